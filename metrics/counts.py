"""Refusal of too few images."""

from collections.abc import Sized

from errors import UserError


def check_enough(figure: str, fewest: int, **sides: Sized) -> None:
    """Raise UserError where one of `sides` (by name, as in generated=images) has fewer than `fewest` elements."""
    for side, images in sides.items():
        if len(images) < fewest:
            raise UserError(f"{figure} needs at least {fewest} {side} images, not {len(images)}")
