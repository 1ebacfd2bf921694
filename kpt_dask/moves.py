"""Which organs move where, and with which weight: plans of the modes that move whole organs.

Pure functions of matches and votes: planned before any voxel is visited, in one order of
summation, so that blocks are independent. Reads no voxel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from kpt_dask.affine import fit_affine
from kpt_dask.boxes import Box
from kpt_dask.distances import REACH
from kpt_dask.grid import Grid

NEGLIGIBLE = 0.05
"""Of an organ's vote weight, the share that mode `across` leaves out: its lightest moves, most of
them. No share of the votes changes by more."""


@dataclass(frozen=True)
class Move:
    """One organ of one atlas, moved by whole voxels or by an affine.

    Attributes
    ----------
    atlas : int
        Index of the atlas.
    organ : int
        Index of the organ in the table.
    weight : float
        Sum of the weights of the matches that propose this move.
    box : ((int, int), (int, int), (int, int))
        Where the organ comes to lie, in voxels of the scan, half-open.
    inverse : float64 array (3, 4), optional
        From voxels of the scan to those of the organ's patch; without it the organ's bounding
        box becomes `box`.
    """

    atlas: int
    organ: int
    weight: float
    box: Box
    inverse: NDArray[np.float64] | None = None


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
    matches: xr.Dataset,
    votes: xr.Dataset,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    across: Mapping[str, Sequence[str]],
    distance: NDArray[np.float32] | None = None,
    rho: float = np.inf,
) -> Proposals:
    """Decide which matches move which organs of their atlas, and with which weight.

    Parameters
    ----------
    matches, votes : xarray.Dataset
        From `kpt_dask.match` and `kpt_dask.vote`.
    atlases, organs
        What the indices of the matches and the columns of the votes stand for.
    across : mapping of str to sequence of str
        By organ, in which organs matches must lie to move it; else in the organ itself. Those
        whose atlas label equals their test keypoint's move it, with weight p(L) · p(m)
        (eqs. 8–10).
    distance : float32 array (match, organ), optional
        mm from the match's atlas keypoint to the atlas's organ. If given, organs that `across`
        does not name are moved by all matches with d < `REACH` · ρ, in an organ or not, with
        weight p(m) · exp(−d² / 2ρ²).
    rho : float
        ρ, mm.
    """
    label = matches.label.values
    keypoint = matches.keypoint.values
    atlas = matches.atlas.values
    probability = matches.probability.values.astype(np.float64)
    agrees = (label > 0) & (label == votes.label.values[keypoint])
    posterior = votes.posterior.values
    index_of = {organ.value: i for i, organ in enumerate(organs)}
    found: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    for o, organ in enumerate(organs):
        shown = np.array([organ.name in a.organs for a in atlases], bool)
        if distance is not None and organ.name not in across:
            own = np.flatnonzero(distance[:, o] < REACH * rho)
            nearness = np.exp(-(distance[own, o].astype(np.float64) ** 2) / (2 * rho**2))
            weight = probability[own] * nearness
        else:
            movers = [organs.by_name(n).value for n in across.get(organ.name, (organ.name,))]
            own = np.flatnonzero(agrees & np.isin(label, movers) & shown[atlas])
            moving = np.array([index_of[int(v)] for v in label[own]], np.int64)
            weight = posterior[keypoint[own], moving].astype(np.float64) * probability[own]
        found.append((own[weight > 0], weight[weight > 0]))
    return Proposals(
        np.concatenate([own for own, _ in found]),
        np.repeat(np.arange(len(organs)), [own.size for own, _ in found]),
        np.concatenate([weight for _, weight in found]),
    )


def plan_moves(
    proposals: Proposals,
    matches: xr.Dataset,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    grid: Grid,
) -> list[Move]:
    """Move organs by the translation of each match, rounded to voxels.

    Matches that propose the same move are one move.

    Returns
    -------
    list of Move
        Ordered by atlas, organ and shift: the order of summation.
    """
    match = proposals.match
    atlas = matches.atlas.values[match].astype(np.int64)
    origins = np.array([a.info.origin for a in atlases]).reshape(-1, 3)
    moved = matches.translation.values[match].astype(np.float64) + origins[atlas] - grid.origin
    shift = np.rint(moved / grid.spacing).astype(np.int64)
    keys, inverse = np.unique(
        np.column_stack([atlas, proposals.organ, shift]), axis=0, return_inverse=True
    )
    weights = np.bincount(inverse.ravel(), proposals.weight, minlength=len(keys))
    moves = []
    for (a, o, *by), w in zip(keys.tolist(), weights.tolist(), strict=True):
        bounds = atlases[a].organs[organs.names[o]].bounding_box
        z, y, x = ((s + d, e + d) for (s, e), d in zip(bounds, by, strict=True))
        moves.append(Move(a, o, w, (z, y, x)))
    return moves


def plan_affines(
    proposals: Proposals,
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    grid: Grid,
) -> list[Move]:
    """Move each atlas's organ by one affine where its matches support one, else as `plan_moves`.

    The affine counts as much as the matches that agree with it; the others have no say.
    """
    atlas = matches.atlas.values[proposals.match].astype(np.int64)
    position = keypoints.position.values[matches.keypoint.values[proposals.match]]
    position = position.astype(np.float64)
    before = position - matches.translation.values[proposals.match]
    affines: list[Move] = []
    moved = np.zeros(atlas.size, bool)
    for a, o in np.unique(np.column_stack([atlas, proposals.organ]), axis=0).tolist():
        own = np.flatnonzero((atlas == a) & (proposals.organ == o))
        found = fit_affine(before[own], position[own])
        if found is not None:
            affine, agree = found
            weight = float(proposals.weight[own[agree]].sum())
            affines.append(_affine_move(a, o, weight, affine, atlases[a], organs.names[o], grid))
            moved[own] = True
    rest = Proposals(proposals.match[~moved], proposals.organ[~moved], proposals.weight[~moved])
    moves = affines + plan_moves(rest, matches, atlases, organs, grid)
    return sorted(moves, key=lambda move: (move.atlas, move.organ))


def without_negligible(moves: Sequence[Move], n_organs: int) -> list[Move]:
    """Leave out the lightest moves of each organ, `NEGLIGIBLE` of its weight at most.

    Without a part ε of the weights, K + D of W becomes K of W − ε W, with 0 ≤ D ≤ ε W: no share
    changes by more than ε.
    """
    kept = []
    for o in range(n_organs):
        own = [i for i, move in enumerate(moves) if move.organ == o]
        weight = np.array([moves[i].weight for i in own])
        order = np.argsort(weight, kind="stable")
        light = np.cumsum(weight[order]) <= NEGLIGIBLE * weight.sum()
        kept += [own[i] for i in order[~light]]
    return [moves[i] for i in sorted(kept)]


def _affine_move(
    a: int,
    o: int,
    weight: float,
    affine: NDArray[np.float64],
    atlas: Atlas,
    organ: str,
    grid: Grid,
) -> Move:
    """Express an affine in mm, from the atlas to the scan, in voxels."""
    bounds = np.array(atlas.organs[organ].bounding_box)
    spacing = float(grid.spacing[0])
    first = np.array(atlas.info.origin) + spacing * bounds[:, 0]
    linear = affine[:, :3]
    # In voxels, from the patch's voxel 0 to the scan's.
    offset = (linear @ first + affine[:, 3] - grid.origin) / spacing
    ends = [(-0.5, n - 0.5) for n in (bounds[:, 1] - bounds[:, 0]).tolist()]
    corners = np.array(list(product(*ends))) @ linear.T + offset
    low = np.floor(corners.min(axis=0)).astype(int).tolist()
    high = (np.ceil(corners.max(axis=0)).astype(int) + 1).tolist()
    z, y, x = zip(low, high, strict=True)
    back = np.linalg.inv(linear)
    return Move(a, o, weight, (z, y, x), np.column_stack([back, -back @ offset]))
