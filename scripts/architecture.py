"""Draw the paper's networks with the shape of what passes along each arrow: the figure of docs/method.md.

python scripts/architecture.py                                   # to docs/architecture.png
python scripts/architecture.py --run RUN_FOLDER --output FILE    # of another run with the paper's networks

Nothing in it is typed: the equations in models/reference.py run on an image that the networks have drawn, and the
figure shows the layers that they pass, the shapes, the image and its codes.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import pipeline.runtime.threads  # noqa: F401  before torch

# isort: split
import torch
from torch import Tensor, nn

from errors import UserError, reported
from files import expand
from models import SDID, VQSVAE, reference
from models.spiking import Convolution, SpikingStack
from pipeline.runtime.terminal import print_anywhere
from pipeline.sampling.grids import check_figure_place, code_colours, save_figure
from pixels import to_float
from spiking_diffusion import SpikingDiffusion

ROOT = Path(__file__).resolve().parents[1]
SEED = 13  # of the image
COLOURS = {"layers": ("#e3edf7", "#3d6fa5"), "readout": ("#e4f1e4", "#4a8a52"), "table": ("#fbeedd", "#c07a2c")}
SPIKES, NUMBERS = "#c8344d", "#444444"
PITCH, COLUMN = 1.0, 3.5  # inches from one step to the next, and from one column to the next
WIDTH, HEIGHT, SIDE = 2.15, 0.52, 0.72  # of a box, and of a picture


class Step(NamedTuple):
    """What is done, in words or as a picture `[H,W,3]`, and what leaves it: spikes `[S,C,H,W]`, or numbers."""

    kind: str
    words: str
    leaves: tuple[int, ...]
    picture: Any = None

    @property
    def colour(self) -> str:
        """Of the arrow."""
        return SPIKES if len(self.leaves) == 4 else NUMBERS

    @property
    def shape(self) -> str:
        """What leaves it, as "16 × 32 × 14 × 14"."""
        return " × ".join(map(str, self.leaves))

    @property
    def half(self) -> float:
        """Half its height."""
        return (HEIGHT if self.picture is None else SIDE) / 2


def step(kind: str, words: str, leaves: Tensor) -> Step:
    """A box, of one image; `leaves` is `[S,1,C,H,W]` or `[1,...]`."""
    shape = leaves.shape
    return Step(kind, words, (shape[0], *shape[2:]) if len(shape) == 5 else tuple(shape[1:]))


def shown(name: str, values: Tensor, codebook_size: int) -> Step:
    """A picture of an image `[1,C,H,W]` in [0,1], or of codes `[1,h,w]`."""
    if values.dim() == 3:
        picture = code_colours(codebook_size)[values[0]]
    else:
        picture = (255 * values[0].expand(3, -1, -1)).byte().permute(1, 2, 0)
    return Step("picture", name, tuple(values.shape[1:]), picture.numpy())


def layer(conv: Convolution) -> str:
    """A convolution in words."""
    side, stride = conv.kernel_size[0], conv.stride[0]
    kind = "transposed conv" if isinstance(conv, nn.ConvTranspose2d) else "conv"
    return f"{kind} {side}×{side}" + (f", stride {stride}" if stride > 1 else "")


def boxes(stack: SpikingStack, x: Tensor, name: str = "") -> tuple[list[Step], Tensor]:
    """The blocks of a stack, and the spikes that leave the last."""
    steps = []
    for conv, norm, neuron in stack.blocks:
        x = reference.block(conv, norm, neuron, x)
        steps.append(step("layers", f"{name}{layer(conv)}\nbatch norm, {type(neuron).__name__}", x))
    return steps, x


def encoding(model: VQSVAE, image: Tensor) -> list[Step]:
    """From an image to its codes."""
    quantizer, size = model.vq_layer, model.codebook_size
    blocks, spikes = boxes(model.encoder.snn_convs, reference.at_each_step(image - 0.5, model.spike_steps))
    r = reference.readout(quantizer, spikes)
    codes = reference.nearest(quantizer, r)
    return [
        shown("image", image, size),
        *blocks,
        step("readout", "(1-α) membrane potential\n+ α firing rate", r),
        step("table", f"nearest of {size}\nembeddings", codes),
        shown("codes", codes, size),
    ]


def denoising(network: SDID, codes: Tensor) -> list[Step]:
    """From tokens, about half of which are masked, to codes."""
    size, t = network.codebook_size, torch.tensor([codes[0].numel() // 2])
    uniforms = torch.rand(codes.shape, generator=torch.Generator().manual_seed(SEED))
    tokens = reference.corrupt(codes, t, uniforms, size)
    planes = torch.stack((tokens, t.view(-1, 1, 1).expand_as(tokens)), 1).to(network.head.weight)
    x, steps = reference.at_each_step(planes, network.spike_steps), []
    for stack in (network.conv1, network.conv2, network.conv3, network.conv4, network.conv5):
        blocks, x = boxes(stack, x)
        steps += blocks
    return [
        shown("tokens and t", tokens, size)._replace(leaves=tuple(planes.shape[1:])),
        *steps,
        step("readout", f"{layer(network.head)}\nmean over the spike steps", reference.sdid(network, tokens, t)),
        step("table", "softmax: reveal some\nof the masked tokens", codes),
    ]


def decoding(model: VQSVAE, codes: Tensor) -> list[Step]:
    """From codes to an image."""
    quantizer, size = model.vq_layer, model.codebook_size
    q, image = reference.embed(quantizer, codes), reference.decode(model, codes)
    generator, spikes = boxes(quantizer.poisson, reference.at_each_step(q, model.spike_steps), "spike generator: ")
    blocks, _ = boxes(model.decoder.snn_convs, spikes)
    return [
        shown("codes", codes, size),
        step("table", "embeddings of the codes", q),
        *generator,
        *blocks,
        step("readout", f"{layer(model.decoder.head)}\ntanh of membrane potential", image),
        shown("image", image, size),
    ]


@torch.no_grad()
def columns(run: Path) -> list[list[Step]]:
    """The three columns of the figure. Raises UserError for a run without the paper's networks."""
    model = SpikingDiffusion.load(run, device="cpu", precision="float32")
    autoencoder, denoiser = model.model.autoencoder, model.model.denoiser
    if not (isinstance(autoencoder, VQSVAE) and isinstance(denoiser, SDID)):
        raise UserError(f"{run} does not have the paper's networks")
    image = to_float(torch.from_numpy(model.sample(1, seed=SEED)))
    codes = reference.encode(autoencoder, image)
    return [encoding(autoencoder, image), denoising(denoiser, codes), decoding(autoencoder, codes)]


def draw(encoder: list[Step], denoiser: list[Step], decoder: list[Step]) -> Any:
    """The figure: the encoder from top to bottom, the denoiser from bottom to top, the decoder from top to bottom."""
    from matplotlib.figure import Figure  # here because importing it takes a second

    height = PITCH * max(map(len, (encoder, denoiser, decoder)))
    figure = Figure((3 * COLUMN, height + 1.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    bottom, top = PITCH / 2, height - PITCH / 2
    draw_column(axes, 0, "Stage 1: encoder", encoder, (top, bottom))
    ys = draw_column(axes, 1, "Stage 2: denoiser (SDID)", denoiser, (bottom, top))
    draw_column(axes, 2, "Stage 1: decoder", decoder, (top, bottom))

    left, middle, right = (COLUMN * (number + 0.5) for number in range(3))
    box, picture = WIDTH / 2, SIDE / 2
    route(axes, NUMBERS, (left + picture, bottom - 0.15), (middle - picture, bottom - 0.15), linestyle="--")
    label(axes, (left + middle) / 2, bottom - 0.35, "in training: masked\nwith probability t/T", NUMBERS)
    lane = middle - box - 0.25
    back = ((middle - box, top), (lane, top), (lane, bottom + 0.15), (middle - picture, bottom + 0.15))
    route(axes, NUMBERS, *back)
    label(axes, lane - 0.12, (bottom + top) / 2, "at each timestep t = T, ..., 1", NUMBERS, rotation=90)
    lane = middle + box + 0.36
    route(axes, SPIKES, (middle + box, ys[1]), (lane, ys[1]), (lane, ys[-2]), (middle + box, ys[-2]))
    label(axes, lane + 0.12, (ys[1] + ys[-2]) / 2, "concatenated", SPIKES, rotation=270)
    route(axes, NUMBERS, (middle + box, top), (right - picture, top))
    label(axes, (middle + box + right - picture) / 2, top + 0.15, denoiser[-1].shape, NUMBERS)

    label(axes, left, -0.35, f"spikes: S × C × H × W, with S = {encoder[1].leaves[0]} spike steps", SPIKES)
    label(axes, right, -0.35, "numbers: C × H × W, or codes H × W", NUMBERS)
    axes.set(xlim=(0, 3 * COLUMN), ylim=(-0.55, height + 0.45), aspect="equal")
    return figure


def draw_column(axes: Any, number: int, title: str, steps: list[Step], ends: tuple[float, float]) -> list[float]:
    """Steps below or above one another, from one end to the other, with arrows between; returns the height of each."""
    x, (start, end) = COLUMN * (number + 0.5), ends
    ys = [start + (end - start) * row / (len(steps) - 1) for row in range(len(steps))]
    axes.text(x, max(ends) + PITCH / 2 + 0.2, title, ha="center", va="center", fontsize=12, weight="bold")
    for this, y in zip(steps, ys, strict=True):
        draw_step(axes, this, x, y)
    for (this, y), (following, to) in pairwise(zip(steps, ys, strict=True)):
        sign = 1 if to > y else -1
        y, to = y + sign * this.half, to - sign * following.half
        route(axes, this.colour, (x, y), (x, to))
        axes.text(x + 0.12, (y + to) / 2, this.shape, color=this.colour, va="center", fontsize=9)
    return ys


def draw_step(axes: Any, this: Step, x: float, y: float) -> None:
    """A box with words, or a picture with its name on the right, around `(x, y)`."""
    from matplotlib.patches import FancyBboxPatch

    if this.picture is not None:
        axes.imshow(this.picture, extent=(x - SIDE / 2, x + SIDE / 2, y - SIDE / 2, y + SIDE / 2), zorder=2)
        axes.text(x + SIDE / 2 + 0.1, y, this.words, va="center", fontsize=9)
        return
    fill, edge = COLOURS[this.kind]
    corner, style = (x - WIDTH / 2, y - HEIGHT / 2), "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=fill, edgecolor=edge, zorder=2))
    axes.text(x, y, this.words, ha="center", va="center", fontsize=9, linespacing=1.25, zorder=3)


def label(axes: Any, x: float, y: float, words: str, colour: str, rotation: float = 0) -> None:
    """Words around `(x, y)`."""
    axes.text(x, y, words, color=colour, ha="center", va="center", rotation=rotation, fontsize=9)


def route(axes: Any, colour: str, *points: tuple[float, float], linestyle: str = "-") -> None:
    """A line through these points, with an arrow at its end."""
    look = dict(color=colour, linewidth=1.4, linestyle=linestyle)
    axes.plot(*zip(*points[:-1], strict=True), **look, solid_joinstyle="miter", zorder=1)
    axes.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, **look))


def main(arguments: list[str] | None = None) -> None:
    """Draw the figure; exit status 2 and one line for a mistake of the user."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=expand, default=ROOT / "pretrained" / "fmnist-faithful", help="a run folder")
    parser.add_argument("--output", type=expand, metavar="FILE", default=ROOT / "docs" / "architecture.png")
    args = parser.parse_args(arguments)
    with reported():
        check_figure_place(args.output)
        save_figure(args.output, draw(*columns(args.run)))


if __name__ == "__main__":
    main()
