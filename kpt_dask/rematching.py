"""Match a scan's keypoints with each atlas's again, where a first field says they should be.

Near its displaced position a keypoint has few rivals, so a match needs no ratio test; that
both keypoints choose each other is enough.
"""

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints
from kpt_dask import cluster
from kpt_dask.fields import Widths, regress
from kpt_dask.matching import Arrays, Keypoints, describe, distances, slices_by_atlas, two_nearest
from kpt_dask.options import SIGMA_T, SIGMA_X

RADIUS = 15.0
"""How far from where the field expects it a keypoint's match may lie, mm."""


def rematch(
    keypoints: xr.Dataset,
    atlases: AtlasKeypoints,
    matches: xr.Dataset,
    *,
    widths: Widths = (SIGMA_X, SIGMA_T),
    client: Client | None = None,
) -> xr.Dataset:
    """Match again near the displacement that the matches of each atlas amount to.

    Parameters
    ----------
    keypoints : xarray.Dataset
        From `kpt_dask.extract`.
    atlases : AtlasKeypoints
        Keypoints of the atlases.
    matches : xarray.Dataset
        From `kpt_dask.match`.
    widths : (float, float)
        σ_x and σ_t of the field, mm.
    client : distributed.Client, optional
        Where atlases are matched side by side.

    Returns
    -------
    xarray.Dataset
        Dimensions ``match`` and ``axis`` (z, y, x), ordered by atlas and test keypoint:
        ``keypoint``, ``atlas`` and ``atlas_keypoint`` (match) int32; ``translation``
        (match, axis) float32, mm, from the atlas to the scan. One to one in each atlas.
    """
    test, sides = describe(keypoints, atlases)
    with cluster.session(client) as session:
        [scattered] = session.scatter([test], broadcast=True, hash=False)
        tasks = []
        for side, first in zip(sides, slices_by_atlas(matches, len(atlases)), strict=True):
            found = matches.keypoint.values[first], matches.translation.values[first]
            tasks.append((scattered, side, *found, widths))
        parts = dict(cluster.run(session, rematch_atlas, tasks, "Matching again"))
    pairs = [parts[i] for i in range(len(atlases))]
    keypoint = np.concatenate([i for i, _ in pairs])
    atlas_keypoint = np.concatenate([j for _, j in pairs])
    atlas = np.repeat(np.arange(len(pairs)), [i.size for i, _ in pairs])
    moved = test[0][keypoint] - atlases.position[atlases.offsets[atlas] + atlas_keypoint]
    return xr.Dataset(
        {
            "keypoint": ("match", keypoint.astype(np.int32)),
            "atlas": ("match", atlas.astype(np.int32)),
            "atlas_keypoint": ("match", atlas_keypoint.astype(np.int32)),
            "translation": (("match", "axis"), moved.astype(np.float32)),
        }
    )


def rematch_atlas(
    test: Arrays,
    atlas: Arrays,
    keypoint: NDArray[np.int32],
    translation: NDArray[np.float32],
    widths: Widths = (SIGMA_X, SIGMA_T),
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match with one atlas.

    Parameters
    ----------
    test, atlas : tuple of ndarray
        Position (n, 3) mm, scale (n) mm, sign (n) and descriptor (n, 64) of keypoints.
    keypoint, translation : ndarray
        Test keypoints (m) of the first matches, and translations (m, 3) to the scan, mm.

    Returns
    -------
    keypoint, atlas_keypoint : int64 arrays (n)
        Pairs, each in its first frame, that are each other's nearest in descriptor, of those
        within `RADIUS` whose scales and signs agree; in order of test keypoint.
    """
    here, there = Keypoints.of(test), Keypoints.of(atlas)
    field = regress(here.position, np.asarray(test[0], np.float32)[keypoint], translation, widths)
    seen = np.flatnonzero(field[:, 3] > 0)
    moved = here.position[seen] - field[seen, :3], here.scale[seen], here.sign[seen]
    squared = distances(here, there)[seen]
    forth = _nearest(squared, moved, there.where)
    back = _nearest(np.ascontiguousarray(squared.T), there.where, moved)
    mutual = np.flatnonzero(forth >= 0)
    mutual = mutual[back[forth[mutual]] == mutual]
    return here.first[seen[mutual]], there.first[forth[mutual]]


def _nearest(
    distances: NDArray[np.float32],
    here: tuple[NDArray[np.float32], ...],
    there: tuple[NDArray[np.float32], ...],
) -> NDArray[np.int64]:
    n = distances.shape[0]
    nearest = np.empty(n, np.int64)
    ignored = np.empty(n, np.float32), np.empty(n, np.float32)
    two_nearest(distances, here, there, np.float32(RADIUS), nearest, *ignored)
    return nearest
