"""The atlases with the nearest keypoints, under the constraints of eq. 2.

Plain arrays in, plain arrays out. Descriptors are ranks, so their squared distances are whole
numbers that float32 holds exactly whatever the order in which BLAS adds: both kernels give the
same result.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.jit import comparing_kernel, kernel


class Best(NamedTuple):
    """The k nearest atlases of n keypoints, nearest first; ties go to the lower atlas.

    Attributes
    ----------
    atlas : int64 array (n, k)
        Number of the atlas; -1 for none.
    segment, row : int64 arrays (n, k)
        Segment and row of the atlas's nearest keypoint.
    first, second : float32 arrays (n, k)
        Squared distances of the atlas's nearest and second nearest keypoint; infinite for none.
    """

    atlas: NDArray[np.int64]
    segment: NDArray[np.int64]
    row: NDArray[np.int64]
    first: NDArray[np.float32]
    second: NDArray[np.float32]

    @classmethod
    def none(cls, n: int, k: int) -> Self:
        """Make the start of a search: no atlas for any of n keypoints."""
        missing = np.full((n, k), -1, np.int64)
        far = np.full((n, k), np.inf, np.float32)
        return cls(missing, missing.copy(), missing.copy(), far, far.copy())


class Query(NamedTuple):
    """Keypoints of a scan, n of one sign, for which the nearest atlases are searched.

    Attributes
    ----------
    descriptor : uint8 array (n, 64)
        Ranks.
    low, high : float32 arrays (n)
        Lowest and highest scale that a match may have, mm.
    """

    descriptor: NDArray[np.uint8]
    low: NDArray[np.float32]
    high: NDArray[np.float32]


class Candidates(NamedTuple):
    """Keypoints of a atlases, m of one sign, among which is searched.

    Attributes
    ----------
    descriptor : uint8 array (m, 64)
        Ranks.
    scale : float32 array (m)
        mm.
    offsets : int64 array (a + 1)
        Keypoints of atlas i are ``offsets[i]`` to ``offsets[i + 1]``.
    """

    descriptor: NDArray[np.uint8]
    scale: NDArray[np.float32]
    offsets: NDArray[np.int64]


class Numbers(NamedTuple):
    """How results are numbered in `Best`.

    Attributes
    ----------
    atlas : int64 array (a)
        Number of each atlas; negative for atlases to skip.
    segment : int
        Number of the segment.
    first_row : int
        Row, in the segment, of the first candidate.
    """

    atlas: NDArray[np.int64]
    segment: int
    first_row: int = 0


@kernel
def _offer(best: Best, i: int, candidate: Any) -> None:
    """Insert an atlas (first, second, atlas, segment, row) in the list of keypoint i, if near."""
    first, second, atlas, segment, row = candidate
    size = best.atlas.shape[1]
    k = size
    while k > 0 and (
        first < best.first[i, k - 1]
        or (first == best.first[i, k - 1] and atlas < best.atlas[i, k - 1])
    ):
        k -= 1
        if k + 1 < size:
            best.atlas[i, k + 1] = best.atlas[i, k]
            best.segment[i, k + 1] = best.segment[i, k]
            best.row[i, k + 1] = best.row[i, k]
            best.first[i, k + 1] = best.first[i, k]
            best.second[i, k + 1] = best.second[i, k]
        best.atlas[i, k] = atlas
        best.segment[i, k] = segment
        best.row[i, k] = row
        best.first[i, k] = first
        best.second[i, k] = second


@comparing_kernel
def _lowest(row: NDArray[np.float32], half: NDArray[np.float32]) -> np.float32:
    """Lowest ``half - row``; vectorised, as none is NaN."""
    lowest = np.float32(np.inf)
    for j in range(row.size):
        d = half[j] - row[j]
        lowest = d if d < lowest else lowest
    return lowest


@kernel
def search_every_atlas(
    products: NDArray[np.float32],
    squares: tuple[NDArray[np.float32], NDArray[np.float32]],
    query: Query,
    candidates: Candidates,
    numbers: Numbers,
    best: Best,
) -> None:
    """Search all atlases, given all scalar products.

    Parameters
    ----------
    products : float32 array (n, m)
        Scalar products of the descriptors of query and candidates.
    squares : float32 arrays (n) and (m)
        Squared lengths of both.
    query : Query
        n keypoints of a scan.
    candidates : Candidates
        m keypoints of atlases.
    numbers : Numbers
        How to number the results.
    best : Best
        Updated with what is nearer than its entries.
    """
    scan_squares, atlas_squares = squares
    scale, offsets = candidates.scale, candidates.offsets
    farthest = best.first[:, -1]
    half = atlas_squares / np.float32(2)
    for i in range(products.shape[0]):
        row = products[i]
        for a in range(offsets.size - 1):
            # Most atlases are too far away whatever their scales.
            columns = slice(offsets[a], offsets[a + 1])
            bound = (farthest[i] - scan_squares[i]) / np.float32(2)
            if numbers.atlas[a] < 0 or _lowest(row[columns], half[columns]) > bound:
                continue
            nearest = np.float32(np.inf)
            next_nearest = np.float32(np.inf)
            index = -1
            for j in range(offsets[a], offsets[a + 1]):
                d = atlas_squares[j] - np.float32(2) * row[j]
                if d >= next_nearest or scale[j] < query.low[i] or scale[j] > query.high[i]:
                    continue
                if d < nearest:
                    next_nearest = nearest
                    nearest = d
                    index = j
                else:
                    next_nearest = d
            if index >= 0:
                first, second = scan_squares[i] + nearest, scan_squares[i] + next_nearest
                row_number = numbers.first_row + index
                _offer(best, i, (first, second, numbers.atlas[a], numbers.segment, row_number))


@kernel
def search_listed_atlases(
    listed: NDArray[np.int32],
    atlas_of: NDArray[np.int32],
    query: Query,
    candidates: Candidates,
    numbers: Numbers,
    best: Best,
) -> None:
    """Search exactly, but only the atlases that a list of neighbours names.

    The second nearest of an atlas need not be in the list. An atlas that is not listed has no
    keypoint nearer than the last of the list, if the list is right.

    Parameters
    ----------
    listed : int32 array (n, k)
        Candidates near each keypoint of the query; -1 where there are fewer.
    atlas_of : int32 array (m)
        Atlas of each candidate.
    query, candidates, numbers, best
        As for `search_every_atlas`.
    """
    scale, offsets = candidates.scale, candidates.offsets
    seen = np.full(offsets.size - 1, -1, np.int64)
    for i in range(listed.shape[0]):
        low, high = query.low[i], query.high[i]
        for column in listed[i]:
            if column < 0 or scale[column] < low or scale[column] > high:
                continue
            a = atlas_of[column]
            if numbers.atlas[a] < 0 or seen[a] == i:
                continue
            seen[a] = i
            far = np.int32(2**30)
            nearest = far
            next_nearest = far
            index = -1
            for j in range(offsets[a], offsets[a + 1]):
                if scale[j] < low or scale[j] > high:
                    continue
                d = np.int32(0)
                for b in range(query.descriptor.shape[1]):
                    difference = np.int32(query.descriptor[i, b]) - np.int32(
                        candidates.descriptor[j, b]
                    )
                    d += difference * difference
                if d < nearest:
                    next_nearest = nearest
                    nearest = d
                    index = j
                elif d < next_nearest:
                    next_nearest = d
            second = np.float32(next_nearest) if next_nearest < far else np.float32(np.inf)
            row_number = numbers.first_row + index
            candidate = np.float32(nearest), second, numbers.atlas[a], numbers.segment, row_number
            _offer(best, i, candidate)
