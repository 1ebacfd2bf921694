"""Nearest and second nearest organ keypoint of each atlas, under the constraints of eq. 2.

Plain arrays in, plain arrays out. Descriptors are ranks, so their squared distances are whole
numbers that float32 holds exactly, in whatever order BLAS adds; both kernels give the same.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])


def _kernel(function: F) -> F:
    return cast(F, numba.njit(nogil=True, cache=True)(function))


@_kernel
def of_every_atlas(
    distances: NDArray[np.float32],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    scale: NDArray[np.float32],
    offsets: NDArray[np.int64],
    nearest: NDArray[np.int64],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
) -> None:
    """Search all atlases, given all distances. Ties go to the lower column.

    Parameters
    ----------
    distances : float32 array (n, m)
        Squared distances between n descriptors of the scan and m of the atlases.
    low, high : float32 arrays (n)
        The scales that a match may have.
    scale : float32 array (m)
        Scales of the atlases' keypoints.
    offsets : int64 array (a + 1)
        Columns of atlas i are ``offsets[i]`` to ``offsets[i + 1]``.
    nearest, first, second : arrays (n, a)
        Receive the column of the nearest (-1 for none), and the squared distances of the
        nearest and second nearest (infinite for none).
    """
    for i in range(distances.shape[0]):
        for a in range(offsets.size - 1):
            best = np.float32(np.inf)
            next_best = np.float32(np.inf)
            index = -1
            for j in range(offsets[a], offsets[a + 1]):
                d = distances[i, j]
                if d >= next_best or scale[j] < low[i] or scale[j] > high[i]:
                    continue
                if d < best:
                    next_best = best
                    best = d
                    index = j
                else:
                    next_best = d
            nearest[i, a] = index
            first[i, a] = best
            second[i, a] = next_best


@_kernel
def of_listed_atlases(
    listed: NDArray[np.int32],
    descriptor: NDArray[np.uint8],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    other: NDArray[np.uint8],
    scale: NDArray[np.float32],
    atlas_of: NDArray[np.int32],
    offsets: NDArray[np.int64],
    wanted: NDArray[np.bool_],
    atlas: NDArray[np.int64],
    nearest: NDArray[np.int64],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
) -> None:
    """Search only the atlases that a list of neighbours names, but these exactly.

    Where a list ends before an atlas's second nearest, nothing has to be assumed of it.

    Parameters
    ----------
    listed : int32 array (n, k)
        Columns that are near each descriptor of the scan, -1 where there are fewer.
    descriptor, other : uint8 arrays (n, 64) and (m, 64)
        Of the scan and of the atlases.
    atlas_of : int32 array (m)
        Atlas of each column.
    wanted : bool array (a)
        The atlases to look at.
    atlas, nearest, first, second : arrays (n, k)
        Receive, for every atlas that is listed, what `of_every_atlas` finds; ``atlas`` is -1
        where there is none.
    low, high, scale, offsets
        As for `of_every_atlas`.
    """
    bins = descriptor.shape[1]
    for i in range(listed.shape[0]):
        found = 0
        for column in listed[i]:
            if column < 0 or scale[column] < low[i] or scale[column] > high[i]:
                continue
            a = atlas_of[column]
            known = not wanted[a]
            for k in range(found):
                if atlas[i, k] == a:
                    known = True
                    break
            if known:
                continue
            best = np.int32(2**30)
            next_best = best
            index = -1
            for j in range(offsets[a], offsets[a + 1]):
                if scale[j] < low[i] or scale[j] > high[i]:
                    continue
                d = np.int32(0)
                for b in range(bins):
                    difference = np.int32(descriptor[i, b]) - np.int32(other[j, b])
                    d += difference * difference
                if d < best:
                    next_best = best
                    best = d
                    index = j
                elif d < next_best:
                    next_best = d
            atlas[i, found] = a
            nearest[i, found] = index
            first[i, found] = best
            second[i, found] = next_best if next_best < 2**30 else np.inf
            found += 1
