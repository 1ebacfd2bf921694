"""A family of whole-body CT phantoms: one template anatomy, deformed anew for every seed.

The template is a list of implicit shapes (capsules, ellipsoids, drums) in template
millimetres, painted in order; the last one wins. It repeats every `PERIOD` mm along z, so a
volume of any height has the same density of content. A subject is a smooth motion of space
(size, turn, shift, waves), an amount of fat, a contrast phase and a little clutter of its
own. A voxel depends on nothing but the seed, the grid and its own index, so a volume can be
made slab by slab. Knows nothing of Zarr or Dask.

Phantoms are for demonstrations and timing; they say nothing about accuracy on patients.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from isal import igzip
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter

from atlas_store.organs import load_organs
from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.jit import kernel
from kpt_dask.nifti import FROM_IJK, FROM_RAS_XYZ
from kpt_dask.output import check_absent, replacing

Floats = NDArray[np.float64]
Shape = tuple[int, int, int]
Point = Sequence[float] | Floats

PERIOD = 700.0
"""Height of the template, mm; above it the body begins anew."""
NOISE = 12.0
"""Standard deviation of the noise, HU."""
_SKIN = 2.5  # mm
_SQUARENESS = 0.6
_CELLS_PER_MM = 128 / PERIOD
_CAPSULE, _ELLIPSOID, _DRUM = 0, 1, 2

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
# Where a shape may be painted is a set of regions, one bit each; the organs are regions 1..10.
_REGION = {name: number for number, name in enumerate(ORGANS, start=1)}
_OUTSIDE, _CAVITY, _WALL, _BONE, _KEEP = 0, 11, 12, 13, 255
_BODY = ~np.uint32(1)

# HU unenhanced, gain at full arterial phase, at full venous phase, spread between subjects,
# amplitude of the texture.
_MATERIALS = {
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
_LAYERS = ("air", "skin", "fat", "muscle", "visceral_fat")
_MATERIAL = {name: number for number, name in enumerate(_MATERIALS)}

# Half width, half depth and thickness of the muscle wall at heights z, mm.
_OUTLINE = np.array(
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


@dataclass
class _Shapes:
    """Shapes in the order of painting; a point is (z, y, x) in mm."""

    kinds: list[int] = field(default_factory=list)
    params: list[Floats] = field(default_factory=list)
    boxes: list[Floats] = field(default_factory=list)
    materials: list[int] = field(default_factory=list)
    regions: list[int] = field(default_factory=list)
    insides: list[int] = field(default_factory=list)

    def _add(
        self, kind: int, params: Iterable[float], box: Floats, material: str, paint: "_Paint"
    ) -> None:
        self.kinds.append(kind)
        self.params.append(np.fromiter(params, np.float64))
        self.boxes.append(box)
        self.materials.append(_MATERIAL[material])
        self.regions.append(paint.region)
        self.insides.append(paint.inside)

    def capsule(
        self, a: Point, b: Point, radii: tuple[float, float], material: str, paint: "_Paint"
    ) -> None:
        """Add a round cone from `a` to `b`."""
        ends, reach = np.array([a, b]), np.array(radii)[:, None]
        box = np.array([(ends - reach).min(axis=0), (ends + reach).max(axis=0)])
        self._add(_CAPSULE, (*a, *b, *radii, 0, 0, 0, 0), box, material, paint)

    def tube(self, line: Floats, material: str, paint: "_Paint", shell: float = 0) -> None:
        """Add capsules along (z, y, x, radius), each radius less by `shell`."""
        for a, b in pairwise(line):
            radii = (float(a[3]) - shell, float(b[3]) - shell)
            self.capsule(a[:3], b[:3], radii, material, paint)

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        material: str,
        paint: "_Paint",
        turn: Point = (0, 0, 0),
        drum: bool = False,
    ) -> None:
        """Add an ellipsoid (or a drum: flat ends along z), turned about z, y and x (radians)."""
        turned = _rotation(*turn)
        to_unit = turned.T / np.array(radii)[:, None]
        reach = np.sqrt(((turned * radii) ** 2).sum(axis=1)) * (1.2 if drum else 1.0)
        box = np.array([centre - reach, centre + reach])
        kind = _DRUM if drum else _ELLIPSOID
        self._add(kind, (*centre, *to_unit.ravel()), box, material, paint)


@dataclass(frozen=True)
class _Paint:
    """What a shape does to the regions: which one it makes, within which it may."""

    region: int
    inside: int


def _paint(region: int | str = _KEEP, inside: Iterable[int | str] = ()) -> _Paint:
    def number(name: int | str) -> int:
        return _REGION[name] if isinstance(name, str) else name

    bits = sum(1 << number(name) for name in inside)
    return _Paint(number(region), bits or int(_BODY))


def _line(text: str, side: int = 1) -> Floats:
    """Parse "z y x radius, …" (mm), mirrored to the right for side −1."""
    rows = [[float(number) for number in row.split()] for row in text.split(",")]
    line: Floats = np.array(rows) * (1, 1, side, 1)
    return line


def _rotation(about_z: float, about_y: float, about_x: float) -> Floats:
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


@lru_cache(maxsize=1)
def _outline() -> Floats:
    """Half width, half depth, wall at every mm of height: shape (701, 3)."""
    knots = np.concatenate(
        [_OUTLINE + np.array((shift, 0, 0, 0)) for shift in (-PERIOD, 0, PERIOD)]
    )
    table: Floats = PchipInterpolator(knots[:, 0], knots[:, 1:])(np.arange(PERIOD + 1))
    return table


def _on_outline(z: float, angle: float, depth: float) -> tuple[float, float, float]:
    """Point `depth` mm under the muscles' surface, `angle` from the back towards the left."""
    half_width, half_depth, _ = _outline()[int(z) % int(PERIOD)]
    x, y = np.sin(angle) / (half_width - depth), np.cos(angle) / (half_depth - depth)
    radius = (x**4 + y**4 + 2 * _SQUARENESS * x * x * y * y) ** -0.25
    return z, radius * np.cos(angle), radius * np.sin(angle)


def _spine_y(z: float) -> float:
    return float(
        np.interp(z, [60, 100, 150, 230, 330, 450, 560, 680], [62, 64, 50, 43, 45, 48, 36, 24])
    )


def _grow_tree(
    shapes: _Shapes,
    rng: np.random.Generator,
    root: Point,
    organ: Sequence[tuple[Point, Point]],
    pitch: float,
    leaf: float,
    material: str,
    paint: _Paint,
) -> None:
    """Grow a vessel tree from `root` that reaches into every part of a union of ellipsoids.

    Tips lie on a jittered lattice; each, in the order of its distance from the root, joins
    the nearest branch that is not a detour. Radii follow Murray's law, from `leaf` mm.
    """
    low = np.min([np.subtract(centre, radii) for centre, radii in organ], axis=0)
    high = np.max([np.add(centre, radii) for centre, radii in organ], axis=0)
    axes = [np.arange(a, b, pitch) for a, b in zip(low, high, strict=True)]
    tips = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    tips = tips + rng.uniform(-0.45, 0.45, tips.shape) * pitch
    within = [(((tips - c) / np.array(r)) ** 2).sum(axis=1) < 0.95 for c, r in organ]
    tips = tips[np.any(within, axis=0)]
    tips = tips[np.argsort(np.linalg.norm(tips - root, axis=1))]
    nodes = np.vstack([root, tips])
    way, parent = np.zeros(len(nodes)), np.zeros(len(nodes), int)
    for i in range(1, len(nodes)):
        step = np.linalg.norm(nodes[:i] - nodes[i], axis=1)
        parent[i] = np.argmin(step + 0.35 * way[:i])
        way[i] = way[parent[i]] + step[parent[i]]
    load = np.ones(len(nodes))
    for i in range(len(nodes) - 1, 0, -1):
        load[parent[i]] += load[i]
    radii = leaf * load ** (1 / 2.7)
    for i in range(1, len(nodes)):
        thickness = (min(radii[parent[i]], 1.25 * radii[i]), radii[i])
        shapes.capsule(nodes[parent[i]], nodes[i], thickness, material, paint)


@lru_cache(maxsize=1)
def _template() -> _Shapes:
    """Make the anatomy that all subjects share. Right is x < 0, the front y < 0."""
    rng = np.random.default_rng(20150628)
    shapes = _Shapes()
    _chest(shapes, rng)
    _abdomen(shapes, rng)
    _vessels_and_airway(shapes)
    _bones(shapes, rng)
    return shapes


def _chest(shapes: _Shapes, rng: np.random.Generator) -> None:
    for side, name in ((-1, "lung_right"), (1, "lung_left")):
        paint, within = _paint(name, (_CAVITY, name)), _paint(inside=(name,))
        lobes = [
            ((464, 0, side * 63), (120, 76, 54)),
            ((395, 10, side * 68), (84, 76, 52)),
        ]
        for centre, radii in lobes:
            shapes.ellipsoid(centre, radii, "lung", paint)
        hilum = (455, 5, side * 22)
        _grow_tree(shapes, rng, hilum, lobes, 27, 1.5, "air", within)
        _grow_tree(shapes, rng, hilum, lobes, 16, 1.25, "vein", within)
        _grow_tree(shapes, rng, (430, 0, side * 20), lobes, 21, 1.25, "vein", within)
    chest = _paint(_CAVITY, (_CAVITY, "lung_right", "lung_left"))
    for side, name, top in ((-1, "lung_right", 106), (1, "lung_left", 94)):
        dome = (300, 5, side * 60)
        shapes.ellipsoid(dome, (top, 76, 64), "muscle", _paint(_CAVITY, (name,)))
        shapes.ellipsoid(dome, (top - 3, 73, 61), "visceral_fat", _paint(inside=(_CAVITY,)))
    shapes.ellipsoid((515, -2, 2), (95, 52, 33), "visceral_fat", chest)
    shapes.ellipsoid((418, -30, 20), (58, 50, 60), "visceral_fat", chest)
    shapes.ellipsoid((418, -29, 21), (52, 44, 54), "myocardium", chest, turn=(0.3, 0.4, 0))
    shapes.ellipsoid((408, -24, 44), (30, 22, 20), "artery", chest, turn=(0.3, 0.5, 0))
    shapes.ellipsoid((412, -50, 14), (28, 16, 24), "vein", chest, turn=(0.3, 0.4, 0))
    shapes.ellipsoid((440, 0, 14), (20, 15, 26), "artery", chest)
    shapes.ellipsoid((420, -26, -20), (28, 22, 15), "vein", chest)
    shapes.tube(_line("440 -48 18 13, 468 -30 22 13, 470 -5 5 11"), "vein", chest)
    shapes.tube(_line("458 5 -40 7, 468 -8 6 10, 458 5 40 7"), "vein", chest)
    esophagus = _line("640 18 3 7, 520 24 4 7, 420 20 8 7, 372 5 25 8")
    shapes.tube(esophagus, "muscle", _paint())


def _abdomen(shapes: _Shapes, rng: np.random.Generator) -> None:
    soft = _paint(inside=(_CAVITY,))
    pelvis = _paint(_CAVITY, (_CAVITY, _WALL))
    shapes.ellipsoid((60, -8, 0), (85, 62, 62), "visceral_fat", pelvis)
    _bowel(shapes, rng, soft)
    shapes.ellipsoid((52, -38, 0), (26, 28, 38), "bowel_wall", pelvis)
    shapes.ellipsoid((52, -38, 0), (23, 25, 35), "fluid", pelvis)
    stomach = _line("372 15 52 30, 350 -12 60 33, 318 -42 50 27, 300 -56 20 19, 296 -48 -12 13")
    shapes.tube(stomach, "bowel_wall", soft)
    shapes.tube(stomach, "bowel_content", soft, shell=4)
    shapes.ellipsoid((345, -34, 56), (26, 13, 19), "gas", soft, turn=(0, 0, -0.5))
    pancreas = _line("285 -25 -35 15, 292 -22 -10 11, 300 -5 20 11, 318 15 62 9")
    shapes.tube(pancreas, "pancreas", soft)

    liver = _paint("liver", (_CAVITY, "liver"))
    in_liver = _paint(inside=("liver",))
    lobes = [
        ((330, 4, -60), (70, 68, 50)),
        ((288, 8, -72), (58, 50, 36)),
        ((352, -34, -8), (34, 38, 56)),
    ]
    for centre, radii in lobes:
        shapes.ellipsoid(centre, radii, "liver", liver)
    _grow_tree(shapes, rng, (318, -12, -30), lobes, 17, 1.2, "portal", in_liver)
    _grow_tree(shapes, rng, (388, 4, -24), lobes, 21, 1.4, "vein", in_liver)
    shapes.ellipsoid((282, -52, -46), (26, 15, 14), "fluid", _paint(_CAVITY, (_CAVITY, "liver")))

    spleen = _paint("spleen", (_CAVITY, "spleen"))
    body = [((335, 36, 84), (48, 36, 24)), ((325, 52, 76), (36, 24, 24))]
    for centre, radii in body:
        shapes.ellipsoid(centre, radii, "spleen", spleen)
    _grow_tree(shapes, rng, (330, 30, 60), body, 17, 1.0, "vein", _paint(inside=("spleen",)))

    for side, name, z in ((-1, "kidney_right", 250), (1, "kidney_left", 262)):
        _kidney(shapes, name, side, z)
        shapes.ellipsoid((z + 62, 38, side * 42), (7, 14, 4), "pancreas", soft, turn=(0.6, 0, 0))
    for side, name in ((-1, "psoas_right"), (1, "psoas_left")):
        muscle = "285 46 25 7, 240 45 34 13, 180 38 45 20, 120 18 57 19, 70 -16 66 13, 45 -18 70 8"
        shapes.tube(_line(muscle, side), "muscle", _paint(name, (_CAVITY, _WALL, name)))


def _kidney(shapes: _Shapes, name: str, side: int, z: float) -> None:
    paint, within = _paint(name, (_CAVITY, name, "liver", "spleen")), _paint(inside=(name,))
    turn = (-side * 0.5, -side * 0.15, 0)
    x = side * 60
    shapes.ellipsoid((z, 42, x), (54, 28, 25), "renal_cortex", paint, turn=turn)
    for row in range(6):
        for lean in (-1, 1):
            height = z - 38 + 15.2 * row
            out = 6 * np.sqrt(1 - (0.4 * row - 1) ** 2 * 0.8)
            centre = (height, 42 + lean * 11, x + side * out * (1.2 if lean > 0 else 0.6))
            shapes.ellipsoid(
                centre, (5.5, 6.5, 7), "medulla", within, turn=(lean * side * 0.8, 0, 0)
            )
    shapes.ellipsoid((z, 38, x - side * 12), (24, 9, 14), "fat", within)
    shapes.tube(_line(f"{z} 38 54 5, {z} 30 30 4", side), "vein", _paint())
    for reach in (-16, 0, 16):
        calyx = _line(f"{z} 38 54 3, {z + reach} 41 63 2", side)
        shapes.tube(calyx, "fluid", within)


def _bowel(shapes: _Shapes, rng: np.random.Generator, paint: _Paint) -> None:
    def gut(points: Sequence[Point], radius: float, fills: Sequence[str]) -> None:
        for a, b in pairwise(points):
            r = radius * rng.uniform(0.8, 1.2)
            shapes.capsule(a, b, (r, r), "bowel_wall", paint)
            fill = fills[int(rng.integers(len(fills)))]
            shapes.capsule(a, b, (r - 2.5, r - 2.5), fill, paint)

    # Loops of the small bowel: a walk that turns back at the border of its ellipsoid.
    centre, radii = np.array((160.0, -26, 0)), np.array((85.0, 46, 76))
    here, heading, walk = centre.copy(), np.array((0.0, 0, 1)), []
    for _ in range(260):
        walk.append(here)
        outwards = (here - centre) / radii
        heading = heading + rng.normal(0, 0.7, 3) - 1.1 * outwards * (outwards @ outwards > 0.7)
        heading /= np.linalg.norm(heading)
        here = here + 13 * heading
    gut(walk, 11.5, ("bowel_content", "bowel_content", "bowel_content", "bowel_wall", "gas"))

    frame = _line(
        "105 -5 -72 0, 150 0 -82 0, 200 4 -84 0, 235 -10 -80 0, 240 -45 -62 0, 222 -62 -30 0,"
        "215 -66 5 0, 225 -62 40 0, 262 -40 70 0, 285 0 84 0, 240 18 84 0, 190 18 82 0,"
        "140 10 80 0, 110 0 62 0, 95 10 35 0, 105 32 5 0, 80 48 0 0, 35 44 0 0"
    )[:, :3]
    knots = PchipInterpolator(np.arange(len(frame)), frame)(np.arange(0, len(frame) - 1, 0.25))
    gut(list(knots), 17, ("stool", "stool", "stool", "gas", "bowel_content"))


def _vessels_and_airway(shapes: _Shapes) -> None:
    anywhere = _paint(_CAVITY)
    cava = _line("190 22 -16 10, 300 16 -24 11, 385 2 -24 12, 412 -10 -22 12")
    shapes.tube(cava, "vein", _paint(_CAVITY, (_CAVITY, *ORGANS)))
    shapes.tube(_line("425 -16 -26 9, 525 -10 -28 9"), "vein", anywhere)
    for side in (-1, 1):
        iliac = "195 20 6 7, 125 6 42 6, 70 -40 60 5.5, 0 -62 66 5"
        shapes.tube(_line(iliac, side), "artery", anywhere)
        iliac = "197 31 2 8, 127 17 38 7, 72 -29 56 6.5, 2 -51 62 6"
        shapes.tube(_line(iliac, side), "vein", anywhere)
        shapes.tube(_line("505 -8 10 5, 560 -8 24 4, 650 2 30 3.5", side), "artery", anywhere)
        jugular = f"525 -12 {-28 * side} 7, 575 -16 36 7, 650 -6 40 6"
        shapes.tube(_line(jugular, side), "vein", anywhere)
        shapes.tube(_line("255 22 8 3.5, 252 34 40 3", side), "artery", anywhere)
    for branch in (
        "318 12 12 4, 305 -20 10 3",
        "300 12 12 4, 230 -25 2 3",
        "326 12 12 4, 330 -5 -20 3",
    ):
        shapes.tube(_line(branch), "artery", anywhere)
    aorta = _line(
        "438 -24 0 14, 480 -30 -8 14, 506 -18 -2 13.5, 514 4 12 13, 500 22 21 12.5, 470 27 23 12,"
        "400 22 22 11.5, 300 16 13 10.5, 240 15 6 9.5, 192 17 2 8.5"
    )
    shapes.tube(aorta, "artery", _paint("aorta"))
    windpipe = _line("655 -18 0 9.5, 570 -8 0 9.5, 486 4 0 10")
    shapes.tube(windpipe, "muscle", anywhere)
    for side in (-1, 1):
        bronchus = _line("486 4 0 8, 462 8 24 6.5", side)
        shapes.tube(bronchus, "muscle", anywhere)
        shapes.tube(bronchus, "air", anywhere, shell=1.5)
        thyroid = (612, -20, side * 17)
        shapes.ellipsoid(thyroid, (20, 9, 9), "renal_cortex", anywhere)
    shapes.tube(windpipe, "air", _paint("trachea"), shell=1.5)


def _bones(shapes: _Shapes, rng: np.random.Generator) -> None:
    bone, marrow = _paint(_BONE), _paint(inside=(_BONE,))

    def plate(centre: Point, radii: Point, turn: Point, shell: float = 2.2) -> None:
        shapes.ellipsoid(centre, radii, "cortex", bone, turn=turn)
        shapes.ellipsoid(centre, np.array(radii) - shell, "marrow", marrow, turn=turn)

    def rod(line: Floats, shell: float = 1.6) -> None:
        shapes.tube(line, "cortex", bone)
        shapes.tube(line, "marrow", marrow, shell=shell)

    for side in (-1, 1):
        back = [(z, _outline()[z, 1] - 20, side * 27, 17) for z in range(110, 640, 30)]
        shapes.tube(np.array(back), "muscle", _paint(_WALL, (_CAVITY, _WALL)))
    for z in np.arange(87.5, 680, 25):
        _vertebra(shapes, rng, float(z))
    for number in range(12):
        for side in (-1, 1):
            _rib(shapes, number, side)
    plate((452, -80, 0), (72, 6.5, 17), (0, 0, -0.08))
    plate((520, -70, 0), (20, 7, 24), (0, 0, -0.2))

    for side in (-1, 1):
        plate((492, 66, side * 84), (60, 5.5, 40), (-side * 0.45, side * 0.1, 0.1), 1.8)
        rod(_line("520 80 60 6, 548 66 108 8", side))
        rod(_line("545 -56 16 8, 562 -40 60 6, 572 -2 104 6.5", side))
        plate((556, 18, side * 108), (21, 20, 20), (0, 0, 0))
        plate((142, 32, side * 80), (58, 52, 7.5), (side * 0.72, side * 0.25, 0))
        plate((100, 55, side * 48), (30, 26, 12), (side * 0.7, 0, 0))
        plate((58, 4, side * 82), (31, 31, 29), (0, 0, 0), 4)
        shapes.ellipsoid((56, 3, side * 86), (26, 26, 26), "cartilage", bone)
        plate((56, 3, side * 86), (22.5, 22.5, 22.5), (0, 0, 0))
        rod(_line("54 4 90 13, 32 12 112 15, -30 8 106 13", side), 3.5)
        rod(_line("52 -24 68 9, 44 -58 8 8.5", side))
        rod(_line("44 24 70 13, 8 26 56 11, 14 -30 30 7, 40 -58 9 7", side))


def _rib(shapes: _Shapes, number: int, side: int) -> None:
    """Paint a rib, from its vertebra around the wall; the lowest two end free."""
    bone, z = _paint(_BONE), 352 + 18.3 * number
    end = (1.5, 1.9)[number] if number < 2 else 2.75
    start, drop = _spine_y(z), 62 - 2.5 * max(number - 5, 0) ** 1.4
    path = [(z + 2, start + 8, side * 17.0), (z + 3, start + 17, side * 30.0)]
    for angle in np.linspace(0.55, end, 13):
        path.append(_on_outline(z - drop * (1 - np.cos(angle)) / 2, side * angle, 13))
    line = np.column_stack([path, 5 + 0.6 * np.sin(np.arange(len(path)))])
    bony = line if number < 2 else line[:12]
    shapes.tube(bony, "cortex", bone)
    shapes.tube(bony, "marrow", _paint(inside=(_BONE,)), shell=1.6)
    shapes.tube(line[len(bony) - 1 :], "cartilage", bone)


def _vertebra(shapes: _Shapes, rng: np.random.Generator, z: float) -> None:
    bone, marrow = _paint(_BONE), _paint(inside=(_BONE,))
    y = _spine_y(z)
    size = float(np.interp(z, [80, 250, 420, 600, 680], [1.05, 1.08, 0.92, 0.7, 0.62]))
    size *= rng.uniform(0.95, 1.05)
    tilt = (0, 0, float(np.arctan((_spine_y(z + 12) - _spine_y(z - 12)) / 24)))
    twist = rng.uniform(-3, 3, 3)
    disc = (z + 12.5, _spine_y(z + 12.5), 0)
    shapes.ellipsoid(disc, (4, 15 * size, 19.5 * size), "disc", bone, tilt, drum=True)
    shapes.ellipsoid((z, y, 0), (9.6, 15.5 * size, 20.5 * size), "cortex", bone, tilt, drum=True)
    shapes.ellipsoid((z, y, 0), (7.6, 13.5 * size, 18.5 * size), "marrow", marrow, tilt, drum=True)
    shapes.capsule((z, y, 0), (z, y + 14 * size, 0), (2, 2.5), "vein", marrow)
    canal, tip = y + 25 * size, min(y + 47 * size, _outline()[int(z), 1] - 4)
    for x in (-size, size):
        foot, knee, joint = (z + 2, y + 12 * size, 13 * x), (z, canal + 4, 12 * x), 13 * x
        across = (z + twist[1], canal + 3 + twist[0], 36 * x)
        shapes.capsule(foot, knee, (5, 5), "cortex", bone)
        shapes.capsule(knee, (z - 4, canal + 9 * size, 0), (4.5, 4), "cortex", bone)
        shapes.capsule(knee, across, (4.5, 3.5), "cortex", bone)
        shapes.capsule(knee, across, (2.8, 2), "marrow", marrow)
        shapes.capsule((z - 9, canal + 3, joint), (z + 9, canal + 5, joint), (4, 4), "cortex", bone)
    arch, spinous = (z - 4, canal + 9 * size, 0), (z - 13 + twist[2], tip, twist[0] / 2)
    shapes.capsule(arch, spinous, (4, 4.5), "cortex", bone)
    shapes.capsule(arch, spinous, (2, 2.8), "marrow", marrow)
    for radius, material in ((8, "fluid"), (4.5, "muscle")):
        cord = (z - 13, canal, 0), (z + 13, canal, 0)
        shapes.capsule(*cord, (radius, radius), material, _paint(_WALL))


@lru_cache(maxsize=1)
def _texture() -> NDArray[np.float32]:
    """Make noise of unit variance that repeats every 64 cells, shape (64, 64, 64)."""
    white = np.random.default_rng(7).standard_normal((64, 64, 64))
    smooth = gaussian_filter(white, 0.8, mode="wrap")
    texture: NDArray[np.float32] = (smooth / smooth.std()).astype(np.float32)
    return texture


class _Motion(NamedTuple):
    """Takes world mm to template mm: size, turn about z and shift, then waves."""

    linear: Floats
    offset: Floats
    wave: Floats
    phase: Floats
    amplitude: Floats

    def to_template(self, points: Floats) -> Floats:
        # Good to a micrometre, and several times faster than in double precision.
        phase = (points @ self.wave.T + self.phase).astype(np.float32)
        waves = np.cos(phase) @ self.amplitude
        moved: Floats = points @ self.linear.T + self.offset + waves
        return moved

    def to_world(self, points: Floats) -> Floats:
        """Invert by fixed-point iteration; the waves' slope is well below one."""
        inverse = np.linalg.inv(self.linear)
        world = (points - self.offset) @ inverse.T
        for _ in range(4):
            world = world + (points - self.to_template(world)) @ inverse.T
        return world


def _motion(rng: np.random.Generator) -> _Motion:
    size = rng.uniform(0.95, 1.06) * rng.uniform(0.98, 1.02, 3)
    linear = np.diag(1 / size) @ _rotation(rng.uniform(-0.06, 0.06), 0, 0)
    length = np.array([130, 150, 180, 210, 250, 300, 380, 480, 1500])
    direction = rng.standard_normal((len(length), 3))
    direction[-1] = 1, 0, 0
    direction /= np.linalg.norm(direction, axis=1)[:, None]
    push = rng.standard_normal((len(length), 3))
    push *= (0.011 * np.minimum(length, 600) / np.linalg.norm(push, axis=1))[:, None]
    return _Motion(
        linear=linear,
        offset=rng.uniform((-14, -4, -6), (14, 4, 6)),
        wave=2 * np.pi * direction / length[:, None],
        phase=rng.uniform(0, 2 * np.pi, len(length)),
        amplitude=push,
    )


class _Subject(NamedTuple):
    """One seed's motion, tissues, and shapes in the order of painting; kernels take it whole."""

    motion: _Motion
    fat: float
    layers: Floats
    hu: Floats
    grain: Floats
    kinds: NDArray[np.uint8]
    params: Floats
    regions: NDArray[np.uint8]
    insides: NDArray[np.uint32]
    low: Floats
    high: Floats


@lru_cache(maxsize=4)
def _subject(seed: int, height: float) -> _Subject:
    """Make the subject of a seed, tall enough for `height` mm."""
    rng = np.random.default_rng(seed)
    motion, fat = _motion(rng), float(rng.uniform(6, 19))
    table = np.array(list(_MATERIALS.values()), dtype=np.float64)
    arterial, venous = rng.uniform(0.1, 1), rng.uniform(0.35, 1)
    spread = rng.uniform(-1, 1, len(table)) * table[:, 3]
    hu = table[:, 0] + arterial * table[:, 1] + venous * table[:, 2] + spread

    top = motion.to_template(np.array([[0.0, 0, 0], [height, 0, 0]]))[:, 0]
    tiles = range(int(top[0] // PERIOD) - 1, int(top[1] // PERIOD) + 2)
    # The template goes to every tile, clutter to its own; within a tile the order is kept.
    where = [(_template(), tile) for tile in tiles]
    where += [(_clutter(np.random.default_rng((seed, tile + 9))), tile) for tile in tiles]

    def gathered(name: str, dtype: type[np.generic]) -> NDArray[Any]:
        return np.concatenate([np.array(getattr(part, name), dtype) for part, _ in where])

    shift = np.concatenate([np.full(len(part.kinds), tile * PERIOD) for part, tile in where])
    kinds, materials = gathered("kinds", np.uint8), gathered("materials", np.uint8)
    params, boxes = gathered("params", np.float64), gathered("boxes", np.float64)
    params[:, 0] += shift
    params[kinds == _CAPSULE, 3] += shift[kinds == _CAPSULE]
    boxes[:, :, 0] += shift[:, None]
    near = (boxes[:, 1, 0] > top[0] - 80) & (boxes[:, 0, 0] < top[1] + 80)
    low, high = _world_boxes(motion, boxes[near])
    return _Subject(
        motion=motion,
        fat=fat,
        layers=hu[[_MATERIAL[name] for name in _LAYERS]],
        hu=hu[materials[near]],
        grain=table[materials[near], 4],
        kinds=kinds[near],
        params=params[near],
        regions=gathered("regions", np.uint8)[near],
        insides=gathered("insides", np.uint32)[near],
        low=low,
        high=high,
    )


def _world_boxes(motion: _Motion, boxes: Floats) -> tuple[Floats, Floats]:
    """Boxes in the world that hold template boxes (n, 2, 3): lower and upper corners, mm."""
    corner = np.array(np.meshgrid(*[(0.0, 0.5, 1.0)] * 3, indexing="ij")).reshape(3, -1).T
    low, extent = boxes[:, 0], boxes[:, 1] - boxes[:, 0]
    points = low[:, None] + corner * extent[:, None]
    world = motion.to_world(points.reshape(-1, 3)).reshape(points.shape)
    # Between the 27 points an edge bends by less than this; tested against no boxes at all.
    margin = 1 + 0.05 * extent.max(axis=1, keepdims=True)
    return world.min(axis=1) - margin, world.max(axis=1) + margin


def _clutter(rng: np.random.Generator) -> _Shapes:
    """Make what one subject alone has: nodes, gas, calcifications, cysts."""
    shapes, anywhere = _Shapes(), _paint(inside=(_CAVITY, *ORGANS))
    for material in rng.choice(["muscle", "gas", "cortex", "fluid", "vein", "fat"], 40):
        centre = rng.uniform((20, -60, -100), (680, 60, 100))
        small = 0.4 if material in ("gas", "cortex") else 1.0
        radii = small * rng.uniform(2.5, 7, 3)
        shapes.ellipsoid(centre, radii, material, anywhere, turn=rng.uniform(-1, 1, 3))
    return shapes


@kernel
def _mix(key: np.uint64) -> np.uint64:
    """Scramble 64 bits (splitmix64's finalizer)."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


@kernel
def _noise_plane(seed: int, z: int, row: Any, plane: Any) -> None:
    """Fill a plane with noise of unit variance, a function of seed and index alone.

    White noise (the sum of four uniform numbers out of 64 hashed bits) is smoothed with
    weights (s, 1, s) along both axes, as a reconstruction kernel would.
    """
    ny, nx = plane.shape
    s = 0.45
    scale = 1 / (37837.227 * (1 + 2 * s * s))
    plane[:] = 0.0
    key = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(z + 1))
    low = np.uint64(0xFFFF)
    for y in range(-1, ny + 1):
        start = _mix(key + np.uint64(y + 1) * np.uint64(0xD1B54A32D192ED03))
        for x in range(nx + 2):
            h = _mix(start + np.uint64(x) * np.uint64(0x9E3779B97F4A7C15))
            total = (h & low) + ((h >> np.uint64(16)) & low)
            total += ((h >> np.uint64(32)) & low) + (h >> np.uint64(48))
            row[x] = np.float64(np.int64(total)) - 131070.0
        for target in range(max(y - 1, 0), min(y + 2, ny)):
            weight = scale if target == y else scale * s
            for x in range(nx):
                plane[target, x] += weight * (row[x + 1] + s * (row[x] + row[x + 2]))


@kernel
def _lookup(table: Any, z: float, y: float, x: float) -> float:
    """Interpolate the repeating texture at a point, cells."""
    fz, fy, fx = np.floor(z), np.floor(y), np.floor(x)
    z, y, x = z - fz, y - fy, x - fx
    z0, y0, x0 = np.int64(fz) & 63, np.int64(fy) & 63, np.int64(fx) & 63
    z1, y1, x1 = (z0 + 1) & 63, (y0 + 1) & 63, (x0 + 1) & 63
    a = table[z0, y0, x0] * (1 - x) + table[z0, y0, x1] * x
    b = table[z0, y1, x0] * (1 - x) + table[z0, y1, x1] * x
    c = table[z1, y0, x0] * (1 - x) + table[z1, y0, x1] * x
    d = table[z1, y1, x0] * (1 - x) + table[z1, y1, x1] * x
    low: float = a * (1 - y) + b * y
    high: float = c * (1 - y) + d * y
    return low * (1 - z) + high * z


@kernel
def _distance(kind: int, p: Any, z: float, y: float, x: float) -> float:
    """About the distance from a shape's surface in mm, negative inside."""
    z, y, x = z - p[0], y - p[1], x - p[2]
    if kind == _CAPSULE:
        az, ay, ax = p[3] - p[0], p[4] - p[1], p[5] - p[2]
        along = (z * az + y * ay + x * ax) / (az * az + ay * ay + ax * ax)
        along = min(max(along, 0.0), 1.0)
        z, y, x = z - along * az, y - along * ay, x - along * ax
        radius: float = p[6] + along * (p[7] - p[6])
        return float(np.sqrt(z * z + y * y + x * x)) - radius
    u = p[3] * z + p[4] * y + p[5] * x
    v = p[6] * z + p[7] * y + p[8] * x
    w = p[9] * z + p[10] * y + p[11] * x
    if kind == _ELLIPSOID:
        level = np.sqrt(u * u + v * v + w * w)
        slope = level
    else:
        across = v * v + w * w
        u3, across3 = u * u * u, across * across * across
        power = u3 * u3 * u * u + across3 * across
        level = np.sqrt(np.sqrt(np.sqrt(power)))
        slope = power / level
        u, v, w = u3 * u3 * u, across3 * v, across3 * w
    gz = p[3] * u + p[6] * v + p[9] * w
    gy = p[4] * u + p[7] * v + p[10] * w
    gx = p[5] * u + p[8] * v + p[11] * w
    steepness = np.sqrt(gz * gz + gy * gy + gx * gx)
    if steepness < 1e-12:
        return -1e3
    distance: float = (level - 1) * slope / steepness
    return distance


@kernel
def _cover(distance: float, edge: float) -> float:
    """Share of a voxel that lies inside."""
    return min(max(0.5 - distance / edge, 0.0), 1.0)


@kernel
def _paint_body(
    z: float,
    y: float,
    x: float,
    grain: float,
    air: float,
    outline: Any,
    fat: float,
    hu: Any,
    edge: float,
) -> tuple[float, int]:
    """HU and region of the body without its organs: cavity, muscles, fat, skin."""
    period = outline.shape[0] - 1
    height = z - np.floor(z / period) * period
    i = min(int(height), period - 1)
    t = height - i
    a = outline[i, 0] * (1 - t) + outline[i + 1, 0] * t
    b = outline[i, 1] * (1 - t) + outline[i + 1, 1] * t
    wall = outline[i, 2] * (1 - t) + outline[i + 1, 2] * t
    X, Y = x / a, y / b
    X2, Y2 = X * X, Y * Y
    level = np.sqrt(np.sqrt(X2 * X2 + Y2 * Y2 + 2 * _SQUARENESS * X2 * Y2))
    if level < 0.3:
        return hu[4] + 16 * grain, _CAVITY
    gx, gy = X * (X2 + _SQUARENESS * Y2) / a, Y * (Y2 + _SQUARENESS * X2) / b
    d = (level - 1) * level * level * level / np.sqrt(gx * gx + gy * gy)
    thick = fat * (1 - 0.35 * Y / level) + 0.4 * grain
    region = _OUTSIDE if d > thick + _SKIN else _CAVITY if d < -wall else _WALL
    if d - thick - _SKIN > edge:
        return air, region
    v = hu[4] + 16 * grain
    if d < -wall - edge:
        return v, region
    plane = (d + 0.45 * wall + 1.2 * grain) / 1.2
    muscle = hu[3] + 9 * grain
    if abs(plane) < 4:
        muscle -= 95 * np.exp(-plane * plane)
    v += _cover(-(d + wall), edge) * (muscle - v)
    v += _cover(-d, edge) * (hu[2] + 9 * grain - v)
    v += _cover(-(d - thick), edge) * (hu[1] - v)
    v += _cover(-(d - thick - _SKIN), edge) * (air - v)
    return v, region


@kernel
def _couch(y: float, x: float, air: float, edge: float) -> float:
    """HU of the couch behind the body: a thin shell around foam."""
    depth = y - 127 + 10 * (x / 160) * (x / 160)
    shell = _cover(abs(depth - 1.5) - 1.5, edge)
    return air + 60 * _cover(abs(depth - 15) - 15, edge) + shell * 600


@kernel
def _render(
    first: int,
    spacing: float,
    origin: Any,
    subject: Any,
    tables: Any,
    seed: int,
    image: Any,
    labels: Any,
) -> None:
    """Fill slabs of the image and the labels, whose plane 0 is plane `first` of the volume."""
    nz, ny, nx = image.shape
    motion, fat, layers, hu, grain, kinds, params, regions, insides, low, high = subject
    linear, offset, wave, phase, amplitude = motion
    outline, texture, label_of = tables
    waves = len(phase)
    edge = max(spacing, 1.0)
    cell = _CELLS_PER_MM
    cos_x, sin_x = np.empty((waves, nx)), np.empty((waves, nx))
    for m in range(waves):
        for i in range(nx):
            angle = wave[m, 2] * (origin[2] + spacing * i)
            cos_x[m, i], sin_x[m, i] = np.cos(angle), np.sin(angle)
    tz, ty, tx = np.empty((ny, nx)), np.empty((ny, nx)), np.empty((ny, nx))
    speckle, rest = np.empty((ny, nx)), np.empty((ny, nx))
    plane = np.empty((ny, nx))
    region = np.empty((ny, nx), np.uint8)
    row = np.empty(nx + 2)
    for k in range(nz):
        z = origin[0] + spacing * (first + k)
        _noise_plane(seed, first + k, row, rest)
        for j in range(ny):
            y = origin[1] + spacing * j
            for i in range(nx):
                x = origin[2] + spacing * i
                tz[j, i] = linear[0, 0] * z + linear[0, 1] * y + linear[0, 2] * x + offset[0]
                ty[j, i] = linear[1, 0] * z + linear[1, 1] * y + linear[1, 2] * x + offset[1]
                tx[j, i] = linear[2, 0] * z + linear[2, 1] * y + linear[2, 2] * x + offset[2]
            for m in range(waves):
                angle = wave[m, 0] * z + wave[m, 1] * y + phase[m]
                c, s = np.cos(angle), np.sin(angle)
                az, ay, ax = amplitude[m, 0], amplitude[m, 1], amplitude[m, 2]
                for i in range(nx):
                    ripple = c * cos_x[m, i] - s * sin_x[m, i]
                    tz[j, i] += az * ripple
                    ty[j, i] += ay * ripple
                    tx[j, i] += ax * ripple
            for i in range(nx):
                speckle[j, i] = _lookup(texture, tz[j, i] * cell, ty[j, i] * cell, tx[j, i] * cell)
                air = _couch(y, origin[2] + spacing * i, layers[0], edge)
                plane[j, i], region[j, i] = _paint_body(
                    tz[j, i], ty[j, i], tx[j, i], speckle[j, i], air, outline, fat, layers, edge
                )
        for n in range(len(kinds)):
            # Off the tips of oblong shapes the distance is too small: they reach further than half.
            if z < low[n, 0] - edge or z > high[n, 0] + edge:
                continue
            j0 = max(int(np.ceil((low[n, 1] - edge - origin[1]) / spacing)), 0)
            j1 = min(int(np.floor((high[n, 1] + edge - origin[1]) / spacing)) + 1, ny)
            i0 = max(int(np.ceil((low[n, 2] - edge - origin[2]) / spacing)), 0)
            i1 = min(int(np.floor((high[n, 2] + edge - origin[2]) / spacing)) + 1, nx)
            kind, p, inside = kinds[n], params[n], insides[n]
            value, rough, becomes = hu[n], grain[n], regions[n]
            for j in range(j0, j1):
                for i in range(i0, i1):
                    if not (inside >> np.uint32(region[j, i])) & np.uint32(1):
                        continue
                    d = _distance(kind, p, tz[j, i], ty[j, i], tx[j, i])
                    share = _cover(d, edge)
                    if share > 0:
                        painted = value + rough * speckle[j, i]
                        plane[j, i] += share * (painted - plane[j, i])
                        if d < 0 and becomes != _KEEP:
                            region[j, i] = becomes
        for j in range(ny):
            for i in range(nx):
                value = np.rint(plane[j, i] + NOISE * rest[j, i])
                image[k, j, i] = np.int16(min(max(value, -1024.0), 3071.0))
                labels[k, j, i] = label_of[region[j, i]]


def phantom_grid(shape: Shape = (300, 130, 160), spacing: float = 2.0) -> Grid:
    """Where a phantom's voxels lie: its feet-side face at z = 0, the body's axis in the middle.

    Parameters
    ----------
    shape : tuple of int
        Voxels along (z, y, x).
    spacing : float
        Edge length of a voxel, mm.

    Raises
    ------
    ParameterError
        If a size or the spacing is not positive.
    """
    if min(shape) < 1 or not 0 < spacing < np.inf:
        raise ParameterError(
            f"a phantom of shape {shape} at {spacing} mm cannot be made; give positive numbers."
        )
    half = spacing / 2
    return Grid.isotropic(shape, spacing, (half, half - shape[1] * half, half - shape[2] * half))


def phantom_slab(
    seed: int, shape: Shape, spacing: float, z0: int, z1: int
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Make planes z0 ≤ z < z1 of a phantom: the same voxels however it is cut.

    Parameters
    ----------
    seed : int
        Chooses the subject.
    shape : tuple of int
        Of the whole phantom, (z, y, x).
    spacing : float
        Edge length of a voxel, mm.
    z0, z1 : int
        First plane, and the one after the last.

    Returns
    -------
    image : ndarray of int16, shape (z1 − z0, y, x)
        HU.
    labels : ndarray of uint8, shape (z1 − z0, y, x)
        Values of the table ``visceral``.

    Raises
    ------
    ParameterError
        If a size, the spacing or the planes cannot be used.
    """
    grid = phantom_grid(shape, spacing)
    if not 0 <= z0 <= z1 <= shape[0]:
        raise ParameterError(
            f"planes {z0} to {z1} are not in a phantom of {shape[0]}; give 0 ≤ z0 ≤ z1 ≤ height."
        )
    subject = _subject(seed, shape[0] * spacing)
    organs, label_of = load_organs("visceral"), np.zeros(256, np.uint8)
    for name, region in _REGION.items():
        label_of[region] = organs.by_name(name).value
    image = np.empty((z1 - z0, *shape[1:]), np.int16)
    labels = np.empty(image.shape, np.uint8)
    tables = (_outline(), _texture(), label_of)
    _render(z0, float(spacing), grid.origin, subject, tables, seed, image, labels)
    return image, labels


def phantom(
    seed: int, shape: Shape = (300, 130, 160), spacing: float = 2.0
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """Make a phantom.

    Parameters
    ----------
    seed : int
        Chooses the subject; all seeds share one anatomy.
    shape : tuple of int
        Voxels along (z, y, x). A body is 700 mm tall; above it another begins.
    spacing : float
        Edge length of a voxel, mm.

    Returns
    -------
    image : ndarray of int16, shape (z, y, x)
        HU.
    labels : ndarray of uint8, shape (z, y, x)
        Values of the table ``visceral``.
    grid : Grid
        Where the voxels lie.

    Raises
    ------
    ParameterError
        If a size or the spacing is not positive.
    """
    image, labels = phantom_slab(seed, shape, spacing, 0, shape[0])
    return image, labels, phantom_grid(shape, spacing)


def write_phantom(
    ct: Path, labels: Path, seed: int, shape: Shape = (300, 130, 160), spacing: float = 2.0
) -> None:
    """Write a phantom and its labels as two NIfTI files, slab by slab.

    Parameters
    ----------
    ct, labels : Path
        Where to write HU (int16) and labels (uint8); compressed if named ``.gz``.
    seed, shape, spacing
        As for `phantom`.

    Raises
    ------
    OutputExistsError
        If one of the files exists.
    ParameterError
        If a size or the spacing is not positive.
    """
    grid = phantom_grid(shape, spacing)
    for path in (ct, labels):
        check_absent(path, overwrite=False)
    with ExitStack() as stack:
        streams: list[Any] = []
        gzip: Any = igzip.IGzipFile
        for path, dtype in ((ct, np.int16), (labels, np.uint8)):
            stream: Any = stack.enter_context(stack.enter_context(replacing(path)).open("wb"))
            if path.name.endswith(".gz"):
                # Neither name nor time goes into the header: the same seed gives the same bytes.
                stream = stack.enter_context(gzip("", "wb", fileobj=stream, mtime=0))
            header = _nifti_header(grid, dtype)
            stream.write(header.binaryblock)
            stream.write(bytes(header.single_vox_offset - len(header.binaryblock)))
            streams.append(stream)
        for z in range(0, shape[0], 32):
            image, label = phantom_slab(seed, shape, spacing, z, min(z + 32, shape[0]))
            streams[0].write(image.astype("<i2").data)
            streams[1].write(label.data)


def _nifti_header(grid: Grid, dtype: type[np.generic]) -> Any:
    kind: Any = nibabel.Nifti1Header
    header = kind(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(grid.shape[::-1])
    header.set_xyzt_units("mm")
    affine = np.linalg.inv(FROM_RAS_XYZ) @ grid.affine @ FROM_IJK
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    return header
