"""last.pth, from which a training is resumed: stage, epoch, step, weights, optimizer, and what run it is of."""

from typing import Any

from errors import UserError
from pipeline.checkpoints import load_checkpoint, save_weights
from pipeline.options.declaration import Role
from pipeline.options.sections import with_role
from pipeline.run_folder import RunFolder

FIXED = (*with_role(Role.TRAINING), "start_from", "data")
"""What config.json and last.pth must agree on."""

LAST_VERSION = 3
"""Of what last.pth holds: counts up when a program could misread the file of another."""


def write_last(run: RunFolder, state: dict[str, Any]) -> None:
    """Write last.pth: `state`, and what tells it from the file of another run or program."""
    config = run.read_config()
    fixed = {key: config[key] for key in FIXED if key in config}
    save_weights(run.last, {"version": LAST_VERSION, "run": fixed, **state})


def read_last(run: RunFolder) -> dict[str, Any]:
    """What last.pth holds; empty if the run was stopped before it had saved any training.

    Raises UserError, which names the difference, if the file is of another program or of a run with other options.
    """
    config = run.read_config()
    trains = run.denoiser if config.get("stage") == "sdid" else run.model
    if not (run.last.exists() or trains.exists()):
        return {}
    if not run.last.exists():
        way = f"--start_from {run.path} with another --result_path trains its weights further"
        raise UserError(f"{run.last} does not exist, as in a packed copy, so nothing can be resumed: {way}")
    state = load_checkpoint(run.last)
    if "stage" not in state:
        raise UserError(f"{run.last} is not what a training saved: restore the file that the run wrote")
    if state.get("version") != LAST_VERSION:
        versions = f"version {state.get('version', 1)}, this program reads version {LAST_VERSION}"
        raise UserError(f"{run.last} has {versions}: resume it with {run.program}")
    there = {key: config.get(key) for key in state["run"]}
    other = [
        "other training data" if key == "data" else f"--{key} {value}, not {there[key]}"
        for key, value in state["run"].items()
        if there[key] != value
    ]
    if other:
        raise UserError(f"{run.last} is of a run with {', '.join(other)}: restore the file that the run wrote")
    return state
