"""The template: the soft organs, the vessels and the airway that all subjects share.

Right is x < 0, the front y < 0.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.interpolate import PchipInterpolator

from kpt_dask.demo.phantom.geometry import Point
from kpt_dask.demo.phantom.shapes import CAVITY, ORGANS, WALL, Paint, Shapes, centreline
from kpt_dask.demo.phantom.skeleton import add_bones
from kpt_dask.demo.phantom.vessels import grow_tree


def template() -> Shapes:
    """Make the anatomy that all subjects share."""
    rng = np.random.default_rng(20150628)
    shapes = Shapes()
    _chest(shapes, rng)
    _abdomen(shapes, rng)
    _vessels_and_airway(shapes)
    add_bones(shapes, rng)
    return shapes


def _chest(shapes: Shapes, rng: np.random.Generator) -> None:
    for side, name in ((-1, "lung_right"), (1, "lung_left")):
        paint, within = Paint(name, (CAVITY, name)), Paint(inside=(name,))
        lobes = [
            ((464, 0, side * 63), (120, 76, 54)),
            ((395, 10, side * 68), (84, 76, 52)),
        ]
        for centre, radii in lobes:
            shapes.ellipsoid(centre, radii, "lung", paint)
        hilum = (455, 5, side * 22)
        grow_tree(shapes, rng, hilum, lobes, 27, 1.5, "air", within)
        grow_tree(shapes, rng, hilum, lobes, 16, 1.25, "vein", within)
        grow_tree(shapes, rng, (430, 0, side * 20), lobes, 21, 1.25, "vein", within)
    chest = Paint(CAVITY, (CAVITY, "lung_right", "lung_left"))
    for side, name, top in ((-1, "lung_right", 106), (1, "lung_left", 94)):
        dome = (300, 5, side * 60)
        shapes.ellipsoid(dome, (top, 76, 64), "muscle", Paint(CAVITY, (name,)))
        shapes.ellipsoid(dome, (top - 3, 73, 61), "visceral_fat", Paint(inside=(CAVITY,)))
    shapes.ellipsoid((515, -2, 2), (95, 52, 33), "visceral_fat", chest)
    shapes.ellipsoid((418, -30, 20), (58, 50, 60), "visceral_fat", chest)
    shapes.ellipsoid((418, -29, 21), (52, 44, 54), "myocardium", chest, turn=(0.3, 0.4, 0))
    shapes.ellipsoid((408, -24, 44), (30, 22, 20), "artery", chest, turn=(0.3, 0.5, 0))
    shapes.ellipsoid((412, -50, 14), (28, 16, 24), "vein", chest, turn=(0.3, 0.4, 0))
    shapes.ellipsoid((440, 0, 14), (20, 15, 26), "artery", chest)
    shapes.ellipsoid((420, -26, -20), (28, 22, 15), "vein", chest)
    shapes.tube(centreline("440 -48 18 13, 468 -30 22 13, 470 -5 5 11"), "vein", chest)
    shapes.tube(centreline("458 5 -40 7, 468 -8 6 10, 458 5 40 7"), "vein", chest)
    esophagus = centreline("640 18 3 7, 520 24 4 7, 420 20 8 7, 372 5 25 8")
    shapes.tube(esophagus, "muscle", Paint())


def _abdomen(shapes: Shapes, rng: np.random.Generator) -> None:
    soft = Paint(inside=(CAVITY,))
    pelvis = Paint(CAVITY, (CAVITY, WALL))
    shapes.ellipsoid((60, -8, 0), (85, 62, 62), "visceral_fat", pelvis)
    _bowel(shapes, rng, soft)
    shapes.ellipsoid((52, -38, 0), (26, 28, 38), "bowel_wall", pelvis)
    shapes.ellipsoid((52, -38, 0), (23, 25, 35), "fluid", pelvis)
    stomach = centreline(
        "372 15 52 30, 350 -12 60 33, 318 -42 50 27, 300 -56 20 19, 296 -48 -12 13"
    )
    shapes.tube(stomach, "bowel_wall", soft)
    shapes.tube(stomach, "bowel_content", soft, shell=4)
    shapes.ellipsoid((345, -34, 56), (26, 13, 19), "gas", soft, turn=(0, 0, -0.5))
    pancreas = centreline("285 -25 -35 15, 292 -22 -10 11, 300 -5 20 11, 318 15 62 9")
    shapes.tube(pancreas, "pancreas", soft)

    liver = Paint("liver", (CAVITY, "liver"))
    in_liver = Paint(inside=("liver",))
    lobes = [
        ((330, 4, -60), (70, 68, 50)),
        ((288, 8, -72), (58, 50, 36)),
        ((352, -34, -8), (34, 38, 56)),
    ]
    for centre, radii in lobes:
        shapes.ellipsoid(centre, radii, "liver", liver)
    grow_tree(shapes, rng, (318, -12, -30), lobes, 17, 1.2, "portal", in_liver)
    grow_tree(shapes, rng, (388, 4, -24), lobes, 21, 1.4, "vein", in_liver)
    shapes.ellipsoid((282, -52, -46), (26, 15, 14), "fluid", Paint(CAVITY, (CAVITY, "liver")))

    spleen = Paint("spleen", (CAVITY, "spleen"))
    body = [((335, 36, 84), (48, 36, 24)), ((325, 52, 76), (36, 24, 24))]
    for centre, radii in body:
        shapes.ellipsoid(centre, radii, "spleen", spleen)
    grow_tree(shapes, rng, (330, 30, 60), body, 17, 1.0, "vein", Paint(inside=("spleen",)))

    for side, name, z in ((-1, "kidney_right", 250), (1, "kidney_left", 262)):
        _kidney(shapes, name, side, z)
        shapes.ellipsoid((z + 62, 38, side * 42), (7, 14, 4), "pancreas", soft, turn=(0.6, 0, 0))
    for side, name in ((-1, "psoas_right"), (1, "psoas_left")):
        muscle = "285 46 25 7, 240 45 34 13, 180 38 45 20, 120 18 57 19, 70 -16 66 13, 45 -18 70 8"
        shapes.tube(centreline(muscle, side), "muscle", Paint(name, (CAVITY, WALL, name)))


def _kidney(shapes: Shapes, name: str, side: int, z: float) -> None:
    paint, within = Paint(name, (CAVITY, name, "liver", "spleen")), Paint(inside=(name,))
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
    shapes.tube(centreline(f"{z} 38 54 5, {z} 30 30 4", side), "vein", Paint())
    for reach in (-16, 0, 16):
        calyx = centreline(f"{z} 38 54 3, {z + reach} 41 63 2", side)
        shapes.tube(calyx, "fluid", within)


def _bowel(shapes: Shapes, rng: np.random.Generator, paint: Paint) -> None:
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

    frame = centreline(
        "105 -5 -72 0, 150 0 -82 0, 200 4 -84 0, 235 -10 -80 0, 240 -45 -62 0, 222 -62 -30 0,"
        "215 -66 5 0, 225 -62 40 0, 262 -40 70 0, 285 0 84 0, 240 18 84 0, 190 18 82 0,"
        "140 10 80 0, 110 0 62 0, 95 10 35 0, 105 32 5 0, 80 48 0 0, 35 44 0 0"
    )[:, :3]
    knots = PchipInterpolator(np.arange(len(frame)), frame)(np.arange(0, len(frame) - 1, 0.25))
    gut(list(knots), 17, ("stool", "stool", "stool", "gas", "bowel_content"))


def _vessels_and_airway(shapes: Shapes) -> None:
    anywhere = Paint(CAVITY)
    cava = centreline("190 22 -16 10, 300 16 -24 11, 385 2 -24 12, 412 -10 -22 12")
    shapes.tube(cava, "vein", Paint(CAVITY, (CAVITY, *ORGANS)))
    shapes.tube(centreline("425 -16 -26 9, 525 -10 -28 9"), "vein", anywhere)
    for side in (-1, 1):
        iliac = "195 20 6 7, 125 6 42 6, 70 -40 60 5.5, 0 -62 66 5"
        shapes.tube(centreline(iliac, side), "artery", anywhere)
        iliac = "197 31 2 8, 127 17 38 7, 72 -29 56 6.5, 2 -51 62 6"
        shapes.tube(centreline(iliac, side), "vein", anywhere)
        shapes.tube(centreline("505 -8 10 5, 560 -8 24 4, 650 2 30 3.5", side), "artery", anywhere)
        jugular = f"525 -12 {-28 * side} 7, 575 -16 36 7, 650 -6 40 6"
        shapes.tube(centreline(jugular, side), "vein", anywhere)
        shapes.tube(centreline("255 22 8 3.5, 252 34 40 3", side), "artery", anywhere)
    for branch in (
        "318 12 12 4, 305 -20 10 3",
        "300 12 12 4, 230 -25 2 3",
        "326 12 12 4, 330 -5 -20 3",
    ):
        shapes.tube(centreline(branch), "artery", anywhere)
    aorta = centreline(
        "438 -24 0 14, 480 -30 -8 14, 506 -18 -2 13.5, 514 4 12 13, 500 22 21 12.5, 470 27 23 12,"
        "400 22 22 11.5, 300 16 13 10.5, 240 15 6 9.5, 192 17 2 8.5"
    )
    shapes.tube(aorta, "artery", Paint("aorta"))
    windpipe = centreline("655 -18 0 9.5, 570 -8 0 9.5, 486 4 0 10")
    shapes.tube(windpipe, "muscle", anywhere)
    for side in (-1, 1):
        bronchus = centreline("486 4 0 8, 462 8 24 6.5", side)
        shapes.tube(bronchus, "muscle", anywhere)
        shapes.tube(bronchus, "air", anywhere, shell=1.5)
        thyroid = (612, -20, side * 17)
        shapes.ellipsoid(thyroid, (20, 9, 9), "renal_cortex", anywhere)
    shapes.tube(windpipe, "air", Paint("trachea"), shell=1.5)
