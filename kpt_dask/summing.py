"""Kernels that cut an organ out of an atlas and add it, moved, to its share of the votes.

Know arrays only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.jit import kernel
from kpt_dask.shares import VANISHING

OUTSIDE = np.iinfo(np.int16).min
"""No HU: volumes are clipped well above it."""

LANES = 16
"""Voxels of a row that `accumulate` adds at a time; rows are longer by as many."""


@kernel
def cut_out(
    packed: NDArray[np.int32], value: int, patch: NDArray[np.int16], extent: NDArray[np.int64]
) -> None:
    """Take one organ's HU out of the voxels of an atlas.

    Parameters
    ----------
    packed : int32 array (z, y, x)
        HU and labels of the organ's box, as `kpt_dask.surroundings.read_planes` gives them.
    value : int
        Label of the organ.
    patch : int16 array (z, y, x + `LANES`)
        Receives HU, `OUTSIDE` where the voxel is not the organ's.
    extent : int64 array (z, y, 2)
        Receives the first voxel of the organ in each row, and the one past its last.
    """
    width = packed.shape[2]
    for z in range(packed.shape[0]):
        for y in range(packed.shape[1]):
            row = packed[z, y]
            out = patch[z, y]
            for x in range(width):
                v = row[x]
                out[x] = np.int16(v >> 16) if (v & 0xFFFF) == value else OUTSIDE
            for x in range(width, out.size):
                out[x] = OUTSIDE
            first, stop = 0, width
            while first < width and out[first] == OUTSIDE:
                first += 1
            while stop > first and out[stop - 1] == OUTSIDE:
                stop -= 1
            extent[z, y, 0] = first
            extent[z, y, 1] = stop


@kernel
def accumulate(
    share: NDArray[np.float32],
    scan: NDArray[np.float32],
    patch: NDArray[np.int16],
    extent: NDArray[np.int64],
    offsets: NDArray[np.int64],
    weights: NDArray[np.float32],
    nu: float,
) -> None:
    """Add one organ, moved by whole voxels in several ways, to its share.

    Parameters
    ----------
    share, scan : float32 arrays (z, y, x + `LANES`)
        Of a box; `share` is changed.
    patch, extent : ndarray
        From `cut_out`.
    offsets : int64 array (n, 3)
        Voxel v of the box is ``v + offset`` of the patch.
    weights : float32 array (n)
        Of the moves, as a share of the organ's.
    nu : float
        HU.
    """
    # exp(−u) as exp(−u / 32)³²: plain arithmetic, which the compiler makes many voxels of.
    scale = np.float32(1 / (64 * nu * nu))
    vanishing = np.float32(VANISHING * VANISHING / 64)
    one, half = np.float32(1), np.float32(0.5)
    c3, c4 = np.float32(1 / 6), np.float32(1 / 24)
    nothing = np.float32(0)
    depth, height, length = share.shape
    width = length - LANES
    # Flat and unsigned: cutting a row out, or asking whether an index is negative, costs more
    # than the few voxels of a row.
    out, here, there = share.ravel(), scan.ravel(), patch.ravel()
    for z in range(depth):
        # All moves of a plane before the next plane: it stays in the cache.
        for m in range(offsets.shape[0]):
            k = z + offsets[m, 0]
            if k < 0 or k >= patch.shape[0]:
                continue
            weight = weights[m]
            by = offsets[m, 2]
            low = max(0, -offsets[m, 1])
            for y in range(low, min(height, patch.shape[1] - offsets[m, 1])):
                j = y + offsets[m, 1]
                start = max(extent[k, j, 0] - by, 0)
                stop = min(extent[k, j, 1] - by, width)
                if start >= stop:
                    continue
                # Whole vectors: a rest would take as long again, by other instructions.
                to = np.uint64((z * height + y) * length + start)
                of = np.uint64((k * patch.shape[1] + j) * patch.shape[2] + start + by)
                for _ in range((stop - start + LANES - 1) // LANES):
                    for lane in range(np.uint64(LANES)):
                        hu = there[of + lane]
                        d = here[to + lane] - np.float32(hu)
                        v = min(d * d * scale, vanishing)
                        p = one - v * (one - v * (half - v * (c3 - v * c4)))
                        p *= p
                        p *= p
                        p *= p
                        p *= p
                        p *= p
                        # Chosen before it is added: else only some loops would fuse the two.
                        p = p if hu != OUTSIDE and v < vanishing else nothing
                        out[to + lane] += weight * p
                    to += np.uint64(LANES)
                    of += np.uint64(LANES)


@kernel
def sample(
    share: Any,
    scan: Any,
    patch: Any,
    start: Any,
    stop: Any,
    corner: Any,
    first: Any,
    inverse: Any,
    weight: Any,
    table: Any,
) -> None:
    """Add one organ, moved by an affine, to its share.

    Parameters
    ----------
    share, scan, patch
        As for `accumulate`; a part of the organ's patch.
    start, stop : int64 arrays (3)
        Voxels of the box to be changed.
    corner, first : int64 arrays (3)
        First voxel of the box in the scan, and of `patch` in the organ's whole patch.
    inverse : float64 array (3, 4)
        From voxels of the scan to those of the organ's whole patch.
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
