"""What all denoisers of the codes have in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.prototypes import Prototypes


class Denoiser(nn.Module, ABC):
    """Predicts the codes of an image from a partly masked grid of tokens and the timestep.

    Args:
        codebook_size: number of codes K; a token is a code, 0..K-1, or the mask, K.
        spike_steps: S.

    Attributes:
        prototypes: the condition of the denoiser, or None if it takes none.
    """

    def __init__(self, codebook_size: int, spike_steps: int):
        super().__init__()
        self.codebook_size, self.spike_steps = codebook_size, spike_steps
        self.prototypes: Prototypes | None = None

    @abstractmethod
    def forward(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens int `[N,h,w]` in 0..K and timesteps int `[N]` to logits `[N,K,h,w]`.

        `condition` is the index int `[N]` of each image's prototype, or NO_PROTOTYPE; None leaves all images without
        one. Raises ValueError if the denoiser has no prototypes.
        """

    def logits_at(self, tokens: Tensor, t: Tensor, where: Tensor, condition: Tensor | None = None) -> Tensor:
        """`forward` at the P positions set in `where`, bool `[N,h,w]`: `[P,K]`. Raises RuntimeError in training mode.

        A sample must not depend on the others of its batch, and batch statistics would make it.
        """
        self._check_evaluation_mode()
        return self(tokens, t, condition).permute(0, 2, 3, 1)[where]  # [N,K,h,w] -> [N,h,w,K] -> [P,K]

    def load_pretrained(self, weights: dict[str, Tensor]) -> None:
        """Initialise from the weights of another denoiser. Raises RuntimeError if its shape is different."""
        self.load_state_dict(weights)

    def _check_evaluation_mode(self) -> None:
        if self.training:
            raise RuntimeError("logits_at needs evaluation mode: a sample must not depend on its batch")

    def _check_condition(self, condition: Tensor | None) -> None:
        if condition is not None and self.prototypes is None:
            raise ValueError("this denoiser has no prototypes, so it takes no condition")
