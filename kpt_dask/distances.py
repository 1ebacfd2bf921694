"""How far keypoints of an atlas lie from its organs.

Measured on the organs' patches when it is asked for, so that nothing more need be stored.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from atlas_store import Atlas, OrganTable
from kpt_dask.jit import kernel
from kpt_dask.patches import OUTSIDE, read_patch

REACH = 4.0
"""Standard deviations ρ beyond which a match has no say: it would weigh less than 0.0004."""


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
        mm; what is farther away is infinitely far.

    Returns
    -------
    ndarray (n, organ), float32
        mm to the centre of the organ's nearest voxel, 0 in the organ; infinite where the atlas
        does not show the organ.

    Raises
    ------
    StoreFormatError
        If an organ is not there or damaged.
    """
    found = np.full((len(points), len(organs)), np.inf, np.float32)
    spacing = np.array(atlas.info.spacing)
    voxel = (points.astype(np.float64) - atlas.info.origin) / spacing
    for o, name in enumerate(organs.names):
        if name not in atlas.organs:
            continue
        low, high = np.array(atlas.organs[name].bounding_box).T
        outside = np.maximum(np.maximum(low - voxel, voxel - (high - 1)), 0) * spacing
        near = np.flatnonzero(np.linalg.norm(outside, axis=1) < reach)
        if near.size:
            patch = read_patch(atlas, name, tuple(slice(0, n) for n in high - low))
            at = voxel[near] - low
            tree = cKDTree(surface(patch) * spacing)
            distance = np.asarray(tree.query(at * spacing, distance_upper_bound=reach)[0])
            voxels = np.floor(at + 0.5).astype(np.int64)
            boxed = np.flatnonzero(((voxels >= 0) & (voxels < high - low)).all(axis=1))
            distance[boxed[patch[tuple(voxels[boxed].T)] != OUTSIDE]] = 0
            found[near, o] = distance
    return found


@kernel
def surface(patch: NDArray[np.int16]) -> NDArray[np.int64]:
    """Voxels (n, 3) of a patch that have a neighbour, across a face, outside of the organ."""
    out = np.empty((np.count_nonzero(patch != OUTSIDE), 3), np.int64)
    depth, height, width = patch.shape
    n = 0
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if patch[z, y, x] == OUTSIDE:
                    continue
                edge = z == 0 or y == 0 or x == 0
                edge = edge or z == depth - 1 or y == height - 1 or x == width - 1
                if (
                    edge
                    or patch[z - 1, y, x] == OUTSIDE
                    or patch[z + 1, y, x] == OUTSIDE
                    or patch[z, y - 1, x] == OUTSIDE
                    or patch[z, y + 1, x] == OUTSIDE
                    or patch[z, y, x - 1] == OUTSIDE
                    or patch[z, y, x + 1] == OUTSIDE
                ):
                    out[n, 0] = z
                    out[n, 1] = y
                    out[n, 2] = x
                    n += 1
    return out[:n]
