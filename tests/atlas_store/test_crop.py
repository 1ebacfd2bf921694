import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlas_store import AtlasStore, Organ, OrganInfo, OrganTable, StoreFormatError, crop
from atlas_store.arrays.boxes import slices
from atlas_store.crop import Coding, crop_box, read_planes, write_crop
from tests.atlas_store.resealed import reseal
from tests.helpers import ATLASES, SPACING, data_of, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AtlasStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crop, "PLANES", 5)
        patch.setattr(crop, "CROP_MARGIN_MM", 2 * SPACING)
        return make_store(tmp_path_factory.mktemp("surroundings") / "s", ATLASES)


def test_hu_and_labels_around_the_organs_are_the_atlas_s(
    store: AtlasStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crop, "PLANES", 5)
    monkeypatch.setattr(crop, "CROP_MARGIN_MM", 2 * SPACING)
    for atlas, body in zip(store.atlases(store.ids()), ATLASES, strict=True):
        where = np.argwhere(body.labels > 0)
        low = np.maximum(where.min(axis=0) - 2, 0)
        high = np.minimum(where.max(axis=0) + 3, body.labels.shape)
        held = crop_box(atlas)
        assert held == tuple(zip(low.tolist(), high.tolist(), strict=True))
        (first, stop), *sides = held
        for begin, end in ((first, stop), (first + 1, stop - 2), (first + 4, first + 5)):
            planes, box, coding = read_planes(atlas, begin, end)
            assert box[1:] == tuple(sides)
            assert box[0][0] <= begin < end <= box[0][1] <= stop
            hu, labels = decoded(planes[: box[0][1] - box[0][0]], coding)
            np.testing.assert_array_equal(hu, np.rint(body.image[slices(box)]))
            np.testing.assert_array_equal(labels, body.labels[slices(box)])
            assert coding.dtype.itemsize == 2


def decoded(planes: NDArray[Any], coding: Coding) -> tuple[NDArray[Any], NDArray[Any]]:
    wide = planes.astype(np.int32)
    (shift, mask, first), label = coding.hu, coding.label
    numbers = wide >> label[0] & label[1]
    names = np.array([0, *coding.labels]) if coding.labels is not None else np.arange(1 << 16)
    return (wide >> shift & mask) + first, names[numbers]


@given(
    st.lists(st.integers(1, 65535), min_size=1, max_size=17, unique=True),
    st.integers(-1100, -900),
    st.integers(3000, 4000),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_whatever_a_volume_holds_is_kept(
    values: list[int], least: int, most: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.integers(least, most + 1, (4, 3, 5))
    hu.flat[:2] = least, most
    labels = rng.choice([0, *values], hu.shape)
    table = OrganTable(tuple(Organ(v, f"o{v}", 50.0, (0, 0, 0)) for v in values))
    info = OrganInfo(1, ((1, 2), (1, 2), (1, 2)), (0.0, 0.0, 0.0))
    found = {organ.name: info for organ in table}
    group = zarr.create_group({})
    image = group.create_array("image", data=hu.astype(np.float32))
    label_map = group.create_array("labels", data=labels.astype(np.uint16))
    box, coding = write_crop(group, image, label_map, found, table, 2.0, -1000)
    stored = group[crop.NAME]
    assert isinstance(stored, zarr.Array)
    for there, here in zip(decoded(np.asarray(stored[...]), coding), (hu, labels), strict=True):
        np.testing.assert_array_equal(there, here[slices(box)])
    small = least >= -1000 and most <= 3095 and len(found) <= 15
    assert coding.dtype == (np.uint16 if small else np.int32)
    for value in {*range(20), *values}:
        known = coding.number_of(value)
        assert value in values or coding is crop.WIDE or known > coding.label[1]


@pytest.mark.parametrize("earlier", ["wide", "other", "none", "unmarked"])
def test_atlases_of_earlier_versions_give_the_same(tmp_path: Path, earlier: str) -> None:
    made = make_store(tmp_path / "s", ATLASES[:1])
    [atlas] = made.atlases(made.ids())
    (first, stop), *_ = crop_box(atlas)
    asked = first + 1, stop - 3
    planes, held, coding = read_planes(atlas, *asked)
    n = held[0][1] - held[0][0]
    expected = decoded(planes[:n], coding)
    group = zarr.open_group(str(data_of(tmp_path / "s")), mode="r+")
    stored = group["surroundings"]
    assert isinstance(stored, zarr.Array)
    numbers, chunks = np.asarray(stored[...]), stored.chunks
    if earlier != "unmarked":
        del group["surroundings"]
    else:
        attributes = {"labels": stored.attrs["labels"]}
        change(stored, lambda document: document.update(attributes=attributes))
    if earlier == "other":
        group.create_array("surroundings", shape=(2, 3, 3, 3), dtype=np.int16)
    elif earlier == "wide":
        hu, labels = decoded(numbers, coding)
        data = (hu << 16 | labels).astype(np.int32)
        group.create_array("surroundings", data=data, chunks=chunks, compressors=BloscCodec())
    reseal(made, atlas.id)
    [atlas] = made.atlases()
    planes, box, coding = read_planes(atlas, *asked)
    assert box == held
    assert (coding is crop.WIDE) == (earlier != "unmarked")
    for found, here in zip(decoded(planes[:n], coding), expected, strict=True):
        np.testing.assert_array_equal(found, here)


def change(array: "zarr.Array[Any]", how: Callable[[dict[str, Any]], object]) -> None:
    path = Path(str(array.store_path).removeprefix("file://"), "zarr.json")
    document = json.loads(path.read_text())
    how(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("attribute", "value", "complaint"),
    [
        ("labels", None, "surroundings of the atlas 'a0' cannot be read .its labels"),
        ("labels", "1", "its labels are described as '1'"),
        ("labels", [1.5], "its labels"),
        ("labels", ["liver"], "its labels"),
        ("first_hu", "air", "its least HU are described as 'air'"),
        ("first_hu", 1 << 20, "its least HU"),
        ("encoding-version", "2", "surroundings has the encoding-version '2'.*update the program"),
        ("encoding-type", "kpt-volume", "has the encoding-type 'kpt-volume'"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(
    tmp_path: Path, attribute: str, value: object, complaint: str
) -> None:
    made = make_store(tmp_path / "s", ATLASES[:1])
    array = zarr.open_group(str(data_of(tmp_path / "s")), mode="r+")["surroundings"]
    assert isinstance(array, zarr.Array)
    assert array.attrs["encoding-type"] == "kpt-atlas-crop"
    array.update_attributes({attribute: value})
    reseal(made, "a0")
    [atlas] = made.atlases()
    with pytest.raises(StoreFormatError, match=complaint):
        read_planes(atlas, *crop_box(atlas)[0])


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("damage", ["missing", "short", "other size", "noise"])
def test_damaged_chunks_are_named(tmp_path: Path, damage: str, sealed: bool) -> None:
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
    complaint = "surroundings/c/0/0/0 of the atlas 'a0' is (missing|damaged)"
    if sealed:
        reseal(made, "a0")
        [atlas] = made.atlases()
        complaint = "surroundings of the atlas 'a0' cannot be read"
    with pytest.raises(StoreFormatError, match=complaint):
        read_planes(atlas, *crop_box(atlas)[0])
