"""Kernels that add a moved organ to its share of the votes. Know arrays only."""

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel
from kpt_dask.patches import OUTSIDE
from kpt_dask.shares import VANISHING


@kernel
def accumulate(
    share: NDArray[np.float32],
    scan: NDArray[np.float32],
    patch: NDArray[np.int16],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    offset: NDArray[np.int64],
    weight: np.float32,
    nu: float,
) -> None:
    """Add one organ, moved by whole voxels, to its share.

    Parameters
    ----------
    share, scan : float32 arrays (z, y, x)
        Of a box; `share` is changed between the voxels `start` and `stop`.
    patch : int16 array (z, y, x)
        HU of the atlas's organ, `OUTSIDE` elsewhere; voxel v of the box is ``v + offset``.
    weight : float32
        Of the move, as a share of the organ's.
    nu : float
        HU.
    """
    # exp(−u) as exp(−u / 32)³²: plain arithmetic, which the compiler makes eight voxels of.
    scale = np.float32(1 / (64 * nu * nu))
    vanishing = np.float32(VANISHING * VANISHING / 64)
    one, half = np.float32(1), np.float32(0.5)
    c3, c4, c5 = np.float32(1 / 6), np.float32(1 / 24), np.float32(1 / 120)
    nothing = np.float32(0)
    n = stop[2] - start[2]
    for z in range(start[0], stop[0]):
        for y in range(start[1], stop[1]):
            row = share[z, y, start[2] : stop[2]]
            here = scan[z, y, start[2] : stop[2]]
            first = start[2] + offset[2]
            there = patch[z + offset[0], y + offset[1], first : first + n]
            for x in range(n):
                d = here[x] - np.float32(there[x])
                v = min(d * d * scale, vanishing)
                p = one - v * (one - v * (half - v * (c3 - v * (c4 - v * c5))))
                p *= p
                p *= p
                p *= p
                p *= p
                p *= p
                # Chosen before it is added: else only some compiled loops would fuse the two.
                p = p if there[x] != OUTSIDE and v < vanishing else nothing
                row[x] += weight * p


@kernel
def sample(
    share: NDArray[np.float32],
    scan: NDArray[np.float32],
    patch: NDArray[np.int16],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    corner: NDArray[np.int64],
    first: NDArray[np.int64],
    inverse: NDArray[np.float64],
    weight: np.float32,
    table: NDArray[np.float32],
) -> None:
    """Add one organ, moved by an affine, to its share.

    Parameters
    ----------
    share, scan, start, stop, weight
        As for `accumulate`.
    patch : int16 array (z, y, x)
        A part of the organ's patch.
    corner, first : int64 arrays (3)
        First voxel of the box in the scan, and of `patch` in the organ's whole patch.
    inverse : float64 array (3, 4)
        From voxels of the scan to those of the organ's whole patch.
    table : float32 array
        From `kpt_dask.shares.intensity_table`.
    """
    last = table.size - 1
    for z in range(start[0], stop[0]):
        pz = float(corner[0] + z)
        for y in range(start[1], stop[1]):
            py = float(corner[1] + y)
            rz = inverse[0, 3] + inverse[0, 0] * pz + inverse[0, 1] * py
            ry = inverse[1, 3] + inverse[1, 0] * pz + inverse[1, 1] * py
            rx = inverse[2, 3] + inverse[2, 0] * pz + inverse[2, 1] * py
            for x in range(start[2], stop[2]):
                px = float(corner[2] + x)
                k = int(np.floor(rz + inverse[0, 2] * px + 0.5)) - first[0]
                j = int(np.floor(ry + inverse[1, 2] * px + 0.5)) - first[1]
                i = int(np.floor(rx + inverse[2, 2] * px + 0.5)) - first[2]
                if k < 0 or j < 0 or i < 0:
                    continue
                if k >= patch.shape[0] or j >= patch.shape[1] or i >= patch.shape[2]:
                    continue
                hu = patch[k, j, i]
                if hu != OUTSIDE:
                    share[z, y, x] += weight * table[min(int(abs(scan[z, y, x] - hu)), last)]
