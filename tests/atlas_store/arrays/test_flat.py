"""Parts of arrays as memory, against numpy's own indices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_store.arrays.flat import as_flat_view


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(0, 3)] * 3))
def test_a_part_of_an_array_is_found_in_its_memory(
    shape: tuple[int, int, int], begin: tuple[int, int, int]
) -> None:
    whole = np.arange(10 * 11 * 12).reshape(10, 11, 12)
    part = whole[tuple(slice(a, a + n) for a, n in zip(begin, shape, strict=True))]
    memory, strides = as_flat_view(part)
    assert memory.flags.c_contiguous
    assert np.shares_memory(memory, whole)
    z, y, x = np.indices(shape)
    np.testing.assert_array_equal(memory[z * strides[0] + y * strides[1] + x], part)


def test_rows_in_pieces_are_refused() -> None:
    whole = np.arange(60).reshape(3, 4, 5)
    pairs = np.zeros((3, 4), [("a", np.int8), ("b", np.int32)])["b"]
    for part in (whole[..., ::2], whole[::-1], whole.transpose(2, 1, 0), pairs):
        with pytest.raises(ValueError, match="rows in one piece"):
            as_flat_view(part)
