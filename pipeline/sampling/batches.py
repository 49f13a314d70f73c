"""Running trained networks over many images: encode, draw codes, decode."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.absorbing import AbsorbingDiffusion, SamplingNoise
from models import Denoiser, VQAutoencoder
from pipeline.runtime import processes
from pipeline.runtime.device import Machine
from pipeline.sampling.settings import Settings
from pixels import to_float, to_uint8
from progress import progress_bar


def in_batches(tensor: Tensor, batch_size: int, title: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(part)` for each part of a tensor, put together on the CPU.

    Several processes share the parts, and each is given the whole result.
    """
    mine = tensor[processes.share(len(tensor))]
    done = []
    with progress_bar(len(mine), title, shown=processes.is_rank_0()) as bar:
        for part in mine.split(batch_size) if len(mine) else ():
            done.append(compute(part).cpu())
            bar.update(len(part))
    return processes.gather(done)


def computing(network: nn.Module, machine: Machine) -> torch.autocast:
    """Context in which a network computes on its machine; one that is not of float32 computes in its own type."""
    lower = machine.bf16 and float_type(network) == torch.float32
    return torch.autocast(machine.device.type, torch.bfloat16, enabled=lower)


def float_type(network: nn.Module) -> torch.dtype:
    """The type of a network's weights."""
    return next(network.parameters()).dtype


@torch.no_grad()
def encode_images(model: VQAutoencoder, images: Tensor, machine: Machine, batch_size: int = 64) -> Tensor:
    """Codes of `images`, uint8 `[N,C,H,W]`, as the smallest integer type that holds them: `[N,h,w]` on the CPU."""
    model.eval()

    def encode(part: Tensor) -> Tensor:
        return model.encode(to_float(part.to(machine.device)).to(float_type(model))).to(torch.int16)

    with computing(model, machine):
        return in_batches(images, batch_size, "encoding", encode)


@torch.no_grad()
def decode_codes(model: VQAutoencoder, codes: Tensor, machine: Machine, batch_size: int = 64) -> Tensor:
    """Images of `codes [N,h,w]`, uint8 `[N,C,H,W]` on the CPU."""
    model.eval()

    def decode(part: Tensor) -> Tensor:
        return to_uint8(model.decode(part.to(machine.device).long()))

    with computing(model, machine):
        return in_batches(codes, batch_size, "decoding", decode)


def draw_codes(
    denoiser: Denoiser,
    diffusion: AbsorbingDiffusion,
    noise: SamplingNoise,
    settings: Settings,
    machine: Machine,
    batch_size: int = 64,
    given: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Codes int64 `[N,h,w]` on the CPU, one grid for each of the N samples of `noise`.

    Tokens of `given [N,h,w]` that are not masked are kept. For `condition` and temperatures see
    `AbsorbingDiffusion.sample`, for guidance, which is of no effect without a condition, `Denoiser.guided_logits_at`.
    """
    denoiser.eval()
    is_guided = settings.guidance and condition is not None
    logits_at = partial(denoiser.guided_logits_at, settings.guidance) if is_guided else denoiser.logits_at

    def codes_of(part: Tensor) -> Tensor:
        here = SamplingNoise(*(values[part].to(machine.device) for values in noise))
        kept = None if given is None else given[part].to(machine.device)
        conditions = None if condition is None else condition[part].to(machine.device)
        return diffusion.sample(logits_at, here, settings.temperature, kept, settings.final_temperature, conditions)

    with computing(denoiser, machine):
        return in_batches(torch.arange(len(noise.uniforms)), batch_size, "sampling", codes_of)
