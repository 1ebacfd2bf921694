"""Search for the nearest descriptors among keypoints that the constraints allow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas_store.keypoints import first_frames
from kpt_dask.kernels.jit import kernel, summing_kernel
from kpt_dask.keypoints.descriptors import BINS

SCALE_RATIO = 2.0
"""ε_σ: matched keypoints' scales differ by at most this factor."""


class FrameArrays(NamedTuple):
    """Keypoints as they are stored: one row per frame, the frames of a keypoint in a row.

    Attributes
    ----------
    position : ndarray (frames, 3)
        mm.
    scale, sign : ndarray (frames)
        mm; −1 or 1.
    descriptor : ndarray (frames, 64)
        Ranks.
    """

    position: NDArray[Any]
    scale: NDArray[Any]
    sign: NDArray[Any]
    descriptor: NDArray[Any]


class Keypoints(NamedTuple):
    """Keypoints of one scan, ready to be compared by kernels: one row per keypoint.

    Attributes
    ----------
    position, scale, sign : float32 arrays (n, 3), (n), (n)
        mm, mm, and −1 or 1.
    frames : int64 array (n + 1)
        The frames of keypoint i are the descriptors ``frames[i]:frames[i + 1]``.
    descriptor : float32 array (frames, 64)
        Ranks.
    """

    position: NDArray[np.float32]
    scale: NDArray[np.float32]
    sign: NDArray[np.float32]
    frames: NDArray[np.int64]
    descriptor: NDArray[np.float32]

    @classmethod
    def of(cls, arrays: Sequence[NDArray[Any]]) -> "Keypoints":
        """Group the frames of `FrameArrays` by keypoint."""
        position, scale, sign, descriptor = (np.ascontiguousarray(a, np.float32) for a in arrays)
        first = first_frames(position, scale)
        frames = np.append(first, descriptor.shape[0])
        return cls(position[first], scale[first], sign[first], frames, descriptor)

    @property
    def first(self) -> NDArray[np.int64]:
        """Row of each keypoint's first frame, (n)."""
        return self.frames[:-1]


class SortedKeys(NamedTuple):
    """Keypoints sorted by sign, then by a key.

    Attributes
    ----------
    order : int64 array (m)
        Indices of the keypoints.
    key : float32 array (m)
        Their keys.
    n_negative : int
        Number of keypoints of sign −1, which come first.
    """

    order: NDArray[np.int64]
    key: NDArray[np.float32]
    n_negative: int


class Nearest(NamedTuple):
    """Nearest keypoint of an atlas to each test keypoint.

    Attributes
    ----------
    indices : int64 array (n)
        Index of the nearest, −1 where there is none.
    squared, second_squared : float32 arrays (n)
        Squared distances of the nearest and the second nearest descriptor, infinite where there
        is none.
    """

    indices: NDArray[np.int64]
    squared: NDArray[np.float32]
    second_squared: NDArray[np.float32]


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
def squared_distance(test: Any, i: int, atlas: Any, j: int) -> Any:
    """Squared distance of two keypoints' descriptors: that of their closest frames.

    Parameters
    ----------
    test, atlas : Keypoints
    i, j : int
        Index of a keypoint in each.
    """
    first, stop = test.frames[i], test.frames[i + 1]
    other, other_stop = atlas.frames[j], atlas.frames[j + 1]
    nearest = _squared(test.descriptor, first, atlas.descriptor, other)
    # Loops over a single frame would triple the time.
    if stop - first > 1 or other_stop - other > 1:
        for p in range(first, stop):
            for q in range(other, other_stop):
                nearest = min(nearest, _squared(test.descriptor, p, atlas.descriptor, q))
    return nearest


@kernel
def two_nearest(test: Any, atlas: Any, keys: Any, window: Any, radius: Any, nearest: Any) -> None:
    """Find the nearest and second nearest atlas keypoint of each test keypoint, constrained.

    The constraints are inside the argmin (eq. 2): scales within `SCALE_RATIO`, equal signs,
    and positions less than `radius` apart. Ties go to the lower index.

    Parameters
    ----------
    test, atlas : Keypoints
    keys : SortedKeys
        The atlas keypoints.
    window : tuple of float32 arrays (n)
        Smallest and largest key that each test keypoint may be matched with.
    radius : float32
        mm.
    nearest : Nearest
        Receives the result.
    """
    here, there = test.position, atlas.position
    order, key, change = keys.order, keys.key, keys.n_negative
    low_key, high_key = window
    limit = radius * radius
    chosen = np.empty(order.size + 1, np.int64)
    for i in range(here.shape[0]):
        best = next_best = np.float32(np.inf)
        index = -1
        begin, end = (0, change) if test.sign[i] < 0 else (change, order.size)
        same_sign = key[begin:end]
        start = begin + np.searchsorted(same_sign, low_key[i])
        stop = begin + np.searchsorted(same_sign, high_key[i], side="right")
        # Branch-free compaction: both tests are unpredictable.
        n = 0
        low, high = test.scale[i] / SCALE_RATIO, test.scale[i] * SCALE_RATIO
        for j in order[start:stop]:
            dz = here[i, 0] - there[j, 0]
            dy = here[i, 1] - there[j, 1]
            dx = here[i, 2] - there[j, 2]
            chosen[n] = j
            alike = (atlas.scale[j] >= low) & (atlas.scale[j] <= high)
            n += (dz * dz + dy * dy + dx * dx < limit) & alike
        for j in chosen[:n]:
            d = squared_distance(test, i, atlas, j)
            if d < best or (d == best and j < index):
                next_best = best
                best = d
                index = j
            else:
                next_best = min(next_best, d)
        nearest.indices[i] = index
        nearest.squared[i] = best
        nearest.second_squared[i] = next_best
