"""The base class of the denoisers of the codes."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from models.conditions import Conditions
from models.labels import Labels
from models.prototypes import Prototypes


class Denoiser(nn.Module, ABC):
    """Predicts the codes of an image from a partly masked grid of tokens and the timestep.

    Args:
        codebook_size: number of codes K; a token is a code, 0..K-1, or the mask, K.
        spike_steps: S.

    Attributes:
        prototypes, labels: the conditions of the denoiser; None for one that it does not have.
    """

    def __init__(self, codebook_size: int, spike_steps: int):
        super().__init__()
        self.codebook_size, self.spike_steps = codebook_size, spike_steps
        self.prototypes: Prototypes | None = None
        self.labels: Labels | None = None

    @staticmethod
    @abstractmethod
    def options_of(weights: dict[str, Tensor]) -> dict[str, Any]:
        """All options but `spike_steps`, inferred from its weights. Raises KeyError for those of another network."""

    @property
    def conditions(self) -> Conditions:
        """What the denoiser can be conditioned on."""
        return Conditions(self.prototypes, self.labels)

    @abstractmethod
    def forward(self, tokens: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Tokens int `[N,h,w]` in 0..K and timesteps int `[N]` to logits `[N,K,h,w]`.

        `condition` is int64 `[N,J]`, see `Conditions`; with None, no image has any. Raises ValueError if the denoiser
        takes no condition.
        """

    def logits_at(self, tokens: Tensor, t: Tensor, where: Tensor, condition: Tensor | None = None) -> Tensor:
        """`forward` at the P positions set in `where`, bool `[N,h,w]`: `[P,K]`. Raises RuntimeError in training mode.

        A sample must not depend on the rest of its batch, as it would through batch statistics.
        """
        self._check_evaluation_mode()
        return self(tokens, t, condition).permute(0, 2, 3, 1)[where]  # [N,K,h,w] -> [N,h,w,K] -> [P,K]

    def guided_logits_at(self, guidance: float, tokens: Tensor, t: Tensor, where: Tensor, condition: Tensor) -> Tensor:
        """`logits_at` with classifier-free guidance: `given + guidance * (given - dropped)`, in two passes.

        `dropped` are the logits without the last condition, which is the label if there is one. (For
        discrete tokens, as in VQ-Diffusion, arXiv 2205.16007, and MaskGIT, arXiv 2202.04200.)
        """
        given = self.logits_at(tokens, t, where, condition)
        dropped = self.logits_at(tokens, t, where, self.conditions.without_last(condition))
        return given + guidance * (given - dropped)

    def load_pretrained(self, weights: dict[str, Tensor]) -> None:
        """Initialise from the weights of another denoiser. Raises RuntimeError if their shapes differ."""
        self.load_state_dict(weights)

    def _check_evaluation_mode(self) -> None:
        if self.training:
            raise RuntimeError("logits_at needs evaluation mode: a sample must not depend on its batch")

    def _check_condition(self, condition: Tensor | None) -> None:
        if condition is not None and not self.conditions:
            raise ValueError("this denoiser takes no condition")
