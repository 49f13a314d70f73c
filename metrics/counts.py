"""A check that there are enough images."""

from collections.abc import Sized

from errors import UserError


def check_enough(metric: str, minimum: int, **sets: Sized) -> None:
    """Raise UserError if one of the named `sets` (as in generated=images) has fewer than `minimum` elements."""
    for name, images in sets.items():
        if len(images) < minimum:
            raise UserError(f"{metric} needs at least {minimum} {name} images, not {len(images)}")
