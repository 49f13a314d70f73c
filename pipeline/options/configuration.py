"""How the options of a call are resolved: defaults, preset, saved run, command line, each overriding the previous."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from parts import NEURONS
from pipeline.options.declaration import Role
from pipeline.options.parser import as_read, as_typed, as_written, build_parser
from pipeline.options.presets import PRESETS
from pipeline.options.sections import (
    ANY,
    CONDITIONS,
    DECLARATIONS,
    DEFAULTS,
    TRAINING_STAGES,
    AutoencoderOptions,
    DenoiserOptions,
    EvaluationOptions,
    NeuronOptions,
    Options,
    names,
    with_role,
)
from pipeline.run_folder import RunFolder

RECORDED = ("image_shape", "data", "class_names")
"""What config.json has of a run's data besides the options."""

NEURON = names(NeuronOptions)
"""Names of the options of neurons."""

WEIGHTS = ("fid_weights", "paper_fid_weights", "fad_weights")
"""Options that name the weights of feature networks."""

TYPED = "command line"
"""Origin of what was typed in this call."""


class Call(NamedTuple):
    """What a command line asks for: options, run folder, and what the run's config.json records of its data, if any."""

    options: Options
    run: RunFolder
    recorded: dict[str, Any]


def resolve(arguments: list[str] | None, description: str = "") -> Call:
    """Options and run folder of a command line. Raises UserError if they are inconsistent."""
    return _assemble(vars(build_parser(description).parse_args(arguments)))


def assemble(values: Mapping[str, Any]) -> Call:
    """The same from option values by name, as the library passes them; they are checked as typed ones are."""
    if unknown := set(values) - set(DEFAULTS):
        raise UserError(f"there is no option {', '.join(sorted(unknown))}")
    return _assemble({key: as_read(key, value, "") for key, value in values.items()})


def _assemble(typed: dict[str, Any]) -> Call:
    """The same from values that have been read."""
    _check_combination(typed)
    started = _started_from(typed.get("start_from"))
    in_preset = PRESETS[(DEFAULTS | started | typed)["preset"]]
    run = RunFolder(_folder(DEFAULTS | in_preset | started | typed))
    made = _made(typed, run)
    if made and made.exists():
        ways = f"resume it with --resume {run.path}, evaluate with --checkpoint {run.model}"
        raise UserError(f"{made} already exists: {ways}, or choose another --result_path")
    if made and _is_interrupted(run, made):
        way = f"resume it with --resume {run.path}"
        raise UserError(f"{run.last} is of an interrupted training: {way}, or choose another --result_path")
    read = run.require_config if "resume" in typed else run.read_config
    saved = {} if made == run.model else read()
    lasting = with_role(Role.RESUMED if "resume" in typed else Role.SETTING)
    kept = {key: as_read(key, saved.get(key, DEFAULTS[key])) for key in lasting} if saved else {}
    preset = (DEFAULTS | started | kept | typed)["preset"]
    layers = {
        "default": DEFAULTS,
        f"--preset {preset}": PRESETS[preset],
        f"--start_from {typed.get('start_from')}": started,
        f"{run.path}": kept,
    }
    options = _merge(layers | {TYPED: typed})
    _check_started(options, started)
    _check_fixed(options, run, saved)
    _check_owners(options)
    _check_stages(options, _merge(layers))
    _check_values(options)
    return Call(options, _results_folder(options, run), {key: saved.get(key) for key in RECORDED})


def _merge(layers: Mapping[str, Mapping[str, Any]]) -> Options:
    """Options from values by origin; a later origin overrides the ones before it."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers.items():
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    return Options.of(values, origins)


def _check_combination(typed: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other."""
    if "resume" in typed and "checkpoint" in typed:
        raise UserError("--resume continues training and --checkpoint evaluates: use one of them")
    if "start_from" in typed and ("resume" in typed or "checkpoint" in typed):
        raise UserError("--start_from begins a new run: leave out --resume and --checkpoint")
    if "new_denoiser" in typed and not {"start_from", "resume"} & set(typed):
        raise UserError("--new_denoiser is for --start_from, which names the run whose autoencoder is taken: give both")
    if "checkpoint" in typed and typed.get("stage") in ("vqsvae", "sdid"):
        raise UserError("--checkpoint evaluates a trained model: to continue training, use --resume RUN")
    if "resume" in typed and "result_path" in typed:
        raise UserError("--resume continues in the run folder: omit --result_path")


def _started_from(start: Path | None) -> dict[str, Any]:
    """The options that a new run inherits from the one it starts from."""
    if start is None:
        return {}
    config = RunFolder(start).require_config()
    return {key: as_read(key, config.get(key, DEFAULTS[key])) for key in with_role(Role.NETWORKS)}


def _folder(values: Mapping[str, Any]) -> Path:
    """The run folder: the one resumed, that of the checkpoint, or the one named after data set and model."""
    if resume := values["resume"]:
        return resume.parent if resume.suffix == ".pth" else resume
    if checkpoint := values["checkpoint"]:
        return checkpoint.parent
    return (values["result_path"] or Path("result")) / values["dataset_name"] / values["model"]


def _made(typed: Mapping[str, Any], run: RunFolder) -> Path | None:
    """The first file of weights that a new training will write; None where none begins."""
    stage = typed.get("stage", "all")
    if "resume" in typed or "checkpoint" in typed or stage not in TRAINING_STAGES:
        return None
    return run.denoiser if stage == "sdid" and "start_from" not in typed else run.model


def _is_interrupted(run: RunFolder, made: Path) -> bool:
    """Whether last.pth holds the training that was to write `made`, and not that of the stage before."""
    stage = run.unfinished_stage()
    return stage == "sdid" or (stage != "" and made == run.model)


def _check_started(options: Options, started: Mapping[str, Any]) -> None:
    """Refuse options with which the autoencoder of `--start_from` was not trained, if it is kept."""
    autoencoder = [key for key in names(AutoencoderOptions) if DECLARATIONS[key].role == Role.IDENTITY]
    changed = _changed(options, started, [*NEURON, *autoencoder])
    if options.run.stage == "sdid" and changed:
        start = options.run.start_from
        raise UserError(f"--start_from {start} has an autoencoder of other options: omit {', '.join(changed)}")


def _changed(options: Options, saved: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of the options that have another value than in a saved run, in words."""
    before = {key: as_read(key, saved[key]) for key in keys if key in saved}
    now = options.values()
    return [
        f"--{key} ({as_typed(key, value)} in the run)"
        for key, value in before.items()
        if as_written(now[key]) != as_written(value)
    ]


def _check_fixed(options: Options, run: RunFolder, saved: Mapping[str, Any]) -> None:
    """Refuse changes to options that the saved run has fixed."""
    fixed = with_role(Role.TRAINING if options.run.resume else Role.IDENTITY)
    if options.run.checkpoint:
        fixed += [key for key in names(DenoiserOptions) + names(AutoencoderOptions) if key not in fixed]
    if options.run.resume and run.denoiser.exists():
        fixed.append("epochs")  # stage 1 is over
    if saved and (changed := _changed(options, DEFAULTS | dict(saved), fixed)):
        raise UserError(f"{run.path} was made with different options: omit {', '.join(changed)}")


def _check_owners(options: Options) -> None:
    """Refuse options that the chosen networks do not have, instead of ignoring them."""
    model, denoiser, neuron = options.autoencoder.model, options.denoiser.denoiser, options.neuron.neuron
    preset = f"--preset {options.run.preset}"
    for key, value in options.values().items():
        owners = DECLARATIONS[key].of
        if options.concern(key) or value == DEFAULTS[key]:
            continue
        of_denoisers = denoiser in options.networks and set(owners) <= set(DECLARATIONS["denoiser"].choices)
        lacking = denoiser if of_denoisers else neuron if set(owners) <= set(NEURONS) else model
        if options.origins[key] == TYPED:
            way = "leave it out"
            if of_denoisers:
                is_made = options.run.checkpoint or options.run.resume
                way = f"{'train a run with' if is_made else 'add'} --preset improved, or {way}"
            raise UserError(f"{lacking} has no --{key}: {way}")
        if options.origins[key] == preset:
            raise UserError(f"{preset} is for {' and '.join(owners)}: {lacking} has no --{key}")


def _check_stages(options: Options, untyped: Options) -> None:
    """Refuse options that have no effect in the chosen stage, unless they repeat what they are without being typed."""
    evaluates = options.run.checkpoint and options.run.stage == "all"
    stage = "evaluate" if evaluates else options.run.stage
    without = untyped.values()
    for key, value in options.values().items():
        stages = DECLARATIONS[key].stages or (stage,)
        if value != without[key] and stage not in stages:
            where = "with --checkpoint" if evaluates else f"in --stage {stage}"
            training = evaluates and "all" in stages
            there = "in a training" if training else " or ".join(f"in --stage {each}" for each in stages)
            raise UserError(f"--{key} has no effect {where}, only {there}: leave it out")


def _check_values(options: Options) -> None:
    """Refuse values that are known to be wrong before anything is loaded."""
    condition, typed = options.denoiser.condition, {key for key, origin in options.origins.items() if origin == TYPED}
    if "images_per_prototype" in typed and "prototype" not in CONDITIONS[condition]:
        raise UserError("--images_per_prototype is for --condition prototype or both: leave it out, or say which")
    if options.sampling.guidance and condition == "none" and "guidance" in typed:
        raise UserError("--guidance needs a denoiser with a condition: leave it out, or train with --condition label")
    neuron = options.neuron
    if neuron.v_reset is not None and neuron.v_reset >= neuron.v_threshold:
        limits = f"--v_reset {neuron.v_reset:g} is not less than --v_threshold {neuron.v_threshold:g}"
        raise UserError(f"{limits}: a neuron that has fired would fire again without input")
    several = [key for key in ("spike_steps", "denoiser_spike_steps") if (options.values()[key] or 1) > 1]
    if neuron.neuron == "fs" and several:
        given = " ".join(f"--{key} 1" for key in several)
        raise UserError(f"--neuron fs needs {given}: its time steps, --digits, are within a spike step")
    stage, no_label = options.run.stage, options.sampling.labels == (ANY,) or "label" not in CONDITIONS[condition]
    if options.sampling.guidance and "guidance" in typed and stage == "inpaint" and no_label:
        raise UserError("--guidance with --stage inpaint is of the labels, and here are none: leave it out")
    if options.sampling.temperature == "auto" and options.origins["final_temperature"] == TYPED:
        raise UserError("--temperature auto chooses one for all timesteps: leave out --final_temperature")
    trains = stage in TRAINING_STAGES and not options.run.checkpoint
    for key, value in options.values().items():
        if isinstance(value, Path) and key in typed and not _is_utf8(str(value) if trains else os.fsencode(value)):
            raise UserError(f"--{key} {value} is not UTF-8, in which logs are written: rename it, or set PYTHONUTF8=1")
    evaluates = stage in ("all", "evaluate")  # else what a run has recorded may have moved away
    check_weights(options.evaluation, WEIGHTS if evaluates else [key for key in WEIGHTS if key in typed])


def check_weights(options: EvaluationOptions, named: Iterable[str] = WEIGHTS) -> None:
    """Raise UserError if a file or folder of feature networks, of the options of these names, does not exist."""
    for key in named:
        path = getattr(options, key)
        if path and not path.exists():
            raise UserError(f"--{key} {path} does not exist: correct the path, or leave the option out")


def _is_utf8(path: str | bytes) -> bool:
    """Whether the bytes of a path are UTF-8, or a string has none that Python did not understand."""
    try:
        return bool(path.encode() if isinstance(path, str) else path.decode("utf-8"))
    except UnicodeError:
        return False


def _results_folder(options: Options, run: RunFolder) -> RunFolder:
    """Where results are written: the run folder, or the --result_path of an evaluation."""
    if not (options.run.checkpoint and options.run.result_path):
        return run
    results = RunFolder(options.run.result_path)
    if (results.model.exists() or results.config.exists()) and results.path.resolve() != run.path.resolve():
        raise UserError(f"{results.path} is the folder of another run: choose another --result_path")
    return results
