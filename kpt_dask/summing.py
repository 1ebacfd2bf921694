"""Kernels that add an organ of an atlas, moved, to its share of the votes.

Know arrays only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel
from kpt_dask.rows import LANES, LOG2_E, add_strips
from kpt_dask.shares import VANISHING
from kpt_dask.strips import OUTSIDE, PLACE

LIGHTEST = np.float32(1e-20)
"""A move that weighs less changes nothing, and would leave the powers that `add_strips` takes."""
FARTHEST = 30000.0
"""HU: so far apart no voxels agree, whatever ν is. `OUTSIDE` is farther from all in a scan."""


@kernel
def accumulate(
    share: NDArray[np.float32],
    scan: NDArray[np.int16],
    first: NDArray[np.int64],
    strips: NDArray[np.int16],
    planes: NDArray[np.int64],
    shifts: NDArray[np.int64],
    weights: NDArray[np.float32],
    nu: float,
) -> None:
    """Add one organ, moved by whole voxels in several ways, to its share.

    Parameters
    ----------
    share, scan : float32 and int16 arrays (z, y, `LANES` + x + `LANES`)
        Of a box; `share` is changed, beside the box too. HU.
    first : int64 array (3)
        First voxel of the box in the volume.
    strips : int16 array (n, `PLACE` + `LANES`)
        See `kpt_dask.strips.Strips`.
    planes : int64 array (p)
        Where the strips of each plane of each atlas begin, and end.
    shifts : int64 array (m, 7)
        Of each move: first voxel of the organ's bounding box in the volume, size of this box,
        and where its planes begin in `planes`.
    weights : float32 array (m)
        Of the moves, as a share of the organ's.
    nu : float
        HU.
    """
    slope = np.float32(LOG2_E / (2 * nu * nu))
    most = np.float32(min(VANISHING * nu, FARTHEST) ** 2)
    depth, height, length = share.shape
    # Flat and unsigned: cutting a row out, or asking whether an index is negative, costs as much
    # as a strip.
    out, here, there = share.ravel(), scan.ravel(), strips.ravel()
    columns, voxels = np.uint64(PLACE + LANES), np.uint64(PLACE)
    two, three = np.uint64(2), np.uint64(3)
    for z in range(depth):
        # All moves of a plane before the next plane: it stays in the cache.
        for m in range(shifts.shape[0]):
            k = first[0] + z - shifts[m, 0]
            if k < 0 or k >= shifts[m, 3] or weights[m] < LIGHTEST:
                continue
            power = np.log2(weights[m])
            down, right = shifts[m, 1] - first[1], shifts[m, 2] - first[2] + LANES
            inside = 0 <= down <= height - shifts[m, 4] and right >= 0
            inside = inside and right <= length - LANES - shifts[m, 5]
            base = (z * height + down) * length + right
            own = shifts[m, 6] + k
            strip, stop = planes[own], planes[own + 1]
            while strip < stop:
                a = np.uint64(strip) * columns + voxels
                if inside and strip + 4 <= stop:
                    of = a, a + columns, a + two * columns, a + three * columns
                    places = (
                        _place(there, of[0], base, length),
                        _place(there, of[1], base, length),
                        _place(there, of[2], base, length),
                        _place(there, of[3], base, length),
                    )
                    add_strips(out, here, places, there, of, power, slope, most)
                    strip += 4
                    continue
                y, x = np.int64(strips[strip, 1]), np.int64(strips[strip, 2])
                beside = y < -down or y >= height - down
                beside = beside or x < -right or x > length - LANES - right
                if inside or not beside:
                    place = np.uint64(base + y * length + x)
                    add_strips(out, here, (place,), there, (a,), power, slope, most)
                strip += 1


@kernel
def _place(strips: Any, of: Any, base: Any, length: Any) -> Any:
    """Where in share and scan the strip begins whose voxels begin there."""
    y, x = strips[of - np.uint64(2)], strips[of - np.uint64(1)]
    return np.uint64(base + np.int64(y) * length + np.int64(x))


@kernel
def sample(
    share: Any,
    scan: Any,
    first: Any,
    organ: Any,
    start: Any,
    stop: Any,
    inverse: Any,
    weight: Any,
    table: Any,
) -> None:
    """Add one organ, moved by an affine, to its share.

    Parameters
    ----------
    share, scan, first
        As for `accumulate`.
    organ : int16 array (z, y, x)
        HU of its bounding box: see `kpt_dask.strips.Strips.dense`.
    start, stop : int64 arrays (3)
        Voxels of the share's box to be changed.
    inverse : float64 array (3, 4)
        From voxels of the volume to those of the organ's bounding box.
    weight : float32
        Of the move, as a share of the organ's.
    table : float32 array
        From `kpt_dask.shares.intensity_table`.
    """
    last = table.size - 1
    for z in range(start[0], stop[0]):
        pz = float(first[0] + z)
        for y in range(start[1], stop[1]):
            py = float(first[1] + y)
            rz = inverse[0, 3] + inverse[0, 0] * pz + inverse[0, 1] * py
            ry = inverse[1, 3] + inverse[1, 0] * pz + inverse[1, 1] * py
            rx = inverse[2, 3] + inverse[2, 0] * pz + inverse[2, 1] * py
            for x in range(start[2], stop[2]):
                px = float(first[2] + x)
                k = int(np.floor(rz + inverse[0, 2] * px + 0.5))
                j = int(np.floor(ry + inverse[1, 2] * px + 0.5))
                i = int(np.floor(rx + inverse[2, 2] * px + 0.5))
                if k < 0 or j < 0 or i < 0:
                    continue
                if k >= organ.shape[0] or j >= organ.shape[1] or i >= organ.shape[2]:
                    continue
                hu = organ[k, j, i]
                if hu != OUTSIDE:
                    apart = abs(int(scan[z, y, LANES + x]) - int(hu))
                    share[z, y, LANES + x] += weight * table[min(apart, last)]
