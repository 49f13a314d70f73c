"""Every option of the command line, declared once: name, type, default, bounds, help, and its role in a saved run.

Each section is a frozen dataclass, and every part of the program receives only its own. The parser, the help text,
config.json, the presets and the checks on a run that is resumed or evaluated all follow from these declarations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from parts import (
    AUTOENCODERS,
    CODE_MODELS,
    DATASETS,
    DENOISERS,
    DIGITS,
    LOSSES,
    LR_SCHEDULES,
    MASKS,
    NEURONS,
    READOUTS,
    REVEAL_ORDERS,
    SAMPLE_METRICS,
    SPIKE_GENERATORS,
    TAU,
    V_RESET,
    V_THRESHOLD,
)
from pipeline.options.declaration import (
    POSITIVE,
    Declaration,
    Limits,
    Role,
    autoencoder_weights,
    comma_separated,
    option,
    parse_metrics,
    temperature_or_auto,
)
from pipeline.options.presets import PRESETS

PAPERS = ("snn-vq-vae",)
SPIKING_CODES = (*PAPERS, "residual-svae")
LEARNED_CODES = tuple(name for name in CODE_MODELS if name != "residual-svae")
CODES = tuple(CODE_MODELS)
MIXING = ("residual", "unet")  # denoisers
WITH_THRESHOLD = tuple(name for name in NEURONS if name != "fs")
LEAKY = tuple(name for name in WITH_THRESHOLD if name != "if")
TRAINING_STAGES = ("all", "vqsvae", "sdid")
STAGES = (*TRAINING_STAGES, "sample", "inpaint", "evaluate")
OF_STAGE_1, OF_STAGE_2 = ("all", "vqsvae"), ("all", "sdid")
EVALUATING = (*TRAINING_STAGES, "evaluate")  # a training records what later evaluations do by default
PRECISIONS = ("auto", "float32", "bf16")
CONDITIONS = {"none": (), "prototype": ("prototype",), "label": ("label",), "both": ("prototype", "label")}
RECONSTRUCTED = "reconstruction_"  # before the name of a metric: of reconstructions instead of samples
FLOORS = tuple(RECONSTRUCTED + name for name in ("fad", "fid", "clean_fid"))
AUTOENCODER_METRICS = ("mse", "ssim", "codebook", *FLOORS)  # no denoiser is needed
METRICS = (*SAMPLE_METRICS, *AUTOENCODER_METRICS, "energy")

ALL, ANY, OWN = "all", "any", "own"
"""Words of `--labels`: every class in turn; no class in particular; the class of each test image that is inpainted."""

COUNT: Limits = {"low": 1, "high": 10**9, "metavar": "N"}
BLOCKS: Limits = {"low": 1, "high": 1000, "metavar": "N"}
WIDTH: Limits = {"low": 1, "high": 4096, "metavar": "N"}
RATE: Limits = {"low": POSITIVE, "high": 1, "metavar": "X"}
STEPS: Limits = {"low": 1, "high": 1024, "metavar": "S"}


@dataclass(frozen=True)
class RunOptions:
    """What to do, where the run folder is, and what to compute with."""

    preset: str = option(
        "faithful",
        "defaults of the other options: the paper's method, or our improved one",
        Role.IDENTITY,
        choices=PRESETS,
        common=True,
    )
    stage: str = option(
        "all",
        "part of the pipeline to run; vqsvae and sdid train the autoencoder and the denoiser",
        Role.RESUMED,
        choices=STAGES,
        common=True,
    )
    checkpoint: Path | None = option(
        None,
        "evaluate or sample a trained model: its run folder, or a model.pth, also of the original release",
        Role.CALL,
        metavar="RUN",
        shown="none",
        parse=autoencoder_weights,
        common=True,
    )
    resume: Path | None = option(
        None, "continue training in this run folder", Role.CALL, metavar="RUN", shown="none", common=True
    )
    start_from: Path | None = option(
        None,
        "initialise from another run's weights; parts it does not have are trained from scratch; with --stage sdid its "
        "autoencoder is kept as it is",
        Role.RESUMED,
        metavar="RUN",
        shown="none",
        stages=TRAINING_STAGES,
    )
    new_denoiser: bool = option(
        False,
        "take only the autoencoder from --start_from; the denoiser is trained from scratch",
        Role.RESUMED,
        stages=OF_STAGE_2,
    )
    result_path: Path | None = option(
        None,
        "folder in which run folders are created; with --checkpoint, where its results go",
        Role.CALL,
        metavar="DIR",
        shown="result; beside the checkpoint",
        common=True,
    )
    max_minutes: float | None = option(
        None,
        "stop each stage after this many minutes, saved and ready to resume",
        Role.CALL,
        low=POSITIVE,
        metavar="M",
        absent="none",
        stages=TRAINING_STAGES,
    )
    save_every: float = option(
        10.0,
        "save every M minutes, in addition to after each epoch",
        Role.RESUMED,
        low=POSITIVE,
        metavar="M",
        stages=TRAINING_STAGES,
    )
    report: bool = option(True, "write report.html, which summarises the run", Role.CALL)
    seed: int = option(42, "random seed", Role.TRAINING, low=0, high=2**32 - 1, metavar="N")
    device: str = option("auto", "cpu, cuda or cuda:N; auto: CUDA if there is one", Role.CALL)
    precision: str = option(
        "auto", "numerical precision; auto: bf16 where the hardware has fast instructions for it", choices=PRECISIONS
    )


@dataclass(frozen=True)
class DataOptions:
    """The images."""

    dataset_name: str = option(
        "Digits", "data set; Digits needs no download", Role.IDENTITY, choices=DATASETS, common=True
    )
    data_path: Path = option(
        Path("data"), "folder of the data sets, downloaded if absent; or your images", metavar="DIR", common=True
    )
    train_images: int | None = option(
        None,
        "use N training images: the first N, or as many from each folder of ImageFolder",
        Role.NETWORKS,
        absent="all",
        **COUNT,
    )
    held_out: int = option(
        0,
        "set N of these aside, evenly spaced, not to train on; their loss is logged after each epoch",
        Role.NETWORKS,
        low=0,
        metavar="N",
    )
    image_size: int | None = option(
        None,
        "side of ImageFolder's images in pixels, a multiple of 4",
        Role.IDENTITY,
        low=8,
        high=4096,
        metavar="N",
        absent="32",
    )
    channels: int | None = option(
        None,
        "channels of ImageFolder's images: 1 greyscale, 3 colour",
        Role.IDENTITY,
        choices=(1, 3),
        shown="as they are",
    )


@dataclass(frozen=True)
class AutoencoderOptions:
    """Stage 1's network."""

    model: str = option(
        "snn-vq-vae",
        "autoencoder: the paper's, a residual one, one without spikes, or FSVAE, which has no codes and no stage 2",
        Role.IDENTITY,
        choices=AUTOENCODERS,
        common=True,
    )
    spike_steps: int = option(16, "spike steps S of every layer", Role.IDENTITY, **STEPS)
    codebook_size: int = option(128, "number of codes K", Role.IDENTITY, low=2, high=32767, metavar="K", of=CODES)
    embedding_dim: int = option(
        16,
        "width of a code's embedding",
        Role.IDENTITY,
        low=1,
        high=4096,
        metavar="D",
        of=(*LEARNED_CODES, "snn-vae"),
    )
    hidden_channels: int = option(
        32, "channels of the first layer; twice as many at half its resolution", Role.IDENTITY, **WIDTH
    )
    autoencoder_blocks: int = option(
        1,
        "residual blocks at each resolution of encoder and decoder",
        Role.IDENTITY,
        of=("residual-svae",),
        **BLOCKS,
    )
    downsampling: int = option(
        4,
        "downsampling factor from the image to its grid of codes; of residual-svae, to its squares of 2x2 codes",
        Role.IDENTITY,
        choices=(2, 4),
        of=SPIKING_CODES,
    )
    revive_codes: bool = option(
        False,
        "dead-code restart: move codes that a batch does not use to encoded vectors",
        Role.NETWORKS,
        of=PAPERS,
        stages=OF_STAGE_1,
    )
    clipped_error: bool = option(
        False,
        "reconstruction loss ignores values that clipping to [0, 1] would correct",
        Role.NETWORKS,
        of=SPIKING_CODES,
        stages=OF_STAGE_1,
    )
    code_noise: float = option(
        0.0,
        "probability that a code becomes one of its two neighbours in training, so that decoding forgives mistakes",
        Role.NETWORKS,
        low=0,
        high=1,
        metavar="P",
        of=("residual-svae",),
        stages=OF_STAGE_1,
    )
    readout: str = option(
        "both",
        "ablation: what the quantiser reads from the spikes",
        Role.NETWORKS,
        choices=READOUTS,
        of=PAPERS,
    )
    spike_generator: str = option(
        "adaptive",
        "ablation: how embeddings become spikes",
        Role.IDENTITY,
        choices=SPIKE_GENERATORS,
        of=PAPERS,
    )


@dataclass(frozen=True)
class DenoiserOptions:
    """Stage 2's network."""

    denoiser: str = option(
        "sdid", "the paper's network, a residual one, or a U-Net", Role.IDENTITY, choices=DENOISERS, of=CODES
    )
    denoiser_channels: int = option(
        64,
        "channels: sdid's first block (its widest has 8 times as many), or all of residual's blocks",
        Role.NETWORKS,
        of=CODES,
        **WIDTH,
    )
    denoiser_spike_steps: int | None = option(
        None, "spike steps of the denoiser; same: as --spike_steps", Role.IDENTITY, absent="same", of=CODES, **STEPS
    )
    denoiser_blocks: int = option(
        4,
        "blocks of the residual denoiser, or of the U-Net's coarse level",
        Role.NETWORKS,
        of=MIXING,
        **BLOCKS,
    )
    condition: str = option(
        "none",
        "what the residual denoiser or the U-Net is conditioned on: the image's prototype (the nearest of a set of "
        "average images), its label, or both",
        Role.NETWORKS,
        choices=CONDITIONS,
        of=MIXING,
    )
    images_per_prototype: int = option(
        20,
        "with prototypes: one for every N training images",
        Role.NETWORKS,
        low=1,
        high=10**9,
        metavar="N",
        of=MIXING,
    )


@dataclass(frozen=True)
class NeuronOptions:
    """The neurons of all spiking networks of a run."""

    neuron: str = option(
        "lif",
        "neuron of the autoencoder and the denoiser: leaky integrate-and-fire (the paper's), without a leak (if), "
        "with a learned time constant for each layer (plif), or one that sends binary digits (fs)",
        Role.IDENTITY,
        choices=NEURONS,
        of=(*SPIKING_CODES, "snn-vae", *DENOISERS),
    )
    tau: float = option(
        TAU,
        "time constant of the neurons in spike steps, more than 1; of plif, the one to begin with",
        Role.IDENTITY,
        low=1.0001,
        high=10**6,
        metavar="X",
        of=LEAKY,
    )
    v_threshold: float = option(
        V_THRESHOLD,
        "membrane potential at which a neuron fires",
        Role.IDENTITY,
        low=POSITIVE,
        high=10**6,
        metavar="X",
        of=WITH_THRESHOLD,
    )
    v_reset: float | None = option(
        V_RESET,
        "membrane potential after a spike, less than --v_threshold; soft: the threshold is subtracted",
        Role.IDENTITY,
        low=-(10**6),
        high=10**6,
        metavar="X",
        absent="soft",
        shown=f"{V_RESET:g}",
        of=WITH_THRESHOLD,
    )
    digits: int = option(
        DIGITS,
        "binary digits of a few-spikes neuron: time steps in which it fires at most once each",
        Role.IDENTITY,
        low=1,
        high=8,
        metavar="N",
        of=("fs",),
    )


@dataclass(frozen=True)
class TrainingOptions:
    """How both stages are trained."""

    epochs: int = option(100, "epochs of stage 1, the autoencoder", common=True, stages=OF_STAGE_1, **COUNT)
    diffusion_epochs: int = option(
        200, "epochs of stage 2, the denoiser", common=True, of=CODES, stages=TRAINING_STAGES, **COUNT
    )
    batch_size: int = option(
        32, "total batch size over all processes, in both stages", Role.TRAINING, stages=TRAINING_STAGES, **COUNT
    )
    lr: float = option(1e-3, "learning rate", Role.TRAINING, stages=TRAINING_STAGES, **RATE)
    diffusion_lr: float | None = option(
        None,
        "learning rate of stage 2; same: as --lr",
        Role.TRAINING,
        absent="same",
        of=CODES,
        stages=TRAINING_STAGES,
        **RATE,
    )
    lr_schedule: str = option(
        "constant", "learning-rate schedule of each stage", Role.TRAINING, choices=LR_SCHEDULES, stages=TRAINING_STAGES
    )
    ema_decay: float = option(
        0.0,
        "decay of the exponential moving average (EMA) of the weights, which is saved instead of them; 0: no EMA",
        Role.TRAINING,
        low=0,
        high=0.999999,
        metavar="X",
        stages=TRAINING_STAGES,
    )
    fixed_norm: float = option(
        0.0,
        "freeze the batch-norm statistics for this last fraction of stage 2",
        Role.TRAINING,
        low=0,
        high=1,
        metavar="X",
        of=CODES,
        stages=TRAINING_STAGES,
    )
    int8_weights: float = option(
        0.0,
        "train with weights rounded to int8, as they are in whole numbers, for this last fraction of each stage",
        Role.TRAINING,
        low=0,
        high=1,
        metavar="X",
        of=CODES,
        stages=TRAINING_STAGES,
    )
    sort_codes: bool = option(
        False,
        "after stage 1, give similar codes similar numbers: sdid, which reads the numbers, learns faster",
        Role.TRAINING,
        of=LEARNED_CODES,
        stages=OF_STAGE_1,
    )
    loss: str = option(
        "reweighted_elbo", "loss of stage 2", Role.TRAINING, choices=LOSSES, of=CODES, stages=TRAINING_STAGES
    )


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn: what samples depend on besides the networks and the seed."""

    temperature: float | str = option(
        0.65,
        "divides the logits: 1 samples the learned distribution; auto chooses one on held-out images",
        metavar="X",
        parse=temperature_or_auto,
        of=CODES,
    )
    final_temperature: float | None = option(
        None,
        "temperature at t = 0, approached linearly from --temperature at t = T; not with auto; same: no change",
        low=POSITIVE,
        metavar="X",
        absent="same",
        of=CODES,
    )
    sample_steps: int | None = option(
        None, "denoising timesteps, at most T, the number of codes of an image", absent="T", of=CODES, **COUNT
    )
    reveal_order: str = option(
        "random",
        "order in which tokens are revealed; spread: few at first, and far apart",
        choices=REVEAL_ORDERS,
        of=CODES,
    )
    guidance: float = option(
        0.0,
        "classifier-free guidance scale of the label, or of the prototype if there is no label; doubles the denoiser "
        "passes; 0: off",
        low=0,
        high=100,
        metavar="W",
        of=MIXING,
    )
    labels: tuple[int | str, ...] | None = option(
        None,
        "classes to draw in --stage sample and --stage inpaint: names or numbers, or all; any: no class in particular; "
        "own, to inpaint: the class of each test image",
        Role.CALL,
        metavar="A,B",
        shown="sample: any; inpaint: own, if there are labels",
        parse=comma_separated,
        of=MIXING,
        stages=("sample", "inpaint"),
    )


@dataclass(frozen=True)
class DrawingOptions:
    """Which images are drawn, and what is written."""

    num_samples: int | None = option(
        None,
        "images to draw; auto: as many as the metrics need, 64 for --stage sample",
        Role.RESUMED,
        low=1,
        high=10**6,
        metavar="N",
        absent="auto",
        common=True,
    )
    eval_batch_size: int = option(64, "batch size of encoding and sampling", **COUNT)
    mask: str = option(
        "right",
        f"region that --stage inpaint hides: {', '.join(MASKS)}, or an image file, white where hidden; transparent is "
        "black",
        Role.RESUMED,
        metavar="M",
        of=CODES,
        stages=("inpaint",),
    )
    png: bool = option(
        False, "also write each sample as a PNG file", Role.RESUMED, stages=(*TRAINING_STAGES, "sample", "evaluate")
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Which metrics, and where their networks come from."""

    metrics: tuple[str, ...] | None = option(
        None,
        f"metrics to compute: {', '.join(METRICS)}; all: all that are available, except fid_50k",
        Role.RESUMED,
        metavar="A,B",
        absent="all",
        parse=parse_metrics(METRICS),
        common=True,
        stages=("all", "evaluate"),
    )
    reference: str = option(
        "test",
        "real images for FID, KID, IS, PRDC and classifier metrics; held_out: those that --held_out has set aside, of "
        "which reconstructions are made then, too, so that choices need not look at the test split",
        choices=("test", "train", "held_out"),
        stages=EVALUATING,
    )
    fid_weights: Path | None = option(
        None, "pytorch-fid's Inception weights", metavar="FILE", absent="download", stages=EVALUATING
    )
    paper_fid_weights: Path | None = option(
        None, "torchvision's Inception weights", metavar="FILE", absent="download", stages=EVALUATING
    )
    fad_weights: Path | None = option(
        None,
        "folder of the published FAD autoencoders; own: ours, trained once per data set",
        metavar="DIR",
        absent="own",
    )


@dataclass(frozen=True)
class Options:
    """All options of a call, in sections, and the origin of each value by option name."""

    run: RunOptions
    data: DataOptions
    autoencoder: AutoencoderOptions
    denoiser: DenoiserOptions
    neuron: NeuronOptions
    training: TrainingOptions
    sampling: SamplingOptions
    drawing: DrawingOptions
    evaluation: EvaluationOptions
    origins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> "Options":
        """The sections, from values by option name; a missing one has its default."""
        sections = {
            name: section(**{key: values[key] for key in names(section) if key in values})
            for name, section in SECTIONS.items()
        }
        return cls(**sections, origins=origins or {})

    @property
    def networks(self) -> set[str]:
        """The chosen autoencoder, the chosen denoiser if it has codes, and the chosen neuron."""
        model, denoiser, neuron = self.autoencoder.model, self.denoiser.denoiser, self.neuron.neuron
        return {model, denoiser, neuron} if model in CODES else {model, neuron}

    def concern(self, name: str) -> bool:
        """Whether the chosen networks have the option of this name."""
        owners = DECLARATIONS[name].of
        return not owners or bool(self.networks & set(owners))

    def values(self) -> dict[str, Any]:
        """All values by option name."""
        return {key: getattr(getattr(self, name), key) for name, section in SECTIONS.items() for key in names(section)}


SECTIONS: dict[str, type] = {
    "data": DataOptions,
    "run": RunOptions,
    "autoencoder": AutoencoderOptions,
    "denoiser": DenoiserOptions,
    "neuron": NeuronOptions,
    "training": TrainingOptions,
    "sampling": SamplingOptions,
    "drawing": DrawingOptions,
    "evaluation": EvaluationOptions,
}


def names(section: type) -> list[str]:
    """Names of a section's options."""
    return [each.name for each in fields(section)]


DECLARATIONS: dict[str, Declaration] = {
    each.name: each.metadata["option"] for section in SECTIONS.values() for each in fields(section)
}
DEFAULTS: dict[str, Any] = {each.name: each.default for section in SECTIONS.values() for each in fields(section)}
KINDS: dict[str, Any] = {name: kind for section in SECTIONS.values() for name, kind in get_type_hints(section).items()}


def with_role(last: Role) -> list[str]:
    """Names of the options whose role is `last` or a firmer one."""
    return [name for name, declared in DECLARATIONS.items() if declared.role <= last]


def is_place(name: str) -> bool:
    """Whether an option names a file or a folder, which has another place on another machine."""
    return name.endswith(("_path", "_weights"))
