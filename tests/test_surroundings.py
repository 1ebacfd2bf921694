from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import AtlasStore, StoreFormatError
from kpt_dask import surroundings
from kpt_dask.boxes import Box, aligned, cut, shape_of, slices
from kpt_dask.surroundings import read_surroundings, surroundings_of
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
    monkeypatch.setattr(surroundings, "AROUND", 2 * SPACING)
    for atlas, body in zip(store.atlases(store.ids()), ATLASES, strict=True):
        where = np.argwhere(body.labels > 0)
        low = np.maximum(where.min(axis=0) - 2, 0)
        high = np.minimum(where.max(axis=0) + 3, body.labels.shape)
        held = surroundings_of(atlas)
        assert held == tuple(zip(low.tolist(), high.tolist(), strict=True))
        for box in (held, tuple((a + 1, b - 2) for a, b in held)):
            hu, labels = read_surroundings(atlas, box)  # type: ignore[arg-type]
            np.testing.assert_array_equal(hu, np.rint(body.image[slices(box)]))  # type: ignore[arg-type]
            np.testing.assert_array_equal(labels, body.labels[slices(box)])  # type: ignore[arg-type]


def test_damaged_surroundings_are_named(tmp_path: Path) -> None:
    made = make_store(tmp_path / "s", ATLASES[:1])
    [atlas] = made.atlases(made.ids())
    held = surroundings_of(atlas)
    [data] = (path for path in (tmp_path / "s" / "atlases").iterdir() if path.is_dir())
    group = zarr.open_group(str(data), mode="r+")
    del group["surroundings"]
    group.create_array("surroundings", shape=(2, 3, 3, 3), dtype=np.int16)
    with pytest.raises(StoreFormatError, match="surroundings of the atlas 'a0' cannot be read"):
        read_surroundings(atlas, held)


@given(boxes, st.tuples(*[st.integers(1, 20)] * 3), st.integers(1, 2000), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_pieces_of_a_box_are_whole_units_that_share_nothing(
    box: Box, unit: tuple[int, int, int], voxels: int, pieces: int
) -> None:
    found = cut(box, unit, voxels, pieces)
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
