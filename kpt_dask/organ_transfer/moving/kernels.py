"""Kernels that add an organ of an atlas, moved, to the organ's share of the votes.

They know arrays only: strips and moves in, votes out (eq. 11).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas_store.organ_strips import HEADER_COLUMNS, SHORT, STRIP, Strips, fill
from kpt_dask.kernels.exponential import LOG2_E, exp2
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import LANES
from kpt_dask.kernels.strip_sum import add_strips
from kpt_dask.organ_transfer.likelihood import VANISHING

assert LANES == STRIP == 2 * SHORT, "a strip is added as one vector, two short ones likewise"

LEAST_WEIGHT = np.float32(1e-20)
"""Moves of a smaller weight are skipped: they change nothing, and their logarithm would leave the
range of `add_strips`."""
MOST_HU_APART = 30000.0
"""HU; voxels this far apart never agree, whatever ν is. `NOT_ORGAN` is farther from all HU."""


class Slab(NamedTuple):
    """One organ's share in a box of the scan, and the scan there.

    Attributes
    ----------
    share : float32 array (z, y, `LANES` + x + `LANES`)
        The organ's share of the votes; changed, in the padding of its rows too.
    scan : int16 array (z, y, `LANES` + x + `LANES`)
        HU of a box with the same columns, and at least the planes and rows, of `share`.
    corner : (int, int)
        Plane and row of `scan` where those of `share` begin.
    first : (int, int, int)
        First voxel of the share's box in the volume.
    """

    share: NDArray[np.float32]
    scan: NDArray[np.int16]
    corner: tuple[int, int]
    first: tuple[int, int, int]


class Shifts(NamedTuple):
    """Moves of one organ by whole voxels.

    Attributes
    ----------
    low, size : int64 arrays (m, 3)
        First voxel in the volume, and size in voxels, of the organ's bounding box when moved.
    planes_at : int64 array (m)
        Where the planes of the atlas's organ begin in `Strips.planes`.
    weight : float32 array (m)
        Weight of each move, as a fraction of all of the organ's.
    """

    low: NDArray[np.int64]
    size: NDArray[np.int64]
    planes_at: NDArray[np.int64]
    weight: NDArray[np.float32]


class Affines(NamedTuple):
    """Moves of one organ by affines.

    Attributes
    ----------
    low, high : int64 arrays (k, 3)
        Voxels of the volume that the organ may reach: the first, and the one past the last.
    size : int64 array (k, 3)
        Size of the organ's bounding box in the atlas, in voxels.
    planes_at : int64 array (k)
        Where the planes of the atlas's organ begin in `Strips.planes`.
    inverse : float64 array (k, 3, 4)
        From voxels of the volume to voxels of the organ's bounding box.
    weight : float32 array (k)
        Weight of each move, as a fraction of all of the organ's.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    size: NDArray[np.int64]
    planes_at: NDArray[np.int64]
    inverse: NDArray[np.float64]
    weight: NDArray[np.float32]


@kernel
def add_shifted_organ(
    slab: Slab, cleared: tuple[int, int], strips: Strips, shifts: Shifts, nu: float
) -> None:
    """Add one organ, moved by whole voxels in several ways, to its share.

    Parameters
    ----------
    slab : Slab
    cleared : (int, int)
        Columns of the share that are set to 0 first.
    strips : Strips
        The organ in all atlases; planes of one atlas follow those of another.
    shifts : Shifts
    nu : float
        HU.
    """
    share, scan, corner, first = slab
    slope = np.float32(LOG2_E / (2 * nu * nu))
    most = np.float32(min(VANISHING * nu, MOST_HU_APART) ** 2)
    depth, height, length = share.shape
    # Flat arrays and unsigned indices: slicing a row, or a test for a negative index, costs as
    # much as adding a strip.
    voxels = strips.values.ravel()
    columns = np.uint64(HEADER_COLUMNS + STRIP)
    for z in range(depth):
        # Plane by plane: one plane of share and scan stays in the cache.
        share[z, :, cleared[0] : cleared[1]] = 0
        out, here = share[z].ravel(), scan[corner[0] + z, corner[1] :].ravel()
        for m in range(shifts.weight.size):
            plane = first[0] + z - shifts.low[m, 0]
            if plane < 0 or plane >= shifts.size[m, 0] or shifts.weight[m] < LEAST_WEIGHT:
                continue
            likelihood = np.log2(shifts.weight[m]), slope, most
            down, right = shifts.low[m, 1] - first[1], shifts.low[m, 2] - first[2] + LANES
            inside = 0 <= down <= height - shifts.size[m, 1] and right >= 0
            inside = inside and right <= length - LANES - shifts.size[m, 2]
            base = down * length + right
            plane += shifts.planes_at[m]
            strip, short = strips.planes[plane], strips.short_strips[plane]
            stop = strips.planes[plane + 1]
            while strip < stop:
                a = np.uint64(strip) * columns + np.uint64(HEADER_COLUMNS)
                if inside and strip + 4 <= short:
                    of, at = _four_strips(voxels, a, base, length)
                    add_strips(out, here, at, voxels, of, likelihood, STRIP)
                    strip += 4
                    continue
                if inside and strip >= short and strip + 8 <= stop:
                    of, at = _four_strips(voxels, a, base, length)
                    more, beyond = _four_strips(voxels, a + np.uint64(4) * columns, base, length)
                    add_strips(out, here, at + beyond, voxels, of + more, likelihood, SHORT)
                    strip += 8
                    continue
                y, x = np.int64(strips.values[strip, 1]), np.int64(strips.values[strip, 2])
                outside = y < -down or y >= height - down
                outside = outside or x < -right or x > length - LANES - right
                if inside or not outside:
                    at_one = np.uint64(base + y * length + x)
                    add_strips(out, here, (at_one,), voxels, (a,), likelihood, STRIP)
                strip += 1


@kernel
def _four_strips(voxels: Any, of: Any, base: Any, length: Any) -> Any:
    """Offsets of the voxels of four strips: in `voxels`, and in share and scan."""
    columns = np.uint64(HEADER_COLUMNS + STRIP)
    second, third, fourth = of + columns, of + columns + columns, of + np.uint64(3) * columns
    at = (
        _offset(voxels, of, base, length),
        _offset(voxels, second, base, length),
        _offset(voxels, third, base, length),
        _offset(voxels, fourth, base, length),
    )
    return (of, second, third, fourth), at


@kernel
def _offset(voxels: Any, of: Any, base: Any, length: Any) -> Any:
    """Offset in share and scan of the strip whose voxels begin at `of`."""
    y, x = voxels[of - np.uint64(2)], voxels[of - np.uint64(1)]
    return np.uint64(base + np.int64(y) * length + np.int64(x))


@kernel
def add_organ_by_affines(slab: Slab, strips: Strips, affines: Affines, nu: float) -> None:
    """Add one organ, moved by several affines, to its share.

    One call for all moves: every return to Python may wait for the GIL.
    """
    start, stop = np.empty((1, 3), np.int64), np.empty((1, 3), np.int64)
    begin, end = np.empty(1, np.int64), np.empty(1, np.int64)
    first = np.array(slab.first)
    for m in range(affines.weight.size):
        empty = False
        for axis in range(3):
            start[0, axis] = max(affines.low[m, axis], first[axis])
            extent = slab.share.shape[axis] - (2 * LANES if axis == 2 else 0)
            stop[0, axis] = min(affines.high[m, axis], first[axis] + extent)
            empty |= start[0, axis] >= stop[0, axis]
        if empty:
            continue
        size = affines.size[m]
        planes_below(affines.inverse[m : m + 1], start, stop, size[:1], begin, end)
        plane = affines.planes_at[m]
        read = strips.planes[plane + begin[0]], strips.planes[plane + end[0]]
        organ = np.empty((end[0] - begin[0], size[1], size[2] + LANES), np.int16)
        fill(strips.values[read[0] : read[1]], begin[0], organ)
        start[0] -= first
        stop[0] -= first
        _add_organ_by_affine(slab, start[0], stop[0], organ, begin[0], affines, m, nu)


@kernel
def _add_organ_by_affine(
    slab: Any, start: Any, stop: Any, organ: Any, begin: Any, affines: Any, m: Any, nu: Any
) -> None:
    """Add one organ, moved by one affine, to its share.

    Parameters
    ----------
    slab : Slab
    start, stop : int64 arrays (3)
        Voxels of the share's box to be changed: the first, and the one past the last.
    organ : int16 array (z, y, x), C order
        HU of planes of the organ's bounding box: see `Strips.dense`. Rows are longer than the box
        is wide.
    begin : int
        The first of these planes.
    affines : Affines
    m : int
        Which of them.
    nu : float
        HU.
    """
    share, scan, corner, first = slab
    inverse, weight = affines.inverse[m], affines.weight[m]
    slope = np.float32(LOG2_E / (2 * nu * nu))
    most = np.float32(min(VANISHING * nu, MOST_HU_APART) ** 2)
    depth, height, width = organ.shape
    voxels = organ.ravel()
    at = np.empty(share.shape[2], np.uint32)
    apart = np.empty(share.shape[2], np.float32)
    for z in range(start[0], stop[0]):
        pz = float(first[0] + z)
        for y in range(start[1], stop[1]):
            py = float(first[1] + y)
            rz = inverse[0, 3] + inverse[0, 0] * pz + inverse[0, 1] * py
            ry = inverse[1, 3] + inverse[1, 0] * pz + inverse[1, 1] * py
            rx = inverse[2, 3] + inverse[2, 0] * pz + inverse[2, 1] * py
            low, high = float(first[2] + start[2]), float(first[2] + stop[2])
            low, high = _inside(rz - begin, inverse[0, 2], depth, low, high)
            low, high = _inside(ry, inverse[1, 2], height, low, high)
            low, high = _inside(rx, inverse[2, 2], width, low, high)
            n = int(high - low)
            if n <= 0:
                continue
            for q in range(n):
                px = low + q
                k = np.int32(np.floor(rz + inverse[0, 2] * px + 0.5)) - np.int32(begin)
                j = np.int32(np.floor(ry + inverse[1, 2] * px + 0.5))
                i = np.int32(np.floor(rx + inverse[2, 2] * px + 0.5))
                inside = (k >= 0) & (k < depth) & (j >= 0) & (j < height) & (i >= 0) & (i < width)
                # The last column is padding: `NOT_ORGAN`.
                at[q] = np.uint32((k * height + j) * width + i if inside else width - 1)
            column = LANES + int(low) - first[2]
            row = scan[corner[0] + z, corner[1] + y]
            here, out = row[column : column + n], share[z, y, column : column + n]
            for q in range(n):
                apart[q] = np.float32(here[q]) - np.float32(voxels[at[q]])
            for q in range(n):
                squared = apart[q] * apart[q]
                counts = squared < most
                power = weight * exp2(-slope * (squared if counts else np.float32(0)))
                out[q] += power if counts else np.float32(0)


@kernel
def _inside(offset: Any, slope: Any, size: Any, low: Any, high: Any) -> Any:
    """Bounds of the whole x in [low, high) for which offset + slope · x may round to 0 … size − 1.

    One more on either side is kept, so that rounding of the bounds loses none.
    """
    if abs(slope) < 1e-9:
        outside = offset < -1.5 or offset > size + 0.5
        return low, low if outside else high
    ends = (-0.5 - offset) / slope, (size - 0.5 - offset) / slope
    return max(low, np.floor(min(ends))), min(high, np.ceil(max(ends)) + 1)


@kernel
def planes_below(inverse: Any, low: Any, high: Any, depth: Any, first: Any, past: Any) -> None:
    """Find the planes of an organ that affines map onto boxes of the volume.

    Parameters
    ----------
    inverse : float64 array (n, 3, 4)
        From voxels of the volume to those of the organ's bounding box.
    low, high : int64 arrays (n, 3)
        The boxes: first voxels, and the ones past the last.
    depth : int64 array (n)
        Planes of each organ's bounding box.
    first, past : int64 arrays (n)
        Receive the first plane, and the one past the last.
    """
    for n in range(depth.size):
        least = most = inverse[n, 0, 3]
        for axis in range(3):
            along = inverse[n, 0, axis]
            ends = along * low[n, axis], along * (high[n, axis] - 1)
            least += min(ends)
            most += max(ends)
        # One plane more on either side, for rounding.
        first[n] = min(max(int(np.floor(least + 0.5)) - 1, 0), depth[n])
        past[n] = min(max(int(np.floor(most + 0.5)) + 2, 0), depth[n])
