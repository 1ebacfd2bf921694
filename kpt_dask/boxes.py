"""Boxes of voxels: pure functions, half-open, (z, y, x)."""

import math
from collections.abc import Sequence

from kpt_dask.omezarr import Region

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
    """Box of what two boxes share, None if that is nothing."""
    if box is None:
        return None
    z, y, x = ((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return (z, y, x) if z[0] < z[1] and y[0] < y[1] and x[0] < x[1] else None


def box_of(region: Region) -> Box:
    """Box of a region."""
    z, y, x = ((s.start, s.stop) for s in region)
    return z, y, x


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in an array that holds the voxels of another."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """Where a box lies in the whole array."""
    return tuple(slice(a, b) for a, b in box)


def shape_of(box: Box) -> tuple[int, int, int]:
    """Voxels along each axis."""
    z, y, x = (b - a for a, b in box)
    return z, y, x


def cut(box: Box, unit: tuple[int, int, int], voxels: float, pieces: int) -> list[Box]:
    """Cut a box at multiples of a unit, always the largest piece, near its middle.

    Parameters
    ----------
    unit : (int, int, int)
        A piece is never cut but at a multiple of this.
    voxels : float
        A piece is cut as long as it has more, if it can be.
    pieces : int
        How many there are to be at least, if so many can be.

    Returns
    -------
    list of Box
        Largest first.
    """
    whole = [box]
    done: list[Box] = []
    while whole:
        largest = max(whole, key=_size)
        if _size(largest) <= voxels and len(whole) + len(done) >= pieces:
            break
        whole.remove(largest)
        halves = _halves(largest, unit)
        if halves:
            whole += halves
        else:
            done.append(largest)
    return sorted(whole + done, key=_size, reverse=True)


def _size(box: Box) -> int:
    return math.prod(shape_of(box))


def _halves(box: Box, unit: tuple[int, int, int]) -> list[Box]:
    """Cut a box once, as near to the middle of an axis as can be; nothing if it cannot be cut."""
    best: tuple[float, int, int] | None = None
    for axis, ((a, b), u) in enumerate(zip(box, unit, strict=True)):
        at = min(max(round((a + b) / 2 / u) * u, (a // u + 1) * u), (b - 1) // u * u)
        if a < at < b:
            share = max(at - a, b - at) / (b - a)
            best = min(best or (share, axis, at), (share, axis, at))
    if best is None:
        return []
    _, axis, at = best
    (a, b) = box[axis]
    low, high = list(box), list(box)
    low[axis], high[axis] = (a, at), (at, b)
    return [(low[0], low[1], low[2]), (high[0], high[1], high[2])]


def aligned(box: Box, unit: tuple[int, int, int], shape: tuple[int, int, int]) -> Region:
    """Smallest region of whole units around a box, within an array of a shape."""
    z, y, x = (
        slice(a // u * u, min(-(-b // u) * u, n))
        for (a, b), u, n in zip(box, unit, shape, strict=True)
    )
    return z, y, x
