"""Kernels that add an organ of an atlas, moved, to its share of the votes.

Know arrays only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel
from kpt_dask.rows import LANES, add_strip
from kpt_dask.shares import VANISHING
from kpt_dask.strips import OUTSIDE, PLACE


@kernel
def accumulate(
    share: NDArray[np.float32],
    scan: NDArray[np.float32],
    strips: NDArray[np.int16],
    planes: NDArray[np.int64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    nu: float,
) -> None:
    """Add one organ, moved by whole voxels in several ways, to its share.

    Parameters
    ----------
    share, scan : float32 arrays (z, y, `LANES` + x + `LANES`)
        Of a box; `share` is changed, beside the box too.
    strips, planes : ndarray
        From `kpt_dask.strips.read_strips`.
    offsets : int64 array (n, 3)
        Voxel v of the organ's bounding box is ``v + offset`` of the box.
    weights : float32 array (n)
        Of the moves, as a share of the organ's.
    nu : float
        HU.
    """
    scale = np.float32(1 / (64 * nu * nu))
    vanishing = np.float32(VANISHING * VANISHING / 64)
    outside = np.int16(OUTSIDE)
    depth, height, length = share.shape
    # Flat and unsigned: cutting a row out, or asking whether an index is negative, costs more
    # than a strip.
    out, here, there = share.ravel(), scan.ravel(), strips.ravel()
    last = planes.size - 1
    for z in range(depth):
        # All moves of a plane before the next plane: it stays in the cache.
        for m in range(offsets.shape[0]):
            k = z - offsets[m, 0]
            if k < 0 or k >= last:
                continue
            weight = weights[m]
            down, right = offsets[m, 1], offsets[m, 2] + LANES
            for strip in range(planes[k], planes[k + 1]):
                y = strips[strip, 1] + down
                x = strips[strip, 2] + right
                if y < 0 or y >= height or x < 0 or x > length - LANES:
                    continue
                to = np.uint64((z * height + y) * length + x)
                of = np.uint64(strip * (PLACE + LANES) + PLACE)
                add_strip(out, to, here, there, of, outside, weight, scale, vanishing)


@kernel
def sample(
    share: Any,
    scan: Any,
    organ: Any,
    start: Any,
    stop: Any,
    corner: Any,
    inverse: Any,
    weight: Any,
    table: Any,
) -> None:
    """Add one organ, moved by an affine, to its share.

    Parameters
    ----------
    share, scan
        As for `accumulate`.
    organ : int16 array (z, y, x)
        HU of its bounding box: see `kpt_dask.strips.Strips.dense`.
    start, stop : int64 arrays (3)
        Voxels of the box to be changed.
    corner : int64 array (3)
        First voxel of the box in the scan.
    inverse : float64 array (3, 4)
        From voxels of the scan to those of the organ's bounding box.
    weight : float32
        Of the move, as a share of the organ's.
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
                k = int(np.floor(rz + inverse[0, 2] * px + 0.5))
                j = int(np.floor(ry + inverse[1, 2] * px + 0.5))
                i = int(np.floor(rx + inverse[2, 2] * px + 0.5))
                if k < 0 or j < 0 or i < 0:
                    continue
                if k >= organ.shape[0] or j >= organ.shape[1] or i >= organ.shape[2]:
                    continue
                hu = organ[k, j, i]
                if hu != OUTSIDE:
                    apart = abs(scan[z, y, LANES + x] - hu)
                    share[z, y, LANES + x] += weight * table[min(int(apart), last)]
