import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store.arrays.boxes import Box, aligned, shape_of, slices, volume_of
from kpt_dask.runtime.balance import cut, deal

boxes = st.tuples(*[st.tuples(st.integers(0, 30), st.integers(1, 30))] * 3).map(
    lambda ends: tuple((a, a + n) for a, n in ends)
)


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 6))
def test_hands_cost_about_the_same(costs: list[int], hands: int) -> None:
    pieces = [((i, i + 1), (0, 1), (0, cost)) for i, cost in enumerate(costs)]
    dealt = deal(pieces, hands, volume_of)
    assert len(dealt) == min(hands, len(pieces))
    assert sorted(piece for hand in dealt for piece in hand) == pieces
    assert all(hand == sorted(hand) for hand in dealt)
    sums = [sum(map(volume_of, hand)) for hand in dealt]
    assert sums == sorted(sums, reverse=True)
    # The bound of a local search: a hand of several has at most half of its cost above any other.
    largest, mean = max(costs, default=0), sum(costs) / hands
    assert max(sums, default=0) <= max(largest, 2 * hands / (hands + 1) * mean + 1e-9)


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
