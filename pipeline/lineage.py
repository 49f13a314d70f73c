"""Where weights come from: `lineage` in config.json has an entry for each training that led to them, the first first.

stage                         what was trained: vqsvae or vae (the autoencoder), or sdid (the denoiser)
options                       those of its data, network and training that are not the program's defaults
git_commit, git_changed       the program, and whether its files differed from those of the commit
weights_before, weights_after digests of the network's weights; before is null for random initial weights
data                          name and fingerprint of the data set
images, minutes               how many training images it saw, and how long its steps took
processor, gpu, …             what it ran on
resumed                       the same facts of each call that resumed it on another machine or with another program

An entry with a `note` sums up trainings from before there was a lineage. One with `packed` is no training, but the
rounding of `scripts/pack.py`. One with nothing but a stage and `weights_after` stands for weights of unknown origin,
such as a file of another program.
"""

from typing import Any, NamedTuple

from datasets import digest
from pipeline.checkpoints import load_weights
from pipeline.options.declaration import Role
from pipeline.options.sections import (
    CODES,
    DEFAULTS,
    AutoencoderOptions,
    DataOptions,
    DenoiserOptions,
    NeuronOptions,
    Options,
    TrainingOptions,
    names,
    with_role,
)
from pipeline.run_folder import RunFolder, this_program
from pipeline.runtime import processes
from pipeline.runtime.device import Machine, describe_machine
from pipeline.session import Session
from progress import in_words

Entry = dict[str, Any]
Lineage = list[Entry]

DENOISER = "sdid"
OF_STAGE_2 = {"diffusion_epochs", "diffusion_lr", "fixed_norm", "loss"}
OF_OTHER_STAGE = {"vqsvae": OF_STAGE_2, "vae": OF_STAGE_2, DENOISER: {"epochs", "sort_codes"}}
"""Options of training that have no effect in a stage."""


class Cost(NamedTuple):
    """What all trainings of a stage cost together."""

    stage: str  # such as "stage 2 (sdid)"
    trainings: int
    images: int
    minutes: float

    @property
    def time(self) -> str:
        """Its duration, such as 1 h 20 min."""
        return in_words(60 * self.minutes)


def costs(lineage: Lineage) -> list[Cost]:
    """The cost of each stage; where weights of unknown origin were among them, the name of the stage says so."""
    stages = dict.fromkeys(entry["stage"] for entry in lineage if "images" in entry)
    return [_cost(stage, [entry for entry in lineage if entry["stage"] == stage]) for stage in stages]


def _cost(stage: str, entries: Lineage) -> Cost:
    trainings = [entry for entry in entries if "images" in entry]
    images, minutes = (sum(each[key] for each in trainings) for key in ("images", "minutes"))
    more = ", and trainings that are not known" if any(map(_is_unknown, entries)) else ""
    return Cost(f"stage {1 + (stage == DENOISER)} ({stage}){more}", len(trainings), images, minutes)


def _is_unknown(entry: Entry) -> bool:
    """Whether it stands for weights of unknown origin."""
    return "weights_before" not in entry and "images" not in entry


def images_before(lineage: Lineage, stage: str, logged: int) -> int:
    """How many images the weights had seen before the `logged` ones of the last training of this stage.

    None if it began with random weights. An entry with a `note` sums up trainings of which the last alone is logged.
    """
    *before, last = [entry for entry in lineage if entry["stage"] == stage and "images" in entry] or [{}]
    summed_up = last["images"] - logged if "note" in last else 0
    return summed_up + (sum(entry["images"] for entry in before) if last.get("weights_before") else 0)


def inherited(session: Session) -> Lineage:
    """The lineage of the weights that a new training begins with, or of the autoencoder whose codes it learns."""
    options, networks = session.options.run, session.networks
    start = networks.start
    encoder = RunFolder(networks.autoencoder_path.parent) if options.stage == DENOISER else start
    further = start if options.stage != "vqsvae" and not options.new_denoiser else None
    return [*(known(encoder, of_denoiser=False) if encoder else []), *(known(further, True) if further else [])]


def known(run: RunFolder, of_denoiser: bool) -> Lineage:
    """The entries of one network in a run folder; where its weights are not those of the last one, that is added.

    Empty if the network is not there.
    """
    path = run.denoiser if of_denoiser else run.model
    if not path.is_file():
        return []
    entries, now = of_network(run.lineage, of_denoiser), digest(load_weights(path))
    autoencoder = "vqsvae" if run.read_config().get("model", DEFAULTS["model"]) in CODES else "vae"
    unknown = {"stage": DENOISER if of_denoiser else autoencoder, "weights_after": now}
    return entries if entries and entries[-1]["weights_after"] == now else [*entries, unknown]


def of_network(lineage: Lineage, of_denoiser: bool) -> Lineage:
    """The entries of the denoiser or of the autoencoder."""
    return [entry for entry in lineage if (entry["stage"] == DENOISER) == of_denoiser]


class Recorder:
    """Keeps the entry of a training that goes on in the config.json of its run; resumed, it keeps its entry.

    Of its options, those of the last call count: a training may be resumed for more epochs.
    """

    def __init__(self, session: Session, stage: str):
        self.run = session.run
        *before, last = self.run.lineage or [{}]
        here = _place(session.machine)
        if last.get("stage") == stage and session.last.get("stage") == stage:
            places = [{key: each.get(key) for key in here} for each in (last, *last.get("resumed", []))]
            entry = last if here in places else last | {"resumed": [*last.get("resumed", []), here]}
            entry |= {"options": _chosen(session.options, stage)}
        else:
            killed_at_once = last.get("stage") == stage and last["weights_after"] is None
            before = before if killed_at_once or not last else [*before, last]
            same = of_network(before, stage == DENOISER)
            entry = {
                "stage": stage,
                "options": _chosen(session.options, stage),
                "data": {"dataset_name": session.data.name, **session.data.fingerprint},
                **here,
                "weights_before": same[-1]["weights_after"] if same else None,
                "weights_after": None,
                "images": 0,
                "minutes": 0.0,
            }
        self.before, self.entry = before, entry
        self.update()

    def update(self, **facts: Any) -> None:
        """Record what has changed: `images`, `minutes`, `weights_after`."""
        self.entry |= facts
        self.run.write_lineage([*self.before, self.entry])


def _place(machine: Machine) -> Entry:
    """The program and the machine."""
    facts = {**this_program(), **describe_machine(machine.device), "precision": machine.precision}
    return facts | {"processes": processes.size()}


def _chosen(options: Options, stage: str) -> dict[str, Any]:
    """The options that a training of this stage depends on, as far as they are not the program's defaults."""
    sections = [DataOptions, AutoencoderOptions, NeuronOptions, TrainingOptions]
    sections += [DenoiserOptions] if stage == DENOISER else []
    known_to = {"preset", "seed", *(name for section in sections for name in names(section))} - OF_OTHER_STAGE[stage]
    lasting = {*with_role(Role.TRAINING), "epochs", "diffusion_epochs"} & known_to
    return {name: value for name, value in options.values().items() if name in lasting and value != DEFAULTS[name]}
