"""Contours of an organ on a plane, filled: holes, islands in holes, and parts that overlap.

A voxel is enclosed by a contour if a line from its centre crosses it an odd number of times, so a
hole may be joined to its contour by a channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Box = tuple[slice, slice]
Mask = NDArray[np.bool_]
Contour = NDArray[np.float64]


class Filled(NamedTuple):
    """Contours of an organ on a plane, filled.

    Attributes
    ----------
    mask : ndarray (row, column), bool
        Voxels of the organ.
    twice : int
        Contours that were listed before.
    crossing : int
        Contours that overlap others and lie in none.
    """

    mask: Mask
    twice: int
    crossing: int


class _Part(NamedTuple):
    """Voxels that a contour encloses, in their box."""

    box: Box
    mask: Mask


def united(contours: Sequence[Contour], shape: tuple[int, int]) -> Filled:
    """Fill contours: one that lies in another is a hole, or an island in a hole.

    Each counts once, and those that overlap otherwise are united: counting how many contours
    enclose a voxel would erase what is listed twice.

    Parameters
    ----------
    contours : sequence of ndarray (n, 2), float64
        (row, column) of the corners of each.
    shape : (int, int)
        Rows and columns of the plane.

    Examples
    --------
    >>> import numpy as np
    >>> square = np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) - 0.05
    >>> organ, hole, beside = 6 * square, 2 * square + 2, 4 * square + 4
    >>> found = united([organ, organ, hole, beside], (9, 9))
    >>> int(found.mask.sum()), found.twice, found.crossing
    (44, 1, 1)
    """
    parts = [part for one in contours if (part := _part(one, shape)) is not None]
    parts.sort(key=lambda part: -np.count_nonzero(part.mask))
    ends = np.array([[(one.start, -one.stop) for one in part.box] for part in parts])
    mask = np.zeros(shape, np.bool_)
    organ: list[bool] = []
    twice = crossing = 0
    for n, (box, own) in enumerate(parts):
        around = None
        for other in np.flatnonzero((ends[:n] <= ends[n]).all(axis=(1, 2)))[::-1].tolist():
            if _cut(parts[other], box)[own].all():
                around = other
                break
        if around is not None and np.array_equal(parts[around].mask, own):
            twice += 1
            organ.append(organ[around])
            continue
        organ.append(around is None or not organ[around])
        crossing += organ[n] and bool(mask[box][own].any())
        mask[box][own] = organ[n]
    return Filled(mask, twice, crossing)


def excluding(contours: Sequence[Contour], shape: tuple[int, int]) -> Filled:
    """Fill contours that exclude each other: the voxels that an odd number of them enclose.

    Examples
    --------
    >>> import numpy as np
    >>> square = np.array([[0, 0], [0, 1], [1, 1], [1, 0]]) - 0.05
    >>> int(excluding([6 * square, 4 * square + 4], (9, 9)).mask.sum())
    44
    """
    mask = np.zeros(shape, np.bool_)
    for one in contours:
        if (part := _part(one, shape)) is not None:
            mask[part.box] ^= part.mask
    return Filled(mask, 0, 0)


def _part(contour: Contour, shape: tuple[int, int]) -> _Part | None:
    """Find the voxels that a contour encloses; None if there are none."""
    first = np.clip(np.floor(contour.min(axis=0)), 0, shape).astype(int)
    last = np.clip(np.floor(contour.max(axis=0)) + 1, 0, shape).astype(int)
    rows, columns = (last - first).tolist()
    crossings = np.zeros((rows, columns + 1), np.int32)
    count_crossings(contour - first, crossings)
    mask = crossings.cumsum(axis=1)[:, :columns] % 2 == 1
    if not mask.any():
        return None
    [tight] = ndimage.find_objects(mask.view(np.uint8))
    row, column = (
        slice(int(start) + one.start, int(start) + one.stop)
        for start, one in zip(first, tight, strict=True)
    )
    return _Part((row, column), mask[tight])


def _cut(part: _Part, box: Box) -> Mask:
    """Cut a box out of a part that has all of it in its own box."""
    rows, columns = (
        slice(one.start - own.start, one.stop - own.start)
        for one, own in zip(box, part.box, strict=True)
    )
    return part.mask[rows, columns]


def count_crossings(contour: NDArray[np.float64], crossings: NDArray[np.int32]) -> None:
    """Count where the edges of a closed contour cross the rows of a plane.

    Parameters
    ----------
    contour : ndarray (n, 2), float64
        (row, column) of the corners.
    crossings : ndarray (row, column + 1), int32
        Is given, at the first column whose centre is beyond it, one more for each crossing.
    """
    start, end = contour, np.roll(contour, -1, axis=0)
    flip = start[:, 0] > end[:, 0]
    low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
    # Rows of an edge: from its lower end, which counts, to its upper end, which does not.
    first = np.clip(np.ceil(low[:, 0]), 0, len(crossings)).astype(np.int64)
    last = np.clip(np.ceil(high[:, 0]), 0, len(crossings)).astype(np.int64)
    number = last - first
    edge = np.repeat(np.arange(len(contour)), number)
    row = np.arange(number.sum()) - np.repeat(number.cumsum() - number, number) + first[edge]
    rise = high[edge, 0] - low[edge, 0]
    at = low[edge, 1] + (row - low[edge, 0]) / rise * (high[edge, 1] - low[edge, 1])
    column = np.clip(np.ceil(at), 0, crossings.shape[1] - 1).astype(np.int64)
    np.add.at(crossings, (row, column), 1)
