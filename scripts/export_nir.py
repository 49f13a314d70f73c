"""Export a run's trained spiking networks to NIR files (https://neuroir.org), and check that the spikes agree.

python scripts/export_nir.py RUN_FOLDER                to RUN_FOLDER/nir
python scripts/export_nir.py RUN_FOLDER --output DIR --raster FILE

Needs the packages nir and nirtorch. A graph receives its input, [C,H,W], at every spike step, which is 0.1 ms in the
file; weights are float64, and batch norm is folded into the convolutions. A learned time constant (plif) is that of a
nir.LIF; few-spikes neurons are a nir.IF for each digit; a soft reset and neurons of your own have no node and are
refused. NIR has no node for transposed convolutions, pixel shuffle or the mixing of positions: they are replaced,
exactly, by convolutions with many zeros (scripts/nir_graphs.py; zeros are counted among the parameters). Each file is
read back and run on test images in float64, and must reproduce every spike of the trained network; the plot shows the
spikes of some neurons.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial, reduce
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

try:
    import nir
    from spikingjelly.activation_based import nir_exchange
except ImportError:  # of nir or nirtorch
    nir_exchange = None

from errors import UserError, reported
from files import expand
from models import SDID, VQSVAE, ResidualSDID, ResidualSVAE, UNetSDID, VQAutoencoder
from models.integer import are_whole
from models.integer_neurons import IntegerLIF
from models.kernels.compiled import is_exactly
from models.neurons import FewSpikes
from models.residual_svae import SIDE, ResidualDecoder, ResidualEncoder
from models.spiking import Convolution, SpikingStack, membrane_weights, weighted_sum
from pipeline.checkpoints import check_place
from pipeline.options.declaration import autoencoder_weights
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.grids import check_figure_place, save_figure
from pipeline.session import open_session
from pixels import to_float
from scripts.nir_graphs import (
    ResidualGraph,
    SDIDGraph,
    StackGraph,
    codes_graph,
    decoder_graph,
    encoder_graph,
    given,
    values_of,
)

IMAGES = 8  # on which spikes are compared
ROUNDING = 1e-9  # allowed difference of outputs that are not spikes
MEMBRANE = "outside: sum over the steps with weights 0.8^(S-1-i), tanh, pixel shuffle"
NEURONS = 12  # plotted of each layer


same = nn.Identity()
Network = TypeVar("Network", bound=nn.Module)


class Export(NamedTuple):
    """A network as a `graph` for one spike step, with what is needed to compare it with the `trained` network.

    `inputs [S,N,C,H,W]` are the graph's; `run()` computes the same with the trained network; `outside` computes that
    network's output from the graph's outputs `[S,N,C',H',W']`.
    """

    name: str
    what: str
    graph: nn.Module
    inputs: Tensor
    trained: nn.Module
    run: Callable[[], Tensor]
    outside: Callable[[Tensor], Tensor]


class Comparison(NamedTuple):
    """Spikes `[S,N,C,H,W]` of each layer, and the largest difference between the two outputs."""

    trained: list[Tensor]
    graph: list[Tensor]
    error: float

    @property
    def spikes(self) -> int:
        """Number of spikes of the trained network."""
        return sum(int(layer.sum()) for layer in self.trained)

    @property
    def differing(self) -> int:
        """Number of spikes that only one of the two has."""
        return sum(int((t != g).sum()) for t, g in zip(self.trained, self.graph, strict=True))

    @property
    def alike(self) -> bool:
        """Whether the graph agrees with the trained network."""
        return not self.differing and self.error <= ROUNDING


def of_autoencoder(model: VQSVAE, images: Tensor) -> Iterator[Export | str]:
    """Encoder, spike generator and decoder of a model; `images [N,C,H,W]` in [0,1]."""
    quantizer, decoder, embedded = model.vq_layer, model.decoder, model.vq_layer.embed(model.encode(images))

    def export(name: str, what: str, stack: SpikingStack, x: Tensor, wanted: Callable, outside: Callable) -> Export:
        steps, sent = at_each_step(model, stack.blocks[0][0], x), values_of(stack.blocks[-1][2])[-1]

        def run() -> Tensor:
            output = wanted(x)
            return output * sent if output.dtype == torch.uint8 else output  # counts

        return Export(name, what, StackGraph(stack), steps, stack, run, outside)

    stack = model.encoder.snn_convs
    yield export("encoder", "pixels - 0.5 to spikes", stack, images - 0.5, stack, same)
    if quantizer.spike_generator == "adaptive":
        yield export("spike_generator", "embeddings to spikes", quantizer.poisson, embedded, quantizer.poisson, same)
    else:
        yield f"spike_generator: not exported, {quantizer.spike_generator!r} has no neurons"
    pixels, spikes = partial(pixels_of, model, (model.downsampling,)), quantizer.generate_spikes(embedded)
    yield export("decoder", f"spikes to currents; {MEMBRANE}", decoder.snn_convs, spikes, decoder, pixels)


def of_residual(model: ResidualSVAE, images: Tensor) -> Iterator[Export]:
    """Encoder, the neurons that send codes, and decoder of a residual autoencoder; `images [N,C,H,W]` in [0,1]."""
    encoder, decoder = cast(ResidualEncoder, model.encoder), cast(ResidualDecoder, model.decoder)
    numbers = model.vq_layer.decode(model.encode(images))
    others = nn.ModuleList(layer for name, layer in encoder.named_children() if name != "fire_codes")

    def mean_currents() -> Tensor:
        return what_enters(encoder.fire_codes, lambda: encoder(images - 0.5))

    what = "pixels - 0.5 to currents; outside: mean over the steps"
    steps = at_each_step(model, encoder.embed, images - 0.5)
    yield Export("encoder", what, encoder_graph(encoder), steps, others, mean_currents, lambda x: x.mean(0))
    what, currents, firing = "mean currents to numbers", mean_currents(), encoder.fire_codes
    graph = codes_graph(firing)
    yield Export("codes", what, graph, currents.double()[None], firing, lambda: firing(currents), same)
    what, steps = (
        f"numbers to currents; {MEMBRANE}",
        at_each_step(model, decoder.embed, F.pixel_unshuffle(numbers, SIDE)),
    )
    pixels = partial(pixels_of, model, (decoder.levels, 2))
    yield Export("decoder", what, decoder_graph(decoder), steps, decoder, lambda: decoder(numbers), pixels)


def at_each_step(model: VQSVAE | ResidualSVAE, first: Convolution, x: Tensor) -> Tensor:
    """The input `[S,...]` of a graph that begins with a layer, for that layer's input, `[N,C,H,W]` or `[S,N,C,H,W]`."""
    x = given(first, x)
    return x if x.dim() == 5 else x.expand(model.spike_steps, *x.shape)


def pixels_of(model: VQSVAE | ResidualSVAE, sides: tuple[int, ...], currents: Tensor) -> Tensor:
    """Pixels of a decoder's currents `[S,N,C,h,w]`, shuffled by these sides, one after another."""
    x = weighted_sum(membrane_weights(model.spike_steps, like=currents), currents)
    return torch.tanh(reduce(F.pixel_shuffle, sides, x))


def of_denoiser(model: SDID | ResidualSDID, codes: Tensor) -> Export:
    """The denoiser, on `codes [N,h,w]`, of which each grid has more masked than the one before."""
    timesteps = codes[0].numel()
    t = torch.linspace(1, timesteps, len(codes)).long()
    chance = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0))
    tokens = torch.where(chance * timesteps < t.view(-1, 1, 1), model.codebook_size, codes)
    condition = model.conditions.of_samples(0, range(len(codes)))
    graph = SDIDGraph(model) if isinstance(model, SDID) else ResidualGraph(model)
    planes = graph.planes(tokens, t, condition)
    steps = planes.expand(model.spike_steps, *planes.shape)
    return Export("denoiser", graph.what, graph, steps, model, lambda: model(tokens, t, condition), graph.logits)


def networks(run_folder: Path, data_path: Path | None) -> Iterator[Export | str]:
    """The networks of a run; for one that is not exported, a line that says why. Raises UserError."""
    place: dict[str, Any] = {} if data_path is None else {"data_path": data_path}
    session = open_session(checkpoint=autoencoder_weights(str(run_folder)), device="cpu", precision="float32", **place)
    autoencoder = exact(session.load_autoencoder())
    images = to_float(session.data.test[:IMAGES], torch.float64)
    if isinstance(autoencoder, VQSVAE):
        yield from of_autoencoder(autoencoder, images)
    elif isinstance(autoencoder, ResidualSVAE):
        yield from of_residual(autoencoder, images)
    else:
        model = session.options.autoencoder.model
        yield f"autoencoder: not exported, this is {model} and only those of snn-vq-vae and residual-svae are"
    if not (isinstance(autoencoder, VQAutoencoder) and session.run.denoiser.is_file()):
        yield "denoiser: not exported, the run has none"
        return
    denoiser = exact(session.networks.load_denoiser(autoencoder))
    if not is_exactly(denoiser, SDID, ResidualSDID, UNetSDID):
        name = session.options.denoiser.denoiser
        yield f"denoiser: not exported, this is {name} and only sdid, residual and unet are"
    else:
        yield of_denoiser(cast(SDID | ResidualSDID, denoiser), autoencoder.encode(images))


def exact(network: Network) -> Network:
    """A network in evaluation mode that computes in float64, or in whole numbers."""
    return (network if are_whole(network.state_dict()) else network.double()).eval()


def what_enters(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a layer is called with in `run()`."""
    caught: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    run()
    hook.remove()
    return caught[0]


def observe(network: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `run()` returns, and the spikes `[S,N,C,H,W]` of each layer of neurons in the order in which they ran.

    Our networks call a layer that has hooks as a module, so that the hook sees its spikes.
    """
    spikes: list[Tensor] = []

    def record(module: nn.Module, _: tuple, output: Any) -> None:
        if isinstance(module, FewSpikes):
            spikes.extend(module.binary_spikes(output))
        elif isinstance(module, neuron.BaseNode | IntegerLIF):
            spikes.append(output)
        elif isinstance(getattr(module, "module", None), neuron.BaseNode):  # wrapped by the importer
            spikes.append(output[0])

    hooks = [module.register_forward_hook(record) for module in network.modules()]
    output = run()
    for hook in hooks:
        hook.remove()
    return output, spikes


def compare(export: Export, graph: nn.Module) -> Comparison:
    """The trained network and `graph`, read back from its file, on the same inputs."""
    wanted, theirs = observe(export.trained, export.run)
    output, ours = observe(graph, lambda: export.outside(graph(export.inputs)[0]))
    theirs = [F.pixel_unshuffle(t, t.shape[-1] // o.shape[-1]) for t, o in zip(theirs, ours, strict=True)]
    return Comparison(theirs, ours, float((output - wanted).abs().max()))


def read_back(export: Export, path: Path) -> nn.Module:
    """Write a network's file and read it back."""
    nir_exchange.export_to_nir(export.graph, export.inputs[0], path)
    graph = nir.read(path)
    before = {name: [source for source, target in graph.edges if target == name] for name in graph.nodes}
    graph.nodes = {name: graph.nodes[name] for name in TopologicalSorter(before).static_order()}  # read much faster
    network: nn.Module = nir_exchange.import_from_nir(graph, dtype=torch.float64, step_mode="m")
    return network


def write(export: Export, folder: Path) -> Comparison:
    """Write the file, read it back, and print what it contains and whether it agrees."""
    path = folder / f"{export.name}.nir"
    compared = compare(export, read_back(export, path))
    parameters = sum(parameter.numel() for parameter in export.graph.parameters())
    verdict = f"{compared.differing:,} DIFFER" if compared.differing else "identical"
    verdict += "" if compared.error <= ROUNDING else f", OUTPUT OFF BY {compared.error:.1e}"
    print(f"{path.name}: {export.what}; {parameters:,} parameters; {compared.spikes:,} spikes compared: {verdict}")
    return compared


def plot_raster(networks: dict[str, Comparison], path: Path) -> None:
    """Plot the spikes for one image: dots for the trained networks, rings for the graphs in the files."""
    import matplotlib.pyplot as plt  # here because importing it takes a second

    figure, axes = plt.subplots(1, len(networks), figsize=(11, 5), layout="constrained", squeeze=False)
    for axis, (name, compared) in zip(axes[0], networks.items(), strict=True):
        trained, graph = shown(compared)
        axis.plot(*trained, "k.", markersize=3)
        axis.plot(*graph, "ro", markersize=5, markerfacecolor="none")
        axis.set(title=name, xlabel="spike step", yticks=[])
    axes[0, 0].set_ylabel(f"{NEURONS} neurons of each layer")
    save_figure(path, figure)


def shown(compared: Comparison) -> list[tuple[Tensor, Tensor]]:
    """Spike steps `[P]` from 1 and rows `[P]` of the spikes of some neurons, evenly spaced among those that fire."""
    layers = []
    for spikes in zip(compared.trained, compared.graph, strict=True):
        both = torch.stack([each[:, 0].flatten(1) for each in spikes])  # of the first image, [2,S,neurons]
        firing = both[:, :, both.any(0).any(0)]
        chosen = torch.linspace(0, firing.shape[2] - 1, min(NEURONS, firing.shape[2])).long()
        layers.append(F.pad(firing[:, :, chosen], (0, NEURONS + 2 - len(chosen))))
    return [(step + 1, row) for step, row in (each.nonzero(as_tuple=True) for each in torch.cat(layers, 2))]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Export; exit status 1 if a file disagrees with its network, 2 and one line for a mistake of the user."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expand, help="a run folder")
    parser.add_argument("--output", type=expand, metavar="DIR", help="folder for the files [RUN/nir]")
    parser.add_argument("--data_path", type=expand, metavar="DIR", help="where the data set is [as in the run]")
    parser.add_argument("--raster", type=expand, metavar="FILE", help="also plot some of the spikes")
    args = parser.parse_args(arguments)
    folder, compared = args.output or args.run / "nir", {}
    with reported():
        if nir_exchange is None:
            raise UserError("two packages are missing: pip install nir nirtorch")
        check_place(folder / "autoencoder.nir")
        check_figure_place(args.raster)
        for network in networks(args.run, args.data_path):
            if isinstance(network, str):
                print(network)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            compared[network.name] = write(network, folder)
        if args.raster and compared:
            plot_raster(compared, args.raster)
    sys.exit(0 if all(each.alike for each in compared.values()) else 1)


if __name__ == "__main__":
    main()
