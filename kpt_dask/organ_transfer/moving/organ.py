"""An organ of some atlases, read for its moves and added to its share: modes that move whole ones.

Between `plan`, what atlases keep (`atlas_store.organ_strips`), and `kernels`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.boxes import Box, joined, shape_of
from atlas_store.organ_strips import fill, read_strips
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import LANES
from kpt_dask.organ_transfer.moving.kernels import accumulate, sample
from kpt_dask.organ_transfer.moving.plan import Moves


@dataclass(frozen=True)
class MovedOrgan:
    """An organ of some atlases, and its moves.

    Attributes
    ----------
    strips : int16 array (n, `PLACE` + `STRIP`)
        All that was read of these atlases.
    planes, halves : int64 arrays (p)
        Where in it the strips of each plane of what was read begin, and where they end, and where
        the short ones begin.
    shifts : int64 array (m, 7)
        Of its moves by whole voxels: where the bounding box begins in the volume, its size, and
        where its planes begin in `planes`.
    weights : float32 array (m)
        Of these moves.
    affines : int64 array (k, 10)
        Of the moves by affines: `low` and `high` as in `Moves`, the size of the bounding box, and
        where its planes begin in `planes`.
    inverse : float64 array (k, 3, 4)
        As in `Moves`.
    affine_weights : float32 array (k)
        Of these moves.
    """

    strips: NDArray[np.int16]
    planes: NDArray[np.int64]
    halves: NDArray[np.int64]
    shifts: NDArray[np.int64]
    weights: NDArray[np.float32]
    affines: NDArray[np.int64]
    inverse: NDArray[np.float64]
    affine_weights: NDArray[np.float32]

    def add(
        self,
        share: NDArray[np.float32],
        box: Box,
        scan: NDArray[np.int16],
        around: Box,
        nu: float,
        bent: bool,
        fresh: bool,
    ) -> None:
        """Add all moves of a kind to the organ's share in a box of the volume.

        Parameters
        ----------
        share, scan
            As for `kpt_dask.organ_transfer.moving.kernels.accumulate`.
        box : Box
            Of the share; beside it in x, its rows hold nothing.
        around : Box
            Of the scan.
        nu : float
            HU.
        bent : bool
            Those by affines, or those by whole voxels, which come first, whichever atlas's they
            are: sums depend on their order.
        fresh : bool
            Whether the share is set to 0 first.
        """
        (z, _), (y, _), (x, stop) = box
        (z0, _), (y0, _), (x0, _) = around
        columns = (LANES + x - x0, LANES + stop - x0) if fresh else (0, 0)
        into = scan, (z - z0, y - y0), np.array([z, y, x0]), self.strips, self.planes
        if self.weights.size and not bent:
            accumulate(share, columns, *into, self.halves, self.shifts, self.weights, nu)
        elif fresh:
            share[..., slice(*columns)] = 0
        if self.affine_weights.size and bent:
            bending = self.affines, self.inverse, self.affine_weights
            _bend(share, *into, *bending, nu)


def read_moved(
    atlases: Mapping[int, Atlas], moves: Moves, boxes: Sequence[Box], organs: OrganTable
) -> dict[int, MovedOrgan]:
    """Read of each organ what its moves bring into some boxes.

    Parameters
    ----------
    atlases : mapping of int to Atlas
        By index.
    moves : Moves
        At least one.
    boxes : sequence of Box
    """
    begins, bent = moves.begins(), moves.bent()
    counts = np.diff(np.append(begins, moves.atlas.size))
    names = organs.names
    pairs = list(zip(moves.atlas[begins].tolist(), moves.organ[begins].tolist(), strict=True))
    sizes = np.array([shape_of(atlases[a].organs[names[o]].bounding_box) for a, o in pairs])
    sizes = np.repeat(sizes, counts, axis=0)
    ranges = []
    for each in _planes(moves, sizes[:, 0], boxes):
        first, stop = np.minimum.reduceat(each[0], begins), np.maximum.reduceat(each[1], begins)
        ranges.append(zip(first.tolist(), stop.tolist(), strict=True))
    wanted: dict[int, dict[str, list[tuple[int, int]]]] = {}
    mine: list[int] = []
    for g, ((a, o), *parts) in enumerate(zip(pairs, *ranges, strict=True)):
        planes = joined((a, b) for a, b in parts if a < b)
        if planes:
            wanted.setdefault(a, {})[names[o]] = planes
            mine.append(g)
    if not mine:
        return {}
    read = read_strips([(atlases[a], own) for a, own in wanted.items()], organs)
    by_atlas = dict(zip(wanted, read, strict=True))
    strips = [by_atlas[a][names[o]] for a, o in (pairs[g] for g in mine)]
    # Of each atlas's organ, where its planes begin among those of all.
    offsets = np.full(begins.size, -1)
    offsets[mine] = np.cumsum([0, *(own.planes.size for own in strips[:-1])])
    offsets = np.repeat(offsets, counts)
    all_planes = np.concatenate([own.planes for own in strips])
    all_halves = np.concatenate([own.halves for own in strips])
    shifts = np.column_stack([moves.low, moves.high - moves.low, offsets])
    weights = moves.weight.astype(np.float32)
    bending = np.column_stack([moves.low, moves.high, sizes, offsets])
    found = {}
    for o in sorted({pairs[g][1] for g in mine}):
        own = (moves.organ == o) & (offsets >= 0)
        straight, by_affine = np.flatnonzero(own & ~bent), np.flatnonzero(own & bent)
        found[o] = MovedOrgan(
            strips[0].values,
            all_planes,
            all_halves,
            shifts[straight],
            weights[straight],
            bending[by_affine],
            moves.inverse[moves.affine[by_affine]],
            weights[by_affine],
        )
    return found


@kernel
def _bend(
    share: Any,
    scan: Any,
    corner: Any,
    first: Any,
    strips: Any,
    planes: Any,
    affines: Any,
    inverse: Any,
    weights: Any,
    nu: Any,
) -> None:
    """Add one organ, moved by several affines, to its share: see `MovedOrgan`."""
    # In one call, after each of which a thread may have to wait for others.
    start, stop = np.empty((1, 3), np.int64), np.empty((1, 3), np.int64)
    begin, end = np.empty(1, np.int64), np.empty(1, np.int64)
    for m in range(weights.size):
        empty = False
        for axis in range(3):
            start[0, axis] = max(affines[m, axis], first[axis])
            size = share.shape[axis] - (2 * LANES if axis == 2 else 0)
            stop[0, axis] = min(affines[m, 3 + axis], first[axis] + size)
            empty |= start[0, axis] >= stop[0, axis]
        if empty:
            continue
        _planes_from(inverse[m : m + 1], start, stop, affines[m, 6:7], begin, end)
        own = planes[affines[m, 9] + begin[0]], planes[affines[m, 9] + end[0]]
        shape = end[0] - begin[0], affines[m, 7], affines[m, 8] + LANES
        organ = np.empty(shape, np.int16)
        fill(strips[own[0] : own[1]], begin[0], organ)
        into = start[0] - first, stop[0] - first
        where = corner, first
        sample(share, scan, *where, organ, begin[0], *into, inverse[m], weights[m], nu)


def _planes(
    moves: Moves, depths: NDArray[np.int64], boxes: Sequence[Box]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of each box, which planes of its organ each move brings there: the first, and past the last.

    These are planes of the bounding box, of which each move's organ has `depths`; where there are
    none, the first is not before the other.
    """
    bent = np.flatnonzero(moves.bent())
    inverse = moves.inverse[moves.affine[bent]]
    for box in boxes:
        reached = moves.reach(box)
        start, stop = (np.array(ends) for ends in zip(*box, strict=True))
        low, high = np.maximum(moves.low, start), np.minimum(moves.high, stop)
        first, past = low[:, 0] - moves.low[:, 0], high[:, 0] - moves.low[:, 0]
        if bent.size:
            own = np.empty((2, bent.size), np.int64)
            _planes_from(inverse, low[bent], high[bent], depths[bent], *own)
            first[bent], past[bent] = own
        yield np.where(reached, first, np.iinfo(np.int64).max), np.where(reached, past, 0)


@kernel
def _planes_from(inverse: Any, low: Any, high: Any, depth: Any, first: Any, past: Any) -> None:
    """Find the planes of an organ from which affines fetch voxels.

    Parameters
    ----------
    inverse : float64 array (n, 3, 4)
        As in `Moves`.
    low, high : int64 arrays (n, 3)
        First voxels of the scan, and the ones past the last.
    depth : int64 array (n)
        Of the bounding box.
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
        # One plane more, whatever is rounded.
        first[n] = min(max(int(np.floor(least + 0.5)) - 1, 0), depth[n])
        past[n] = min(max(int(np.floor(most + 0.5)) + 2, 0), depth[n])
