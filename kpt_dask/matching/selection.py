"""Choose the atlases that agree best with a scan.

In two steps, so that the cost hardly grows with the store: the index proposes a few times as
many atlases as are wanted, these are matched, and those are kept that agree best.

Agreement depends on the mode. Where all matches move an atlas, all keypoints count; atlases are
chosen one by one, and an atlas counts less the more of those chosen annotate the same organs, so
that an organ that few atlases annotate is likely covered. Where only matches in organs move an
atlas, these alone count, as shares of all votes for their organ, so that an organ of few keypoints
weighs as much as one of many. An atlas that annotates no organ of interest is never chosen, unless
none does.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints, AtlasStore, OrganTable
from atlas_store.index.search import MODES, AtlasIndex
from atlas_store.keypoints import first_frames
from kpt_dask.errors import ParameterError
from kpt_dask.matching.search import SCALE_RATIO
from kpt_dask.matching.translations import density
from kpt_dask.options import check_count
from kpt_dask.runtime import progress

BY_ORGANS = ("organ", "affine")
"""Modes in which only matches in organs move an atlas."""
USUAL = 20
"""Atlases that are kept of a larger store by default: more gained nothing on real
patients, and time would grow with the store."""
PROPOSED = 3
"""Atlases that are matched for each one that is kept."""
NOTHING: Mapping[str, Sequence[str]] = MappingProxyType({})
PROPOSAL_BANDWIDTH = 15.0
"""σ of the density of translations when atlases are proposed, mm."""


def check_selection(select: int | None, index: str) -> None:
    """Refuse what cannot be selected.

    Raises
    ------
    ParameterError
        If the number of atlases is no positive whole number, or the way to search is unknown.
    """
    check_count("The number of atlases to select", select)
    if index not in MODES:
        raise ParameterError(f"The index {index!r} is unknown; use {', '.join(MODES)}.")


def how_many(select: int | None, atlases: int) -> int:
    """Choose the number of atlases to use: all, unless there are more than the limit."""
    return min(USUAL if select is None else select, atlases)


def propose_atlases(
    keypoints: xr.Dataset,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    select: int,
    *,
    mode: str = "local",
    index: str = "auto",
    organs: OrganTable | None = None,
    across: Mapping[str, Sequence[str]] = NOTHING,
) -> tuple[str, ...]:
    """Choose the atlases that are worth matching, by means of the index.

    A keypoint of the scan counts for each of the atlases that have the nearest keypoints, with
    the likelihood of the descriptors' distance (eq. 4), and the more the nearer the translation
    is to the mode of that atlas's translations.

    Parameters
    ----------
    keypoints : xarray.Dataset
        From `kpt_dask.extract`.
    store : AtlasStore
        The atlases.
    atlas_ids : sequence of str
        Those to choose from.
    select : int
        Number of atlases to keep in the end; `PROPOSED` times as many are chosen here.
    mode : str
        Mode of the transfer that follows, one of `kpt_dask.options.MODES`.
    index : str
        One of `atlas_store.index.search.MODES`.
    organs : OrganTable, optional
        Organs of interest; by default all of the store.
    across : mapping of str to sequence of str
        Organs whose matches move an organ, as in `kpt_dask.options.TransferOptions`.

    Returns
    -------
    tuple of str
        In the order of `atlas_ids`.
    """
    if PROPOSED * select >= len(atlas_ids):
        return tuple(atlas_ids)
    with progress.stage("Selecting atlases"):
        descriptor, scale, sign = (keypoints[n].values for n in ("descriptor", "scale", "sign"))
        opened = AtlasIndex.open(store, index)
        if missing := opened.n_needed(atlas_ids):
            with progress.stage("Building graphs", total=missing) as advance:
                for _ in opened.build_needed(atlas_ids):
                    advance(1)
        found = opened.query(descriptor, scale, sign, atlas_ids, scale_ratio=SCALE_RATIO)
        i, k = np.nonzero(found.atlas >= 0)
        atlas, squared = found.atlas[i, k], found.first[i, k]
        moved = keypoints.position.values[i] - found.position[i, k]
        weight = _likeness(squared, float(squared.max(initial=0.0)))
        weight *= _closeness(atlas, moved)
        n, most = len(atlas_ids), PROPOSED * select
        wanted = organs or store.organs
        columns = [store.organs.names.index(name) for name in wanted.names]
        annotated = opened.annotated(atlas_ids)[:, columns]
        if mode in BY_ORGANS:
            moving = _moving(wanted, across, store)
            score = shares_of_votes(atlas, found.label[i, k], weight, n, moving)
            best = _best(score, annotated, most)
        else:
            score = np.bincount(atlas, weight, n).astype(np.float64)
            best = choose_covering(score, annotated, most)
    return tuple(atlas_ids[i] for i in best)


def select_atlases(
    matches: xr.Dataset,
    keypoints: xr.Dataset,
    atlases: AtlasKeypoints,
    store: AtlasStore,
    select: int,
    *,
    mode: str = "local",
    organs: OrganTable | None = None,
    across: Mapping[str, Sequence[str]] = NOTHING,
) -> list[int]:
    """Choose the atlases whose keypoints agree best with the scan's.

    In modes `BY_ORGANS`, those with the largest shares of the organs' votes (eq. 7). Otherwise
    agreement is the soft Jaccard index Σ_m w_m / (n + n_a − Σ_m w_m) of the scan's n and the
    atlas's n_a keypoints. A match m, in an organ or not, counts as w_m = exp(−d_m² / 2τ²) · p(m),
    by the distance of the descriptors (eq. 4) and the density of its translation.

    Parameters
    ----------
    matches : xarray.Dataset
        From `kpt_dask.match`.
    keypoints : xarray.Dataset
        Keypoints of the scan.
    atlases : AtlasKeypoints
        Keypoints of the atlases that were matched.
    store : AtlasStore
        Store of the atlases.
    select : int
        Number of atlases to keep.
    mode : str
        Mode of the transfer that follows, one of `kpt_dask.options.MODES`.
    organs, across
        As for `propose_atlases`.

    Returns
    -------
    list of int
        Their indices, ascending.
    """
    weight = _likeness(matches.squared_distance.values, matches.attrs["largest_squared_distance"])
    weight *= matches.probability.values
    wanted = organs or store.organs
    names = wanted.names
    annotated = np.array(
        [[n in atlas.annotated for n in names] for atlas in store.atlases(atlases.ids)]
    )
    if mode in BY_ORGANS:
        atlas, label = matches.atlas.values, matches.label.values
        moving = _moving(wanted, across, store)
        score = shares_of_votes(atlas, label, weight, len(atlases), moving)
        return _best(score, annotated, select)
    both = np.bincount(matches.atlas.values, weight, len(atlases)).astype(np.float64)
    here = first_frames(keypoints.position.values, keypoints.scale.values).size
    first = first_frames(atlases.position, atlases.scale)
    there = np.diff(np.searchsorted(first, atlases.offsets))
    return choose_covering(both / np.maximum(here + there - both, 1.0), annotated, select)


def annotating(store: AtlasStore, atlas_ids: Sequence[str], organs: OrganTable) -> tuple[str, ...]:
    """Keep the atlases that annotate one of the organs; all if none does."""
    names = {*organs.names}
    atlases = zip(atlas_ids, store.atlases(atlas_ids), strict=True)
    return tuple(i for i, atlas in atlases if names & {*atlas.annotated}) or tuple(atlas_ids)


def choose_covering(
    score: NDArray[np.float64], annotated: NDArray[np.bool_], select: int
) -> list[int]:
    """Choose atlases of high score that together annotate many organs.

    The next is always the one with the largest score · Σ_l 1 / (1 + N_l), over the organs l
    that it annotates, N_l of those chosen so far annotate l. Ties go to the first.

    Parameters
    ----------
    score : ndarray (A), float64
    annotated : ndarray (A, O), bool
    select : int

    Returns
    -------
    list of int
        Ascending; all that annotate an organ, or all, if there are no more than `select`.
    """
    useful = _useful(annotated)
    chosen = np.zeros(score.size, np.bool_)
    shown = annotated.astype(np.float64)
    count = np.zeros(annotated.shape[1])
    for _ in range(min(select, int(useful.sum()))):
        gain = np.where(useful & ~chosen, score * (shown @ (1.0 / (1.0 + count))), -1.0)
        best = int(gain.argmax())
        chosen[best] = True
        count += shown[best]
    found: list[int] = np.flatnonzero(chosen).tolist()
    return found


def restrict_to(matches: xr.Dataset, atlases: Sequence[int], n: int) -> xr.Dataset:
    """Keep the matches with some of the n atlases, as if only these had been matched."""
    new_index = np.full(n, -1, np.int32)
    new_index[list(atlases)] = np.arange(len(atlases))
    kept = matches.isel(match=np.flatnonzero(new_index[matches.atlas.values] >= 0))
    kept["atlas"] = kept.atlas.copy(data=new_index[kept.atlas.values])
    largest = float(kept.squared_distance.values.max(initial=0.0))
    return kept.assign_attrs(largest_squared_distance=largest)


def shares_of_votes(
    atlas: NDArray[np.integer],
    label: NDArray[np.integer],
    weight: NDArray[np.float64],
    n: int,
    organs: OrganTable,
) -> NDArray[np.float64]:
    """Sum over the organs of each atlas's share of the organ's votes.

    Parameters
    ----------
    atlas, label : ndarray (m)
        Atlas of each vote, and label value of its organ; 0 is no organ.
    weight : ndarray (m), float64
        Weight of each vote.
    n : int
        Number of atlases.
    organs : OrganTable

    Returns
    -------
    ndarray (n), float64
    """
    score = np.zeros(n)
    for value in sorted(organs.values):
        votes = np.bincount(atlas[label == value], weight[label == value], minlength=n)
        if (total := votes.sum()) > 0:
            score += votes / total
    return score


def _useful(annotated: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark the atlases that annotate an organ of interest; all if none does."""
    some = np.asarray(annotated.any(axis=1))
    return some if some.any() else np.ones_like(some)


def _moving(
    wanted: OrganTable, across: Mapping[str, Sequence[str]], store: AtlasStore
) -> OrganTable:
    """Organs whose matches move those of interest."""
    movers = [mover for name in wanted.names for mover in across.get(name, ())]
    return store.organs.only([*wanted.names, *movers])


def _best(score: NDArray[np.float64], annotated: NDArray[np.bool_], select: int) -> list[int]:
    """Choose the useful atlases of largest score, ascending; ties go to the first."""
    useful = np.flatnonzero(_useful(annotated))
    best = np.argsort(-score[useful], kind="stable")[:select]
    found: list[int] = np.sort(useful[best]).tolist()
    return found


def _likeness(squared: NDArray[np.float32], largest: float) -> NDArray[np.float64]:
    """exp(−d² / 2τ²), the likelihood of eq. 4 up to its factor; between 0.6 and 1."""
    likeness: NDArray[np.float64] = np.exp(squared.astype(np.float64) / (-2.0 * max(largest, 1.0)))
    return likeness


def _closeness(atlas: NDArray[np.int64], translation: NDArray[np.float32]) -> NDArray[np.float64]:
    """Gaussian of each translation's distance from the mode of those of its atlas."""
    close = np.zeros(atlas.size)
    order = np.argsort(atlas, kind="stable")
    starts = np.flatnonzero(np.diff(atlas[order], prepend=-1))
    for rows in np.split(order, starts[1:]) if order.size else ():
        samples = np.ascontiguousarray(translation[rows])
        mode = samples[density(samples, samples, PROPOSAL_BANDWIDTH).argmax()]
        close[rows] = np.exp(-((samples - mode) ** 2).sum(axis=1) / (2 * PROPOSAL_BANDWIDTH**2))
    return close
