"""The template's bones, and the muscles of the back that they lie on."""

import numpy as np

from kpt_dask.demo.phantom.geometry import Floats, Point, on_outline, outline
from kpt_dask.demo.phantom.shapes import BONE, CAVITY, WALL, Paint, Shapes, centreline


def add_bones(shapes: Shapes, rng: np.random.Generator) -> None:
    """Add the muscles of the back, the spine, the ribs, the shoulders and the pelvis."""
    bone, marrow = Paint(BONE), Paint(inside=(BONE,))

    def plate(centre: Point, radii: Point, turn: Point, shell: float = 2.2) -> None:
        shapes.ellipsoid(centre, radii, "cortex", bone, turn=turn)
        shapes.ellipsoid(centre, np.array(radii) - shell, "marrow", marrow, turn=turn)

    def rod(line: Floats, shell: float = 1.6) -> None:
        shapes.tube(line, "cortex", bone)
        shapes.tube(line, "marrow", marrow, shell=shell)

    for side in (-1, 1):
        back = [(z, outline()[z, 1] - 20, side * 27, 17) for z in range(110, 640, 30)]
        shapes.tube(np.array(back), "muscle", Paint(WALL, (CAVITY, WALL)))
    for z in np.arange(87.5, 680, 25):
        _vertebra(shapes, rng, float(z))
    for number in range(12):
        for side in (-1, 1):
            _rib(shapes, number, side)
    plate((452, -80, 0), (72, 6.5, 17), (0, 0, -0.08))
    plate((520, -70, 0), (20, 7, 24), (0, 0, -0.2))

    for side in (-1, 1):
        plate((492, 66, side * 84), (60, 5.5, 40), (-side * 0.45, side * 0.1, 0.1), 1.8)
        rod(centreline("520 80 60 6, 548 66 108 8", side))
        rod(centreline("545 -56 16 8, 562 -40 60 6, 572 -2 104 6.5", side))
        plate((556, 18, side * 108), (21, 20, 20), (0, 0, 0))
        plate((142, 32, side * 80), (58, 52, 7.5), (side * 0.72, side * 0.25, 0))
        plate((100, 55, side * 48), (30, 26, 12), (side * 0.7, 0, 0))
        plate((58, 4, side * 82), (31, 31, 29), (0, 0, 0), 4)
        shapes.ellipsoid((56, 3, side * 86), (26, 26, 26), "cartilage", bone)
        plate((56, 3, side * 86), (22.5, 22.5, 22.5), (0, 0, 0))
        rod(centreline("54 4 90 13, 32 12 112 15, -30 8 106 13", side), 3.5)
        rod(centreline("52 -24 68 9, 44 -58 8 8.5", side))
        rod(centreline("44 24 70 13, 8 26 56 11, 14 -30 30 7, 40 -58 9 7", side))


def _rib(shapes: Shapes, number: int, side: int) -> None:
    """Paint a rib, from its vertebra around the wall; the lowest two end free."""
    bone, z = Paint(BONE), 352 + 18.3 * number
    end = (1.5, 1.9)[number] if number < 2 else 2.75
    start, drop = _spine_y(z), 62 - 2.5 * max(number - 5, 0) ** 1.4
    path = [(z + 2, start + 8, side * 17.0), (z + 3, start + 17, side * 30.0)]
    for angle in np.linspace(0.55, end, 13):
        path.append(on_outline(z - drop * (1 - np.cos(angle)) / 2, side * angle, 13))
    line = np.column_stack([path, 5 + 0.6 * np.sin(np.arange(len(path)))])
    bony = line if number < 2 else line[:12]
    shapes.tube(bony, "cortex", bone)
    shapes.tube(bony, "marrow", Paint(inside=(BONE,)), shell=1.6)
    shapes.tube(line[len(bony) - 1 :], "cartilage", bone)


def _vertebra(shapes: Shapes, rng: np.random.Generator, z: float) -> None:
    bone, marrow = Paint(BONE), Paint(inside=(BONE,))
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
    canal, tip = y + 25 * size, min(y + 47 * size, outline()[int(z), 1] - 4)
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
        shapes.capsule(*cord, (radius, radius), material, Paint(WALL))


def _spine_y(z: float) -> float:
    return float(
        np.interp(z, [60, 100, 150, 230, 330, 450, 560, 680], [62, 64, 50, 43, 45, 48, 36, 24])
    )
