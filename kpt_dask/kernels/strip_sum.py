"""Strips of an organ's voxels, added to its share."""

from typing import Any

import numpy as np

from kpt_dask.kernels.exponential import exp2
from kpt_dask.kernels.jit import either, kernel
from kpt_dask.kernels.strip_sum_llvm import add_vectors


@kernel
def add_strips_plain(
    share: Any, scan: Any, at: Any, strips: Any, of: Any, likelihood: Any, n: int
) -> None:
    """Add strips to a share: 2^(power − slope · d²), d = I − I_a, where d² is below `most`.

    Parameters
    ----------
    share : float32 array, one axis
    scan, strips : int16 arrays, one axis
        HU.
    at, of : tuples of int
        Where each strip begins in share and scan, and in `strips`. They do not overlap there.
    likelihood : (float32, float32, float32)
        `power`, `slope` and `most`. Nothing is added where d² reaches `most`; elsewhere
        power − slope · d² must be in the range of `exp2`.
    n : int
        Number of voxels of each strip: `LANES`, or `HALF` for an even number of strips. It is
        written in the call.
    """
    power, slope, most = likelihood
    lowest, highest = np.int32(-(2**15)), np.int32(2**15 - 1)
    for strip in range(len(at)):
        to, first = np.uint64(at[strip]), np.uint64(of[strip])
        for i in range(np.uint64(n)):
            d = np.int32(scan[to + i]) - np.int32(strips[first + i])
            # Saturated, as 16-bit arithmetic of vectors is.
            apart = np.float32(min(max(d, lowest), highest))
            squared = apart * apart
            before = share[to + i]
            after = before + exp2(power - slope * squared)
            share[to + i] = after if squared < most else before


add_strips = either(add_vectors, add_strips_plain)
