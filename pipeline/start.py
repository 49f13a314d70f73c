"""What a call is about to do, printed before it begins: a mistake is seen before hours are spent on it."""

import math
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import nn

from datasets import ImageData
from models import neuron_options
from models.integer_neurons import IntegerFewSpikes, IntegerLIF
from models.kernels import compiled
from models.neurons import FromRest, dynamics_of
from pipeline.options.parser import as_typed
from pipeline.runtime import processes
from pipeline.runtime.device import describe_machine
from pipeline.runtime.processes import on_rank_0
from pipeline.sampling.image_models import CodeDiffusion, ImageModel, PriorSampling
from pipeline.session import Session

Rows = list[tuple[str, str]]


class Stage(NamedTuple):
    """A stage that is trained: its number, the option of its epochs, and how many steps are few and enough.

    As Digits needed with the networks that the improved preset once had: after 21, 63 and 252 steps of stage 1, the
    mean squared error is 0.083, 0.012 and 0.004; after 63, 210 and 630 of stage 2, 19, 61 and 80 % of the samples are
    recognised as their class.
    """

    number: int
    option: str
    few: int
    enough: int


STAGES = (Stage(1, "epochs", 200, 1000), Stage(2, "diffusion_epochs", 400, 2000))


@on_rank_0
def announce_training(session: Session) -> None:
    """Print what will be trained, on what, for how long and where; and what to type where that is far too little."""
    o, data = session.options, session.data
    rows: Rows = [("data set", describe_data(session, data)), ("preset", o.run.preset)]
    advice = []
    networks = new_networks(session)
    for stage, network in zip(STAGES, networks, strict=False):
        rows.append((f"stage {stage.number}", describe_network(*network)))
        over = stage.number == 1 and session.last.get("stage") == "sdid"
        if over or o.run.stage not in ("all", "vqsvae" if stage.number == 1 else "sdid"):
            rows.append(("", "not trained in this call"))
            continue
        epochs, batch_size = getattr(o.training, stage.option), o.training.batch_size
        steps = math.ceil(len(data.train) / batch_size)
        seen = f"{epochs * steps:,} steps, {epochs * len(data.train):,} images"
        rows.append(("", f"{epochs:,} epochs x {steps:,} steps, batch size {batch_size}: {seen}"))
        if epochs * steps < stage.few:
            advice.append(f"--{stage.option} {_rounded_up(stage.enough / steps)}")
    rows += [*describe_neurons(session, networks), *circumstances(session)]
    if o.run.resume:
        at = session.last
        rows.append(("resumed", f"{at['stage']}, {at['epoch']} epochs and {at['step']} steps done" if at else "anew"))
    elif advice:
        rows.append(("warning", f"so few steps give grey images; this gives better ones: {' '.join(advice)}"))
    show(rows)


@on_rank_0
def announce_model(session: Session, model: ImageModel, drawn: str = "", data: ImageData | None = None) -> None:
    """Print what will be sampled or evaluated, and where results go; `drawn` says how many images are, and how."""
    networks: list[tuple[str, nn.Module]] = []
    if isinstance(model, CodeDiffusion | PriorSampling):
        networks.append((session.options.autoencoder.model, model.autoencoder))
    if isinstance(model, CodeDiffusion) and model.denoiser:
        networks.append((session.options.denoiser.denoiser, model.denoiser))
    rows: Rows = [("weights", str(session.networks.autoencoder_path))]
    rows += [(f"stage {number}", describe_network(*network)) for number, network in enumerate(networks, 1)]
    rows += describe_neurons(session, networks)
    rows.append(("data set", describe_data(session, data) if data else session.options.data.dataset_name))
    show([*rows, *([("images", drawn)] if drawn else []), *circumstances(session)])


def new_networks(session: Session) -> list[tuple[str, nn.Module]]:
    """Names and networks of both stages, without memory for their weights."""
    o, networks, data = session.options, session.networks, session.data
    with torch.device("meta"):
        found: list[tuple[str, nn.Module]] = [(o.autoencoder.model, networks.new_autoencoder(*data.shape[:2]))]
        if session.has_codes and o.run.stage != "vqsvae":
            found.append((o.denoiser.denoiser, networks.new_denoiser(session.code_grid, data)))
    return found


def describe_data(session: Session, data: ImageData) -> str:
    """The data set in words; where it is, for images of the user's own."""
    o = session.options
    own = data.name == "ImageFolder" and o.origins["data_path"] != "default"
    place = f" in {o.data.data_path}" if own else ""
    channels, height, width = data.shape
    counts = f"{len(data.train):,} training, {len(data.held_out):,} held-out and {len(data.test):,} test images"
    return f"{data.name}{place}: {counts}, {width}x{height} pixels, {'grey' if channels == 1 else 'colour'}"


def describe_network(name: str, network: nn.Module) -> str:
    """A network in words."""
    size = sum(parameter.numel() for parameter in network.parameters())
    spike_steps = getattr(network, "spike_steps", 1)
    return f"{name}, {size:,} parameters" + (f", {spike_steps} spike steps" if spike_steps > 1 else "")


def describe_neurons(session: Session, networks: list[tuple[str, nn.Module]]) -> Rows:
    """The neurons of networks that have some, and what computes them."""
    layers = [layer for _, network in networks for layer in network.modules()]
    if not any(isinstance(layer, FromRest | IntegerLIF) for layer in layers):
        return []
    values, name = vars(session.options.neuron), session.options.neuron.neuron
    words = [f"{key} {as_typed(key, values[key])}" for key in neuron_options(name) if key in values]
    how = "SpikingJelly"
    if session.machine.device.type == "cpu":
        fused = dynamics_of(session.networks.neuron()) is not None and compiled.available()
        how = "compiled kernels" if fused else "SpikingJelly, not fused"
    if any(isinstance(layer, IntegerFewSpikes | IntegerLIF) for layer in layers):
        how = "in whole numbers"
    return [("neuron", f"{', '.join([name, *words])} ({how})")]


def circumstances(session: Session) -> Rows:
    """What results may depend on, and where they go."""
    device, facts = session.machine.device, describe_machine(session.machine.device)
    several = f", {processes.size()} processes" if processes.size() > 1 else ""
    name, threads = facts.get("gpu", facts["processor"]), facts["threads"]
    threads = f"{threads} thread{'s' if threads > 1 else ''}"
    return [
        ("device", f"{device}, {name}; {session.machine.precision}, {threads}{several}"),
        ("seed", str(session.options.run.seed)),
        ("folder", str(session.run.path)),
    ]


def show(rows: Rows) -> None:
    """Print rows of a name and a value, aligned."""
    with suppress(BrokenPipeError):  # a training meets it again, when it has something to save
        print(*(f"  {name:<8}  {value}" for name, value in rows), sep="\n", flush=True)


def _rounded_up(number: float) -> int:
    """A number with two significant digits, at least as large."""
    unit = 10 ** max(0, len(str(math.ceil(number))) - 2)
    return math.ceil(number / unit) * unit
