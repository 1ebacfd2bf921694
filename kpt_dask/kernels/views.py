"""Rows of arrays that are given to kernels as `atlas_store.arrays.flat.as_flat_view` gives them."""

from typing import Any

from kpt_dask.kernels.jit import kernel


@kernel
def flat_row(array: Any, z: int, y: int, width: int) -> Any:
    """Row of a flat array (z, y, x)."""
    memory, strides = array
    begin = z * strides[0] + y * strides[1]
    return memory[begin : begin + width]
