"""One organ of some atlases, with its moves: read once, then added to the organ's share.

Between `plan` (which moves), `atlas_store.organ_strips` (which voxels) and `kernels` (the sums).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.boxes import Box, joined, shape_of
from atlas_store.organ_strips import Strips, read_strips
from kpt_dask.kernels.simd import LANES
from kpt_dask.organ_transfer.moving.kernels import (
    Affines,
    Shifts,
    Slab,
    add_organ_by_affines,
    add_shifted_organ,
    planes_below,
)
from kpt_dask.organ_transfer.moving.plan import OrganMoves


@dataclass(frozen=True)
class OrganStripsAndMoves:
    """One organ as several atlases show it, and how each is moved.

    Attributes
    ----------
    strips : Strips
        The organ in all these atlases: planes of one atlas follow those of another.
    shifts : Shifts
        Its moves by whole voxels.
    affines : Affines
        Its moves by affines.
    """

    strips: Strips
    shifts: Shifts
    affines: Affines

    def add(self, slab: Slab, box: Box, nu: float, *, by_affine: bool, clear_first: bool) -> None:
        """Add all moves of one kind to the organ's share.

        Parameters
        ----------
        slab : Slab
            Planes and rows of `box`; its columns may be more, which stay as they are.
        box : Box
            Voxels of the volume where the organ may be.
        nu : float
            HU.
        by_affine : bool
            Whether to add the moves by affines, or those by whole voxels. Sums depend on their
            order: whole voxels come first, of all atlases.
        clear_first : bool
            Whether the share is set to 0 before.
        """
        begin, end = (LANES + x - slab.first[2] for x in box[2])
        cleared = (begin, end) if clear_first else (0, 0)
        if self.shifts.weight.size and not by_affine:
            add_shifted_organ(slab, cleared, self.strips, self.shifts, nu)
        elif clear_first:
            slab.share[..., slice(*cleared)] = 0
        if self.affines.weight.size and by_affine:
            add_organ_by_affines(slab, self.strips, self.affines, nu)


def read_organs(
    atlases: Mapping[int, Atlas], moves: OrganMoves, boxes: Sequence[Box], organs: OrganTable
) -> dict[int, OrganStripsAndMoves]:
    """Read of each organ the planes that its moves bring into some boxes.

    Parameters
    ----------
    atlases : mapping of int to Atlas
        By index.
    moves : OrganMoves
        At least one.
    boxes : sequence of Box
        Boxes of the volume.
    organs : OrganTable

    Returns
    -------
    dict of int to OrganStripsAndMoves
        By index of the organ; without organs that no move brings there.
    """
    names = organs.names
    begins = moves.begins()
    counts = np.diff(np.append(begins, moves.atlas.size))
    pairs = list(zip(moves.atlas[begins].tolist(), moves.organ[begins].tolist(), strict=True))
    sizes = np.array([shape_of(atlases[a].organs[names[o]].bounding_box) for a, o in pairs])
    sizes = np.repeat(sizes, counts, axis=0)
    ranges = []
    for first, past in _planes_of_moves(moves, sizes[:, 0], boxes):
        lowest = np.minimum.reduceat(first, begins).tolist()
        ranges.append(zip(lowest, np.maximum.reduceat(past, begins).tolist(), strict=True))
    wanted: dict[int, dict[str, list[tuple[int, int]]]] = {}
    reached: list[int] = []
    for pair, ((a, o), *parts) in enumerate(zip(pairs, *ranges, strict=True)):
        planes = joined((first, past) for first, past in parts if first < past)
        if planes:
            wanted.setdefault(a, {})[names[o]] = planes
            reached.append(pair)
    if not reached:
        return {}
    read = read_strips([(atlases[a], planes) for a, planes in wanted.items()], organs)
    by_atlas = dict(zip(wanted, read, strict=True))
    strips = [by_atlas[a][names[o]] for a, o in (pairs[pair] for pair in reached)]
    joined_strips = Strips(
        strips[0].values,
        np.concatenate([one.planes for one in strips]),
        np.concatenate([one.short_strips for one in strips]),
    )
    # Where the planes of each atlas's organ begin among those of all; −1 where none was read.
    planes_at = np.full(begins.size, -1)
    planes_at[reached] = np.cumsum([0, *(one.planes.size for one in strips[:-1])])
    planes_at = np.repeat(planes_at, counts)
    by_affine, weight = moves.by_affine(), moves.weight.astype(np.float32)
    found = {}
    for o in sorted({pairs[pair][1] for pair in reached}):
        chosen = (moves.organ == o) & (planes_at >= 0)
        s, k = np.flatnonzero(chosen & ~by_affine), np.flatnonzero(chosen & by_affine)
        found[o] = OrganStripsAndMoves(
            joined_strips,
            Shifts(moves.low[s], moves.high[s] - moves.low[s], planes_at[s], weight[s]),
            Affines(
                moves.low[k],
                moves.high[k],
                sizes[k],
                planes_at[k],
                moves.inverse[moves.affine[k]],
                weight[k],
            ),
        )
    return found


def _planes_of_moves(
    moves: OrganMoves, depths: NDArray[np.int64], boxes: Sequence[Box]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, per box, the planes of its organ that each move brings there: first and past the last.

    Planes of the organ's bounding box, which has `depths` of them. A move that brings none has a
    first plane that is not before the last.
    """
    by_affine = np.flatnonzero(moves.by_affine())
    inverse = moves.inverse[moves.affine[by_affine]]
    for box in boxes:
        reached = moves.reach(box)
        start, stop = (np.array(ends) for ends in zip(*box, strict=True))
        low, high = np.maximum(moves.low, start), np.minimum(moves.high, stop)
        first, past = low[:, 0] - moves.low[:, 0], high[:, 0] - moves.low[:, 0]
        if by_affine.size:
            planes = np.empty((2, by_affine.size), np.int64)
            planes_below(
                inverse, low[by_affine], high[by_affine], depths[by_affine], planes[0], planes[1]
            )
            first[by_affine], past[by_affine] = planes
        yield np.where(reached, first, np.iinfo(np.int64).max), np.where(reached, past, 0)
