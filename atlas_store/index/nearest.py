"""The atlases with the nearest keypoints, under the constraints of eq. 2.

Plain arrays in, plain arrays out. Descriptors are ranks, so their squared distances are whole
numbers that float32 holds exactly, in whatever order BLAS adds; both kernels give the same.
"""

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.jit import comparing_kernel, kernel

Best = tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.float32],
]
"""The nearest atlases of n keypoints, nearest first, k for each: which atlas (-1 for none), in
which segment, which row of it is the nearest, squared distances of the nearest and the second
nearest of the atlas (infinite for none). Ties go to the lower atlas. Each (n, k)."""


def nothing(n: int, k: int) -> Best:
    """No atlas is known for any of n keypoints yet."""
    none = np.full((n, k), -1, np.int64)
    far = np.full((n, k), np.inf, np.float32)
    return none, none.copy(), none.copy(), far, far.copy()


@kernel
def _offer(
    best: Best, i: int, atlas: int, segment: int, row: int, first: np.float32, second: np.float32
) -> None:
    """Put an atlas where it belongs among the nearest of keypoint i, if it does."""
    atlases, segments, rows, firsts, seconds = best
    k = atlases.shape[1]
    while k > 0 and (
        first < firsts[i, k - 1] or (first == firsts[i, k - 1] and atlas < atlases[i, k - 1])
    ):
        k -= 1
        if k + 1 < atlases.shape[1]:
            atlases[i, k + 1] = atlases[i, k]
            segments[i, k + 1] = segments[i, k]
            rows[i, k + 1] = rows[i, k]
            firsts[i, k + 1] = firsts[i, k]
            seconds[i, k + 1] = seconds[i, k]
        atlases[i, k] = atlas
        segments[i, k] = segment
        rows[i, k] = row
        firsts[i, k] = first
        seconds[i, k] = second


@comparing_kernel
def _lowest(row: NDArray[np.float32], half: NDArray[np.float32]) -> np.float32:
    """Lowest ``half - row``; many at a time, as none is NaN."""
    lowest = np.float32(np.inf)
    for j in range(row.size):
        d = half[j] - row[j]
        lowest = d if d < lowest else lowest
    return lowest


@kernel
def of_every_atlas(
    products: NDArray[np.float32],
    squares: tuple[NDArray[np.float32], NDArray[np.float32]],
    limits: tuple[NDArray[np.float32], NDArray[np.float32]],
    scale: NDArray[np.float32],
    offsets: NDArray[np.int64],
    place: NDArray[np.int64],
    segment: int,
    start: int,
    best: Best,
) -> None:
    """Search all atlases, given all scalar products.

    Parameters
    ----------
    products : float32 array (n, m)
        Of n descriptors of the scan with m of the atlases.
    squares : float32 arrays (n) and (m)
        Squared lengths of both.
    limits : float32 arrays (n)
        The lowest and highest scale that a match may have.
    scale : float32 array (m)
        Scales of the atlases' keypoints.
    offsets : int64 array (a + 1)
        Columns of atlas i are ``offsets[i]`` to ``offsets[i + 1]``.
    place : int64 array (a)
        What to call each atlas; those below 0 are passed over.
    segment, start : int
        What to call the segment, and the first column.
    best : Best
        Receives what is nearer than what it holds.
    """
    low, high = limits
    here, there = squares
    farthest = best[3][:, -1]
    half = there / np.float32(2)
    for i in range(products.shape[0]):
        row = products[i]
        for a in range(offsets.size - 1):
            # Most atlases are too far away whatever their scales.
            own = slice(offsets[a], offsets[a + 1])
            bound = (farthest[i] - here[i]) / np.float32(2)
            if place[a] < 0 or _lowest(row[own], half[own]) > bound:
                continue
            nearest = np.float32(np.inf)
            next_nearest = np.float32(np.inf)
            index = -1
            for j in range(offsets[a], offsets[a + 1]):
                d = there[j] - np.float32(2) * row[j]
                if d >= next_nearest or scale[j] < low[i] or scale[j] > high[i]:
                    continue
                if d < nearest:
                    next_nearest = nearest
                    nearest = d
                    index = j
                else:
                    next_nearest = d
            if index >= 0:
                first, second = here[i] + nearest, here[i] + next_nearest
                _offer(best, i, place[a], segment, start + index, first, second)


@kernel
def of_listed_atlases(
    listed: NDArray[np.int32],
    descriptor: NDArray[np.uint8],
    limits: tuple[NDArray[np.float32], NDArray[np.float32]],
    other: NDArray[np.uint8],
    scale: NDArray[np.float32],
    atlas_of: NDArray[np.int32],
    offsets: NDArray[np.int64],
    place: NDArray[np.int64],
    segment: int,
    best: Best,
) -> None:
    """Search only the atlases that a list of neighbours names, but these exactly.

    Where a list ends before an atlas's second nearest, nothing has to be assumed of it. An
    atlas that is not listed has no keypoint nearer than the last of the list, if the list is
    right.

    Parameters
    ----------
    listed : int32 array (n, k)
        Columns that are near each descriptor of the scan, -1 where there are fewer.
    descriptor, other : uint8 arrays (n, 64) and (m, 64)
        Of the scan and of the atlases.
    atlas_of : int32 array (m)
        Atlas of each column.
    limits, scale, offsets, place, segment, best
        As for `of_every_atlas`.
    """
    low, high = limits
    seen = np.full(offsets.size - 1, -1, np.int64)
    for i in range(listed.shape[0]):
        for column in listed[i]:
            if column < 0 or scale[column] < low[i] or scale[column] > high[i]:
                continue
            a = atlas_of[column]
            if place[a] < 0 or seen[a] == i:
                continue
            seen[a] = i
            far = np.int32(2**30)
            nearest = far
            next_nearest = far
            index = -1
            for j in range(offsets[a], offsets[a + 1]):
                if scale[j] < low[i] or scale[j] > high[i]:
                    continue
                d = np.int32(0)
                for b in range(descriptor.shape[1]):
                    difference = np.int32(descriptor[i, b]) - np.int32(other[j, b])
                    d += difference * difference
                if d < nearest:
                    next_nearest = nearest
                    nearest = d
                    index = j
                elif d < next_nearest:
                    next_nearest = d
            second = np.float32(next_nearest) if next_nearest < far else np.float32(np.inf)
            _offer(best, i, place[a], segment, index, np.float32(nearest), second)
