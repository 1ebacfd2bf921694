import errno
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from atlas_store import (
    AtlasExistsError,
    AtlasIdError,
    AtlasNotFoundError,
    AtlasStore,
    KeypointsFormatError,
    OrganTableError,
    ParameterMismatchError,
    Snapshot,
    StoreExistsError,
    StoreFormatError,
    StoreNotFoundError,
    load_organs,
)
from atlas_store.arrays import chunk_io
from atlas_store.marker import is_id, natural_order
from atlas_store.storage.digests import canonical, digest
from atlas_store.storage.objects import Objects, finish_writes


@pytest.fixture(params=["path", "string", "file URL", "relative", "memory URL"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> str | Path:
    """Every kind of place a store can be in."""
    monkeypatch.chdir(tmp_path)
    places = {
        "path": tmp_path / "image",  # a name that also occurs inside
        "string": str(tmp_path / "store"),
        "file URL": f"file://{tmp_path}/store",
        "relative": "s",
        "memory URL": f"memory://{tmp_path}/store",
    }
    return places[request.param]


def test_the_life_of_a_store(anywhere: str | Path, synthetic: SimpleNamespace) -> None:
    organs = load_organs("openkbp")
    AtlasStore.create(anywhere, organs, synthetic.PARAMETERS)
    store = AtlasStore.open(anywhere)
    assert (len(store), store.organs, store.parameters) == (0, organs, synthetic.PARAMETERS)

    for seed, atlas_id in enumerate(["pt_13", "pt_3", "pt_1"]):
        synthetic.add(store, atlas_id, seed)
    assert list(store) == store.ids() == ["pt_1", "pt_3", "pt_13"]
    assert "pt_3" in store
    assert "pt_4" not in store
    with pytest.raises(AtlasExistsError, match="has an atlas 'pt_3' already"):
        synthetic.add(store, "pt_3", seed=9)
    xr.testing.assert_equal(store["pt_3"].keypoints(), synthetic.keypoints(seed=1))

    synthetic.add(store, "pt_3", seed=9, replace=True)
    xr.testing.assert_equal(store["pt_3"].keypoints(), synthetic.keypoints(seed=9))
    synthetic.add(store, "pt_20", replace=True)
    store.remove("pt_1")
    assert AtlasStore.open(anywhere).ids() == ["pt_3", "pt_13", "pt_20"]
    with pytest.raises(AtlasNotFoundError, match="has no atlas 'pt_1'"):
        store.remove("pt_1")
    assert store.verify() == []


def test_an_atlas_says_what_was_added(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    info = synthetic.add(store, "pt_1", seed=5)
    atlas = store["pt_1"]
    assert atlas.info == info
    assert atlas.annotated == ("brainstem", "larynx", "mandible")
    assert info.source == ("pt_1_ct.nii.gz", "pt_1_seg.nii.gz")
    assert (info.shape, info.spacing, info.origin) == (synthetic.SHAPE, (2, 2, 2), (-10, 0, 4.5))
    assert info.parameters == synthetic.PARAMETERS
    labels = synthetic.labels()
    np.testing.assert_array_equal(atlas.labels[...], labels)
    assert atlas.image["0"].shape == synthetic.SHAPE
    keypoints = atlas.keypoints()
    assert info.keypoints == keypoints.sizes["keypoint"] == 40
    assert set(atlas.organs) == {"brainstem", "mandible"}
    for name, organ in atlas.organs.items():
        value = store.organs.by_name(name).value
        assert (labels[organ.slices] == value).sum() == organ.voxels == (labels == value).sum()
        assert organ.keypoints == (keypoints.label == value).sum() > 0


def test_a_keypoint_in_several_frames_counts_once(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    once = synthetic.keypoints(seed=3)
    times = np.random.default_rng(3).integers(1, 4, 40)
    several = once.isel(keypoint=np.repeat(np.arange(40), times))
    with store.draft("pt_1", synthetic.PARAMETERS) as draft:
        synthetic.fill(draft)
        info = draft.commit(
            several,
            annotated=["mandible"],
            organs=synthetic.extents(synthetic.labels()),
            shape=synthetic.SHAPE,
            spacing=(2, 2, 2),
            origin=(0, 0, 0),
            source=["pt_1"],
        )
    assert store["pt_1"].keypoints().sizes["keypoint"] == times.sum() > 40
    assert info.keypoints == 40
    for name, organ in info.organs.items():
        assert organ.keypoints == (once.label == store.organs.by_name(name).value).sum()
    assert store.verify() == []


def test_a_store_is_a_zarr_group(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    info = synthetic.add(store, "pt_1")
    group = zarr.open_group(store.url, mode="r")
    assert group.attrs["encoding-type"] == "kpt-atlas-store"
    labels = group[f"atlases/pt_1.{info.uuid}/image/labels/organs/0"]
    np.testing.assert_array_equal(labels[...], synthetic.labels())


def test_an_atlas_can_be_sent_to_another_process(store: AtlasStore, synthetic) -> None:
    synthetic.add(store, "pt_1")
    atlas = pickle.loads(pickle.dumps(store["pt_1"]))
    np.testing.assert_array_equal(atlas.labels[...], synthetic.labels())
    assert pickle.loads(pickle.dumps(store)).ids() == ["pt_1"]


def test_many_atlases_are_read_at_once(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    for atlas_id in ("a2", "a10"):
        synthetic.add(store, atlas_id)
    assert [atlas.id for atlas in store.atlases()] == ["a2", "a10"]
    assert [atlas.id for atlas in store.atlases(["a10"])] == ["a10"]
    with pytest.raises(AtlasNotFoundError):
        store.atlases(["a2", "a3"])


def test_a_store_is_not_created_over_anything(store: AtlasStore, tmp_path: Path) -> None:
    for path in (store.url, tmp_path, __file__):
        with pytest.raises(StoreExistsError, match="exists already"):
            AtlasStore.create(path, store.organs, {})
    (tmp_path / "empty").mkdir()
    assert len(AtlasStore.create(tmp_path / "empty", store.organs, {})) == 0


def test_opening_what_is_no_store_says_so_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="holds no atlas store: check the path"):
        AtlasStore.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "letter.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(StoreFormatError, match="is no atlas store"):
            AtlasStore.open(path)
    zarr.create_group(tmp_path / "volume", attributes={"encoding-type": "kpt-volume"})
    with pytest.raises(StoreFormatError, match="encoding-type 'kpt-volume', not 'kpt-atlas-sto"):
        AtlasStore.open(tmp_path / "volume")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a.update({"encoding-version": "2"}), "version '2', but.*update the program"),
        (lambda a: a.update(organs=None), "no list"),
        (lambda a: a["organs"][0].update(value=-1), "'brainstem' has the label value -1"),
        (lambda a: a["organs"][0].pop("nu"), "'brainstem' lacks nu"),
        (lambda a: a.update(parameters=3), "lacks its uuid or parameters"),
        (lambda a: a.pop("uuid"), "lacks its uuid or parameters"),
    ],
)
def test_a_damaged_or_newer_store_is_refused(
    store: AtlasStore, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    path = Path(store.url, "zarr.json")
    document = json.loads(path.read_text())
    change(document["attributes"])
    path.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match=complaint):
        AtlasStore.open(store.url)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"attributes": 3}', "\udcff"])
def test_a_store_described_by_nonsense_is_refused(store: AtlasStore, text: str) -> None:
    Path(store.url, "zarr.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreFormatError):
        AtlasStore.open(store.url)


def test_other_parameters_are_refused_and_the_difference_is_spelled_out(store: AtlasStore) -> None:
    other = {"spacing": 1.5, "extraction": {"sigma": 1.6, "octaves": 4}}
    with pytest.raises(ParameterMismatchError) as caught:
        store.draft("pt_1", other)
    for phrase in (
        "spacing is 2.0 in the store and 1.5 here",
        "extraction.levels is 3 in the store and absent here",
        "extraction.octaves is absent in the store and 4 here",
    ):
        assert phrase in str(caught.value)
    assert "sigma" not in str(caught.value)


def test_a_draft_that_fails_leaves_nothing(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    before = sorted(Path(store.url).rglob("*"))

    def interrupted() -> None:
        with store.draft("pt_1", synthetic.PARAMETERS) as draft:
            synthetic.fill(draft)
            assert len(store) == 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with store.draft("pt_1", synthetic.PARAMETERS) as draft:
        synthetic.fill(draft)
    assert sorted(Path(store.url).rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"annotated": ["heart"]}, OrganTableError, "no organ 'heart'"),
        ({"organs": {}}, KeypointsFormatError, "have the label 1, which its label map"),
        ({"shape": (12, 10, 9)}, StoreFormatError, "label map is uint8"),
        ({"spacing": (2, 2, float("nan"))}, ValueError, "not JSON compliant"),
    ],
)
def test_what_contradicts_itself_is_not_committed(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    changes: dict[str, Any],
    error: type[Exception],
    complaint: str,
) -> None:
    with store.draft("pt_1", synthetic.PARAMETERS) as draft:
        synthetic.fill(draft)
        with pytest.raises(error, match=complaint):
            synthetic.commit(draft, **changes)
    assert list(store) == []
    assert store.verify() == []


def test_a_replaced_atlas_stays_until_the_new_one_is_whole(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    old = store["pt_1"]
    with store.draft("pt_1", synthetic.PARAMETERS, replace=True) as draft:
        synthetic.fill(draft, seed=2)
        old.ensure_present()
        synthetic.commit(draft, seed=2)
    assert len(os.listdir(Path(store.url, "atlases"))) == 3  # zarr.json, the old and the new data
    assert [one.info for one in store.removed()] == [old.info]
    with pytest.raises(AtlasNotFoundError, match="was removed or replaced while it was read"):
        old.ensure_present()
    store.prune()
    with pytest.raises(AtlasNotFoundError):
        old.keypoints()
    with pytest.raises(AtlasNotFoundError):
        _ = old.labels


@pytest.mark.parametrize("lost", ["", "image/0/c/1", "zarr.json"])
def test_data_deleted_while_it_is_added_is_not_committed(
    store: AtlasStore, synthetic: SimpleNamespace, lost: str
) -> None:
    with store.draft("pt_1", synthetic.PARAMETERS) as draft:
        synthetic.fill(draft)
        image = draft.group["image/0"]
        assert isinstance(image, zarr.Array)
        image.attrs[chunk_io.COMPLETE] = True
        path = Path(store.url, draft.group.path, lost)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        if not lost:
            synthetic.fill(draft)  # as what is written later makes it again
        with pytest.raises(StoreFormatError, match="'pt_1' was deleted while it was added"):
            synthetic.commit(draft)
    assert os.listdir(Path(store.url, "atlases")) == ["zarr.json"]
    assert (store.ids(), store.verify()) == ([], [])


def test_a_draft_that_cannot_begin_leaves_nothing(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, path: str, **__: object) -> None:
        Path(store.url, path).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr, "create_group", full)
    with pytest.raises(OSError, match="No space"), store.draft("pt_1", synthetic.PARAMETERS):
        pass
    assert os.listdir(Path(store.url, "atlases")) == ["zarr.json"]


@pytest.mark.parametrize("change", ["replace", "remove", "add"])
def test_what_changed_meanwhile_is_not_replaced(
    store: AtlasStore, synthetic: SimpleNamespace, change: str
) -> None:
    if change != "add":
        synthetic.add(store, "pt_1", seed=1)

    def replaced() -> None:
        with store.draft("pt_1", synthetic.PARAMETERS, replace=True) as draft:
            synthetic.fill(draft, seed=2)
            if change == "remove":
                store.remove("pt_1")
            else:
                synthetic.add(store, "pt_1", seed=3, replace=change == "replace")
            synthetic.commit(draft, seed=2)

    with pytest.raises(AtlasNotFoundError, match="'pt_1' was added, replaced or removed while"):
        replaced()
    if change == "remove":
        store.restore("pt_1")
    xr.testing.assert_equal(
        store["pt_1"].keypoints(), synthetic.keypoints(seed=1 if change == "remove" else 3)
    )
    assert len(store.removed()) == (change == "replace")
    assert len(os.listdir(Path(store.url, "atlases"))) == 2 + len(store.removed())
    assert store.verify() == []


def test_only_the_very_atlas_is_replaced_and_its_last_note_stays(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    seen = synthetic.add(store, "pt_1", seed=1)
    with store.draft("pt_1", synthetic.PARAMETERS, replace=seen) as draft:
        draft.keep_note()
        synthetic.fill(draft, seed=2)
        store.set_note("pt_1", "noted meanwhile")
        synthetic.commit(draft, seed=2)
    assert store.note("pt_1") == "noted meanwhile"
    with (
        pytest.raises(AtlasNotFoundError, match="run this again"),
        store.draft("pt_1", synthetic.PARAMETERS, replace=seen),
    ):
        pass
    assert store.verify() == []


def test_a_snapshot_keeps_to_the_atlases_it_began_with(
    anywhere: str | Path, synthetic: SimpleNamespace
) -> None:
    store = AtlasStore.create(anywhere, load_organs("openkbp"), synthetic.PARAMETERS)
    for seed, atlas_id in enumerate(["pt_1", "pt_2", "pt_3", "pt_4"]):
        synthetic.add(store, atlas_id, seed)
    snapshot = Snapshot(store)
    known = snapshot["pt_4"].info
    synthetic.add(store, "pt_0")
    synthetic.add(store, "pt_2", seed=9, replace=True)
    store.remove("pt_3")
    store.remove("pt_4")
    store.prune()
    assert snapshot.ids() == list(snapshot) == ["pt_1", "pt_2", "pt_3", "pt_4"]
    assert snapshot.uuids().keys() == set(snapshot)
    assert "pt_3" in snapshot
    assert "pt_0" not in snapshot
    assert [atlas.id for atlas in snapshot.atlases()] == ["pt_1", "pt_4"]
    assert snapshot["pt_4"].info == known
    for atlas_id in ("pt_0", "pt_2", "pt_3"):
        with pytest.raises(AtlasNotFoundError):
            _ = snapshot[atlas_id]
    with pytest.raises(AtlasNotFoundError, match="was removed or replaced while it was read"):
        snapshot["pt_4"].keypoints()
    assert snapshot.gone(snapshot) == ["pt_2", "pt_3", "pt_4"]
    xr.testing.assert_equal(snapshot["pt_1"].keypoints(), synthetic.keypoints(seed=0))


def test_of_the_same_id_added_at_once_exactly_one_wins(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    barrier = Barrier(4)
    won: list[int] = []
    lost: list[int] = []

    def compete(seed: int) -> None:
        with store.draft("pt_1", synthetic.PARAMETERS) as draft:
            synthetic.fill(draft, seed)
            barrier.wait()
            try:
                synthetic.commit(draft, seed)
            except AtlasExistsError:
                lost.append(seed)
            else:
                won.append(seed)

    threads = [Thread(target=compete, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    xr.testing.assert_equal(store["pt_1"].keypoints(), synthetic.keypoints(seed=won[0]))
    assert store.verify() == []
    assert len(os.listdir(Path(store.url, "atlases"))) == 2


def test_those_who_wait_for_writes_do_not_wait_for_each_other() -> None:
    def wait() -> None:
        for _ in range(300):
            finish_writes()

    threads = [Thread(target=wait, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


@given(st.text(max_size=140) | st.from_regex(r"[A-Za-z0-9._-]{1,140}", fullmatch=True))
@settings(max_examples=200, deadline=None)
def test_an_id_is_a_plain_file_name(atlas_id: str) -> None:
    plain = (
        1 <= len(atlas_id) <= 128
        and atlas_id[0] not in "._-"
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in atlas_id)
    )
    assert is_id(atlas_id) == plain


@pytest.mark.parametrize("atlas_id", ["", "../pt_1", "a/b", ".hidden", "a\n", "ä", "x" * 129])
def test_an_id_that_cannot_be_one_is_refused(
    store: AtlasStore, synthetic: SimpleNamespace, atlas_id: str
) -> None:
    with pytest.raises(AtlasIdError, match="cannot be the id of an atlas"):
        store.draft(atlas_id, synthetic.PARAMETERS)
    assert atlas_id not in store
    with pytest.raises(AtlasNotFoundError):
        store[atlas_id]


@pytest.mark.parametrize("atlas_id", ["zarr", "a.json", "a.partial", f"a.{'0' * 32}", "x" * 128])
def test_no_id_gets_in_the_way_of_the_store(
    store: AtlasStore, synthetic: SimpleNamespace, atlas_id: str
) -> None:
    synthetic.add(store, "a")
    synthetic.add(store, atlas_id)
    assert store.ids() == sorted(["a", atlas_id])
    assert store.verify(repair=True) == []
    store.remove("a")
    xr.testing.assert_equal(store[atlas_id].keypoints(), synthetic.keypoints())


@given(st.permutations([f"pt_{n}" for n in range(12)] + ["pt_007", "a", "pt", "pt_1_2"]))
@settings(max_examples=20, deadline=None)
def test_natural_order_is_by_number_whatever_the_order_before(ids: list[str]) -> None:
    ordered = sorted(ids, key=natural_order)
    assert ordered[:5] == ["a", "pt", "pt_0", "pt_1", "pt_1_2"]
    assert ordered[5:] == ["pt_2", "pt_3", "pt_4", "pt_5", "pt_6", "pt_007", "pt_7"] + [
        f"pt_{n}" for n in range(8, 12)
    ]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_of_several_writers_of_a_new_object_one_is_told_that_it_wrote(
    tmp_path: Path, scheme: str
) -> None:
    objects = Objects.at(f"{scheme}{tmp_path}/objects")
    assert objects.is_vacant()
    assert objects.write_new("a/marker.json", b"first")
    assert not objects.write_new("a/marker.json", b"second")
    assert objects.read_many(["a/marker.json", "a/other"]) == [b"first", None]
    assert not objects.is_vacant()


@pytest.mark.parametrize(
    "change",
    [
        {"id": "pt_2"},
        {"uuid": "../../../etc"},
        {"organs": {"heart": None}},
        {"organs": {"brainstem": {"voxels": -1}}},
        {"shape": [10**9, 1, 1], "organs": {"brainstem": {"bounding_box": [[0, 2**70]] * 3}}},
        {"spacing": [10**400, 1, 1]},
        {"spacing": [2, 2, 2.1]},
        {"spacing": [4, 4, 4]},
        {"spacing": [-2, -2, -2]},
        {"origin": [float("1e300"), 0, 0]},
        {"origin": [0, 0]},
        {"shape": [0, 10, 8], "organs": {}},
        {"shape": [10**6, 10**6, 10**6]},
        {"digest": "f" * 63},
        {"organ_table": "0" * 64},
        {"annotated": "brainstem"},
        {"annotated": ["heart"]},
        {"encoding-version": "2"},
        {"keypoints": True},
        {"digest": None},
    ],
)
def test_a_marker_that_lies_is_refused(
    store: AtlasStore, synthetic: SimpleNamespace, change: dict[str, Any]
) -> None:
    synthetic.add(store, "pt_1")
    path = Path(store.url, "markers", "pt_1.json")
    content = json.loads(path.read_text()) | change
    del content["checksum"]
    body = canonical(content)
    path.write_bytes(b'{"checksum":"%s",' % digest(body).encode() + body[1:])
    with pytest.raises(StoreFormatError, match=r"markers/pt_1\.json"):
        store["pt_1"]
    assert [problem.atlas for problem in store.verify()] == ["pt_1"]
    store.remove("pt_1")
    assert len(store) == 0


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("image/labels/organs/0", {"shape": [10**6] * 3}),
        ("image/labels/organs/0", {"data_type": "float32"}),
        ("image/labels/organs/0", {"data_type": "nonsense"}),
        ("image/labels/organs/0", {"codecs": [{"name": "pickle"}]}),
        ("image/labels/organs/0", {"chunk_grid": {"configuration": {"chunk_shape": [10**5] * 3}}}),
        ("image/labels/organs/0", {"shape": "[" * 9}),
        ("image/labels/organs/0", {"node_type": "group"}),
        ("image", {"node_type": "array"}),
    ],
)
def test_an_image_that_lies_is_refused(
    store: AtlasStore, synthetic: SimpleNamespace, array: str, change: dict[str, Any]
) -> None:
    synthetic.add(store, "pt_1")
    atlas = store["pt_1"]
    path = Path(store.url, atlas.path, array, "zarr.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreFormatError, match="atlas 'pt_1'"):
        _ = (atlas.image, atlas.labels)
    assert store.verify()


@pytest.mark.parametrize("array", ["image/0", "image/labels/organs/0"])
@pytest.mark.parametrize("said", [2**31 - 1, 2**29])
def test_a_bomb_is_not_unpacked(
    store: AtlasStore, synthetic: SimpleNamespace, array: str, said: int
) -> None:
    synthetic.add(store, "pt_1")
    atlas = store["pt_1"]
    path = Path(store.url, atlas.path, array, "c/0/0/0")
    chunk = bytearray(path.read_bytes())
    chunk[4:8] = said.to_bytes(4, "little")
    path.write_bytes(chunk)
    with pytest.raises(StoreFormatError, match=f"c/0/0/0 is damaged, it would unpack .* to {said}"):
        _ = atlas.group[array][...]
    path.write_bytes(chunk[:9])
    with pytest.raises(StoreFormatError, match="c/0/0/0 is damaged, it is too short"):
        _ = atlas.group[array][...]


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "markers/pt_1.json",
        "{data}/zarr.json",
        "{data}/image/labels/organs/0/zarr.json",
        "{data}/image/labels/organs/0/c/0/0/0",
        "{data}/keypoints/zarr.json",
        "{data}/keypoints/descriptor/c/0/0",
    ],
)
def test_an_endless_file_is_not_read(
    store: AtlasStore, synthetic: SimpleNamespace, name: str
) -> None:
    synthetic.add(store, "pt_1")
    with open(Path(store.url, name.format(data=store["pt_1"].path)), "r+b") as file:
        file.truncate(1 << 42)

    def read() -> None:
        atlas = AtlasStore.open(store.url)["pt_1"]
        _ = (atlas.labels[...], atlas.keypoints())

    with pytest.raises((StoreFormatError, KeypointsFormatError), match=r"more than \d+ bytes"):
        read()
    if name != "zarr.json":
        assert {problem.atlas for problem in store.verify()} == {"pt_1"}


def test_a_store_of_the_first_version_opens(tmp_path: Path) -> None:
    """An archive that an earlier version wrote; add one for each new version, change none."""
    with zipfile.ZipFile(Path(__file__).parent / "archived" / "version_1.zip") as archive:
        archive.extractall(tmp_path)
    store = AtlasStore.open(tmp_path)
    assert store.ids() == ["pt_1", "pt_2"]
    assert store.verify() == []
    for atlas_id, descriptors, labels in (("pt_1", 13785, 36), ("pt_2", 13557, 34)):
        keypoints = store[atlas_id].keypoints()
        assert keypoints.sizes["keypoint"] == 20
        assert int(keypoints.descriptor.values[:, ::3].sum(dtype=int)) == descriptors
        assert int(keypoints.label.values.sum(dtype=int)) == labels
        assert store[atlas_id].annotated == ("brainstem", "larynx", "mandible")
        assert store[atlas_id].info.scan_digest is None
        assert (store[atlas_id].labels[...] == 7).sum() == 60


def test_a_full_disk_is_named(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zarr's own error says which disk is full as little as the system does."""

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    synthetic.add(store, "pt_1", seed=1)
    monkeypatch.setattr(LocalStore, "set", full)
    for write in (
        lambda: store.set_note("pt_1", "cyst"),
        lambda: store.remove("pt_1"),
        lambda: synthetic.add(store, "pt_2", seed=2),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert caught.value.filename == store.url
    monkeypatch.undo()
    assert store.ids() == ["pt_1"]
    assert store.verify() == []
