"""The template's frame: its height, the body's outline over it, turns of (z, y, x) vectors.

Template millimetres have z up from the feet, y to the back and x to the left; the body's axis
is at x = y = 0.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

Floats = NDArray[np.float64]
Point = Sequence[float] | Floats

PERIOD = 700.0
"""Height of the template, mm; above it the body begins anew."""
SQUARENESS = 0.6
"""Weight of the mixed term in the outline x⁴ + 2 s x²y² + y⁴ = 1; an ellipse has 1."""

# Half width, half depth and thickness of the muscle wall at heights z, mm.
_KNOTS = np.array(
    [
        (0, 132, 88, 46),
        (60, 134, 90, 42),
        (130, 130, 90, 30),
        (200, 119, 89, 17),
        (270, 121, 90, 17),
        (340, 127, 93, 19),
        (420, 131, 95, 21),
        (480, 133, 92, 22),
        (530, 137, 84, 25),
        (570, 129, 74, 26),
        (610, 88, 64, 24),
        (650, 62, 58, 22),
    ],
    dtype=np.float64,
)


@lru_cache(maxsize=1)
def outline() -> Floats:
    """Half width, half depth, wall at every mm of height: shape (701, 3)."""
    knots = np.concatenate([_KNOTS + np.array((shift, 0, 0, 0)) for shift in (-PERIOD, 0, PERIOD)])
    table: Floats = PchipInterpolator(knots[:, 0], knots[:, 1:])(np.arange(PERIOD + 1))
    return table


def on_outline(z: float, angle: float, depth: float) -> tuple[float, float, float]:
    """Point `depth` mm under the muscles' surface, `angle` from the back towards the left."""
    half_width, half_depth, _ = outline()[int(z) % int(PERIOD)]
    x, y = np.sin(angle) / (half_width - depth), np.cos(angle) / (half_depth - depth)
    radius = (x**4 + y**4 + 2 * SQUARENESS * x * x * y * y) ** -0.25
    return z, radius * np.cos(angle), radius * np.sin(angle)


def rotation(about_z: float, about_y: float, about_x: float) -> Floats:
    """Rotation of (z, y, x) vectors."""
    result = np.eye(3)
    for angle, (p, q) in ((about_z, (1, 2)), (about_y, (0, 2)), (about_x, (0, 1))):
        turn = np.eye(3)
        turn[[p, p, q, q], [p, q, p, q]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        result = result @ turn
    return result
