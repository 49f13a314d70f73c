"""The schedule of one stage: epochs, learning rates, and when batch norm is frozen."""

from dataclasses import dataclass

from parts import LR_SCHEDULES


@dataclass(frozen=True)
class Schedule:
    """How long and how to train one stage."""

    epochs: int
    batch_size: int
    lr: float
    seed: int
    max_minutes: float | None = None
    save_every: float = 10.0  # minutes
    lr_schedule: str = "constant"  # one of LR_SCHEDULES
    ema_decay: float = 0.0  # of the averaged weights that are kept and evaluated; 0: the last weights are
    fixed_norm: float = 0.0  # fraction of the steps, the last ones, in which batch norm's statistics do not change
    int8_weights: float = 0.0  # fraction of the steps, the last ones, which are made with weights rounded to int8

    def lr_at(self, done: float) -> float:
        """The learning rate when the fraction `done` of all steps is done."""
        return self.lr * LR_SCHEDULES[self.lr_schedule](done)

    def freezes_norms(self, done: float) -> bool:
        """Whether the batch-norm statistics are frozen at that point."""
        return is_in_last(self.fixed_norm, done)

    def rounds_weights(self, done: float) -> bool:
        """Whether weights are rounded at that point."""
        return is_in_last(self.int8_weights, done)


def is_in_last(fraction: float, done: float) -> bool:
    """Whether only the last `fraction` of all steps is left when the fraction `done` is done; never if that is 0."""
    return fraction > 0 and done >= 1 - fraction
