"""Workers that do not see what the client sees, or are of another version."""

import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import dask.config
import pytest
import zarr
from distributed import Client, LocalCluster, Nanny

from atlas_store.storage.objects import Objects
from kpt_dask.errors import ClusterError
from kpt_dask.runtime import cluster, connect, witness


@pytest.fixture(scope="module")
def processes() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as two,
        Client(two, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def group(tmp_path: Path) -> zarr.Group:
    return zarr.create_group(str(tmp_path / "out"), zarr_format=3)


def hide(folder: Path) -> None:
    """Let a worker see nothing of a folder, as if it were on another machine."""
    read = Objects.read
    Objects.read = lambda self, key: (  # type: ignore[method-assign]
        None if str(folder) in str(self.store) else read(self, key)
    )


def reveal() -> None:
    from importlib import reload

    from atlas_store.storage import objects

    Objects.read = reload(objects).Objects.read  # type: ignore[method-assign]


def test_workers_that_see_everything_leave_nothing(
    processes: Client, group: zarr.Group, tmp_path: Path
) -> None:
    (tmp_path / "input").write_text("as it is")
    with witness.shared(processes, group, [(Objects.at(tmp_path), "input")]):
        assert dict(cluster.run(processes, operator.add, [(1, 2)], "Adding")) == {0: 3}
        assert len(list((tmp_path / "out" / witness.FOLDER).iterdir())) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["zarr.json"]


def test_one_blind_worker_of_two_ends_the_run(
    processes: Client, group: zarr.Group, tmp_path: Path
) -> None:
    blind = next(iter(processes.nthreads()))
    processes.run(hide, tmp_path, workers=[blind])
    try:
        expected = rf"^The worker {blind} .* does not see .*out/\.kpt-witness"
        with pytest.raises(ClusterError, match=expected), witness.shared(processes, group):
            pass
    finally:
        processes.run(reveal, workers=[blind])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["zarr.json"]


def test_a_blind_worker_that_joins_later_ends_the_run(
    processes: Client, group: zarr.Group, tmp_path: Path
) -> None:
    """Its first task refuses; what the others did is not lost on it in silence."""
    with witness.shared(processes, group):
        proof = witness.current()
        assert proof is not None
        late = replace(proof, token="of another run")
        token = witness._current.set(late)
        try:
            with pytest.raises(ClusterError, match=r"does not see .*out/\.kpt-witness"):
                list(cluster.run(processes, operator.add, [(1, 2)], "Adding"))
        finally:
            witness._current.reset(token)


def test_another_input_is_named(processes: Client, group: zarr.Group, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "zarr.json").write_text("one")
    processes.run(hide, store)
    try:
        with (
            pytest.raises(ClusterError, match=r"does not see .*store/zarr\.json as it is here"),
            witness.shared(processes, group, [(Objects.at(store), "zarr.json")]),
        ):
            pass
    finally:
        processes.run(reveal)


def test_a_folder_that_cannot_be_written_is_named(
    processes: Client, group: zarr.Group, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    def forbid() -> None:
        witness._leave = refuse

    def allow() -> None:
        from importlib import reload

        reload(witness)

    processes.run(forbid)
    try:
        expected = r"cannot write to .*out.* \(Permission denied\)"
        with pytest.raises(ClusterError, match=expected), witness.shared(processes, group):
            pass
    finally:
        processes.run(allow)


def test_other_versions_are_named(
    processes: Client, group: zarr.Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**witness.versions(), "numba": "0.1"}
    monkeypatch.setattr(witness, "versions", lambda: other)
    with (
        pytest.raises(ClusterError, match=r"has numba \S+ instead of 0\.1: give all"),
        witness.shared(processes, group),
    ):
        pass


def test_a_worker_without_the_packages_is_named(group: zarr.Group, tmp_path: Path) -> None:
    """Python finds no kpt_dask there: the folder of this one is hidden from it."""
    hidden = "import sys; sys.modules['kpt_dask'] = None"
    (tmp_path / "preload.py").write_text(f"{hidden}\nasync def dask_setup(_): pass\n")
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            worker_class=Nanny,
            preload=str(tmp_path / "preload.py"),
        ) as bare,
        Client(bare, set_as_default=False) as client,
        pytest.raises(ClusterError, match=r"^The worker \S+ lacks the package kpt_dask"),
        witness.shared(client, group),
    ):
        pass


def test_relative_paths_go_to_workers_in_other_folders(
    processes: Client, bodies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpt_dask import convert, open_scan

    monkeypatch.chdir(tmp_path)
    shutil.copy(bodies / "body_1_ct.nii.gz", "scan.nii.gz")
    scan = open_scan("scan.nii.gz")
    there = convert(scan, "there.zarr", spacing=8, client=processes)
    with cluster.local(1) as own:
        here = convert(scan, "here.zarr", spacing=8, client=own)
    for ours, theirs in zip(here.levels, there.levels, strict=True):
        assert (ours[:] == theirs[:]).all()
    assert here.levels[-1][:].any()
    assert not (Path(os.sep) / "there.zarr").exists()


def test_a_fork_is_refused_with_a_sentence() -> None:
    """Locks and threads of Dask do not survive it: work would hang."""
    code = """
import multiprocessing, operator
from kpt_dask.errors import ClusterError
from kpt_dask.runtime import cluster

def work():
    with cluster.session() as client:
        return dict(cluster.run(client, operator.add, [(1, 2)], "Adding"))

def child(answers):
    try:
        answers.put(str(work()))
    except ClusterError as error:
        answers.put(str(error))

assert work() == {0: 3}
fork = multiprocessing.get_context("fork")
answers = fork.SimpleQueue()
process = fork.Process(target=child, args=(answers,))
process.start()
process.join(60)
print(process.exitcode, answers.get())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.stdout.startswith("0 This process was forked"), done.stderr
    assert "'spawn'" in done.stdout


def test_the_current_folder_of_settings_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's settings are the user's again once a session has ended."""
    # Sessions of other tests may be open.
    monkeypatch.setattr(connect._Settings, "sessions", 0)
    monkeypatch.setattr(connect._Settings, "stack", ExitStack())
    with dask.config.set({"distributed.worker.memory.pause": 0.123}):
        with cluster.local(1):
            assert dask.config.get("distributed.worker.memory.pause") != 0.123
            with cluster.local(1):
                pass
            assert dask.config.get("distributed.worker.memory.pause") != 0.123
        assert dask.config.get("distributed.worker.memory.pause") == 0.123
