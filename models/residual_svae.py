"""A residual spiking autoencoder whose codes are the numbers that its neurons send (`--model residual-svae`)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.neurons import LIF, FewSpikes, Neuron
from models.quantizer import Codebook, QuantizerOutput
from models.spiking import (
    BRANCH_SCALE,
    THRESHOLD_BIAS,
    Convolution,
    Firing,
    apply_head,
    bias_of,
    literal,
    mean_weights,
    membrane_weights,
    over_steps,
)
from models.vq_autoencoder import VQAutoencoder
from parts import FEW_SPIKES_RANGE

SIDE = 2  # of the square of codes that stands for one position


def of_constant(conv: Convolution, x: Tensor, spike_steps: int) -> Tensor:
    """A convolution of what is the same at each spike step, `[N,C,H,W]`: computed once, where it is no `literal` layer.

    To `[N,C',H',W']` then, otherwise to `[S,N,C',H',W']`.
    """
    return torch.stack([conv(x) for _ in range(spike_steps)]) if literal(conv) else conv(x)


class ConvolutionBlock(nn.Module):
    """Residual block on currents: two 3x3 convolutions, each of the spikes of batch norm and neurons.

    The residual stream carries real-valued currents (membrane shortcut, MS-ResNet, arXiv 2112.08954).
    """

    def __init__(self, width: int, spike_steps: int, neuron: Neuron):
        super().__init__()
        self.fire_first = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.fire_second = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        with torch.no_grad():
            self.second.weight.mul_(BRANCH_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Currents `[S,N,C,H,W]`, or `[N,C,H,W]` if they are the same at each spike step, to `[S,N,C,H,W]`."""
        hidden = over_steps(self.first, self.fire_first(x))
        return x + over_steps(self.second, self.fire_second(hidden))


def _blocks(count: int, width: int, spike_steps: int, neuron: Neuron) -> nn.Sequential:
    return nn.Sequential(*(ConvolutionBlock(width, spike_steps, neuron) for _ in range(count)))


class ResidualEncoder(nn.Module):
    """Pixels `[N,C,H,W]`, the same at each spike step, to numbers `[N,1,h,w]`.

    The last layer's neurons are few-spikes neurons, whatever the others are. They receive the currents' mean over the
    spike steps, and their numbers are the codes.
    """

    def __init__(
        self, channels: int, hidden: int, digits: int, spike_steps: int, levels: int, blocks: int, neuron: Neuron
    ):
        super().__init__()
        self.spike_steps, width = spike_steps, hidden * levels
        self.embed = nn.Conv2d(channels, hidden, 4, stride=2, padding=1, bias=False)
        self.fine = _blocks(blocks, hidden, spike_steps, neuron)
        if levels == 2:
            self.fire_down = Firing(hidden, spike_steps, THRESHOLD_BIAS, neuron)
            self.down = nn.Conv2d(hidden, width, 3, stride=2, padding=1, bias=False)
            self.coarse = _blocks(blocks, width, spike_steps, neuron)
        self.levels = levels
        self.fire = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
        self.head = nn.Conv2d(width, SIDE**2, 1)
        middle = (FEW_SPIKES_RANGE - FEW_SPIKES_RANGE / 2**digits) / 2
        self.fire_codes = Firing(SIDE**2, 1, middle, partial(FewSpikes, digits))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.fine(of_constant(self.embed, x, self.spike_steps))
        if self.levels == 2:
            x = self.coarse(over_steps(self.down, self.fire_down(x)))
        mean = mean_weights(self.spike_steps, like=self.head.weight)
        currents = apply_head(self.head, partial(self.fire, x), mean)
        return F.pixel_shuffle(self.fire_codes(currents)[0], SIDE)


class ResidualDecoder(nn.Module):
    """Numbers `[N,1,h,w]`, the same at each spike step, to pixels `[N,C,H,W]` in (-1,1).

    Pixels are the tanh of the last layer's membrane potential.
    """

    def __init__(self, channels: int, hidden: int, spike_steps: int, levels: int, blocks: int, neuron: Neuron):
        super().__init__()
        self.spike_steps, self.levels, width = spike_steps, levels, hidden * levels
        self.embed = nn.Conv2d(SIDE**2, width, 3, padding=1)
        if levels == 2:
            self.coarse = _blocks(blocks, width, spike_steps, neuron)
            self.fire_up = Firing(width, spike_steps, THRESHOLD_BIAS, neuron)
            self.up = nn.Conv2d(width, 4 * hidden, 3, padding=1, bias=False)
        self.fine = _blocks(blocks, hidden, spike_steps, neuron)
        self.fire = Firing(hidden, spike_steps, THRESHOLD_BIAS, neuron)
        self.head = nn.Conv2d(hidden, 4 * channels, 3, padding=1)
        with torch.no_grad():
            self.head.weight.mul_(BRANCH_SCALE)
            nn.init.zeros_(bias_of(self.head))

    def forward(self, numbers: Tensor) -> Tensor:
        """See the class."""
        x = of_constant(self.embed, F.pixel_unshuffle(numbers, SIDE), self.spike_steps)
        if self.levels == 2:
            x = F.pixel_shuffle(over_steps(self.up, self.fire_up(self.coarse(x))), 2)
        weights = membrane_weights(self.spike_steps, like=self.head.weight)
        return torch.tanh(F.pixel_shuffle(apply_head(self.head, partial(self.fire, self.fine(x)), weights), 2))


class SentNumbers(Codebook):
    """A codebook of numbers that neurons send: `codebook_size` of them, evenly spaced (FSQ, arXiv 2309.15505).

    They are constants, what is encoded is one of them already, and there is nothing to learn: the loss is 0. In
    training, a number is replaced by one of its neighbours with probability `code_noise`. So the decoder learns to
    smooth over small mistakes, which a denoiser will make. Raises ValueError if `codebook_size` is not a power of 2,
    from 2 to 256.
    """

    def __init__(self, codebook_size: int, code_noise: float = 0.0):
        super().__init__(codebook_size, 1)
        self.code_noise = code_noise
        self.digits = codebook_size.bit_length() - 1
        if codebook_size != 2**self.digits or not 1 <= self.digits <= 8:
            raise ValueError(f"codebook_size must be a power of 2 from 2 to 256, got {codebook_size}")
        numbers = torch.arange(codebook_size)[:, None] * (FEW_SPIKES_RANGE / codebook_size)
        self.embeddings.weight = nn.Parameter(numbers, requires_grad=False)

    def forward(self, encoded: Tensor, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Read the codes of `encoded [N,1,h,w]`, which passes through, in training with noise from `generator`."""
        sent = encoded + self._noise(encoded, generator) if self.training and self.code_noise else encoded
        return QuantizerOutput(sent, self.nearest_codes(encoded), encoded.new_zeros(()))

    @torch.no_grad()
    def _noise(self, encoded: Tensor, generator: torch.Generator | None) -> Tensor:
        """What is added to numbers: of each, the way to the next larger one, the next smaller one, or 0."""
        uniforms = torch.rand(encoded.shape, generator=generator, device=encoded.device)
        steps = (uniforms < self.code_noise / 2).to(encoded) - (uniforms >= 1 - self.code_noise / 2).to(encoded)
        last = self.embeddings.weight[-1]
        return (encoded + steps * self.embeddings.weight[1]).clamp_min(0).minimum(last) - encoded


class ResidualSVAE(VQAutoencoder):
    """A spiking autoencoder of residual blocks of the class `ConvolutionBlock`.

    A position of its innermost layer has four neurons that send a number each; they are a square of 2x2 codes. So the
    grid of codes is twice as fine as that layer, and a denoiser can reveal the four one after another.

    Args:
        channels: channels of the images.
        codebook_size: how many numbers a neuron can send, a power of 2 from 2 to 256. Raises ValueError otherwise.
        spike_steps: S.
        hidden_channels: channels at half the side of an image; twice as many at a quarter.
        downsampling: side of an image divided by that of the innermost layer, 2 or 4.
        autoencoder_blocks: residual blocks at each resolution of encoder and decoder.
        clipped_error: see VQAutoencoder.
        code_noise: probability that a number becomes one of its neighbours in training; see SentNumbers.
        neuron: makes the neurons of a layer.
    """

    codes_a_side = SIDE

    def __init__(
        self,
        channels: int = 1,
        codebook_size: int = 8,
        spike_steps: int = 1,
        hidden_channels: int = 64,
        downsampling: int = 4,
        autoencoder_blocks: int = 1,
        clipped_error: bool = False,
        code_noise: float = 0.0,
        neuron: Neuron = LIF,
    ):
        numbers = SentNumbers(codebook_size, code_noise)
        inner = spike_steps, downsampling // 2, autoencoder_blocks, neuron
        super().__init__(
            channels,
            codebook_size,
            encoder=ResidualEncoder(channels, hidden_channels, numbers.digits, *inner),
            vq_layer=numbers,
            decoder=ResidualDecoder(channels, hidden_channels, *inner),
            clipped_error=clipped_error,
        )
        self.spike_steps, self.downsampling = spike_steps, downsampling // SIDE

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """See VQAutoencoder."""
        hidden, channels = weights["encoder.embed.weight"].shape[:2]
        return dict(
            channels=channels,
            codebook_size=len(weights["vq_layer.embeddings.weight"]),
            hidden_channels=hidden,
            downsampling=2 * len(weights["decoder.embed.weight"]) // hidden,
            autoencoder_blocks=sum(
                name.startswith("decoder.fine.") and name.endswith("second.weight") for name in weights
            ),
        )
