"""Choose the atlases that agree best with a scan.

In two steps, so that the cost hardly grows with the store: the index proposes a few times as
many atlases as are wanted, these are matched, and those are kept that have most of the votes.
Both times an organ's votes count as shares of all its votes: an organ of few keypoints has as
much to say as one of many.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import AtlasStore
from atlas_store.index import MODES, OrganIndex
from kpt_dask import progress
from kpt_dask.errors import ParameterError
from kpt_dask.matching import SCALE_RATIO, density
from kpt_dask.voting import likelihood

PROPOSED = 3
"""Atlases that are matched for each one that is kept."""
BANDWIDTH = 15.0
"""Of the density of translations when atlases are proposed, mm."""


def check_selection(select: int | None, index: str) -> None:
    """Refuse what cannot be selected.

    Raises
    ------
    ParameterError
        If the number of atlases is not positive, or the way to search is unknown.
    """
    if select is not None and select < 1:
        raise ParameterError(f"The number of atlases to select must be at least 1, not {select}.")
    if index not in MODES:
        raise ParameterError(f"The index {index!r} is unknown; use {', '.join(MODES)}.")


def propose_atlases(
    keypoints: xr.Dataset,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    select: int,
    *,
    index: str = "auto",
) -> tuple[str, ...]:
    """Choose the atlases that are worth matching, by means of the index.

    A keypoint of the scan votes for each of the atlases that have the nearest keypoints in
    organs, with the likelihood of the descriptors' distance (eq. 4), and the more the nearer
    the translation is to the mode of that atlas's translations.

    Parameters
    ----------
    keypoints : xarray.Dataset
        From `kpt_dask.extract`.
    store : AtlasStore
        The atlases.
    atlas_ids : sequence of str
        Those to choose from.
    select : int
        How many will be kept; `PROPOSED` times as many are chosen here.
    index : str
        One of `atlas_store.index.MODES`.

    Returns
    -------
    tuple of str
        In the order of `atlas_ids`.
    """
    if PROPOSED * select >= len(atlas_ids):
        return tuple(atlas_ids)
    with progress.stage("Selecting atlases"):
        descriptor, scale, sign = (keypoints[n].values for n in ("descriptor", "scale", "sign"))
        opened = OrganIndex.open(store, index)
        found = opened.query(descriptor, scale, sign, atlas_ids, scale_ratio=SCALE_RATIO)
        i, k = np.nonzero(found.atlas >= 0)
        atlas, squared = found.atlas[i, k], found.first[i, k]
        moved = keypoints.position.values[i] - found.position[i, k]
        weight = likelihood(squared, float(squared.max(initial=0.0)))
        weight *= _closeness(atlas, moved, len(atlas_ids))
        score = shares(atlas, found.label[i, k], weight, len(atlas_ids))
        best = np.argsort(-score, kind="stable")[: PROPOSED * select]
    return tuple(atlas_ids[i] for i in sorted(best.tolist()))


def select_atlases(matches: xr.Dataset, n: int, select: int) -> list[int]:
    """Choose the atlases with the largest shares of the organs' votes (eq. 7).

    Parameters
    ----------
    matches : xarray.Dataset
        From `kpt_dask.match`, with `n` atlases.
    n, select : int
        How many atlases there are, and how many to keep.

    Returns
    -------
    list of int
        Their indices, ascending.
    """
    weight = likelihood(
        matches.squared_distance.values, matches.attrs["largest_squared_distance"]
    ) * matches.probability.values.astype(np.float64)
    score = shares(matches.atlas.values, matches.label.values, weight, n)
    return sorted(np.argsort(-score, kind="stable")[:select].tolist())


def only(matches: xr.Dataset, atlases: Sequence[int], n: int) -> xr.Dataset:
    """Keep the matches with some of the n atlases, as if only these had been matched."""
    place = np.full(n, -1, np.int32)
    place[list(atlases)] = np.arange(len(atlases))
    kept = matches.isel(match=np.flatnonzero(place[matches.atlas.values] >= 0))
    kept["atlas"] = kept.atlas.copy(data=place[kept.atlas.values])
    largest = float(kept.squared_distance.values.max(initial=0.0))
    return kept.assign_attrs(largest_squared_distance=largest)


def shares(
    atlas: NDArray[np.integer], label: NDArray[np.integer], weight: NDArray[np.float64], n: int
) -> NDArray[np.float64]:
    """Sum over the organs of each atlas's share of the organ's votes.

    Parameters
    ----------
    atlas, label : ndarray (m)
        Of each vote: the atlas, and the organ's label value; 0 is no organ.
    weight : ndarray (m), float64
        Of each vote.
    n : int
        Number of atlases.

    Returns
    -------
    ndarray (n), float64
    """
    score = np.zeros(n)
    for value in np.unique(label[label > 0]):
        votes = np.bincount(atlas[label == value], weight[label == value], minlength=n)
        if (total := votes.sum()) > 0:
            score += votes / total
    return score


def _closeness(
    atlas: NDArray[np.int64], translation: NDArray[np.float32], n: int
) -> NDArray[np.float64]:
    """Gaussian of each translation's distance from the mode of those of its atlas."""
    close = np.zeros(atlas.size)
    order = np.argsort(atlas, kind="stable")
    ends = np.searchsorted(atlas[order], np.arange(n + 1))
    for a in range(n):
        rows = order[ends[a] : ends[a + 1]]
        if rows.size:
            own = np.ascontiguousarray(translation[rows])
            mode = own[density(own, own, BANDWIDTH).argmax()]
            close[rows] = np.exp(-((own - mode) ** 2).sum(axis=1) / (2 * BANDWIDTH**2))
    return close
