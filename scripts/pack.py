"""Make a small copy of a run to share: weights in 16 bits, or in 8 that lose nothing; options, log; no images.

python scripts/pack.py RUN_FOLDER pretrained/fmnist
python scripts/pack.py RUN_FOLDER pretrained/kmnist-faithful --int8   # half the size
python scripts/pack.py RUN_FOLDER whole --integer                     # computes in whole numbers

The copy is a run folder: `python main.py --checkpoint pretrained/fmnist` evaluates it, and with `--stage sample` draws
images from it. Metrics are not copied, because they are of other weights: those before rounding.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: scripts are not a package

import torch
from torch import Tensor

from datasets import digest
from errors import UserError, reported
from files import expand
from models.integer import in_whole_numbers
from models.integer_layers import row_scales, whole
from pipeline.checkpoints import SCALE, load_weights, per_row, save_weights, write_json
from pipeline.evaluation.temperature import recorded_temperature
from pipeline.lineage import Lineage, known
from pipeline.options.declaration import Role
from pipeline.options.sections import DEFAULTS, is_place, with_role
from pipeline.run_folder import RunFolder
from pipeline.runtime.terminal import print_anywhere
from pipeline.session import open_session


def pack(run: RunFolder, copy: RunFolder, int8: bool = False, integer: bool = False) -> None:
    """Write the copy, optionally with the denoiser's weights in int8, or with both networks in whole numbers.

    A temperature that was chosen on held-out images is written as a number. Raises UserError, with nothing written, if
    the run is incomplete, the copy exists, or its networks cannot be in whole numbers.
    """
    config = run.require_config()
    if copy.config.exists() or copy.model.exists():
        raise UserError(f"{copy.path} already holds a run: choose another folder for the copy, or delete it")
    autoencoder, denoiser = load_weights(run.model), load_weights(run.denoiser)
    if config.get("temperature") == "auto":
        config["temperature"] = recorded_temperature(run, digest(autoencoder, denoiser))
        config["final_temperature"] = None
    if integer:
        autoencoder, denoiser = whole_weights(run)
    packed = [compact(autoencoder), compact(denoiser, nearest_scales if int8 else None)]
    for path, weights in zip((copy.model, copy.denoiser), packed, strict=True):
        save_weights(path, weights)
    config["lineage"] = packed_lineage(run, copy)
    kept = {key for key in with_role(Role.SETTING) if not is_place(key)}
    write_json(copy.config, {key: value for key, value in config.items() if key in kept or key not in DEFAULTS})
    if run.log_file.exists():
        shutil.copy(run.log_file, copy.log_file)


def packed_lineage(run: RunFolder, copy: RunFolder) -> Lineage:
    """The lineage of a run, and an entry for each network whose weights packing has rounded."""
    chains = [known(run, of_denoiser) for of_denoiser in (False, True)]
    for chain, path in zip(chains, (copy.model, copy.denoiser), strict=True):
        before, after = chain[-1]["weights_after"], digest(load_weights(path))
        chain.append({"stage": chain[-1]["stage"], "packed": True, "weights_before": before, "weights_after": after})
    return [entry for chain in chains for entry in chain]


def whole_weights(run: RunFolder) -> list[dict[str, Tensor]]:
    """The weights of a run's autoencoder and denoiser in whole numbers. Raises UserError for neurons that cannot be."""
    session = open_session(checkpoint=run.model, stage="sample", device="cpu")
    autoencoder = session.load_vq_autoencoder()
    try:
        networks = [in_whole_numbers(each) for each in (autoencoder, session.networks.load_denoiser(autoencoder))]
    except ValueError as error:
        raise UserError(f"{run.path}: {error}") from error
    return [network.state_dict() for network in networks]


def nearest_scales(weight: Tensor) -> Tensor:
    """Of each row of a weight `[R,...]`, the scale `[R]` of which 127 is its largest value."""
    return weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / 127


def compact(weights: dict[str, Tensor], scales: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The weights as they are packed; `load_weights` and the network restore the types.

    Weights are kept in half precision, or, with `scales` of their rows, in int8, except per-channel values such as
    batch norm's, which are few and sensitive. Whole weights, which were trained with `--int8_weights`, are always kept
    in int8, and as they are. Integers, such as the codes of prototypes, are kept as bytes where these hold them.
    """
    packed = {}
    for name, value in weights.items():
        if not value.is_floating_point():
            packed[name] = value.byte() if value.numel() and value.min() >= 0 and value.max() <= 255 else value
        elif value.dim() <= 1:
            packed[name] = value
        elif scales_of := row_scales if torch.equal(whole(value), value) else scales:
            scale = scales_of(value)
            packed[name] = (value / per_row(scale, value)).round().to(torch.int8)
            packed[name + SCALE] = scale.float()
        else:
            packed[name] = value.half()
    return packed


def main(arguments: list[str] | None = None) -> None:
    """Pack; a mistake of the user is one line on stderr and exit status 2."""
    print_anywhere()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expand, help="a run folder")
    parser.add_argument("copy", type=expand, help="folder for the copy")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--int8", action="store_true", help="pack the denoiser's weights in 8 bits instead of 16")
    forms.add_argument("--integer", action="store_true", help="both networks in whole numbers, of 8 bits")
    args = parser.parse_args(arguments)
    with reported():
        pack(RunFolder(args.run), RunFolder(args.copy), args.int8, args.integer)
    size = sum(path.stat().st_size for path in args.copy.rglob("*.pth")) / 2**20
    print(f"{args.copy}: {size:.1f} MiB of weights")


if __name__ == "__main__":
    main()
