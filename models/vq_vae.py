"""VQ-VAE: the VQ-SVAE's autoencoder with ReLU instead of spikes (arXiv 1711.00937), a baseline of arXiv 2308.10187."""

from torch import Tensor, nn

from models.quantizer import Codebook
from models.spiking import full_precision
from models.vq_autoencoder import VQAutoencoder


class ConvolutionStack(nn.Module):
    """Layers in sequence, `[N,C,H,W]` to `[N,C',H',W']`, in full precision: without spike steps they are cheap."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        with full_precision(x):
            return self.convs(x)


class VQVAE(VQAutoencoder):
    """The convolutions of VQSVAE without batch norm and spikes; the decoder has no final tanh, as in the release.

    Args:
        channels: channels of the images.
        codebook_size: number of embeddings K.
        embedding_dim: their dimension D.
        hidden_channels: channels of the first hidden layer; the second has twice as many.
    """

    def __init__(self, channels: int = 1, codebook_size: int = 128, embedding_dim: int = 16, hidden_channels: int = 32):
        hidden = hidden_channels

        def down(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)

        def up(inputs: int, outputs: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)

        super().__init__(
            channels,
            codebook_size,
            encoder=ConvolutionStack(
                down(channels, hidden),
                nn.ReLU(),
                down(hidden, 2 * hidden),
                nn.ReLU(),
                nn.Conv2d(2 * hidden, embedding_dim, 1),
            ),
            vq_layer=Codebook(codebook_size, embedding_dim),
            decoder=ConvolutionStack(
                up(embedding_dim, 2 * hidden),
                nn.ReLU(),
                up(2 * hidden, hidden),
                nn.ReLU(),
                nn.ConvTranspose2d(hidden, channels, 3, padding=1),
            ),
        )

    @staticmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, int]:
        """All options, inferred from its weights. Raises KeyError for those of another network."""
        hidden, channels = weights["encoder.convs.0.weight"].shape[:2]
        codebook_size, embedding_dim = weights["vq_layer.embeddings.weight"].shape
        return dict(channels=channels, codebook_size=codebook_size, embedding_dim=embedding_dim, hidden_channels=hidden)
