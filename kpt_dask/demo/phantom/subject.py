"""What a seed chooses: a motion, tissues, and clutter among the template's shapes."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.demo.phantom.anatomy import template
from kpt_dask.demo.phantom.geometry import PERIOD, Floats
from kpt_dask.demo.phantom.motion import Motion, random_motion, random_sizes, world_boxes
from kpt_dask.demo.phantom.shapes import (
    CAPSULE,
    CAVITY,
    LAYERS,
    MATERIAL,
    MATERIALS,
    ORGANS,
    Paint,
    Shapes,
)

SIZES = 100
"""Number of the random generator of a body's size, beside those of its tiles' clutter."""


class Subject(NamedTuple):
    """One seed's motion, tissues, and shapes in the order of painting; kernels take it whole.

    Attributes
    ----------
    motion : Motion
        Takes world mm to template mm.
    fat : float
        Thickness of the fat under the skin, mm.
    layers : ndarray of float64, shape (5,)
        HU of `LAYERS`.
    hu, grain : ndarray of float64, shape (shape,)
        HU of each shape, and the amplitude of its texture.
    kinds, params, regions, insides : ndarray, shape (shape,), (shape, 12), (shape,), (shape,)
        As in `Shape`, at the heights of their bodies.
    low, high : ndarray of float64, shape (shape, 3)
        Corners of boxes that hold the shapes in the world, mm.
    """

    motion: Motion
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
def make_subject(seed: int, height: float, size_spread: float = 0.0) -> Subject:
    """Make the subject of a seed, tall enough for `height` mm; see `random_sizes`."""
    rng = np.random.default_rng(seed)
    factors = random_sizes(np.random.default_rng((seed, SIZES)), size_spread)
    motion, fat = random_motion(rng, factors), float(rng.uniform(6, 19))
    table = np.array(list(MATERIALS.values()), dtype=np.float64)
    arterial, venous = rng.uniform(0.1, 1), rng.uniform(0.35, 1)
    spread = rng.uniform(-1, 1, len(table)) * table[:, 3]
    hu = table[:, 0] + arterial * table[:, 1] + venous * table[:, 2] + spread

    top = motion.to_template(np.array([[0.0, 0, 0], [height, 0, 0]]))[:, 0]
    tiles = range(int(top[0] // PERIOD) - 1, int(top[1] // PERIOD) + 2)
    # The template goes to every tile, clutter to its own; within a tile the order is kept.
    parts = [_template_columns() for _ in tiles]
    parts += [_columns(_clutter(np.random.default_rng((seed, tile + 9)))) for tile in tiles]
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    kinds, params, boxes, materials, regions, insides = columns
    shift = np.repeat([*tiles, *tiles], [len(part[0]) for part in parts]) * PERIOD
    params[:, 0] += shift
    params[kinds == CAPSULE, 3] += shift[kinds == CAPSULE]
    boxes[:, :, 0] += shift[:, None]
    near = (boxes[:, 1, 0] > top[0] - 80) & (boxes[:, 0, 0] < top[1] + 80)
    low, high = world_boxes(motion, boxes[near])
    return Subject(
        motion=motion,
        fat=fat,
        layers=hu[[MATERIAL[name] for name in LAYERS]],
        hu=hu[materials[near]],
        grain=table[materials[near], 4],
        kinds=kinds[near].astype(np.uint8),
        params=params[near],
        regions=regions[near].astype(np.uint8),
        insides=insides[near].astype(np.uint32),
        low=low,
        high=high,
    )


@lru_cache(maxsize=1)
def _template_columns() -> list[NDArray[Any]]:
    return _columns(template())


def _columns(shapes: Shapes) -> list[NDArray[Any]]:
    """Turn shapes into one array for each field of a `Shape`."""
    return [np.array(column) for column in zip(*shapes, strict=True)]


def _clutter(rng: np.random.Generator) -> Shapes:
    """Make what one subject alone has: nodes, gas, calcifications, cysts."""
    shapes, anywhere = Shapes(), Paint(inside=(CAVITY, *ORGANS))
    for material in rng.choice(["muscle", "gas", "cortex", "fluid", "vein", "fat"], 40):
        centre = rng.uniform((20, -60, -100), (680, 60, 100))
        small = 0.4 if material in ("gas", "cortex") else 1.0
        radii = small * rng.uniform(2.5, 7, 3)
        shapes.ellipsoid(centre, radii, material, anywhere, turn=rng.uniform(-1, 1, 3))
    return shapes
