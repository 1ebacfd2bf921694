"""Let the matches of each test keypoint vote for its organ (Wachinger et al. 2015, eqs. 3–7)."""

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import OrganTable


def likelihood(squared_distance: NDArray[np.float32], tau_squared: float) -> NDArray[np.float64]:
    """p(F | 𝓕, m), a Gaussian of the descriptors' distance (eq. 4).

    Parameters
    ----------
    squared_distance : float32 array
        Between the descriptors of matched keypoints.
    tau_squared : float
        τ², the largest squared distance of all matches.
    """
    if tau_squared == 0:
        return np.ones(squared_distance.shape)
    exponent = -squared_distance.astype(np.float64) / (2 * tau_squared)
    density: NDArray[np.float64] = np.exp(exponent) / np.sqrt(2 * np.pi * tau_squared)
    return density


def weight(
    squared_distance: NDArray[np.float32], tau_squared: float, probability: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Weight of each match's vote, p(F | 𝓕, m) · p(m) (eq. 6).

    Parameters
    ----------
    squared_distance, tau_squared
        As for `likelihood`.
    probability : float32 array (match)
        p(m), from `kpt_dask.match`.
    """
    return likelihood(squared_distance, tau_squared) * probability.astype(np.float64)


def weights_of(matches: xr.Dataset) -> NDArray[np.float64]:
    """Weight of each match's vote, float64 array (match), of the matches of `kpt_dask.match`."""
    tau_squared = matches.attrs["largest_squared_distance"]
    return weight(matches.squared_distance.values, tau_squared, matches.probability.values)


def votes_for(votes: xr.Dataset, organs: OrganTable) -> xr.Dataset:
    """Keep the votes of `vote` for some of its organs; keypoints of others get label 0."""
    kept = votes.sel(organ=list(organs.names))
    own = np.isin(votes.label.values, organs.values)
    return kept.assign(label=votes.label.copy(data=np.where(own, votes.label.values, 0)))


def vote(matches: xr.Dataset, n_keypoints: int, organs: OrganTable) -> xr.Dataset:
    """Give each test keypoint the organ that its matches agree on.

    A match votes for the organ of its atlas keypoint with p(F | 𝓕, m) · p(m). Atlas
    keypoints in no organ do not vote.

    Parameters
    ----------
    matches : xarray.Dataset
        From `kpt_dask.match`.
    n_keypoints : int
        Number of test keypoints.
    organs : OrganTable
        The organs of the atlases.

    Returns
    -------
    xarray.Dataset
        ``posterior`` (keypoint, organ) float32: the votes, normalized over the organs; all 0
        where there was no vote.
        ``label`` (keypoint) uint16: the organ with the most votes (eq. 7; ties go to the
        organ that comes first in the table), 0 where there was none.
        Coordinate ``organ``: the names.

    References
    ----------
    C. Wachinger, M. Toews, G. Langs, W. Wells, P. Golland, "Keypoint Transfer for Fast
    Whole-Body Segmentation", IEEE Transactions on Medical Imaging 39(2), 273–282, 2020,
    https://doi.org/10.1109/TMI.2018.2851194.

    Examples
    --------
    >>> import kpt_dask
    >>> from atlas_store import AtlasKeypoints, AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> keypoints = kpt_dask.extract(kpt_dask.open_volume("body_4.zarr"))
    >>> matches = kpt_dask.match(keypoints, AtlasKeypoints.load(store))
    >>> votes = kpt_dask.vote(matches, keypoints.sizes["keypoint"], store.organs)
    >>> votes.posterior.sizes["organ"] == len(store.organs)
    True
    """
    values = np.array(organs.values, np.int64)
    label = matches.label.values.astype(np.int64)
    order = np.argsort(values, kind="stable")
    at = np.minimum(np.searchsorted(values[order], label), values.size - 1)
    organ = np.where(values[order][at] == label, order[at], -1)
    weights = weights_of(matches)
    voting = organ >= 0
    votes = np.zeros((n_keypoints, values.size))
    np.add.at(votes, (matches.keypoint.values[voting], organ[voting]), weights[voting])
    total = votes.sum(axis=1, keepdims=True)
    posterior = np.divide(votes, total, out=np.zeros_like(votes), where=total > 0)
    winner = np.where(total[:, 0] > 0, values[votes.argmax(axis=1)], 0)
    return xr.Dataset(
        {
            "posterior": (("keypoint", "organ"), posterior.astype(np.float32)),
            "label": ("keypoint", winner.astype(np.uint16)),
        },
        coords={"organ": list(organs.names)},
    )
