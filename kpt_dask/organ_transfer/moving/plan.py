"""Plans of the modes that move whole organs: which organs move where, and with which weight.

Pure functions of matches and votes: no voxel is read. The moves are in the order of summation, so
sums do not depend on how the volume is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.boxes import Box
from kpt_dask.grid import Grid
from kpt_dask.kernels.jit import kernel
from kpt_dask.matching.trend import fit_trend
from kpt_dask.organ_transfer.job import Evidence
from kpt_dask.organ_transfer.moving.distances import REACH_RHO
from kpt_dask.organ_transfer.moving.organ_affines import fit_affines

NEGLIGIBLE = 0.05
"""Mode `across` drops an organ's lightest moves, which are most of them, up to this part of its
total weight; no probability changes by more."""


@dataclass(frozen=True, eq=False)
class OrganMoves:
    """Organs of atlases, moved by whole voxels or by affines.

    Attributes
    ----------
    atlas, organ : int64 arrays (n)
        Index of the atlas, and of the organ in the table. Ordered by both: the order of
        summation.
    weight : float64 array (n)
        Sums of the weights of the matches that propose a move.
    low, high : int64 arrays (n, 3)
        Voxels of the scan that the organ's bounding box covers when moved: the first, and the one
        past the last.
    voxels : int64 array (n)
        Voxels of the organ.
    affine : int64 array (n)
        Row of `inverse` by which the organ moves; −1 if it moves by whole voxels.
    inverse : float64 array (k, 3, 4)
        Affines, from voxels of the scan to those of an organ's bounding box.
    """

    atlas: NDArray[np.int64]
    organ: NDArray[np.int64]
    weight: NDArray[np.float64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    voxels: NDArray[np.int64]
    affine: NDArray[np.int64]
    inverse: NDArray[np.float64]

    def take(self, index: NDArray[np.int64]) -> "OrganMoves":
        """Keep some moves, given by their indices, in that order."""
        return OrganMoves(
            self.atlas[index],
            self.organ[index],
            self.weight[index],
            self.low[index],
            self.high[index],
            self.voxels[index],
            self.affine[index],
            self.inverse,
        )

    def begins(self) -> NDArray[np.int64]:
        """Index of the first move of each organ of each atlas."""
        ahead = (np.diff(self.atlas) != 0) | (np.diff(self.organ) != 0)
        return np.flatnonzero(np.append(self.atlas.size > 0, ahead))

    def by_affine(self) -> NDArray[np.bool_]:
        """Whether each move is by an affine: bool (n)."""
        return self.affine >= 0

    def reach(self, box: Box) -> NDArray[np.bool_]:
        """Whether each move reaches a box: bool (n)."""
        reached = np.empty(self.atlas.size, np.bool_)
        _reach(self.low, self.high, np.array(box), reached)
        return reached

    def visited_in(self, box: Box) -> NDArray[np.float64]:
        """Estimate how many voxels of a box each move visits: float (n).

        By whole voxels, those of the organ, which counts as a ball: 48 % of it lie in its middle
        third. By an affine, all voxels that its moved bounding box covers.
        """
        visited = np.empty(self.atlas.size)
        _visit(self.low, self.high, self.voxels, self.by_affine(), np.array(box), visited)
        return visited

    def reaches(self) -> dict[int, Box]:
        """Box around all moves of each organ, by index of the organ."""
        boxes: dict[int, Box] = {}
        for o in np.unique(self.organ).tolist():
            chosen = self.organ == o
            low, high = self.low[chosen].min(axis=0), self.high[chosen].max(axis=0)
            z, y, x = zip(low.tolist(), high.tolist(), strict=True)
            boxes[o] = z, y, x
        return boxes


@kernel
def _reach(low: Any, high: Any, box: Any, out: Any) -> None:
    for n in range(low.shape[0]):
        out[n] = True
        for axis in range(3):
            out[n] &= (low[n, axis] < box[axis, 1]) & (high[n, axis] > box[axis, 0])


@kernel
def _visit(low: Any, high: Any, voxels: Any, by_affine: Any, box: Any, out: Any) -> None:
    """Do what `OrganMoves.visited_in` does."""
    for n in range(low.shape[0]):
        share = inside = 1.0
        for axis in range(3):
            size = high[n, axis] - low[n, axis]
            begin = min(max(box[axis, 0] - low[n, axis], 0), size) / size
            end = min(max(box[axis, 1] - low[n, axis], 0), size) / size
            # Volume of a ball of height 1 below `end`, less that below `begin`.
            share *= end * end * (3 - 2 * end) - begin * begin * (3 - 2 * begin)
            inside *= (end - begin) * size
        out[n] = inside if by_affine[n] else share * voxels[n]


@dataclass(frozen=True)
class Proposals:
    """Matches that move an organ, ordered by organ and match.

    Attributes
    ----------
    match, organ : int64 arrays (n)
        Indices of the match, and of the organ in the table.
    weight : float64 array (n)
        Positive.
    """

    match: NDArray[np.int64]
    organ: NDArray[np.int64]
    weight: NDArray[np.float64]


def propose(
    evidence: Evidence,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    voting: OrganTable,
    across: Mapping[str, Sequence[str]],
    distance: NDArray[np.float32] | None = None,
    rho: float = np.inf,
) -> Proposals:
    """Decide which matches move which organs of their atlas, and with which weight.

    Parameters
    ----------
    evidence : Evidence
        Its matches and votes.
    atlases
        What the indices of the matches stand for.
    organs : OrganTable
        Organs to move.
    voting : OrganTable
        Organs that the columns of the votes stand for, those to move among them.
    across : mapping of str to sequence of str
        By organ, in which organs matches must lie to move it; in the organ itself otherwise. Those
        whose atlas label equals their test keypoint's label move it, with weight p(L) · p(m)
        (eqs. 8–10).
    distance : float32 array (match, organ), optional
        mm from the match's atlas keypoint to the atlas's organ. If given, organs that `across`
        does not name are moved by all matches with d < `REACH_RHO` · ρ, in an organ or not, with
        weight p(m) · exp(−d² / 2ρ²).
    rho : float
        ρ, mm.
    """
    _, matches, votes = evidence
    label, keypoint = matches.label.values, matches.keypoint.values
    probability = matches.probability.values.astype(np.float64)
    agreeing = np.flatnonzero((label > 0) & (label == votes.label.values[keypoint]))
    names = organs.names
    column_of = np.zeros(1 << 16, np.int64)
    column_of[list(voting.values)] = np.arange(len(voting))
    lies_in = column_of[label[agreeing]]
    posterior = votes.posterior.values[keypoint[agreeing], lies_in].astype(np.float64)
    agreeing_weight = posterior * probability[agreeing]
    shown = np.array([[name in a.organs for name in names] for a in atlases], bool)
    shown = shown.reshape(-1, len(names))[matches.atlas.values[agreeing]]
    match_of: list[NDArray[np.int64]] = []
    weight_of: list[NDArray[np.float64]] = []
    for o, name in enumerate(names):
        if distance is not None and name not in across:
            match = np.flatnonzero(distance[:, o] < REACH_RHO * rho)
            nearness = np.exp(-(distance[match, o].astype(np.float64) ** 2) / (2 * rho**2))
            weight = probability[match] * nearness
        else:
            movers = [voting.names.index(mover) for mover in across.get(name, [name])]
            moving = np.isin(lies_in, movers) & shown[:, o]
            match, weight = agreeing[moving], agreeing_weight[moving]
        match_of.append(match[weight > 0])
        weight_of.append(weight[weight > 0])
    return Proposals(
        np.concatenate(match_of),
        np.repeat(np.arange(len(organs)), [match.size for match in match_of]),
        np.concatenate(weight_of),
    )


def plan_moves(
    proposals: Proposals,
    matches: xr.Dataset,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    grid: Grid,
) -> OrganMoves:
    """Move organs by the translation of each match, rounded to voxels.

    Matches that propose the same move are one move; those of an organ are ordered by shift.
    """
    match = proposals.match
    atlas = matches.atlas.values[match].astype(np.int64)
    origins = np.array([a.info.origin for a in atlases]).reshape(-1, 3)
    moved = matches.translation.values[match].astype(np.float64) + origins[atlas] - grid.origin
    shift = np.rint(moved / grid.spacing).astype(np.int64)
    first, inverse = _distinct(np.column_stack([atlas, proposals.organ, shift]))
    weights = np.bincount(inverse, proposals.weight, minlength=first.size)
    atlas, organ, shift = atlas[first], proposals.organ[first], shift[first]
    bounds, voxels = _boxes_of(atlas, organ, atlases, organs)
    return OrganMoves(
        atlas,
        organ,
        weights.astype(np.float64),
        bounds[..., 0] + shift,
        bounds[..., 1] + shift,
        voxels,
        affine=np.full(atlas.size, -1),
        inverse=np.empty((0, 3, 4)),
    )


def _boxes_of(
    atlas: NDArray[np.int64],
    organ: NDArray[np.int64],
    atlases: Sequence[Atlas],
    organs: OrganTable,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bounding boxes (n, 3, 2) and voxels (n) of organs of atlases."""
    names = organs.names
    first, inverse = _distinct(np.column_stack([atlas, organ]))
    pairs = zip(atlas[first].tolist(), organ[first].tolist(), strict=True)
    found = [atlases[a].organs[names[o]] for a, o in pairs]
    boxes = np.array([info.bounding_box for info in found], np.int64).reshape(-1, 3, 2)
    return boxes[inverse], np.array([info.voxels for info in found], np.int64)[inverse]


def _distinct(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find distinct rows, in their order: where each is first, and which of them each row is.

    Several times faster than `numpy.unique`, which compares whole rows to sort them.
    """
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    inverse = np.empty(len(rows), np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse


def plan_affines(
    proposals: Proposals,
    evidence: Evidence,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    grid: Grid,
) -> OrganMoves:
    """Move each atlas's organ by one affine where it has three matches, else as `plan_moves`.

    The affine's weight is the sum over these matches, each as far as it agrees with the affine.
    """
    keypoints, matches, _ = evidence
    match_atlas = matches.atlas.values[proposals.match].astype(np.int64)
    position = keypoints.position.values[matches.keypoint.values[proposals.match]]
    position = position.astype(np.float64)
    in_atlas = position - matches.translation.values[proposals.match]
    first, pair = _distinct(np.column_stack([match_atlas, proposals.organ]))
    order = np.argsort(pair, kind="stable")
    counts = np.bincount(pair, minlength=first.size)
    # In this process: to send so little work elsewhere would take as long as to do it.
    own = matches.atlas.values
    whole = keypoints.position.values[matches.keypoint.values]
    trends = {
        a: fit_trend(whole[own == a], matches.translation.values[own == a])
        for a in np.unique(match_atlas).tolist()
    }
    bodies = [trends[a] for a in match_atlas[first].tolist()]
    affines, agree = fit_affines(in_atlas[order], position[order], np.cumsum(counts), bodies)
    fitted = np.flatnonzero(~np.isnan(affines[:, 0, 0]))
    by_affine = np.zeros(first.size, np.bool_)
    by_affine[fitted] = True
    others = ~by_affine[pair]
    weights = np.bincount(pair[order], agree * proposals.weight[order], minlength=first.size)
    rest = Proposals(proposals.match[others], proposals.organ[others], proposals.weight[others])
    shifted = plan_moves(rest, matches, atlases, organs, grid)
    atlas, organ = match_atlas[first[fitted]], proposals.organ[first[fitted]]
    bounds, voxels = _boxes_of(atlas, organ, atlases, organs)
    origins = np.array([a.info.origin for a in atlases]).reshape(-1, 3)[atlas]
    low, high, inverse = _in_voxels(affines[fitted], bounds, origins, grid)
    both = OrganMoves(
        np.append(atlas, shifted.atlas),
        np.append(organ, shifted.organ),
        np.append(weights[fitted], shifted.weight),
        np.concatenate([low, shifted.low]),
        np.concatenate([high, shifted.high]),
        np.append(voxels, shifted.voxels),
        np.append(np.arange(fitted.size), shifted.affine),
        inverse,
    )
    return both.take(np.lexsort((both.organ, both.atlas)))


def without_negligible(moves: OrganMoves, n_organs: int) -> OrganMoves:
    """Drop the lightest moves of each organ, up to `NEGLIGIBLE` of its weight.

    A share (K + D) / W becomes K / (W − εW), where εW is the weight that is dropped and
    0 ≤ D ≤ εW: it changes by at most ε.
    """
    kept = np.ones(moves.atlas.size, bool)
    for o in range(n_organs):
        of_organ = np.flatnonzero(moves.organ == o)
        order = of_organ[np.argsort(moves.weight[of_organ], kind="stable")]
        light = np.cumsum(moves.weight[order]) <= NEGLIGIBLE * moves.weight[of_organ].sum()
        kept[order[light]] = False
    return moves.take(np.flatnonzero(kept))


def _in_voxels(
    affines: NDArray[np.float64],
    bounds: NDArray[np.int64],
    origins: NDArray[np.float64],
    grid: Grid,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Express affines in mm, from atlases to the scan, in voxels.

    Parameters
    ----------
    affines : float64 array (k, 3, 4)
    bounds : int64 array (k, 3, 2)
        Bounds of each one's organ.
    origins : float64 array (k, 3)
        Origin of each one's atlas.
    grid : Grid
        Grid of the scan; its spacing is that of the atlases.

    Returns
    -------
    low, high : int64 arrays (k, 3)
    inverse : float64 array (k, 3, 4)
        Where the organs come to lie, and the way back: see `OrganMoves`.
    """
    spacing = float(grid.spacing[0])
    linear, size = affines[..., :3], bounds[..., 1] - bounds[..., 0]
    first = (origins + spacing * bounds[..., 0])[..., None]
    # In voxels, from the bounding box's voxel 0 to the scan's.
    offset = (linear @ first + affines[..., 3:] - grid.origin[:, None]) / spacing
    # All eight: of an axis, the first border or the last.
    ends = np.array(list(product((0, 1), repeat=3))).T
    corners = linear @ (ends * size[..., None] - 0.5) + offset
    low = np.floor(corners.min(axis=2)).astype(np.int64)
    high = np.ceil(corners.max(axis=2)).astype(np.int64) + 1
    back = np.linalg.inv(linear)
    return low, high, np.concatenate([back, -back @ offset], axis=2)
