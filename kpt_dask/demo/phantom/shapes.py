"""Shapes that paint a body: capsules, ellipsoids and drums, of what and over what.

Regions say where a shape may paint: each organ is one, so are the cavity, the wall and the
bones, and a shape is confined to a set of them. Knows no anatomy.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kpt_dask.demo.phantom.geometry import Floats, Point, rotation

CAPSULE, ELLIPSOID, DRUM = 0, 1, 2

ORGANS = (
    "liver",
    "spleen",
    "aorta",
    "trachea",
    "lung_right",
    "lung_left",
    "kidney_right",
    "kidney_left",
    "psoas_right",
    "psoas_left",
)
REGION = {name: number for number, name in enumerate(ORGANS, start=1)}
OUTSIDE, CAVITY, WALL, BONE, KEEP = 0, 11, 12, 13, 255

# HU unenhanced, gain at full arterial phase, at full venous phase, spread between subjects,
# amplitude of the texture.
MATERIALS = {
    "fat": (-105, 0, 0, 4, 9),
    "visceral_fat": (-100, 0, 0, 4, 16),
    "skin": (10, 5, 10, 5, 8),
    "muscle": (48, 3, 12, 4, 9),
    "cortex": (620, 0, 0, 90, 60),
    "marrow": (170, 5, 10, 50, 40),
    "cartilage": (95, 0, 5, 10, 10),
    "disc": (80, 0, 0, 10, 8),
    "fluid": (12, 0, 0, 6, 3),
    "lung": (-860, 3, 8, 20, 22),
    "air": (-990, 0, 0, 3, 2),
    "artery": (45, 250, 85, 10, 3),
    "vein": (42, 30, 110, 8, 3),
    "myocardium": (45, 45, 55, 6, 6),
    "liver": (52, 8, 55, 5, 6),
    "portal": (42, 15, 135, 6, 2),
    "spleen": (46, 55, 70, 5, 9),
    "renal_cortex": (36, 130, 130, 10, 8),
    "medulla": (30, 15, 105, 8, 6),
    "pancreas": (40, 40, 40, 6, 20),
    "bowel_wall": (38, 25, 50, 6, 6),
    "bowel_content": (20, 0, 0, 14, 22),
    "stool": (-20, 0, 0, 40, 110),
    "gas": (-900, 0, 0, 30, 20),
}
LAYERS = ("air", "skin", "fat", "muscle", "visceral_fat")
MATERIAL = {name: number for number, name in enumerate(MATERIALS)}


class Paint:
    """What a shape does to the regions.

    Attributes
    ----------
    region : int
        What the voxels inside the shape become; `KEEP` leaves them as they are.
    inside : int
        Regions that may be painted, one bit each; all but `OUTSIDE` by default.
    """

    def __init__(self, region: int | str = KEEP, inside: Iterable[int | str] = ()) -> None:
        self.region = _number(region)
        self.inside = sum(1 << _number(name) for name in inside) or 0xFFFFFFFF ^ (1 << OUTSIDE)


def _number(region: int | str) -> int:
    return REGION[region] if isinstance(region, str) else region


class Shape(NamedTuple):
    """One shape: parameters (12,), and corners (2, 3) of its box, in template mm."""

    kind: int
    params: Floats
    box: Floats
    material: int
    region: int
    inside: int


class Shapes(list[Shape]):
    """Shapes in the order of painting, the last one wins; a point is (z, y, x) in mm."""

    def capsule(
        self, a: Point, b: Point, radii: tuple[float, float], material: str, paint: Paint
    ) -> None:
        """Add a round cone from `a` to `b`."""
        ends, reach = np.array([a, b]), np.array(radii)[:, None]
        box = np.array([(ends - reach).min(axis=0), (ends + reach).max(axis=0)])
        params = np.array((*a, *b, *radii, 0, 0, 0, 0), np.float64)
        self._add(CAPSULE, params, box, material, paint)

    def tube(self, line: Floats, material: str, paint: Paint, shell: float = 0) -> None:
        """Add capsules along (z, y, x, radius), each radius less by `shell`."""
        for a, b in pairwise(line):
            radii = (float(a[3]) - shell, float(b[3]) - shell)
            self.capsule(a[:3], b[:3], radii, material, paint)

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        material: str,
        paint: Paint,
        turn: Point = (0, 0, 0),
        drum: bool = False,
    ) -> None:
        """Add an ellipsoid (or a drum: flat ends along z), turned about z, y and x (radians)."""
        turned = rotation(*turn)
        to_unit = turned.T / np.array(radii)[:, None]
        reach = np.sqrt(((turned * radii) ** 2).sum(axis=1)) * (1.2 if drum else 1.0)
        box = np.array([centre - reach, centre + reach])
        params = np.array((*centre, *to_unit.ravel()), np.float64)
        self._add(DRUM if drum else ELLIPSOID, params, box, material, paint)

    def _add(self, kind: int, params: Floats, box: Floats, material: str, paint: Paint) -> None:
        self.append(Shape(kind, params, box, MATERIAL[material], paint.region, paint.inside))


def centreline(text: str, side: int = 1) -> Floats:
    """Parse "z y x radius, …" (mm), mirrored to the right for side −1."""
    rows = [[float(number) for number in row.split()] for row in text.split(",")]
    line: Floats = np.array(rows) * (1, 1, side, 1)
    return line
