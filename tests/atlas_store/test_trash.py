"""Removed atlases come back whole, or are gone for ever; nothing between."""

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import xarray as xr

from atlas_store import (
    AtlasExistsError,
    AtlasNotFoundError,
    AtlasStore,
    StoreFormatError,
    draft,
    trash,
)
from atlas_store.errors import StoreWarning
from atlas_store.storage.objects import Objects


def folders(store: AtlasStore) -> int:
    return len([name for name in os.listdir(Path(store.url, "atlases")) if name != "zarr.json"])


def test_a_removed_atlas_is_restored_as_it_was(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    before = store["pt_1"].info
    store.remove("pt_1")
    assert (store.ids(), [one.info for one in store.removed()]) == ([], [before])
    assert store.verify(repair=True) == []
    assert store.restore("pt_1").info == before
    assert store.removed() == []
    xr.testing.assert_equal(store["pt_1"].keypoints(), synthetic.keypoints(seed=1))
    assert store.verify() == []


def test_the_last_removed_of_an_id_is_restored(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        synthetic.add(store, "pt_1", seed)
        with monkeypatch.context() as patch:
            now = datetime(2026, 1, seed, tzinfo=UTC)
            patch.setattr(trash, "datetime", SimpleNamespace(now=lambda _, now=now: now))
            store.remove("pt_1")
    assert [one.removed.day for one in store.removed()] == [2, 1]
    restored = store.restore("pt_1")
    xr.testing.assert_equal(restored.keypoints(), synthetic.keypoints(seed=2))
    with pytest.raises(AtlasExistsError, match="has an atlas 'pt_1'"):
        store.restore("pt_1")
    assert len(store.removed()) == 1
    assert store.verify() == []


def test_of_several_versions_any_is_restored(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    made = [synthetic.add(store, "pt_1", seed, replace=True) for seed in range(3)]
    assert {one.info.uuid for one in store.removed()} == {info.uuid for info in made[:2]}
    for seed in (0, 1, 2, 0):
        restored = store.restore("pt_1", version=made[seed].uuid[:8], replace=True)
        assert restored.info == made[seed]
        xr.testing.assert_equal(restored.keypoints(), synthetic.keypoints(seed=seed))
        assert len(store.removed()) == 2
    for version in (made[0].uuid, "g"):
        with pytest.raises(AtlasNotFoundError, match=f"no removed versions '{version}'"):
            store.restore("pt_1", version=version, replace=True)
    with pytest.raises(AtlasNotFoundError, match="no removed atlas 'pt_2'"):
        store.restore("pt_2", version=made[1].uuid)
    assert (store["pt_1"].info, store.verify()) == (made[0], [])


def test_a_version_that_several_removed_atlases_may_be_is_refused(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        monkeypatch.setattr(
            draft, "uuid4", lambda i=i: SimpleNamespace(hex=f"ab{i}".ljust(32, "0"))
        )
        synthetic.add(store, "pt_1", seed=i)
        store.remove("pt_1")
    with pytest.raises(AtlasNotFoundError, match="has 2 removed versions 'ab' of"):
        store.restore("pt_1", version="ab")
    assert store.restore("pt_1", version="ab0").info.uuid.startswith("ab0")


def test_only_what_was_removed_long_ago_is_pruned(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, atlas_id in enumerate(["pt_1", "pt_2", "pt_3"]):
        synthetic.add(store, atlas_id, seed)
    store.remove("pt_1")
    with monkeypatch.context() as patch:
        now = datetime.now(UTC) - timedelta(days=9)
        patch.setattr(trash, "datetime", SimpleNamespace(now=lambda _: now))
        store.remove("pt_2")
    assert store.prune(timedelta(days=8)) == ["pt_2"]
    with pytest.raises(AtlasNotFoundError, match="no removed atlas 'pt_2'"):
        store.restore("pt_2")
    assert folders(store) == 2
    assert store.prune() == ["pt_1"]
    assert (store.ids(), folders(store), store.verify()) == (["pt_3"], 1, [])


@pytest.mark.parametrize("action", ["remove", "restore", "prune"])
@pytest.mark.parametrize("call", range(4))
def test_interrupted_anywhere_an_atlas_is_there_removed_or_a_leftover(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    call: int,
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    if action != "remove":
        store.remove("pt_1")
    calls = 0

    def interrupted(name: str) -> None:
        original = getattr(Objects, name)

        def counted(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(Objects, name, counted)

    with monkeypatch.context():
        for name in ("write", "write_new", "delete", "delete_folder"):
            interrupted(name)
        with suppress(KeyboardInterrupt):
            store.prune() if action == "prune" else getattr(store, action)("pt_1")
    monkeypatch.undo()
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    if "pt_1" not in store and store.removed():
        store.restore("pt_1")
    if "pt_1" in store:
        xr.testing.assert_equal(store["pt_1"].keypoints(), synthetic.keypoints(seed=1))
        assert action != "prune" or call == 0
    else:
        assert action == "prune"
    kept = [one for one in store.verify(repair=True) if not one.repaired]
    # Nothing tells then that its marker is not lost.
    assert len(kept) == (action == "prune" and call == 1)
    for problem in kept:
        shutil.rmtree(problem.what.partition(" is complete")[0])
    assert store.verify() == []


def test_an_atlas_pruned_while_it_is_restored_is_not_there(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    store.remove("pt_1")
    write_new = Objects.write_new

    def pruned_before(*args: object) -> bool:
        AtlasStore.open(store.url).prune()
        return write_new(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Objects, "write_new", pruned_before)
    with pytest.raises(AtlasNotFoundError, match="no removed atlas 'pt_1'"):
        store.restore("pt_1")
    assert store.ids() == []
    assert store.verify() == []


@pytest.mark.parametrize(
    "change",
    [{"encoding-version": "9"}, {"removed": "once"}, {"marker": "{}"}, {"removed": None}],
)
def test_a_damaged_description_is_named_and_the_others_are_used(
    store: AtlasStore, synthetic: SimpleNamespace, change: dict[str, object]
) -> None:
    for name in ("pt_1", "pt_2"):
        synthetic.add(store, name, seed=1)
        store.remove(name)
    [path] = Path(store.url, "removed").glob("pt_1.*")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(StoreWarning, match=path.name):
        assert [one.info.id for one in store.removed()] == ["pt_2"]
    with pytest.raises(StoreFormatError, match=path.name):
        store.restore("pt_1")
    assert store.restore("pt_2").id == "pt_2"
    store.remove("pt_2")
    with pytest.warns(StoreWarning, match=path.name):
        assert store.prune() == ["pt_2"]
    assert folders(store) == 1
    (problem,) = store.verify(repair=True)
    assert path.name in problem.what
    assert not problem.repaired


def test_what_replaces_an_atlas_while_it_is_removed_stays(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    settle = Objects.settle

    def replaced_before(objects: Objects, path: str) -> None:
        settle(objects, path)
        if path.startswith("removed/"):
            monkeypatch.setattr(Objects, "settle", settle)
            synthetic.add(store, "pt_1", seed=2, replace=True)

    monkeypatch.setattr(Objects, "settle", replaced_before)
    with pytest.raises(AtlasNotFoundError, match="'pt_1' was replaced while it was removed"):
        store.remove("pt_1")
    xr.testing.assert_equal(store["pt_1"].keypoints(), synthetic.keypoints(seed=2))
    assert (len(store.removed()), folders(store), store.verify()) == (1, 2, [])


def test_an_atlas_whose_data_is_gone_is_not_restored(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    data = Path(store.url, store["pt_1"].path)
    chunk = data / "image" / "0" / "c" / "1" / "0" / "0"
    store.remove("pt_1")
    for path in (chunk, data / "zarr.json", data):
        path.rename(path.with_name("away"))
        with pytest.raises(StoreFormatError, match=r"lacks \d+ of \d+ objects|is missing"):
            store.restore("pt_1")
        assert (store.ids(), len(store.removed())) == ([], 1)
        path.with_name("away").rename(path)
    assert store.restore("pt_1").id == "pt_1"
    assert store.verify() == []


def test_an_atlas_that_was_never_quite_removed_is_not_listed_as_removed(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.add(store, "pt_1", seed=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "delete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.remove("pt_1")
    assert (store.ids(), store.removed()) == (["pt_1"], [])
    assert store.prune() == []
    assert store["pt_1"].keypoints() is not None
    assert store.verify() == []


def test_all_is_pruned_even_what_a_clock_ahead_removed(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    with monkeypatch.context() as patch:
        now = datetime.now(UTC) + timedelta(days=9)
        patch.setattr(trash, "datetime", SimpleNamespace(now=lambda _: now))
        store.remove("pt_1")
    assert store.prune(timedelta(days=1)) == []
    assert store.prune(timedelta.max) == []
    assert store.prune() == ["pt_1"]
    assert store.verify() == []


@pytest.mark.parametrize("part", ["", "image"])
def test_data_that_is_a_link_to_another_disk_is_read_verified_and_pruned(
    store: AtlasStore, synthetic: SimpleNamespace, tmp_path: Path, part: str
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    folder = Path(store.url, store["pt_1"].path, part)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert store.verify() == []
    xr.testing.assert_equal(store["pt_1"].keypoints(), synthetic.keypoints(seed=1))
    store.remove("pt_1")
    assert store.restore("pt_1").id == "pt_1"
    store.remove("pt_1")
    assert len(store.prune(timedelta(0))) == 1
    assert folders(store) == 0
    assert store.verify() == []


def test_data_behind_a_link_that_cannot_be_deleted_is_told_and_found_again(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    folder = Path(store.url, store["pt_1"].path)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    store.remove("pt_1")

    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(PermissionError, match="elsewhere"):
            store.prune(timedelta(0))
    assert folders(store) == 1
    assert [problem.atlas for problem in store.verify()] == ["pt_1"]


def test_what_was_replaced_is_restored_and_so_is_what_replaced_it(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    store.set_note("pt_1", "the first")
    before = store["pt_1"].info
    synthetic.add(store, "pt_1", seed=2, replace=True)
    after = store["pt_1"].info
    assert [one.info for one in store.removed()] == [before]
    assert store.verify(repair=True) == []
    with pytest.raises(AtlasExistsError, match="has an atlas 'pt_1'"):
        store.restore("pt_1")
    for info, seed in ((before, 1), (after, 2), (before, 1)):
        restored = store.restore("pt_1", replace=True)
        assert restored.info == info
        xr.testing.assert_equal(restored.keypoints(), synthetic.keypoints(seed=seed))
        assert len(store.removed()) == 1
    assert store.note("pt_1") == "the first"
    assert store.prune() == ["pt_1"]
    assert (store["pt_1"].info, folders(store), store.verify()) == (before, 1, [])
    with pytest.raises(AtlasNotFoundError, match="no removed atlas 'pt_1'"):
        store.restore("pt_1", replace=True)


@pytest.mark.parametrize("action", ["replace", "restore"])
@pytest.mark.parametrize("call", range(6))
def test_interrupted_anywhere_an_atlas_that_is_replaced_is_there_or_restorable(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    call: int,
) -> None:
    made = []
    for seed in (1, 2) if action == "restore" else (1,):
        synthetic.add(store, "pt_1", seed=seed, replace=True)
        made.append(store["pt_1"].info)
    calls = 0

    def interrupt(name: str) -> None:
        original = getattr(Objects, name)

        def counted(objects: Objects, key: str, *rest: object) -> object:
            nonlocal calls
            if key.startswith(("markers/", "removed/")):
                calls += 1
                if calls == call + 1:
                    raise KeyboardInterrupt
            return original(objects, key, *rest)

        monkeypatch.setattr(Objects, name, counted)

    for name in ("write", "delete", "settle"):
        interrupt(name)
    with suppress(KeyboardInterrupt):
        if action == "replace":
            synthetic.add(store, "pt_1", seed=2, replace=True)
        else:
            store.restore("pt_1", replace=True)
    monkeypatch.undo()
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    store.verify(repair=True)
    assert store.ids() == ["pt_1"]
    found = [store["pt_1"].info, *(one.info for one in store.removed())]
    assert {info.uuid for info in made} <= {info.uuid for info in found}
    assert store.verify() == []


class Paused(Objects):
    """Stops before it writes a marker until others are done, or have come here too."""

    def __init__(self, objects: Objects, barrier: Barrier) -> None:
        super().__init__(objects.store, objects.url)
        self.barrier = barrier

    def write(self, key: str, data: bytes) -> None:
        if key.startswith("markers/"):
            self.barrier.wait(timeout=60)
        super().write(key, data)


def opened_paused(store: AtlasStore, barrier: Barrier) -> AtlasStore:
    opened = AtlasStore.open(store.url)
    opened.objects = Paused(opened.objects, barrier)
    return opened


@pytest.mark.parametrize("second", ["replaced", "restored"])
def test_of_two_replacements_at_once_one_stays_and_the_other_is_restored(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    made = [synthetic.add(store, "pt_1", seed, replace=True) for seed in range(2)]
    barrier = Barrier(2)
    stores = [opened_paused(store, barrier) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(synthetic.add, stores[0], "pt_1", seed=2, replace=True)
        if second == "replaced":
            other = threads.submit(synthetic.add, stores[1], "pt_1", seed=3, replace=True)
        else:
            other = threads.submit(stores[1].restore, "pt_1", replace=True)
        made.append(first.result())
        if second == "replaced":
            made.append(other.result())
        else:
            assert other.result().info == made[0]
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    assert store.verify(repair=True) == []
    assert store.prune(timedelta(days=1)) == []
    present = store["pt_1"].info
    assert {one.info.uuid for one in store.removed()} == {one.uuid for one in made} - {present.uuid}
    for seed, info in enumerate(made):
        if info == store["pt_1"].info:
            continue
        restored = store.restore("pt_1", version=info.uuid, replace=True)
        xr.testing.assert_equal(restored.keypoints(), synthetic.keypoints(seed=seed))
    assert store.verify(repair=True) == []


@pytest.mark.parametrize("last", ["added", "restored"])
def test_what_a_replacement_that_was_held_up_overwrites_is_restored(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    barrier = Barrier(2)
    held_up = opened_paused(store, barrier)
    with ThreadPoolExecutor(1) as threads:
        replaced = threads.submit(synthetic.add, held_up, "pt_1", seed=2, replace=True)
        while barrier.n_waiting == 0 and not replaced.done():
            time.sleep(0.01)
        store.remove("pt_1")
        if last == "added":
            info = synthetic.add(store, "pt_1", seed=3)
        else:
            info = store.restore("pt_1").info
        barrier.wait(timeout=60)
        assert replaced.result() == store["pt_1"].info
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    assert store.verify(repair=True) == []
    assert store.restore("pt_1", replace=True, version=info.uuid).info == info
    xr.testing.assert_equal(
        store["pt_1"].keypoints(), synthetic.keypoints(seed=3 if last == "added" else 1)
    )
    assert store.verify() == []


def test_what_is_removed_while_it_is_pruned_can_be_restored(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        now = datetime.now(UTC) - timedelta(days=9)
        patch.setattr(trash, "datetime", SimpleNamespace(now=lambda _: now))
        for seed in range(2):
            synthetic.add(store, "pt_1", seed, replace=True)
    is_marked = trash.is_marked

    def removed_after(*args: object, **options: object) -> bool:
        found = is_marked(*args, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(trash, "is_marked", is_marked)
        store.remove("pt_1")
        return found

    monkeypatch.setattr(trash, "is_marked", removed_after)
    store.prune(timedelta(days=8))
    xr.testing.assert_equal(store.restore("pt_1").keypoints(), synthetic.keypoints(seed=1))
    assert store.verify(repair=True) == []


def test_of_an_atlas_that_is_pruned_while_it_is_restored_the_present_one_stays(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        synthetic.add(store, "pt_1", seed=seed, replace=True)
    write = Objects.write

    def pruned_before(objects: Objects, key: str, data: bytes) -> None:
        if key.startswith("markers/"):
            monkeypatch.setattr(Objects, "write", write)
            AtlasStore.open(store.url).prune()
        write(objects, key, data)

    monkeypatch.setattr(Objects, "write", pruned_before)
    with pytest.raises(AtlasNotFoundError, match="no removed atlas 'pt_1'"):
        store.restore("pt_1", replace=True)
    xr.testing.assert_equal(store["pt_1"].keypoints(), synthetic.keypoints(seed=2))
    assert store.verify() == []
