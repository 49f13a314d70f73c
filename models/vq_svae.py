"""VQ-SVAE: the spiking vector-quantised autoencoder (arXiv 2308.10187)."""

from typing import cast

import torch
from torch import Tensor, nn

from models.neurons import LIF, Neuron
from models.quantizer import SpikingQuantizer
from models.spiking import SpikingStack, bias_of, membrane_weights
from models.vq_autoencoder import VQAutoencoder


class Encoder(nn.Module):
    """Pixels `[N,C,H,W]`, the same at each spike step, to spikes `[S,N,D,h,w]`; `inner_stride` is H/2h, 1 or 2."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        embedding_dim: int,
        spike_steps: int,
        inner_stride: int = 2,
        neuron: Neuron = LIF,
    ):
        super().__init__()
        self.snn_convs = SpikingStack(
            nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
            nn.Conv2d(hidden, 2 * hidden, 3, stride=inner_stride, padding=1),
            nn.Conv2d(2 * hidden, embedding_dim, 1),
            spike_steps=spike_steps,
            neuron=neuron,
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.snn_convs(x)


class Decoder(nn.Module):
    """Spikes `[S,N,D,h,w]`, or a constant input `[N,D,h,w]`, to pixels `[N,C,H,W]` in (-1,1); H/2h is `inner_stride`.

    Pixels are the tanh of the last layer's membrane potential.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        embedding_dim: int,
        spike_steps: int,
        inner_stride: int = 2,
        neuron: Neuron = LIF,
    ):
        super().__init__()

        def up(inputs: int, outputs: int, stride: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(inputs, outputs, 3, stride, padding=1, output_padding=stride - 1)

        self.snn_convs = SpikingStack(
            up(embedding_dim, 2 * hidden, inner_stride),
            up(2 * hidden, hidden, 2),
            head=nn.ConvTranspose2d(hidden, channels, 3, padding=1),
            spike_steps=spike_steps,
            neuron=neuron,
        )
        self.spike_steps = spike_steps

    @property
    def head(self) -> nn.ConvTranspose2d:
        """The last layer."""
        return cast(nn.ConvTranspose2d, self.snn_convs[-1])

    def forward(self, spikes: Tensor) -> Tensor:
        """See the class."""
        weights = membrane_weights(self.spike_steps, like=self.head.weight)
        return torch.tanh(self.snn_convs(spikes, readout=weights))


class VQSVAE(VQAutoencoder):
    """The spiking autoencoder.

    Args:
        channels: channels of the images.
        codebook_size: number of embeddings K.
        embedding_dim: their dimension D.
        spike_steps: S.
        hidden_channels: channels of the first hidden layer; the second has twice as many.
        downsampling: side of an image divided by the side of its grid of codes, 4 (the paper) or 2.
        clipped_error: see VQAutoencoder; also scales the initial weights of the last layer to its number of inputs.
        revive_codes: dead-code restart; see Codebook.
        readout: ablation: "both", or only the firing "rate" or membrane "potential" of the encoder's spikes.
        spike_generator: ablation: "adaptive", "repeat" or "poisson"; see SpikingQuantizer.
        neuron: makes the neurons of a layer.
    """

    encoder: Encoder
    vq_layer: SpikingQuantizer
    decoder: Decoder

    def __init__(
        self,
        channels: int = 1,
        codebook_size: int = 128,
        embedding_dim: int = 16,
        spike_steps: int = 16,
        hidden_channels: int = 32,
        downsampling: int = 4,
        clipped_error: bool = False,
        revive_codes: bool = False,
        readout: str = "both",
        spike_generator: str = "adaptive",
        neuron: Neuron = LIF,
    ):
        sizes = (channels, hidden_channels, embedding_dim, spike_steps, downsampling // 2)
        decoder = Decoder(*sizes, neuron)
        super().__init__(
            channels,
            codebook_size,
            encoder=Encoder(*sizes, neuron),
            vq_layer=SpikingQuantizer(
                codebook_size, embedding_dim, spike_steps, readout, spike_generator, revive_codes, neuron
            ),
            decoder=decoder,
            clipped_error=clipped_error,
        )
        self.spike_steps, self.downsampling = spike_steps, downsampling
        if clipped_error:  # torch confuses inputs and outputs of a transposed convolution: weights are far too large
            with torch.no_grad():
                decoder.head.weight.mul_(hidden_channels**-0.5)
                bias_of(decoder.head).zero_()

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """See VQAutoencoder."""
        hidden, channels = weights["encoder.snn_convs.0.weight"].shape[:2]
        codebook_size, embedding_dim = weights["vq_layer.embeddings.weight"].shape
        return dict(channels=channels, codebook_size=codebook_size, embedding_dim=embedding_dim, hidden_channels=hidden)
