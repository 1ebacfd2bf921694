"""What is damaged is named, what was interrupted is invisible and can be removed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atlas_store
from atlas_store import AtlasKeypoints, AtlasStore, AtlasStoreError, StoreFormatError, draft, verify
from atlas_store.storage.objects import Objects
from atlas_store.verify import verify_store


class Adders:
    """Processes that add atlases to a store."""

    def __init__(self, program: Path, store: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(atlas_store.__file__).parents[1])}
        self.server = subprocess.Popen(
            [sys.executable, program, store],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def start(self, *ids: str) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(" ".join(ids) + "\n")
        self.server.stdin.flush()


@pytest.fixture
def adders(store: AtlasStore, synthetic: SimpleNamespace) -> Iterator[Adders]:
    adders = Adders(synthetic.path, store.url)
    yield adders
    adders.server.communicate()


def test_four_processes_add_at_once(store: AtlasStore, adders: Adders) -> None:
    for process in range(4):
        adders.start(*(f"pt_{process}_{n}" for n in range(2)), "shared")
    seen: list[str] = []
    while seen.count("done") < 4:
        seen.append(adders.read())
    added = {line.removeprefix("added ") for line in seen if line.startswith("added ")}
    assert added == {*(f"pt_{process}_{n}" for process in range(4) for n in range(2)), "shared"}
    assert seen.count("added shared") == 1
    assert seen.count("refused shared") == 3
    assert set(store) == added
    assert store.verify() == []


def wait_for_end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(process, 0)
            time.sleep(0.01)


def test_a_running_add_is_no_problem_and_is_never_repaired_away(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    with store.draft("pt_1", synthetic.PARAMETERS) as draft:
        synthetic.fill(draft)
        assert store.verify(repair=True) == []
        synthetic.commit(draft)
    assert store.verify() == []


@pytest.mark.parametrize("age", [timedelta(hours=25), timedelta(days=-400)])
def test_a_running_add_of_this_machine_is_kept_whatever_the_clock_says(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, age: timedelta
) -> None:
    with store.draft("pt_1", synthetic.PARAMETERS) as draft:
        synthetic.fill(draft)
        with monkeypatch.context() as patch:
            now = datetime.now(UTC) + age
            patch.setattr(verify, "datetime", SimpleNamespace(now=lambda _: now))
            assert store.verify(repair=True) == []
        synthetic.commit(draft)
    assert store.verify() == []


@pytest.mark.parametrize(
    ("attributes", "abandoned"),
    [
        ({"started": timedelta(hours=-23), "machine": "another", "process": 1}, False),
        ({"started": timedelta(hours=-25), "machine": "another", "process": 1}, True),
        ({"started": timedelta(hours=-25), "process": os.getpid()}, True),
        ({"machine": "another"}, True),
    ],
)
def test_an_add_of_another_machine_counts_as_interrupted_after_a_day(
    store: AtlasStore, synthetic: SimpleNamespace, attributes: dict[str, object], abandoned: bool
) -> None:
    folder = Path(store.url, "atlases", f"pt_1.{'0' * 32}")
    folder.mkdir()
    if "started" in attributes:
        attributes = attributes | {
            "started": (datetime.now(UTC) + attributes["started"]).isoformat()
        }
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (folder / "zarr.json").write_text(json.dumps(document))
    problems = store.verify(repair=True)
    assert [problem.repaired for problem in problems] == [True] * abandoned
    assert folder.exists() != abandoned


class Outdated(Objects):
    """A place whose markers were listed just before an add committed and ended."""

    def names(self, folder: str) -> list[str]:
        return [] if folder == "markers" else super().names(folder)


def test_an_add_that_commits_and_ends_meanwhile_is_not_repaired_away(
    store: AtlasStore, adders: Adders
) -> None:
    adders.start("pt_1")
    process = int(adders.read().removeprefix("started "))
    while adders.read() != "done":
        pass
    wait_for_end(process)
    outdated = Outdated(store.objects.store, store.url)
    assert verify_store(outdated, store.organs, store.parameters, repair=True) == []
    assert store.verify() == []
    assert store.ids() == ["pt_1"]


def test_what_is_left_without_a_description_is_removed(store: AtlasStore) -> None:
    folder = Path(store.url, "atlases", f"pt_1.{'0' * 32}")
    folder.mkdir()
    # Zarr writes the description of the folder of all atlases with each.
    names = "markers/pt_1.0123.partial", f"atlases/zarr.{'1' * 32}.partial"
    partials = [Path(store.url, name) for name in names]
    for partial in partials:
        partial.parent.mkdir(exist_ok=True)
        partial.write_text("{")
    assert len(store) == 0
    problems = store.verify(repair=True)
    assert [problem.repaired for problem in problems] == [True, True, True]
    assert not any(path.exists() for path in (folder, *partials))


def test_a_stranger_among_the_markers_is_named_and_left_alone(store: AtlasStore) -> None:
    stranger = Path(store.url, "markers", "notes.txt")
    stranger.parent.mkdir()
    stranger.write_text("do not lose this")
    assert len(store) == 0
    (problem,) = store.verify(repair=True)
    assert str(problem).endswith("notes.txt is no marker of an atlas: delete it.")
    assert stranger.exists()


def test_a_damaged_marker_does_not_cost_the_data(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1")
    marker = Path(store.url, "markers", "pt_1.json")
    whole = marker.read_bytes()
    marker.write_bytes(whole.replace(b'"keypoints":40', b'"keypoints":41'))
    (problem,) = store.verify(repair=True)
    assert problem.atlas == "pt_1"
    assert "its checksum does not fit" in problem.what
    marker.write_bytes(whole)
    assert store.verify() == []


def test_an_organ_table_or_parameters_changed_later_are_noticed(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1")
    path = Path(store.url, "zarr.json")
    text = path.read_text()
    path.write_text(text.replace('"nu": 300', '"nu": 301').replace('"levels": 3', '"levels": 4'))
    (table, parameters) = AtlasStore.open(store.url).verify()
    assert "made with another organ table" in table.what
    assert "extraction.levels is 4 in the store and 3 here" in parameters.what


def test_a_changed_description_of_the_data_is_named(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1")
    path = Path(store.url, store["pt_1"].path, "zarr.json")
    path.write_text(path.read_text().replace('"process"', '"prosess"'))
    (problem,) = store.verify()
    assert problem.what == f"{path} is damaged"


def test_a_missing_or_additional_object_is_named(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1")
    data = Path(store.url, store["pt_1"].path)
    (data / "image" / "0" / "c" / "1" / "0" / "0").unlink()
    (data / "image" / "1").mkdir()
    (data / "image" / "1" / "zarr.json").write_text("{}")
    missing, additional = store.verify()
    assert missing.what.endswith("image/0 has 1 object(s) that are missing")
    assert additional.what.endswith("zarr.json has 1 object(s) that are not part of what was added")


@given(data=st.data())
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_changed_byte_is_detected(
    store: AtlasStore, synthetic: SimpleNamespace, data: st.DataObject
) -> None:
    if "pt_1" not in store:
        synthetic.add(store, "pt_1")
    root = Path(store.url)
    files = sorted(
        p for p in root.rglob("*") if p.is_file() and p.parent not in (root, root / "atlases")
    )
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(changed)
        problems = store.verify(repair=True)
    finally:
        file.write_bytes(whole)
    assert {problem.atlas for problem in problems} == {"pt_1"}
    if "image" in file.parts:
        array = file.relative_to(root / store["pt_1"].path).as_posix().partition("/c/")[0]
        assert any(array in problem.what for problem in problems)
    assert store.verify() == []


class Reader(Thread):
    """Reads an atlas in another thread, so that a read that waits for ever is noticed."""

    def __init__(self, store: AtlasStore) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.read: tuple[object, ...] | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            atlas = AtlasStore.open(self.store.url)["pt_1"]
            keypoints = {name: a.tobytes() for name, a in atlas.keypoint_arrays().items()}
            image = atlas.image["0"]
            assert isinstance(image, zarr.Array)
            self.read = keypoints, atlas.labels[...].tobytes(), np.asarray(image[...]).tobytes()
        except Exception as error:
            self.error = error

    @classmethod
    def of(cls, store: AtlasStore) -> "Reader":
        reader = cls(store)
        reader.start()
        reader.join(timeout=60)
        assert not reader.is_alive(), "reading waits for ever"
        return reader


@given(data=st.data())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_changed_byte_is_read_in_silence(
    store: AtlasStore, synthetic: SimpleNamespace, data: st.DataObject
) -> None:
    if "pt_1" not in store:
        synthetic.add(store, "pt_1")
    whole = Reader.of(store)
    assert whole.error is None
    file = data.draw(st.sampled_from(sorted(p for p in Path(store.url).rglob("*") if p.is_file())))
    before = file.read_bytes()
    changed = bytearray(before)
    changed[data.draw(st.integers(0, len(before) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(changed)
        found = Reader.of(store)
    finally:
        file.write_bytes(before)
    if found.error is None:
        assert found.read == whole.read
        # A description that no reader of the voxels asks for.
        assert file.name == "zarr.json"
    else:
        assert isinstance(found.error, AtlasStoreError)
        assert "pt_1" in str(found.error) or "zarr.json" in str(found.error)


def test_swapped_names_of_organs_are_refused(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    synthetic.add(store, "pt_1")
    path = Path(store.url, "zarr.json")
    text = path.read_text()
    swapped = text.replace('"brainstem"', '"?"').replace('"mandible"', '"brainstem"')
    path.write_text(swapped.replace('"?"', '"mandible"'))
    opened = AtlasStore.open(store.url)
    for read in (lambda: opened["pt_1"], opened.atlases, lambda: AtlasKeypoints.load(opened)):
        with pytest.raises(StoreFormatError, match=r"pt_1\.json names another organ table"):
            read()
    path.write_text(text.replace('"levels": 3', '"levels": 4'))
    with pytest.raises(StoreFormatError, match="levels is 4 in the store and 3 here"):
        _ = AtlasStore.open(store.url)["pt_1"]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "loop", "folder"])
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
def test_what_is_no_file_is_refused_at_once(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
) -> None:
    synthetic.add(store, "pt_1")
    path = Path(store.url, name.format(data=store["pt_1"].path))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        # The path of a socket must be short.
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    error = Reader.of(store).error
    assert isinstance(error, AtlasStoreError)
    if name not in ("zarr.json", "markers/pt_1.json"):
        assert {problem.atlas for problem in store.verify()} == {"pt_1"}


def test_notes_that_nobody_needs_are_removed_and_others_kept(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    for name in ("pt_1", "pt_2", "pt_3"):
        synthetic.add(store, name)
        store.set_note(name, f"about {name}")
    store.remove("pt_2")
    folder = Path(store.url, "notes")
    left = [folder / f"pt_3.{'0' * 32}.json", folder / "pt_3.0123.partial"]
    left.append(Path(store.url, "removed", "pt_3.0123.partial"))
    for path in left:
        path.write_text("{")
    # Its data is lost, and somebody may bring it back from a copy.
    data = Path(store.url, store["pt_3"].path)
    data.rename(data.with_name("away"))
    problems = store.verify(repair=True)
    assert {str(path) for path in left} == {p.what.split(" was left")[0] for p in problems[1:]}
    assert [problem.repaired for problem in problems] == [False, True, True, True]
    assert not any(path.exists() for path in left)
    data.with_name("away").rename(data)
    assert store.verify() == []
    store.restore("pt_2")
    assert [store.note(name) for name in store] == [f"about {name}" for name in store]


def test_a_damaged_note_is_named(store: AtlasStore, synthetic: SimpleNamespace) -> None:
    synthetic.add(store, "pt_1")
    store.set_note("pt_1", "read twice")
    (path,) = Path(store.url, "notes").iterdir()
    path.write_text(path.read_text().replace('"note"', '"nose"'))
    (problem,) = store.verify(repair=True)
    expected = f"atlas 'pt_1': {path} is damaged (it holds no note): write the note again."
    assert str(problem) == expected
    store.set_note("pt_1", "read twice")
    assert store.verify() == []


def test_what_was_removed_is_verified_while_it_can_be_restored(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    for name in ("pt_1", "pt_2"):
        synthetic.add(store, name)
    data = Path(store.url, store["pt_1"].path)
    for name in ("pt_1", "pt_2"):
        store.remove(name)
    assert store.verify() == []
    (data / "image" / "0" / "c" / "1" / "0" / "0").unlink()
    entry = next(Path(store.url, "removed").glob("pt_2.*"))
    entry.write_text(entry.read_text().replace("pt_1_ct", "pt_9_ct"))
    missing, damaged = store.verify(repair=True)
    assert (missing.atlas, damaged.atlas) == ("pt_1", "pt_2")
    assert missing.what.startswith("it was removed, and ")
    assert missing.what.endswith("image/0 has 1 object(s) that are missing")
    assert str(entry) in damaged.what
    assert [missing.repaired, damaged.repaired] == [False, False]


def test_complete_data_whose_marker_is_lost_is_named_and_never_deleted(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pt_1", "pt_2", "pt_3"):
        synthetic.add(store, name)
    store.remove("pt_3")
    assert store.without_marker() == []
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    markers = Path(store.url, "markers")
    markers.rename(markers.with_name("away"))
    assert store.without_marker() == ["pt_1", "pt_2"]
    problems = store.verify(repair=True)
    assert [(problem.atlas, problem.repaired) for problem in problems] == [
        ("pt_1", False),
        ("pt_2", False),
    ]
    assert " is complete and has no marker: restore markers/pt_1.json" in str(problems[0])
    synthetic.add(store, "pt_1")
    # The old data is needed no more.
    (left, lost) = store.verify(repair=True)
    assert (left.atlas, left.repaired) == ("pt_1", True)
    assert (lost.atlas, lost.repaired) == ("pt_2", False)
    markers.with_name("away").joinpath("pt_2.json").rename(markers / "pt_2.json")
    assert store.without_marker() == []
    assert store.verify() == []


@pytest.mark.parametrize("part", ["markers/pt_1.json", "{data}/image/0/c/1/0/0"])
def test_what_the_disk_does_not_let_be_read_is_named_and_the_others_are_verified(
    store: AtlasStore,
    synthetic: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    for name in ("pt_1", "pt_2"):
        synthetic.add(store, name)
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    path = Path(store.url, part.format(data=store["pt_1"].path))
    away = path.rename(tmp_path / "away")
    # Whoever tests may read all: a link that no system call follows.
    path.symlink_to("x" * 300)
    Path(store.url, store["pt_2"].path, "image/0/c/1/0/0").unlink()
    unread, missing = store.verify(repair=True)
    assert (unread.atlas, unread.repaired, missing.atlas) == ("pt_1", False, "pt_2")
    assert unread.what == f"{path} cannot be read (File name too long)"
    away.rename(path)
    assert [problem.atlas for problem in store.verify(repair=True)] == ["pt_2"]


def test_a_lost_marker_of_an_atlas_that_replaced_another_is_named_and_restored(
    store: AtlasStore, synthetic: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "_is_running", lambda _: False)
    for seed in range(2):
        info = synthetic.add(store, "pt_1", seed, replace=True)
    marker = Path(store.url, "markers", "pt_1.json")
    marker.unlink()
    assert store.without_marker() == ["pt_1"]
    (problem,) = store.verify(repair=True)
    assert str(problem) == f"atlas 'pt_1': {marker} is missing: restore the atlas."
    assert store.restore("pt_1", version=info.uuid).info == info
    assert store.verify() == []
    store.remove("pt_1")
    assert (store.without_marker(), store.verify()) == ([], [])


def test_data_is_kept_if_a_marker_of_an_older_copy_names_what_is_not_there(
    store: AtlasStore, synthetic: SimpleNamespace, adders: Adders
) -> None:
    adders.start("pt_1")
    process = int(adders.read().removeprefix("started "))
    wait_for_end(process)
    marker = Path(store.url, "markers", "pt_1.json")
    marker.write_bytes(replace(store["pt_1"].info, uuid="0" * 32).dump())
    missing, kept = store.verify(repair=True)
    assert missing.what == "its data is missing"
    assert "is complete and has no marker" in kept.what
    assert not kept.repaired


def test_a_marker_that_counts_other_voxels_than_its_label_map_has_is_named(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    info = synthetic.add(store, "pt_1")
    organs = {name: replace(one, voxels=one.voxels - 1) for name, one in info.organs.items()}
    Path(store.url, "markers", "pt_1.json").write_bytes(replace(info, organs=organs).dump())
    (problem,) = store.verify()
    assert problem.what == "its marker counts other voxels of organs than its label map has"
