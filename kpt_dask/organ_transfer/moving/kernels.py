"""Kernels that add an organ of an atlas, moved, to its share of the votes.

Know arrays only.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store.organ_strips import PLACE, SHORT, STRIP
from kpt_dask.kernels.exponential import LOG2_E, exp2
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import HALF, LANES
from kpt_dask.kernels.strip_sum import add_halves, add_strips
from kpt_dask.organ_transfer.decision import VANISHING

assert (LANES, HALF) == (STRIP, SHORT), "a strip is added as one vector, two short ones likewise"

LIGHTEST = np.float32(1e-20)
"""A move that weighs less changes nothing, and would leave the powers that `add_strips` takes."""
FARTHEST = 30000.0
"""HU: so far apart no voxels agree, whatever ν is. `OUTSIDE` is farther from all in a scan."""


@kernel
def accumulate(
    share: NDArray[np.float32],
    fresh: tuple[int, int],
    scan: NDArray[np.int16],
    corner: tuple[int, int],
    first: NDArray[np.int64],
    strips: NDArray[np.int16],
    planes: NDArray[np.int64],
    halves: NDArray[np.int64],
    shifts: NDArray[np.int64],
    weights: NDArray[np.float32],
    nu: float,
) -> None:
    """Add one organ, moved by whole voxels in several ways, to its share.

    Parameters
    ----------
    share, scan : float32 and int16 arrays (z, y, `LANES` + x + `LANES`)
        Of two boxes that begin and end at the same x; `share` is changed, beside the box too. HU.
    fresh : (int, int)
        Columns of `share` that are set to 0 first.
    corner : (int, int)
        Plane and row of `scan` where the share's first ones are.
    first : int64 array (3)
        First voxel of the share's box in the volume.
    strips : int16 array (n, `PLACE` + `LANES`)
        See `atlas_store.organ_strips.Strips`.
    planes, halves : int64 arrays (p)
        Where the strips of each plane of each atlas begin, and end, and where those of at most
        `SHORT` voxels begin: see `atlas_store.organ_strips.Strips`.
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
    there = strips.ravel()
    columns, voxels = np.uint64(PLACE + STRIP), np.uint64(PLACE)
    for z in range(depth):
        # All that is done to a plane before the next plane: it stays in the cache.
        share[z, :, fresh[0] : fresh[1]] = 0
        out, here = share[z].ravel(), scan[corner[0] + z, corner[1] :].ravel()
        for m in range(shifts.shape[0]):
            k = first[0] + z - shifts[m, 0]
            if k < 0 or k >= shifts[m, 3] or weights[m] < LIGHTEST:
                continue
            power = np.log2(weights[m])
            down, right = shifts[m, 1] - first[1], shifts[m, 2] - first[2] + LANES
            inside = 0 <= down <= height - shifts[m, 4] and right >= 0
            inside = inside and right <= length - LANES - shifts[m, 5]
            base = down * length + right
            own = shifts[m, 6] + k
            strip, half, stop = planes[own], halves[own], planes[own + 1]
            while strip < stop:
                a = np.uint64(strip) * columns + voxels
                if inside and strip + 4 <= half:
                    of, at = _four(there, a, base, length)
                    add_strips(out, here, at, there, of, power, slope, most)
                    strip += 4
                    continue
                if inside and strip >= half and strip + 8 <= stop:
                    of, at = _four(there, a, base, length)
                    more, beyond = _four(there, a + np.uint64(4) * columns, base, length)
                    add_halves(out, here, at + beyond, there, of + more, power, slope, most)
                    strip += 8
                    continue
                y, x = np.int64(strips[strip, 1]), np.int64(strips[strip, 2])
                beside = y < -down or y >= height - down
                beside = beside or x < -right or x > length - LANES - right
                if inside or not beside:
                    place = np.uint64(base + y * length + x)
                    add_strips(out, here, (place,), there, (a,), power, slope, most)
                strip += 1


@kernel
def _four(strips: Any, of: Any, base: Any, length: Any) -> Any:
    """Where the voxels of four strips begin in `strips`, and where in share and scan."""
    columns = np.uint64(PLACE + STRIP)
    second, third, fourth = of + columns, of + columns + columns, of + np.uint64(3) * columns
    places = (
        _place(strips, of, base, length),
        _place(strips, second, base, length),
        _place(strips, third, base, length),
        _place(strips, fourth, base, length),
    )
    return (of, second, third, fourth), places


@kernel
def _place(strips: Any, of: Any, base: Any, length: Any) -> Any:
    """Where in share and scan the strip begins whose voxels begin there."""
    y, x = strips[of - np.uint64(2)], strips[of - np.uint64(1)]
    return np.uint64(base + np.int64(y) * length + np.int64(x))


@kernel
def sample(
    share: Any,
    scan: Any,
    corner: Any,
    first: Any,
    organ: Any,
    begin: Any,
    start: Any,
    stop: Any,
    inverse: Any,
    weight: Any,
    nu: Any,
) -> None:
    """Add one organ, moved by an affine, to its share.

    Parameters
    ----------
    share, scan, corner, first
        As for `accumulate`.
    organ : int16 array (z, y, x), C order
        HU of planes of its bounding box: see `Strips.dense`. Rows are longer than the box is wide.
    begin : int
        The first of these planes.
    start, stop : int64 arrays (3)
        Voxels of the share's box to be changed.
    inverse : float64 array (3, 4)
        From voxels of the volume to those of the organ's bounding box.
    weight : float32
        Of the move, as a share of the organ's.
    nu : float
        HU.
    """
    slope = np.float32(LOG2_E / (2 * nu * nu))
    most = np.float32(min(VANISHING * nu, FARTHEST) ** 2)
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
                # The last column is none of the organ's.
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
    """Bounds of the whole x between two whole ones for which offset + slope · x may be inside.

    Those left out would be rounded to less than 0, or to `size` or more; one more on either side
    is kept, whatever is rounded.
    """
    if abs(slope) < 1e-9:
        outside = offset < -1.5 or offset > size + 0.5
        return low, low if outside else high
    ends = (-0.5 - offset) / slope, (size - 0.5 - offset) / slope
    return max(low, np.floor(min(ends))), min(high, np.ceil(max(ends)) + 1)
