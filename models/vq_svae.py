"""VQ-SVAE: the spiking vector-quantised autoencoder (arXiv 2308.10187)."""

import torch
from torch import Tensor, nn

from models.quantizer import SpikingQuantizer
from models.spiking import SpikingStack, membrane_weights
from models.vq_autoencoder import VQAutoencoder


class Encoder(nn.Module):
    """Pixels `[N,C,H,W]`, the same at each spike step, to spikes `[S,N,D,H/4,W/4]`."""

    def __init__(self, channels: int, hidden: int, embedding_dim: int, spike_steps: int):
        super().__init__()
        self.snn_convs = SpikingStack(
            nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
            nn.Conv2d(hidden, 2 * hidden, 3, stride=2, padding=1),
            nn.Conv2d(2 * hidden, embedding_dim, 1),
            spike_steps=spike_steps,
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.snn_convs(x)


class Decoder(nn.Module):
    """Spikes `[S,N,D,h,w]`, or a constant input `[N,D,h,w]`, to pixels `[N,C,4h,4w]` in (-1,1).

    Pixels are the tanh of the last layer's membrane potential.
    """

    def __init__(self, channels: int, hidden: int, embedding_dim: int, spike_steps: int):
        super().__init__()
        up = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
        self.snn_convs = SpikingStack(
            nn.ConvTranspose2d(embedding_dim, 2 * hidden, **up),
            nn.ConvTranspose2d(2 * hidden, hidden, **up),
            head=nn.ConvTranspose2d(hidden, channels, 3, padding=1),
            spike_steps=spike_steps,
        )
        self.spike_steps = spike_steps

    def forward(self, spikes: Tensor) -> Tensor:
        """See the class."""
        weights = membrane_weights(self.spike_steps, like=self.snn_convs[-1].weight)
        return torch.tanh(self.snn_convs(spikes, readout=weights))


class VQSVAE(VQAutoencoder):
    """The spiking autoencoder.

    Args:
        channels: of the images.
        codebook_size: number of embeddings K.
        embedding_dim: their width D.
        spike_steps: S.
        hidden: channels of the first hidden layer; the second has twice as many.
        readout: an ablation: "both", or only firing "rate" or membrane "potential" of the encoder's spikes.
        spike_generator: an ablation: "adaptive", "repeat" or "poisson"; see SpikingQuantizer.
    """

    def __init__(
        self,
        channels: int = 1,
        codebook_size: int = 128,
        embedding_dim: int = 16,
        spike_steps: int = 16,
        hidden: int = 32,
        readout: str = "both",
        spike_generator: str = "adaptive",
    ):
        super().__init__(
            channels,
            codebook_size,
            encoder=Encoder(channels, hidden, embedding_dim, spike_steps),
            vq_layer=SpikingQuantizer(codebook_size, embedding_dim, spike_steps, readout, spike_generator),
            decoder=Decoder(channels, hidden, embedding_dim, spike_steps),
        )
        self.spike_steps = spike_steps

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """All options but `spike_steps` and the ablations, read off a model's weights.

        KeyError if they are of something else.
        """
        hidden, channels = weights["encoder.snn_convs.0.weight"].shape[:2]
        codebook_size, embedding_dim = weights["vq_layer.embeddings.weight"].shape
        return dict(channels=channels, codebook_size=codebook_size, embedding_dim=embedding_dim, hidden=hidden)
