"""Boxes and regions of voxels: pure functions, half-open, (z, y, x)."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Region = tuple[slice, ...]
"""One slice with plain bounds per axis."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(start, stop) along z, y, x, half-open."""


def enclosing(boxes: Sequence[Box]) -> Box | None:
    """Smallest box around boxes, None around none."""
    if not boxes:
        return None
    z, y, x = (
        (min(box[axis][0] for box in boxes), max(box[axis][1] for box in boxes))
        for axis in range(3)
    )
    return z, y, x


def overlap(box: Box | None, other: Box) -> Box | None:
    """Intersection of two boxes; None if it is empty."""
    if box is None:
        return None
    # Written out, as in `shape_of`: called thousands of times.
    (a, b), (c, d), (e, f) = box
    (g, h), (i, j), (k, m) = other
    z, y, x = (max(a, g), min(b, h)), (max(c, i), min(d, j)), (max(e, k), min(f, m))
    return (z, y, x) if z[0] < z[1] and y[0] < y[1] and x[0] < x[1] else None


def overlaps(boxes: Mapping[int, Box], other: Box) -> dict[int, Box]:
    """Intersections of several boxes with another, without the empty ones."""
    found = {key: overlap(box, other) for key, box in boxes.items()}
    return {key: box for key, box in found.items() if box is not None}


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Union of half-open ranges, as sorted, disjoint ranges."""
    found: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((first, stop))
    return found


def wider(box: Box, shape: tuple[int, int, int], by: int) -> Box:
    """Box so many voxels larger on each side, within an array of this shape."""
    z, y, x = ((max(a - by, 0), min(b + by, n)) for (a, b), n in zip(box, shape, strict=True))
    return z, y, x


def box_of(region: Region) -> Box:
    """Box of a region."""
    z, y, x = ((s.start, s.stop) for s in region)
    return z, y, x


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Index of a box in an array that holds the voxels of `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """Index of a box in the whole array."""
    return tuple(slice(a, b) for a, b in box)


def volume_of(box: Box | None) -> int:
    """Count the voxels of a box; 0 for None."""
    return 0 if box is None else math.prod(shape_of(box))


def shape_of(box: Box) -> tuple[int, int, int]:
    """Voxels along each axis."""
    (a, b), (c, d), (e, f) = box
    return b - a, d - c, f - e


def begin_of(box: Box) -> NDArray[np.int64]:
    """First voxel, int64 (3)."""
    return np.array([start for start, _ in box])


def aligned(box: Box, unit: tuple[int, int, int], shape: tuple[int, int, int]) -> Region:
    """Smallest region of whole units around a box, within an array of this shape."""
    z, y, x = (
        slice(a // u * u, min(-(-b // u) * u, n))
        for (a, b), u, n in zip(box, unit, shape, strict=True)
    )
    return z, y, x
