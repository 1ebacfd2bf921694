"""Vessel trees that fill an organ."""

from collections.abc import Sequence

import numpy as np

from kpt_dask.demo.phantom.geometry import Point
from kpt_dask.demo.phantom.shapes import Paint, Shapes


def grow_tree(
    shapes: Shapes,
    rng: np.random.Generator,
    root: Point,
    organ: Sequence[tuple[Point, Point]],
    pitch: float,
    leaf: float,
    material: str,
    paint: Paint,
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
