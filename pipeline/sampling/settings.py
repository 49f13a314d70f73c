"""The settings that samples are drawn with; they describe and record themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import UserError
from pipeline.options.sections import DEFAULTS, SamplingOptions

IN_SENTENCES = {"temperature", "final_temperature", "temperature_chosen", "sample_steps", "reveal_order", "labels"}
"""Settings for which `in_words` has words of its own."""


@dataclass(frozen=True)
class Settings(SamplingOptions):
    """The options of sampling as a model follows them: the temperature is a number, labels are numbers of classes.

    Sample i is of `labels[i % len(labels)]`; without any, it is of no class in particular. `temperature_chosen` says
    whether the temperature was chosen on held-out images.
    """

    temperature: float = 1.0
    labels: tuple[int, ...] = ()
    temperature_chosen: bool = False

    @classmethod
    def of(cls, options: SamplingOptions) -> "Settings":
        """Those of the options but for the labels, which a model knows; at temperature 1 if one is to be chosen."""
        resolved: dict[str, Any] = {"labels": ()}
        if options.temperature == "auto":
            resolved |= {"temperature": 1.0, "final_temperature": None}
        return cls(**vars(options) | resolved)

    def record(self, num_timesteps: int) -> dict[str, Any]:
        """JSON values by name, in which all timesteps are `num_timesteps`."""
        return vars(self) | {"sample_steps": self.sample_steps or num_timesteps, "labels": list(self.labels)}

    def in_words(self, name_of: Callable[[int], str], *about_model: str) -> str:
        """How samples are drawn, with what there is to say about the model; `name_of` names a class."""
        chosen = " chosen on held-out training images" if self.temperature_chosen else ""
        final = f" changing to {self.final_temperature:g}" if self.final_temperature else ""
        timesteps = f"{self.sample_steps or 'all'} timesteps"
        order = [] if self.reveal_order == DEFAULTS["reveal_order"] else [f"{self.reveal_order} order"]
        others = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in vars(self).items()
            if name not in IN_SENTENCES and value != DEFAULTS[name]
        ]
        classes = [f"classes {', '.join(map(name_of, self.labels))}"] if self.labels else []
        words = [f"temperature {self.temperature:g}{chosen}{final}", timesteps, *order, *about_model, *others, *classes]
        return ", ".join(words)


def check_sample_steps(steps: int | None, most: int) -> None:
    """Raise UserError if there are fewer timesteps than are asked for."""
    if steps is not None and steps > most:
        raise UserError(f"images of this size have {most} timesteps: use --sample_steps {most} instead of {steps}")
