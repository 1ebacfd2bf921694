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
from atlas_store.keypoints import first_frames
from kpt_dask.kernels.jit import kernel, summing_kernel
from kpt_dask.kernels.rows import LANES, LOG2_E, exp2
from kpt_dask.keypoints.descriptors import BINS
from kpt_dask.runtime import cluster

SCALE_RATIO = 2.0
"""ε_σ: matched keypoints' scales differ by at most this factor."""
DISTANCE_RATIO = 0.9
"""Nearest over second nearest descriptor distance, at most (Lowe's ratio test)."""
CLOSEST_PAIRS = 0.10
"""ε_x keeps this share of all pairs, the closest after the rough alignment."""
BANDWIDTH = 10.0
"""Of the density of translations, mm."""

_VANISHING = 29.0
"""−log₂ of the smallest weight in a density."""
_SAMPLED = 64
"""Test keypoints, about, whose pairs say how far the closest ones may be apart."""
_ROOM = 1.5
"""How many times as many pairs as are kept lie nearer than that, about."""

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
        shared = cluster.share(session, test)
        tasks = [(shared, own) for own in sides]
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
    def frames(self) -> NDArray[np.int64]:
        """Where the frames of each keypoint begin, and where the last one's end, (n + 1)."""
        return np.append(self.first, self.descriptor.shape[0])


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
    nearest, first, second = np.empty(n, np.int64), *np.empty((2, n), np.float32)
    position, scale = here.position - centre, here.scale
    ratio = np.float32(SCALE_RATIO)
    key, window = there.scale, (scale / ratio, scale * ratio)
    if np.isfinite(radius):
        # Fewer lie as high as that. A millimetre more, whatever is rounded.
        key, height, farthest = there.position[:, 0], position[:, 0], np.float32(radius + 1)
        window = height - farthest, height + farthest
    order = np.lexsort((key, there.sign))
    two_nearest(
        (position, scale, here.sign, here.frames, here.descriptor),
        (there.position, there.scale, there.frames, there.descriptor),
        (order, key[order]),
        int((there.sign < 0).sum()),
        window,
        np.float32(radius),
        (nearest, first, second),
    )
    # Squared distances against the squared ratio; a missing second nearest is infinitely far.
    keep = np.flatnonzero((nearest >= 0) & (first <= np.float32(DISTANCE_RATIO**2) * second))
    return keep, nearest[keep], first[keep]


@summing_kernel
def _squared(test: NDArray[np.float32], p: int, atlas: NDArray[np.float32], q: int) -> Any:
    """Squared distance of two descriptors.

    Ranks are small integers, so float32 holds every sum exactly, in whatever order it is added.
    """
    total = np.float32(0)
    for b in range(BINS):
        d = test[p, b] - atlas[q, b]
        total += d * d
    return total


@kernel
def squared_distance(
    test: NDArray[np.float32],
    frames: NDArray[np.int64],
    i: int,
    atlas: NDArray[np.float32],
    other_frames: NDArray[np.int64],
    j: int,
) -> Any:
    """Squared distance of keypoints i and j: that of their closest frames.

    Parameters
    ----------
    test, atlas : float32 arrays (frames, 64)
        Descriptors.
    frames, other_frames : int64 arrays
        Where the frames of each keypoint begin, and where the last one's end.
    """
    first, stop = frames[i], frames[i + 1]
    other, other_stop = other_frames[j], other_frames[j + 1]
    nearest = _squared(test, first, atlas, other)
    # Loops over one frame would take three times as long as what is in them.
    if stop - first > 1 or other_stop - other > 1:
        for p in range(first, stop):
            for q in range(other, other_stop):
                nearest = min(nearest, _squared(test, p, atlas, q))
    return nearest


@kernel
def two_nearest(
    test: tuple[NDArray[Any], ...],
    atlas: tuple[NDArray[Any], ...],
    ordered: tuple[NDArray[Any], ...],
    change: int,
    window: tuple[NDArray[np.float32], NDArray[np.float32]],
    radius: np.float32,
    found: tuple[NDArray[Any], ...],
) -> None:
    """Nearest and second nearest atlas keypoint of each test keypoint, under constraints.

    The constraints are inside the argmin (eq. 2): scales within `SCALE_RATIO`, equal signs,
    and positions less than `radius` apart. Ties go to the lower index.

    Parameters
    ----------
    test : tuple of ndarray
        Position (n, 3), scale (n) and sign (n), where frames begin and the last one's end (n + 1),
        and descriptors (frames, 64).
    atlas : tuple of ndarray
        The same but for the sign.
    ordered : tuple of ndarray (m)
        Indices of the atlas keypoints by sign and then by some key, and their keys.
    change : int
        How many of these have the sign −1.
    window : tuple of float32 arrays (n)
        Least and largest key of any that each test keypoint may be matched with.
    radius : float32
        mm.
    found : tuple of ndarray (n)
        Receive the index of the nearest, int64, −1 where there is none; its squared distance and
        that of the second nearest, float32, infinite where there is none.
    """
    here, scale, sign, frames, descriptor = test
    there, other_scale, other_frames, other_descriptor = atlas
    order, keys = ordered
    nearest, first, second = found
    limit = radius * radius
    chosen = np.empty(order.size + 1, np.int64)
    for i in range(here.shape[0]):
        best = next_best = np.float32(np.inf)
        index = -1
        begin, end = (0, change) if sign[i] < 0 else (change, order.size)
        own = keys[begin:end]
        start = begin + np.searchsorted(own, window[0][i])
        stop = begin + np.searchsorted(own, window[1][i], side="right")
        # Without branches: which are near and alike in scale is as good as random.
        n = 0
        low, high = scale[i] / SCALE_RATIO, scale[i] * SCALE_RATIO
        for j in order[start:stop]:
            dz = here[i, 0] - there[j, 0]
            dy = here[i, 1] - there[j, 1]
            dx = here[i, 2] - there[j, 2]
            chosen[n] = j
            alike = (other_scale[j] >= low) & (other_scale[j] <= high)
            n += (dz * dz + dy * dy + dx * dx < limit) & alike
        for j in chosen[:n]:
            d = squared_distance(descriptor, frames, i, other_descriptor, other_frames, j)
            if d < best or (d == best and j < index):
                next_best = best
                best = d
                index = j
            else:
                next_best = min(next_best, d)
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
    m = samples.shape[0]
    scale = np.float32(0.5 * LOG2_E / (bandwidth * bandwidth))
    farthest, nothing = np.float32(_VANISHING), np.float32(0)
    blocks = (m + LANES - 1) // LANES
    # Their number is rounded up by samples that are infinitely far.
    along = np.full((3, blocks * LANES), np.inf, np.float32)
    for j in range(m):
        for axis in range(3):
            along[axis, j] = samples[j, axis]
    zs, ys, xs = along[0], along[1], along[2]
    sums = np.empty(LANES, np.float32)
    for i in range(points.shape[0]):
        z, y, x = points[i, 0], points[i, 1], points[i, 2]
        sums[:] = nothing
        for b in range(blocks):
            begin = np.uint64(b * LANES)
            for lane in range(np.uint64(LANES)):
                dz, dy, dx = zs[begin + lane] - z, ys[begin + lane] - y, xs[begin + lane] - x
                v = (dz * dz + dy * dy + dx * dx) * scale
                w = exp2(-min(v, farthest))
                sums[lane] += w if v < farthest else nothing
        total = 0.0
        for lane in range(LANES):
            total += sums[lane]
        out[i] = total / m
    return out


def closest_pairs_radius(
    test: NDArray[np.float32], atlas: NDArray[np.float32], share: float
) -> float:
    """ε_x: the distance below which the closest `share` of all pairs lie, mm.

    Exact, in bounded memory: a histogram finds the millimetre, and only the pairs of that
    millimetre are sorted. Pairs that are farther apart along z than a part of the pairs says
    are not looked at, unless that part turns out to have misled.
    """
    rank = max(math.ceil(round(share * test.shape[0] * atlas.shape[0], 6)), 1)
    other = np.ascontiguousarray(atlas[np.argsort(atlas[:, 0], kind="stable")].T)
    sampled = np.ascontiguousarray(test[:: max(test.shape[0] // _SAMPLED, 1)])
    below = np.cumsum(_count_millimetres(sampled, other, _FARTHEST))
    farthest = int(np.searchsorted(below, min(_ROOM * share, 1.0) * below[-1])) + 1
    below = np.cumsum(_count_millimetres(test, other, min(farthest, _FARTHEST)))
    if below[-2] < rank:
        below = np.cumsum(_count_millimetres(test, other, _FARTHEST))
    millimetre = int(np.searchsorted(below, rank))
    before = int(below[millimetre - 1]) if millimetre else 0
    inside = _pairs_of_millimetre(test, other, millimetre, int(below[millimetre]) - before)
    inside.sort()
    # The next float up, because pairs are kept that are strictly closer; and far enough
    # from 0 that its square is not 0.
    return max(float(np.nextafter(inside[rank - before - 1], np.float32(np.inf))), 1e-6)


_FARTHEST = 100_000
"""mm; farther pairs share the last bin."""


@kernel
def _near(point: Any, others: Any, farthest: int, distances: Any) -> Any:
    """Find a range of points that holds all that are nearer, and fill their distances.

    Parameters
    ----------
    point : float32 array (3)
    others : float32 array (3, m)
        In order of z.
    farthest : int
        mm; all points are in the range if it is `_FARTHEST`.
    distances : float32 array (m)
        Those of the range are filled, mm.
    """
    zs, ys, xs = others[0], others[1], others[2]
    first, stop = 0, zs.size
    if farthest < _FARTHEST:
        # A millimetre more, whatever is rounded.
        first = np.searchsorted(zs, point[0] - (farthest + 1))
        stop = np.searchsorted(zs, point[0] + (farthest + 1))
    z, y, x = point[0], point[1], point[2]
    for j in range(np.uint64(first), np.uint64(stop)):
        dz, dy, dx = z - zs[j], y - ys[j], x - xs[j]
        distances[j] = np.sqrt(dz * dz + dy * dy + dx * dx)
    return first, stop


@kernel
def _count_millimetres(test: Any, others: Any, farthest: int) -> Any:
    """Count pairs by millimetre, int64 (farthest + 1); not all of the last, but of `_FARTHEST`."""
    counts = np.zeros(farthest + 1, np.int64)
    distances = np.empty(others.shape[1], np.float32)
    for i in range(test.shape[0]):
        first, stop = _near(test[i], others, farthest, distances)
        for j in range(first, stop):
            counts[int(min(distances[j], np.float32(farthest)))] += 1
    return counts


@kernel
def _pairs_of_millimetre(test: Any, others: Any, millimetre: int, n: int) -> Any:
    """Find the distances of all `n` pairs of a millimetre."""
    # Without branches: what comes next takes the place of what does not belong here.
    out = np.empty(n + 1, np.float32)
    distances = np.empty(others.shape[1], np.float32)
    k = 0
    for i in range(test.shape[0]):
        first, stop = _near(test[i], others, min(millimetre + 1, _FARTHEST), distances)
        for j in range(first, stop):
            out[k] = distances[j]
            k += int(min(distances[j], np.float32(_FARTHEST))) == millimetre
    return out[:n]


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
