"""What the networks of a run would take on neuromorphic chips, layer by layer, and which limits they break.

python scripts/chip_report.py RUN_FOLDER
python scripts/chip_report.py pretrained/fmnist > chips.md

Prints Markdown: neurons, synapses, fan-in, fan-out, weights, spikes and synaptic operations of each layer; what it
takes of Loihi 2, SpiNNaker2 and Speck; and what stays outside. Spikes and operations are means over samples that the
run draws with its settings; no data set is needed. The limits, with their sources, are in scripts/chips.py.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
from torch import Tensor, nn

from errors import UserError, reported
from files import expand
from metrics.energy import AXES, NODES, kind_of, of_weights
from models.neurons import OWN
from models.quantizer import Codebook
from models.residual_svae import SentNumbers
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.cost import Cost
from pipeline.sampling.image_models import CodeDiffusion
from pipeline.session import open_session
from scripts.chips import CHIPS, KIBI, Chip, Layer

SAMPLES = 16
PARTS = {
    "encode": "Encoder, for an image",
    "denoiser_pass": "Denoiser, for a sample",
    "decode": "Decoder, for a sample",
}


def measure(model: CodeDiffusion, networks: dict[str, nn.Module]) -> tuple[dict[str, list[Layer]], Cost]:
    """The layers of each part, in their order, and what the model costs."""
    shapes: dict[nn.Module, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        axes = AXES[kind_of(layer)]
        shapes[layer] = tuple(inputs[0].shape[-axes:]), tuple(output.shape[-axes:])

    with ExitStack() as hooks:
        for layer in {each for network in networks.values() for each in network.modules()}:
            if isinstance(layer, tuple(AXES)):
                hooks.enter_context(layer.register_forward_hook(see))
        cost = model.cost(model.draw_images(range(SAMPLES)))
    layers: dict[str, list[Layer]] = {}
    for part, network in networks.items():
        runs, counted = cost.passes if part == "denoiser_pass" else 1, of_weights(cost.layers[part])
        modules = {name: network.get_submodule(name) for name in counted}
        layers[part] = [Layer(name, each, *shapes[each], runs * counted[name]) for name, each in modules.items()]
    return layers, cost


def by_layer(layers: Sequence[Layer]) -> Iterator[str]:
    """The table of what layers are and do."""
    yield "| layer | | input → output | neurons | synapses | fan-in | fan-out | KiB of weights | spikes | operations |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for layer in layers:
        arrow = " → ".join("×".join(map(str, shape)) for shape in (layer.inputs, layer.outputs))
        counts = (layer.neurons, *layer.connections())
        kib, spikes = f"{layer.weights / KIBI:,.1f}", f"{layer.counted.spikes:,.0f}"
        operations = f"{layer.counted.acs:,.0f}" if spikes != "0" else f"{layer.counted.macs:,.0f} of real values"
        cells = (f"`{layer.name}`", layer.kind, arrow, *(f"{count:,}" for count in counts), kib, spikes, operations)
        yield f"| {' | '.join(cells)} |"


def on_chips(layers: Sequence[Layer]) -> Iterator[str]:
    """The table of what layers take of the chips, and below it whether all of them have room on one."""
    yield f"| layer | {' | '.join(chip.name for chip in CHIPS)} |"
    yield f"|---|{'---|' * len(CHIPS)}"
    for layer in layers:
        yield f"| `{layer.name}` | {' | '.join(str(chip.needs(layer)) for chip in CHIPS)} |"
    rooms = (f"{chip.placed(layers)} of {len(layers)}" for chip in CHIPS)
    yield f"| **at once on one chip** | {' | '.join(rooms)} |"


def lacking(chip: Chip, networks: Iterable[nn.Module]) -> str:
    """What a chip lacks of the neurons of networks, in words."""
    neurons = [layer for network in networks for layer in network.modules() if isinstance(layer, NODES)]
    kinds = {next((own for own in OWN if isinstance(layer, own)), type(layer)).__name__ for layer in neurons}
    others = sorted(kinds - set(chip.neurons))
    return f"; it has no {' or '.join(others)} neurons, but {' and '.join(chip.neurons)}" if others else ""


def outside(codebook: Codebook, layers: dict[str, list[Layer]]) -> Iterator[str]:
    """What no layer of spiking neurons computes."""
    real = [f"`{layer.name}`" for part in layers.values() for layer in part if layer.counted.macs]
    if real:
        yield f"real-valued input of {', '.join(real)}"
    if not isinstance(codebook, SentNumbers):
        yield f"the search for the nearest of {codebook.embeddings.num_embeddings} embeddings"
    yield "softmax and drawing of codes, between passes of the denoiser, and the tokens and conditions as spikes"
    yield "the mean of the denoiser's outputs over the spike steps, and the decoder's tanh of a potential"
    yield "batch norm and biases are part of weights and thresholds; currents are added where neurons receive them"


def report(run: Path) -> Iterator[str]:
    """The lines. Raises UserError if the run has no spiking networks with codes."""
    session = open_session(checkpoint=RunFolder(run).model, stage="sample", device="cpu", precision="float32")
    model = session.read_model()
    if not isinstance(model, CodeDiffusion) or model.denoiser is None:
        raise UserError(f"{run} has no denoiser of codes: its layers are not counted")
    networks: dict[str, nn.Module] = dict.fromkeys(PARTS, model.autoencoder) | {"denoiser_pass": model.denoiser}
    layers, cost = measure(model, networks)
    yield f"# {run.name} on neuromorphic chips\n"
    sample, grid = cost.operations["sample"], "×".join(map(str, model.grid))
    yield (
        f"A sample, {model.drawn}, is {cost.passes} passes of the denoiser on {grid} codes and a decoding: "
        f"{sample.spikes:,.0f} spikes, {sample.acs + sample.macs:,.0f} synaptic operations, {sample.updates:,.0f} "
        f"updates of neurons; means over {SAMPLES} samples. Weights have 8 bits; a synapse to the padding is none."
    )
    for part, heading in PARTS.items():
        yield f"\n## {heading}\n"
        yield from by_layer(layers[part])
        yield ""
        yield from on_chips(layers[part])
    yield "\n## Limits\n"
    for chip in CHIPS:
        missing = lacking(chip, networks.values())
        yield f"- {chip.name}, {chip.cores} cores{missing}. Source: {chip.sources}."
    yield "\n## Not on a chip\n"
    yield from (f"- {words}" for words in outside(model.autoencoder.vq_layer, layers))


def main(arguments: list[str] | None = None) -> None:
    """Print the report; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expand, help="a run folder")
    args = parser.parse_args(arguments)
    with reported():
        for line in report(args.run):
            print(line)


if __name__ == "__main__":
    main()
