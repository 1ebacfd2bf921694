"""Anti-aliased linear resampling of a scan, plane by plane as it is read.

Along each axis a sample is a weighted mean of a few neighbours: a triangle as wide as the
coarser of the two spacings, so that a coarser grid averages and a finer one interpolates
linearly; beyond the ends the nearest sample counts. The weights are small tables made by a
pure function; kernels apply them.

The axes are always done in the order y, x, z of the world, and neighbours are added in the
direction of the world, whatever order and direction the file stores: permuted and flipped
files give the same bits. The stored slow axis is the one along which planes arrive; axes
before it in that order are done on each arriving plane, axes after it on each finished one.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kpt_dask.grid import Grid
from kpt_dask.kernels.jit import kernel
from kpt_dask.resampling.axes import VOTES, Orientation, axis_tables
from kpt_dask.resampling.blocks import LABEL_TIE, Region

Plane = NDArray[np.float32]
T = TypeVar("T", bound=np.generic)

WORLD_ORDER = (1, 2, 0)
"""Order in which the world axes (z, y, x) are resampled."""

LARGEST_LABEL = 65535
"""Largest value of a label, uint16."""

VOTE_TIE = int(LABEL_TIE * VOTES**3)
"""`LABEL_TIE` in votes."""

ROWS = 16
"""Rows resampled side by side, to fill a vector."""


def resample(
    slabs: Iterable[NDArray[np.float32]],
    source: Grid,
    target: Grid,
    thickness: tuple[int, int, int],
) -> Iterator[tuple[Region, NDArray[np.float32]]]:
    """Resample a streaming scan onto a grid whose axes are parallel to its own.

    Parameters
    ----------
    slabs : iterable of ndarray (n, j, i), float32
        All planes of the scan in stored order.
    source : Grid
        The scan's grid, axes in stored order; any permutation and flip.
    target : Grid
        Axes in world order: ``source.working(spacing)``, or `along_own_axes` if oblique.
    thickness : tuple of int
        Thickness of an output slab along z, y or x, whichever the planes arrive along, voxels.

    Yields
    ------
    region : tuple of slice
        Where the slab lies in the target; starts at a multiple of its thickness.
    values : ndarray (z, y, x), float32
        The resampled slab. Slabs come in the order in which the scan stores them.
    """
    stream = _Stream(source, target, thickness)
    slow = stream.tables[stream.slow]

    def finish(ring: NDArray[Any], output: int) -> Plane:
        total = _along_slow(ring, slow.start[output], slow.weights[output])
        return stream.passes(total, stream.after)

    return stream.run(slabs, lambda plane: stream.passes(plane, stream.before), finish)


def resample_labels(
    slabs: Iterable[NDArray[np.uint16]],
    source: Grid,
    target: Grid,
    thickness: tuple[int, int, int],
) -> Iterator[tuple[Region, NDArray[np.uint16]]]:
    """Resample a streaming label map; like `resample`, but each voxel is one of its labels.

    The neighbours of a voxel, weighted as for `resample`, vote: the label (background too)
    with the largest sum of weights wins, the lower one in a tie.
    """
    stream = _Stream(source, target, thickness)
    down, across = (stream.tables[a] for a in stream.in_plane)
    slow = stream.tables[stream.slow]
    votes, row_votes, column_votes = (table.votes for table in (slow, down, across))

    def finish(ring: NDArray[Any], output: int) -> NDArray[np.uint16]:
        winner: NDArray[np.uint16] = _vote(
            ring,
            slow.start[output],
            votes[output],
            down.start,
            row_votes,
            across.start,
            column_votes,
        )
        return winner

    return stream.run(slabs, lambda plane: plane, finish)


class _Stream:
    """One pass over the planes of a scan."""

    def __init__(self, source: Grid, target: Grid, thickness: tuple[int, int, int]) -> None:
        orientation = Orientation.of(source)
        self.tables = axis_tables(source, target)
        self.shape = target.shape
        self.slow = orientation.axes.index(0)
        self.in_plane = tuple(a for a in range(3) if a != self.slow)
        self.backwards = orientation.flipped[self.slow]
        self.thickness = thickness[self.slow]
        self.transposed = orientation.axes[self.in_plane[0]] == 2
        self.steps = tuple(-1 if orientation.flipped[a] else 1 for a in self.in_plane)
        turn = WORLD_ORDER.index(self.slow)
        self.before, self.after = WORLD_ORDER[:turn], WORLD_ORDER[turn + 1 :]

    def run(
        self,
        slabs: Iterable[NDArray[T]],
        prepare: Callable[[NDArray[T]], NDArray[T]],
        finish: Callable[[NDArray[T], int], NDArray[T]],
    ) -> Iterator[tuple[Region, NDArray[T]]]:
        """Collect output slabs from the planes that `finish` computes from the prepared ones."""
        n_out = self.shape[self.slow]
        slab: NDArray[T] | None = None
        for index, plane in self._finished(slabs, prepare, finish):
            first = index - index % self.thickness
            last = min(first + self.thickness, n_out)
            if slab is None:
                slab = np.empty(self._with_slow(last - first), plane.dtype)
            np.moveaxis(slab, self.slow, 0)[index - first] = plane
            if index == (first if self.backwards else last - 1):
                region = [slice(0, n) for n in self.shape]
                region[self.slow] = slice(first, last)
                yield (region[0], region[1], region[2]), slab
                slab = None

    def passes(self, plane: Plane, axes: tuple[int, ...]) -> Plane:
        """Resample a plane along some of the world axes that it contains."""
        for a in axes:
            table = self.tables[a]
            if not table.is_identity:
                apply = _along_rows if a == self.in_plane[0] else _along_columns
                plane = apply(plane, table.start, table.weights)
        return plane

    def _finished(
        self,
        slabs: Iterable[NDArray[T]],
        prepare: Callable[[NDArray[T]], NDArray[T]],
        finish: Callable[[NDArray[T], int], NDArray[T]],
    ) -> Iterator[tuple[int, NDArray[T]]]:
        """Planes of the output with their index along the slow axis, in stored order.

        The ring buffer holds the last planes: plane n (in the world's direction) is
        ``ring[n % taps]``, where `taps` is the number of neighbours of an output plane.
        """
        table = self.tables[self.slow]
        taps = table.weights.shape[1]
        outputs = range(len(table.start))
        wanted = iter(reversed(outputs) if self.backwards else outputs)
        output = next(wanted, None)
        ring: NDArray[T] | None = None
        for index, plane in self._arriving(slabs):
            prepared = prepare(plane)
            if ring is None:
                ring = np.zeros((taps, *prepared.shape), prepared.dtype)
            ring[index % taps] = prepared
            while output is not None and index == self._completed_by(output):
                yield output, finish(ring, output)
                output = next(wanted, None)

    def _completed_by(self, output: int) -> int:
        """Index (in the world's direction) of the last plane to arrive for an output plane."""
        table = self.tables[self.slow]
        ahead = 0 if self.backwards else table.weights.shape[1] - 1
        return int(table.start[output]) + ahead

    def _arriving(self, slabs: Iterable[NDArray[T]]) -> Iterator[tuple[int, NDArray[T]]]:
        """Planes with rows and columns in world order, and their index in the world's direction."""
        n_in = self.tables[self.slow].n_in
        count = 0
        for slab in slabs:
            for plane in slab:
                turned = plane.T if self.transposed else plane
                turned = np.ascontiguousarray(turned[:: self.steps[0], :: self.steps[1]])
                yield n_in - 1 - count if self.backwards else count, turned
                count += 1

    def _with_slow(self, n: int) -> tuple[int, ...]:
        return tuple(n if a == self.slow else self.shape[a] for a in range(3))


@kernel
def _along_rows(plane: Any, start: Any, weights: Any) -> Any:
    """Resample axis 0 of a plane."""
    n_out, taps = weights.shape
    width = plane.shape[1]
    out = np.zeros((n_out, width), np.float32)
    for o in range(n_out):
        row = out[o]
        for t in range(taps):
            weight = weights[o, t]
            source = plane[start[o] + t]
            for x in range(width):
                row[x] += weight * source[x]
    return out


@kernel
def _along_columns(plane: Any, start: Any, weights: Any) -> Any:
    """Resample axis 1 of a plane, `ROWS` rows side by side so that the loop is vectorised."""
    n_out, taps = weights.shape
    height, width = plane.shape
    out = np.empty((height, n_out), np.float32)
    turned = np.zeros((width, ROWS), np.float32)
    total = np.empty(ROWS, np.float32)
    for top in range(0, height, ROWS):
        rows = min(ROWS, height - top)
        for r in range(rows):
            source = plane[top + r]
            for x in range(width):
                turned[x, r] = source[x]
        for o in range(n_out):
            total[:] = 0
            for t in range(taps):
                weight = weights[o, t]
                column = turned[start[o] + t]
                for r in range(ROWS):
                    total[r] += weight * column[r]
            for r in range(rows):
                out[top + r, o] = total[r]
    return out


@kernel
def _along_slow(ring: Any, first: Any, weights: Any) -> Any:
    """Weighted sum of the planes of a ring buffer, from plane `first` on."""
    taps, height, width = ring.shape
    out = np.zeros((height, width), np.float32)
    for y in range(height):
        row = out[y]
        for t in range(taps):
            weight = weights[t]
            source = ring[(first + t) % taps, y]
            for x in range(width):
                row[x] += weight * source[x]
    return out


@kernel
def _vote(
    ring: Any, first: Any, votes: Any, down: Any, row_votes: Any, across: Any, column_votes: Any
) -> Any:
    """Labels of an output plane, from the stored planes that are its neighbours.

    Most voxels have neighbours of one label only. The lowest and the highest label of each
    column of neighbours are equal then, and there is no vote.
    """
    taps, _, width = ring.shape
    n_rows, n_columns = len(down), len(across)
    row_taps, column_taps = row_votes.shape[1], column_votes.shape[1]
    out = np.empty((n_rows, n_columns), ring.dtype)
    lowest = np.empty(width, ring.dtype)
    highest = np.empty(width, ring.dtype)
    labels = np.empty(taps * row_taps * column_taps, ring.dtype)
    sums = np.empty(len(labels), np.int64)
    for y in range(n_rows):
        begin = ring[first % taps, down[y]]
        for x in range(width):
            lowest[x] = begin[x]
            highest[x] = begin[x]
        for t in range(taps):
            for r in range(row_taps):
                row = ring[(first + t) % taps, down[y] + r]
                for x in range(width):
                    lowest[x] = min(lowest[x], row[x])
                    highest[x] = max(highest[x], row[x])
        for o in range(n_columns):
            left = across[o]
            label = lowest[left]
            mixed = False
            for c in range(column_taps):
                mixed |= (lowest[left + c] != label) | (highest[left + c] != label)
            if mixed:
                n = 0
                for t in range(taps):
                    for r in range(row_taps):
                        row = ring[(first + t) % taps, down[y] + r]
                        for c in range(column_taps):
                            known = 0
                            while known < n and labels[known] != row[left + c]:
                                known += 1
                            if known == n:
                                labels[n] = row[left + c]
                                sums[n] = 0
                                n += 1
                            sums[known] += votes[t] * row_votes[y, r] * column_votes[o, c]
                most = 0
                for known in range(n):
                    most = max(most, sums[known])
                label = np.uint16(LARGEST_LABEL)
                for known in range(n):
                    if sums[known] >= most - VOTE_TIE:
                        label = min(label, labels[known])
            out[y, o] = label
    return out
