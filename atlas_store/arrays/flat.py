"""Parts of arrays, given to kernels so that they know each row to be in one piece."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Flat = tuple[NDArray[Any], tuple[int, ...]]
"""The memory that an array spans, as one row, and the array's strides in it."""


def flat(array: NDArray[Any]) -> Flat:
    """Give the memory of an array, and its strides.

    Kernels do not know of an array that is cut out of another that each of its rows is in one
    piece; told so, they do many voxels of a row at once.

    Raises
    ------
    ValueError
        If its rows are not in one piece, or an axis runs backwards.
    """
    strides = tuple(stride // array.itemsize for stride in array.strides)
    odd = any(stride % array.itemsize for stride in array.strides)
    if odd or min(strides) < 0 or (strides[-1] != 1 and array.shape[-1] > 1):
        raise ValueError(f"an array of the strides {array.strides} has no rows in one piece")
    ends = [(n - 1) * stride for n, stride in zip(array.shape, strides, strict=True)]
    span = 1 + sum(ends) if array.size else 0
    return np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,)), strides
