"""Boxes of voxels: pure functions, half-open, (z, y, x)."""

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
