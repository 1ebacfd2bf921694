import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store.arrays.boxes import Box, aligned, shape_of, slices, volume_of
from kpt_dask.runtime.balance import cut, distribute

boxes = st.tuples(*[st.tuples(st.integers(0, 30), st.integers(1, 30))] * 3).map(
    lambda ends: tuple((a, a + n) for a, n in ends)
)


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 6))
def test_bins_cost_about_the_same(costs: list[int], bins: int) -> None:
    pieces = [((i, i + 1), (0, 1), (0, cost)) for i, cost in enumerate(costs)]
    filled = distribute(pieces, bins, volume_of)
    assert len(filled) == min(bins, len(pieces))
    assert sorted(piece for content in filled for piece in content) == pieces
    assert all(content == sorted(content) for content in filled)
    sums = [sum(map(volume_of, content)) for content in filled]
    assert sums == sorted(sums, reverse=True)
    # The bound of a local search: a bin of several has at most half of its cost above any other.
    largest, mean = max(costs, default=0), sum(costs) / bins
    assert max(sums, default=0) <= max(largest, 2 * bins / (bins + 1) * mean + 1e-9)


@given(boxes, st.tuples(*[st.integers(1, 20)] * 3), st.integers(1, 2000), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_pieces_of_a_box_are_whole_units_that_share_nothing(
    box: Box, unit: tuple[int, int, int], voxels: int, pieces: int
) -> None:
    found = cut(box, unit, pieces, volume_of, lambda piece: volume_of(piece) <= voxels)
    shape = (61, 62, 63)
    count = np.zeros(shape, np.uint8)
    whole = np.zeros(shape, np.uint8)
    for piece in found:
        count[slices(piece)] += 1
        whole[aligned(piece, unit, shape)] += 1
        for (a, b), (low, high), u in zip(piece, box, unit, strict=True):
            assert a in (low, a // u * u)
            assert b in (high, b // u * u)
    assert (count[slices(box)] == 1).all()
    assert count.sum() == np.prod(shape_of(box))
    assert whole.max() == 1
    units = [len({n // u for n in range(*ends)}) for ends, u in zip(box, unit, strict=True)]
    if len(found) < min(pieces, np.prod(units)):
        raise AssertionError(found)
    for piece in found:
        small = all((b - 1) // u == a // u for (a, b), u in zip(piece, unit, strict=True))
        assert small or np.prod(shape_of(piece)) <= voxels
