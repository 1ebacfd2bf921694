"""Distances of an atlas's keypoints from its organs, for the weights of mode `across`.

Measured on the organ strips when they are needed, so nothing more is stored.
"""

import numpy as np
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.boxes import shape_of
from atlas_store.organ_strips import NOT_ORGAN, read_strips
from kpt_dask.kernels.jit import kernel

REACH_RHO = 4.0
"""Distance, in units of ρ, from which on a match does not count: it would weigh below 0.0004."""


def organ_distances(
    atlas: Atlas, points: NDArray[np.float32], organs: OrganTable, reach: float
) -> NDArray[np.float32]:
    """Measure how far points of an atlas lie from its organs.

    Parameters
    ----------
    atlas : Atlas
    points : float32 array (n, 3)
        (z, y, x), mm, in the world of the atlas.
    organs : OrganTable
    reach : float
        mm; larger distances are infinite.

    Returns
    -------
    ndarray (n, organ), float32
        mm to the centre of the organ's nearest voxel, 0 in the organ; infinite where the atlas
        does not show the organ.

    Raises
    ------
    StoreFormatError
        If its organs are not there or damaged.
    """
    # Imported here, because only mode across needs it: it takes a tenth of a start.
    from scipy.spatial import cKDTree

    distances = np.full((len(points), len(organs)), np.inf, np.float32)
    spacing = np.array(atlas.info.spacing)
    voxel = (points.astype(np.float64) - atlas.info.origin) / spacing
    near: dict[str, NDArray[np.int64]] = {}
    for name in organs.names:
        if name in atlas.organs:
            low, high = np.array(atlas.organs[name].bounding_box).T
            outside = np.maximum(np.maximum(low - voxel, voxel - (high - 1)), 0) * spacing
            points_near = np.flatnonzero(np.linalg.norm(outside, axis=1) < reach)
            if points_near.size:
                near[name] = points_near
    boxes = {name: atlas.organs[name].bounding_box for name in near}
    whole = {name: [(0, z[1] - z[0])] for name, (z, _, _) in boxes.items()}
    [strips_of] = read_strips([(atlas, whole)], organs)
    for name, strips in strips_of.items():
        points_near, box = near[name], boxes[name]
        shape = shape_of(box)
        organ = strips.dense(shape)[..., : shape[2]] != NOT_ORGAN
        inside = voxel[points_near] - [start for start, _ in box]
        tree = cKDTree(surface(organ) * spacing)
        distance = np.asarray(tree.query(inside * spacing, distance_upper_bound=reach)[0])
        voxels = np.floor(inside + 0.5).astype(np.int64)
        boxed = np.flatnonzero(((voxels >= 0) & (voxels < organ.shape)).all(axis=1))
        distance[boxed[organ[tuple(voxels[boxed].T)]]] = 0
        distances[points_near, organs.names.index(name)] = distance
    return distances


@kernel
def surface(organ: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Voxels (n, 3) of an organ (z, y, x) that have a neighbour, across a face, outside of it."""
    out = np.empty((np.count_nonzero(organ), 3), np.int64)
    depth, height, width = organ.shape
    n = 0
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if not organ[z, y, x]:
                    continue
                edge = z == 0 or y == 0 or x == 0
                edge = edge or z == depth - 1 or y == height - 1 or x == width - 1
                if (
                    edge
                    or not organ[z - 1, y, x]
                    or not organ[z + 1, y, x]
                    or not organ[z, y - 1, x]
                    or not organ[z, y + 1, x]
                    or not organ[z, y, x - 1]
                    or not organ[z, y, x + 1]
                ):
                    out[n, 0] = z
                    out[n, 1] = y
                    out[n, 2] = x
                    n += 1
    return out[:n]
