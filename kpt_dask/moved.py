"""An organ of some atlases, read for its moves and added to its share: modes that move whole ones.

Between the plan (`kpt_dask.moves`), what atlases keep (`kpt_dask.strips`) and the kernels
(`kpt_dask.summing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from kpt_dask.boxes import Box, begin_of, joined, shape_of
from kpt_dask.moves import Moves
from kpt_dask.shares import intensity_table
from kpt_dask.strips import Strips, read_strips
from kpt_dask.summing import accumulate, sample


@dataclass(frozen=True)
class MovedOrgan:
    """An organ of some atlases, and its moves.

    Attributes
    ----------
    strips : int16 array (n, `PLACE` + `LANES`)
        All that was read of these atlases.
    planes : int64 array (p)
        Where in it the strips of each plane of each atlas's organ begin, and where they end.
    shifts : int64 array (m, 7)
        Of moves by whole voxels: where the bounding box begins in the volume, its size, and
        where its planes begin in `planes`.
    weights : float32 array (m)
        Of these moves.
    affines : list of (dense, low, high, inverse, weight)
        Of the moves by affines: the bounding box, int16 (z, y, x), and as in `Moves`.
    """

    strips: NDArray[np.int16]
    planes: NDArray[np.int64]
    shifts: NDArray[np.int64]
    weights: NDArray[np.float32]
    affines: list[tuple[Any, Any, Any, Any, Any]]

    @classmethod
    def of(cls, parts: Sequence[tuple[Strips, Box, slice]], moves: Moves) -> "MovedOrgan":
        """Put together the strips of an organ, its bounds, and its moves, of each atlas."""
        sizes = [strips.planes.size for strips, _, _ in parts]
        counts = [own.stop - own.start for _, _, own in parts]
        begins = np.repeat(np.cumsum([0, *sizes[:-1]]), counts)
        index = np.concatenate([np.arange(own.start, own.stop) for _, _, own in parts])
        low, high = moves.low[index], moves.high[index]
        weights = moves.weight[index].astype(np.float32)
        bent = moves.bent()
        shifted = ~bent[index]
        affines = []
        for strips, bounds, own in parts:
            by_affine = (own.start + np.flatnonzero(bent[own])).tolist()
            dense = strips.dense(shape_of(bounds)) if by_affine else None
            for i in by_affine:
                weight = np.float32(moves.weight[i])
                affines.append((dense, moves.low[i], moves.high[i], moves.inverse[i], weight))
        return cls(
            parts[0][0].values,
            np.concatenate([strips.planes for strips, _, _ in parts]),
            np.column_stack([low, high - low, begins])[shifted],
            weights[shifted],
            affines,
        )

    def add(self, share: NDArray[np.float32], scan: NDArray[np.int16], box: Box, nu: float) -> None:
        """Add all moves to the organ's share in a box of the volume.

        Parameters
        ----------
        share, scan
            As for `kpt_dask.summing.accumulate`.
        box : Box
        nu : float
            HU.
        """
        first = begin_of(box)
        if self.weights.size:
            moved = self.strips, self.planes, self.shifts, self.weights
            accumulate(share, scan, first, *moved, nu)
        for dense, low, high, inverse, weight in self.affines:
            start, stop = np.maximum(low - first, 0), np.minimum(high - first, shape_of(box))
            where = start, stop, inverse
            sample(share, scan, first, dense, *where, weight, intensity_table(nu))


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
    begins = moves.begins()
    ends = [*begins[1:].tolist(), moves.atlas.size]
    low, high = moves.low[:, 0], moves.high[:, 0]
    ranges = []
    for box in boxes:
        here = moves.reach(box)
        first = np.where(here, np.maximum(low, box[0][0]) - low, np.iinfo(np.int64).max)
        stop = np.where(here, np.minimum(high, box[0][1]) - low, 0)
        first, stop = np.minimum.reduceat(first, begins), np.maximum.reduceat(stop, begins)
        ranges.append(zip(first.tolist(), stop.tolist(), strict=True))
    bent = np.logical_or.reduceat(moves.bent(), begins).tolist()
    names = organs.names
    wanted: dict[int, dict[str, list[tuple[int, int]]]] = {}
    mine: dict[int, list[tuple[int, slice]]] = {}
    groups = map(slice, begins.tolist(), ends)
    for own, by_affine, *parts in zip(groups, bent, *ranges, strict=True):
        planes = joined((a, b) for a, b in parts if b)
        if not planes:
            continue
        a, o = int(moves.atlas[own.start]), int(moves.organ[own.start])
        if by_affine:
            planes = [(0, shape_of(atlases[a].organs[names[o]].bounding_box)[0])]
        wanted.setdefault(a, {})[names[o]] = planes
        mine.setdefault(o, []).append((a, own))
    read = read_strips([(atlases[a], own) for a, own in wanted.items()], organs)
    strips = dict(zip(wanted, read, strict=True))
    found = {}
    for o, owns in mine.items():
        name = names[o]
        parts = [(strips[a][name], atlases[a].organs[name].bounding_box, own) for a, own in owns]
        found[o] = MovedOrgan.of(parts, moves)
    return found
