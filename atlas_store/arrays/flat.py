"""Flat views of arrays, from which kernels know that each row is contiguous."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Flat = tuple[NDArray[Any], tuple[int, ...]]
"""The memory that an array spans, 1-D, and the array's strides in it, in elements."""


def as_flat_view(array: NDArray[Any]) -> Flat:
    """View the memory that an array spans as 1-D.

    Compilers cannot see that the rows of a part of an array are contiguous; in a 1-D view they
    are, so loops over a row are vectorised.

    Parameters
    ----------
    array : ndarray
        With contiguous rows, along the last axis.

    Returns
    -------
    memory : ndarray (n)
        From the first element to the last, with what lies between.
    strides : tuple of int
        Strides of the axes of `array`, in elements of `memory`.

    Raises
    ------
    ValueError
        If the rows are not contiguous, or an axis runs backwards.
    """
    strides = tuple(stride // array.itemsize for stride in array.strides)
    odd = any(stride % array.itemsize for stride in array.strides)
    if odd or min(strides) < 0 or (strides[-1] != 1 and array.shape[-1] > 1):
        raise ValueError(f"an array of the strides {array.strides} has no rows in one piece")
    ends = [(n - 1) * stride for n, stride in zip(array.shape, strides, strict=True)]
    span = 1 + sum(ends) if array.size else 0
    return np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,)), strides
