"""Match a scan's keypoints with each atlas's, and weigh the matches.

Per atlas: nearest descriptor under the scale constraint and the ratio test, the mode of the
translations, matching again near that alignment, and the density of each match's
translation (Wachinger et al. 2015, sections 2.2 and 2.3).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints
from kpt_dask import cluster
from kpt_dask.jit import kernel
from kpt_dask.keypoints import first_frames

SCALE_RATIO = 2.0
"""ε_σ: matched keypoints' scales differ by at most this factor."""
DISTANCE_RATIO = 0.9
"""Nearest over second nearest descriptor distance, at most (Lowe's ratio test)."""
CLOSEST_PAIRS = 0.10
"""ε_x keeps this share of all pairs, the closest after the rough alignment."""
BANDWIDTH = 10.0
"""Of the density of translations, mm."""

_ROWS = 4096
"""Test keypoints whose distances are held at a time."""

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


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
        Where atlases are matched side by side.

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
    """
    test, sides = describe(keypoints, atlases)
    with cluster.session(client) as session:
        # Without a hash of its own: releasing an equal one from an earlier call would race.
        [scattered] = session.scatter([test], broadcast=True, hash=False)
        tasks = [(scattered, own) for own in sides]
        parts = cluster.run_small(session, match_atlas, tasks, "Matching")
    return _dataset(atlases, parts)


def describe(keypoints: xr.Dataset, atlases: AtlasKeypoints) -> tuple[Arrays, list[Arrays]]:
    """Take what matching looks at, of a scan's keypoints and of those of each atlas.

    Returns
    -------
    tuple of ndarray, list of tuple of ndarray
        Position (n, 3) mm, scale (n) mm, sign (n) and descriptor (n, 64) of keypoints.
    """
    p, s, g, d = (keypoints[name].values for name in ("position", "scale", "sign", "descriptor"))
    own = (atlases.slice_of(i) for i in range(len(atlases)))
    a = atlases
    return (p, s, g, d), [(a.position[i], a.scale[i], a.sign[i], a.descriptor[i]) for i in own]


def slices_by_atlas(matches: xr.Dataset, n: int) -> list[slice]:
    """Where the matches with each of `n` atlases lie, as they are ordered by atlas."""
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


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints of one scan, ready to be compared.

    Attributes
    ----------
    first : int64 array (n)
        Where their frames begin.
    position, scale, sign : float32 arrays (n, 3), (n), (n)
        mm.
    descriptor : float32 array (frames, 64)
        Of all frames, those of a keypoint one after the other.
    """

    first: NDArray[np.int64]
    position: NDArray[np.float32]
    scale: NDArray[np.float32]
    sign: NDArray[np.float32]
    descriptor: NDArray[np.float32]

    @classmethod
    def of(cls, arrays: Arrays) -> "Keypoints":
        """From position, scale, sign and descriptor, one for each frame."""
        position, scale, sign, descriptor = (np.ascontiguousarray(a, np.float32) for a in arrays)
        first = first_frames(position, scale)
        return cls(first, position[first], scale[first], sign[first], descriptor)

    @property
    def where(self) -> tuple[NDArray[np.float32], ...]:
        """Position, scale and sign."""
        return self.position, self.scale, self.sign


def match_atlas(test: Arrays, atlas: Arrays) -> AtlasMatches:
    """Match with one atlas.

    Parameters
    ----------
    test, atlas : tuple of ndarray
        Position (n, 3) mm, scale (n) mm, sign (n) and descriptor (n, 64) of keypoints.
    """
    here, there = Keypoints.of(test), Keypoints.of(atlas)
    i, j, d = _pass(here, there, np.zeros(3, np.float32), np.inf)
    if i.size:
        proposed = here.position[i] - there.position[j]
        centre = proposed[np.argmax(density(proposed, proposed, BANDWIDTH))]
        radius = closest_pairs_radius(here.position - centre, there.position, CLOSEST_PAIRS)
        i, j, d = _pass(here, there, centre, radius)
    translation = here.position[i] - there.position[j]
    p = density(translation, translation, BANDWIDTH)
    return AtlasMatches(here.first[i], there.first[j], d, translation, p)


def _pass(
    here: Keypoints, there: Keypoints, centre: NDArray[np.float32], radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Find matches that pass the ratio test, `radius` mm apart at most once moved by `centre`."""
    n = here.first.size
    nearest = np.empty(n, np.int64)
    first = np.empty(n, np.float32)
    second = np.empty(n, np.float32)
    for a in range(0, n, _ROWS):
        rows = slice(a, a + _ROWS)
        two_nearest(
            distances(here, there, rows),
            (here.position[rows] - centre, here.scale[rows], here.sign[rows]),
            there.where,
            np.float32(radius),
            nearest[rows],
            first[rows],
            second[rows],
        )
    # Squared distances against the squared ratio; a missing second nearest is infinitely far.
    keep = np.flatnonzero((nearest >= 0) & (first <= np.float32(DISTANCE_RATIO**2) * second))
    return keep, nearest[keep], first[keep]


def distances(here: Keypoints, there: Keypoints, rows: slice | None = None) -> NDArray[np.float32]:
    """Squared distances (n, m) of keypoints: those of their closest frames.

    Parameters
    ----------
    here, there : Keypoints
        n, or `rows` of them, and m.
    """
    first = here.first[rows or slice(None)]
    stop = here.descriptor.shape[0]
    if rows is not None and rows.stop < here.first.size:
        stop = int(here.first[rows.stop])
    begin = int(first[0]) if first.size else stop
    found = squared_distances(here.descriptor[begin:stop], there.descriptor)
    if found.shape[1] > there.first.size:
        found = np.minimum.reduceat(found, there.first, axis=1)
    if found.shape[0] > first.size:
        found = np.minimum.reduceat(found, first - begin, axis=0)
    return found


def squared_distances(test: NDArray[np.float32], atlas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances (n, m) between descriptors (n, 64) and (m, 64), all float32.

    Ranks are small integers, so float32 holds every sum exactly, in whatever order BLAS adds.
    """
    distances = test @ atlas.T
    distances *= -2
    distances += (atlas**2).sum(axis=1)
    distances += (test**2).sum(axis=1)[:, None]
    return distances


@kernel
def two_nearest(
    distances: NDArray[np.float32],
    test: tuple[NDArray[np.float32], ...],
    atlas: tuple[NDArray[np.float32], ...],
    radius: np.float32,
    nearest: NDArray[np.int64],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
) -> None:
    """Nearest and second nearest atlas keypoint of each test keypoint, under constraints.

    The constraints are inside the argmin (eq. 2): scales within `SCALE_RATIO`, equal signs,
    and positions less than `radius` apart. Ties go to the lower index.

    Parameters
    ----------
    distances : float32 array (n, m)
        Squared descriptor distances.
    test, atlas : tuple of float32 arrays
        Position (n, 3), scale (n) and sign (n) of both sides.
    radius : float32
        mm.
    nearest : int64 array (n)
        Receives the index of the nearest, −1 where there is none.
    first, second : float32 arrays (n)
        Receive the squared distances, infinite where there is none.
    """
    position, scale, sign = test
    other, other_scale, other_sign = atlas
    limit = radius * radius
    for i in range(distances.shape[0]):
        best = np.float32(np.inf)
        next_best = np.float32(np.inf)
        index = -1
        low = scale[i] / SCALE_RATIO
        high = scale[i] * SCALE_RATIO
        row = distances[i]
        for j in range(row.size):
            d = row[j]
            if d >= next_best or other_sign[j] != sign[i]:
                continue
            if other_scale[j] < low or other_scale[j] > high:
                continue
            dz = position[i, 0] - other[j, 0]
            dy = position[i, 1] - other[j, 1]
            dx = position[i, 2] - other[j, 2]
            if not dz * dz + dy * dy + dx * dx < limit:
                continue
            if d < best:
                next_best = best
                best = d
                index = j
            else:
                next_best = d
        nearest[i] = index
        first[i] = best
        second[i] = next_best


@kernel
def density(
    points: NDArray[np.float32], samples: NDArray[np.float32], bandwidth: float
) -> NDArray[np.float32]:
    """Mean of Gaussians of `bandwidth` centred at `samples` (m, 3), at `points` (n, 3).

    Unnormalized, so that it is a share between 0 and 1: how much of all samples agrees.
    One density serves the Hough transform (its mode) and p(m).
    """
    out = np.zeros(points.shape[0], np.float32)
    scale = -0.5 / (bandwidth * bandwidth)
    for i in range(points.shape[0]):
        total = 0.0
        for j in range(samples.shape[0]):
            dz = points[i, 0] - samples[j, 0]
            dy = points[i, 1] - samples[j, 1]
            dx = points[i, 2] - samples[j, 2]
            exponent = scale * (dz * dz + dy * dy + dx * dx)
            if exponent > -20.0:
                total += np.exp(exponent)
        out[i] = total / samples.shape[0]
    return out


def closest_pairs_radius(
    test: NDArray[np.float32], atlas: NDArray[np.float32], share: float
) -> float:
    """ε_x: the distance below which the closest `share` of all pairs lie, mm.

    Exact, in bounded memory: a histogram finds the millimetre, and only the pairs of that
    millimetre are sorted.
    """
    pairs = share * test.shape[0] * atlas.shape[0]
    rank = max(math.ceil(round(pairs, 6)), 1)
    counts = _count_millimetres(test, atlas)
    below = np.cumsum(counts)
    millimetre = int(np.searchsorted(below, rank))
    inside = _pairs_of_millimetre(test, atlas, millimetre, int(counts[millimetre]))
    inside.sort()
    before = int(below[millimetre - 1]) if millimetre else 0
    # The next float up, because pairs are kept that are strictly closer; and far enough
    # from 0 that its square is not 0.
    return max(float(np.nextafter(inside[rank - before - 1], np.float32(np.inf))), 1e-6)


@kernel
def _distance(test: NDArray[np.float32], atlas: NDArray[np.float32], i: int, j: int) -> float:
    dz = test[i, 0] - atlas[j, 0]
    dy = test[i, 1] - atlas[j, 1]
    dx = test[i, 2] - atlas[j, 2]
    return np.sqrt(dz * dz + dy * dy + dx * dx)  # type: ignore[no-any-return]


_FARTHEST = 100_000
"""mm; farther pairs share the last bin."""


@kernel
def _count_millimetres(test: NDArray[np.float32], atlas: NDArray[np.float32]) -> NDArray[np.int64]:
    counts = np.zeros(_FARTHEST + 1, np.int64)
    for i in range(test.shape[0]):
        for j in range(atlas.shape[0]):
            counts[min(int(_distance(test, atlas, i, j)), _FARTHEST)] += 1
    return counts


@kernel
def _pairs_of_millimetre(
    test: NDArray[np.float32], atlas: NDArray[np.float32], millimetre: int, n: int
) -> NDArray[np.float32]:
    out = np.empty(n, np.float32)
    k = 0
    for i in range(test.shape[0]):
        for j in range(atlas.shape[0]):
            d = _distance(test, atlas, i, j)
            if min(int(d), _FARTHEST) == millimetre:
                out[k] = d
                k += 1
    return out


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
