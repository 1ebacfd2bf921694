from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import AtlasStore, StoreFormatError
from kpt_dask import surroundings
from kpt_dask.boxes import Box, aligned, cut, deal, shape_of, slices, volume_of
from kpt_dask.surroundings import read_planes, surroundings_of
from tests.test_local import ATLASES
from tests.test_transfer import SPACING, make_store

boxes = st.tuples(*[st.tuples(st.integers(0, 30), st.integers(1, 30))] * 3).map(
    lambda ends: tuple((a, a + n) for a, n in ends)
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AtlasStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surroundings, "PLANES", 5)
        patch.setattr(surroundings, "AROUND", 2 * SPACING)
        return make_store(tmp_path_factory.mktemp("surroundings") / "s", ATLASES)


def test_hu_and_labels_around_the_organs_are_the_atlas_s(
    store: AtlasStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "PLANES", 5)
    monkeypatch.setattr(surroundings, "AROUND", 2 * SPACING)
    for atlas, body in zip(store.atlases(store.ids()), ATLASES, strict=True):
        where = np.argwhere(body.labels > 0)
        low = np.maximum(where.min(axis=0) - 2, 0)
        high = np.minimum(where.max(axis=0) + 3, body.labels.shape)
        held = surroundings_of(atlas)
        assert held == tuple(zip(low.tolist(), high.tolist(), strict=True))
        (first, stop), *sides = held
        for begin, end in ((first, stop), (first + 1, stop - 2), (first + 4, first + 5)):
            planes, box = read_planes(atlas, begin, end)
            assert box[1:] == tuple(sides)
            assert box[0][0] <= begin < end <= box[0][1] <= stop
            planes = planes[: box[0][1] - box[0][0]]
            np.testing.assert_array_equal(planes >> 16, np.rint(body.image[slices(box)]))
            np.testing.assert_array_equal(planes & 0xFFFF, body.labels[slices(box)])


def data_of(store: Path) -> Path:
    [data] = (path for path in (store / "atlases").iterdir() if path.is_dir())
    return data


@pytest.mark.parametrize("earlier", [True, False])
def test_atlases_of_earlier_versions_give_the_same(tmp_path: Path, earlier: bool) -> None:
    made = make_store(tmp_path / "s", ATLASES[:1])
    [atlas] = made.atlases(made.ids())
    (first, stop), *_ = surroundings_of(atlas)
    asked = first + 1, stop - 3
    expected, held = read_planes(atlas, *asked)
    group = zarr.open_group(str(data_of(tmp_path / "s")), mode="r+")
    del group["surroundings"]
    if earlier:
        group.create_array("surroundings", shape=(2, 3, 3, 3), dtype=np.int16)
    found, box = read_planes(atlas, *asked)
    assert box == held
    n = held[0][1] - held[0][0]
    np.testing.assert_array_equal(found[:n], expected[:n])


@pytest.mark.parametrize("damage", ["missing", "short", "other size", "noise"])
def test_damaged_chunks_are_named(tmp_path: Path, damage: str) -> None:
    made = make_store(tmp_path / "s", ATLASES[:1])
    [atlas] = made.atlases(made.ids())
    chunk = data_of(tmp_path / "s") / "surroundings/c/0/0/0"
    packed = bytearray(chunk.read_bytes())
    if damage == "short":
        packed = packed[:10]
    elif damage == "other size":
        packed[4:8] = (2**31 - 1).to_bytes(4, "little")
    elif damage == "noise":
        packed[16:] = b"\xff" * (len(packed) - 16)
    chunk.unlink()
    if damage != "missing":
        chunk.write_bytes(packed)
    with pytest.raises(StoreFormatError, match="surroundings of the atlas 'a0' cannot be read"):
        read_planes(atlas, *surroundings_of(atlas)[0])


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 6))
def test_hands_cost_about_the_same(costs: list[int], hands: int) -> None:
    pieces = [((i, i + 1), (0, 1), (0, cost)) for i, cost in enumerate(costs)]
    dealt = deal(pieces, hands, volume_of)
    assert len(dealt) == min(hands, len(pieces))
    assert sorted(piece for hand in dealt for piece in hand) == pieces
    assert all(hand == sorted(hand) for hand in dealt)
    sums = [sum(map(volume_of, hand)) for hand in dealt]
    assert sums == sorted(sums, reverse=True)
    # Graham's bound for dealing the costliest first.
    least = max([sum(costs) / hands, *costs], default=0)
    assert max(sums, default=0) <= (4 / 3) * least + max(costs, default=0) / 3


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
