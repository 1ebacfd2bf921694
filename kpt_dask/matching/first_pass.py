"""Match a scan's keypoints with each atlas's, and weigh the matches.

Per atlas: nearest descriptor under the scale constraint and the ratio test, the mode of the
translations, matching again near that alignment, and the density of each match's
translation (Wachinger et al. 2015, sections 2.2 and 2.3).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints
from kpt_dask.matching.search import (
    SCALE_RATIO,
    FrameArrays,
    Keypoints,
    Nearest,
    SortedKeys,
    two_nearest,
)
from kpt_dask.matching.translations import BANDWIDTH, closest_pairs_radius, density
from kpt_dask.runtime import cluster

DISTANCE_RATIO = 0.9
"""Nearest over second nearest descriptor distance, at most (Lowe's ratio test)."""
CLOSEST_PAIRS = 0.10
"""ε_x keeps this share of all pairs, the closest after the rough alignment."""


def match(
    keypoints: xr.Dataset, atlases: AtlasKeypoints, *, client: Client | None = None
) -> xr.Dataset:
    """Match a scan's keypoints with those of every atlas.

    Eq. 2 asks for one match of a keypoint with an atlas. Where keypoints have several frames,
    the distance of two of them is that of their closest frames; the second nearest of the
    ratio test is thus another keypoint, never the nearest one in another frame.

    Parameters
    ----------
    keypoints : xarray.Dataset
        From `kpt_dask.extract`.
    atlases : AtlasKeypoints
        Keypoints of the atlases, extracted with the same parameters.
    client : distributed.Client, optional
        Client whose workers match atlases in parallel.

    Returns
    -------
    xarray.Dataset
        Dimensions ``match`` and ``axis`` (z, y, x), ordered by atlas and test keypoint:
        ``keypoint``, ``atlas``, ``atlas_keypoint`` (match) int32, indices into the scan's
        keypoints, the atlases, and the keypoints of that atlas, each in its first frame;
        ``label`` (match) uint16, the atlas keypoint's organ, 0 for none;
        ``squared_distance`` (match) float32, between the descriptors;
        ``translation`` (match, axis) float32, mm, from the atlas to the scan;
        ``probability`` (match) float32, p(m), the density of the translation among all
        matches of its atlas, between 0 and 1.
        Attribute ``largest_squared_distance``, τ² of eq. 4.

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
    >>> matches.translation.dims
    ('match', 'axis')
    """
    test, by_atlas = frame_arrays(keypoints, atlases)
    with cluster.session(client) as session:
        shared = cluster.share(session, test)
        tasks = [(shared, one) for one in by_atlas]
        parts = cluster.run_small(session, match_atlas, tasks, "Matching")
    return _dataset(atlases, parts)


def frame_arrays(
    keypoints: xr.Dataset, atlases: AtlasKeypoints
) -> tuple[FrameArrays, list[FrameArrays]]:
    """Select the arrays that matching needs: of a scan's keypoints, and of those of each atlas."""
    test = FrameArrays._make(keypoints[name].values for name in FrameArrays._fields)
    columns = [getattr(atlases, name) for name in FrameArrays._fields]
    slices = (atlases.slice_of(i) for i in range(len(atlases)))
    return test, [FrameArrays._make(column[rows] for column in columns) for rows in slices]


def slices_by_atlas(matches: xr.Dataset, n: int) -> list[slice]:
    """Slices of the matches with each of `n` atlases; matches are ordered by atlas."""
    ends = np.searchsorted(matches.atlas.values, np.arange(n + 1)).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class AtlasMatches:
    """Matches with one atlas, ordered by test keypoint.

    Attributes
    ----------
    keypoint, atlas_keypoint : int64 arrays (m)
    squared_distance : float32 array (m)
        Between the descriptors.
    translation : float32 array (m, 3)
        From the atlas to the scan, mm.
    probability : float32 array (m)
        p(m).
    """

    keypoint: NDArray[np.int64]
    atlas_keypoint: NDArray[np.int64]
    squared_distance: NDArray[np.float32]
    translation: NDArray[np.float32]
    probability: NDArray[np.float32]


def match_atlas(test: FrameArrays, atlas: FrameArrays) -> AtlasMatches:
    """Match with one atlas.

    Parameters
    ----------
    test, atlas : FrameArrays
        Keypoints of the scan and of the atlas.
    """
    here, there = Keypoints.of(test), Keypoints.of(atlas)
    i, j, d = _nearest_matches(here, there, np.zeros(3, np.float32), np.inf)
    if i.size:
        proposed = here.position[i] - there.position[j]
        centre = proposed[np.argmax(density(proposed, proposed, BANDWIDTH))]
        radius = closest_pairs_radius(here.position - centre, there.position, CLOSEST_PAIRS)
        i, j, d = _nearest_matches(here, there, centre, radius)
    translation = here.position[i] - there.position[j]
    p = density(translation, translation, BANDWIDTH)
    return AtlasMatches(here.first[i], there.first[j], d, translation, p)


def _nearest_matches(
    here: Keypoints, there: Keypoints, centre: NDArray[np.float32], radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Find matches that pass the ratio test, less than `radius` mm apart after moving by `centre`.

    Returns
    -------
    i, j : int64 arrays (m)
        Indices of matched keypoints.
    squared : float32 array (m)
        Squared distance of their descriptors.
    """
    n = here.scale.size
    moved = here._replace(position=here.position - centre)
    ratio = np.float32(SCALE_RATIO)
    key, window = there.scale, (here.scale / ratio, here.scale * ratio)
    if np.isfinite(radius):
        # Height is the more selective key. A millimetre of tolerance for rounding.
        height, farthest = moved.position[:, 0], np.float32(radius + 1)
        key, window = there.position[:, 0], (height - farthest, height + farthest)
    order = np.lexsort((key, there.sign))
    keys = SortedKeys(order, key[order], int((there.sign < 0).sum()))
    nearest = Nearest(np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n, np.float32))
    two_nearest(moved, there, keys, window, np.float32(radius), nearest)
    # Squared distances against the squared ratio; a missing second nearest is infinitely far.
    clear = nearest.squared <= np.float32(DISTANCE_RATIO**2) * nearest.second_squared
    passed = np.flatnonzero((nearest.indices >= 0) & clear)
    return passed, nearest.indices[passed], nearest.squared[passed]


def _dataset(atlases: AtlasKeypoints, parts: list[AtlasMatches]) -> xr.Dataset:
    counts = [part.keypoint.size for part in parts]
    atlas_keypoint = np.concatenate([part.atlas_keypoint for part in parts])
    atlas = np.repeat(np.arange(len(parts)), counts)
    squared = np.concatenate([part.squared_distance for part in parts])
    return xr.Dataset(
        {
            "keypoint": ("match", np.concatenate([p.keypoint for p in parts]).astype(np.int32)),
            "atlas": ("match", atlas.astype(np.int32)),
            "atlas_keypoint": ("match", atlas_keypoint.astype(np.int32)),
            "label": ("match", atlases.label[atlases.offsets[atlas] + atlas_keypoint]),
            "squared_distance": ("match", squared),
            "translation": (("match", "axis"), np.concatenate([p.translation for p in parts])),
            "probability": ("match", np.concatenate([p.probability for p in parts])),
        },
        attrs={"largest_squared_distance": float(squared.max(initial=0.0))},
    )
