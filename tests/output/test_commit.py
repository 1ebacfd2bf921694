"""Outputs appear whole, together, or not at all; what killed runs leave is swept."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from threading import Thread

import pytest
import zarr
from distributed import Client

from kpt_dask.errors import OutputExistsError, OutputVanishedError
from kpt_dask.output import commit, partial
from kpt_dask.output.commit import replacing, replacing_together, sweep

OWN = json.dumps({"attributes": {"encoding-type": "kpt-volume"}})


def write(folder: Path, content: str) -> None:
    (folder / "0").mkdir(parents=True)
    (folder / "zarr.json").write_text(OWN)
    (folder / "0" / "c").write_text(content)


def both(place: Path) -> tuple[str, str]:
    return (place / "o.zarr" / "0" / "c").read_text(), (place / "o.nii.gz").read_text()


def run(place: Path, content: str) -> None:
    with replacing_together([place / "o.zarr", place / "o.nii.gz"], overwrite=True) as [out, file]:
        write(out, content)
        file.write_text(content)


def names(place: Path) -> list[str]:
    return sorted(os.listdir(place))


@pytest.fixture(params=["exchange", "aside"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, on a file system that can exchange, or on one that cannot."""
    if request.param == "aside":
        monkeypatch.setattr(commit, "_exchange", lambda *_: False)
    return tmp_path


def test_both_are_replaced(place: Path) -> None:
    for content in ("old", "new", "newest"):
        run(place, content)
        assert both(place) == (content, content)
        assert names(place) == ["o.nii.gz", "o.zarr"]


def test_a_failure_leaves_everything_as_it_was(place: Path) -> None:
    def fail() -> None:
        targets = [place / "deep/er/o.zarr", place / "far/o.nii.gz"]
        with replacing_together(targets) as [out, file]:
            write(out, "new")
            file.write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(place) == []


def test_a_signal_while_a_lock_is_made_leaves_no_lock(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(partial.Partial):
        def __init__(self, target: Path) -> None:
            super().__init__(target)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commit, "Partial", Interrupted)
    # Libraries that other tests import set handlers of their own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(place, "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(place) == []


def test_links_stay_and_what_they_lead_to_is_written(place: Path) -> None:
    (place / "disk").mkdir()
    (place / "o.zarr").symlink_to("disk/real.zarr")
    (place / "o.nii.gz").symlink_to("disk/real.nii.gz")
    for content in ("old", "new"):
        run(place, content)
        assert both(place) == (content, content)
    assert (place / "o.zarr").is_symlink()
    assert (place / "o.nii.gz").is_symlink()
    assert names(place / "disk") == ["real.nii.gz", "real.zarr"]


@pytest.mark.parametrize(
    "name", [b"x" * 250 + b".zarr", b"M\xfcller.zarr", b"two\nlines.zarr", b"y" * 248 + b".nii.gz"]
)
def test_any_name_can_be_written(place: Path, name: bytes) -> None:
    target = place / os.fsdecode(name)
    for _ in range(2):
        with replacing(target, overwrite=True) as path:
            path.write_text("new") if name.endswith(b".gz") else write(path, "new")
        assert os.listdir(os.fsencode(place)) == [name]


def test_what_is_deleted_meanwhile_is_told(place: Path) -> None:
    run(place, "old")
    with (
        pytest.raises(OutputVanishedError, match="something deleted it"),
        replacing_together([place / "o.zarr", place / "o.nii.gz"], overwrite=True) as [out, _],
    ):
        write(out, "new")
    assert both(place) == ("old", "old")
    assert names(place) == ["o.nii.gz", "o.zarr"]


def test_what_appears_meanwhile_is_not_replaced(place: Path) -> None:
    def run() -> None:
        with replacing(place / "o.zarr") as out:
            write(out, "ours")
            write(place / "o.zarr", "theirs")

    with pytest.raises(OutputExistsError, match="exists already"):
        run()
    assert (place / "o.zarr" / "0" / "c").read_text() == "theirs"


def test_if_one_cannot_be_moved_none_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "old")
    move = commit._move

    def full(what: dict[str, str]) -> None:
        if what["to"].endswith(".gz"):
            raise OSError(28, "No space left on device")
        move(what)

    monkeypatch.setattr(commit, "_move", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, "new")
    assert both(tmp_path) == ("old", "old")
    assert names(tmp_path) == ["o.nii.gz", "o.zarr"]


KILLED = """
import os, signal, sys
from pathlib import Path
from kpt_dask.output import commit
from kpt_dask.output.commit import replacing_together, sweep

place, exchange = Path(sys.argv[1]), sys.argv[2]
if exchange == "aside":
    commit._exchange = lambda *_: False
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym"}

def run(content, point):
    calls = 0

    def watched(event, arguments):
        nonlocal calls
        if event in EVENTS:
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)

    with replacing_together([place / "o.zarr", place / "o.nii.gz"], overwrite=True) as [out, file]:
        (out / "0").mkdir(parents=True)
        (out / "zarr.json").write_text('{"attributes": {"encoding-type": "kpt-volume"}}')
        (out / "0" / "c").write_text(content)
        file.write_text(content)
        sys.addaudithook(watched)

def now():
    return (place / "o.zarr" / "0" / "c").read_text(), (place / "o.nii.gz").read_text()

run("0", -1)
seen, code, point = set(), None, 0
while code != 0:
    point += 1
    before = now()[0]
    child = os.fork()
    if child == 0:
        run(str(point), point)
        os._exit(0)
    code = os.waitpid(child, 0)[1]
    assert code in (0, signal.SIGKILL)
    sweep(place)
    labels, volume = now()
    assert labels == volume and labels in (before, str(point)), (point, before, labels, volume)
    assert sorted(os.listdir(place)) == ["o.nii.gz", "o.zarr"], (point, os.listdir(place))
    seen.add(labels == before)
assert seen == {True, False}
"""


@pytest.mark.parametrize("how", ["exchange", "aside"])
def test_killed_at_any_point_the_next_run_finds_both_old_or_both_new(
    tmp_path: Path, how: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_what_a_living_run_writes_is_not_swept(tmp_path: Path) -> None:
    with replacing(tmp_path / "o.zarr") as out:
        write(out, "new")
        run(tmp_path, "other")
        sweep(tmp_path)
        assert (out / "0" / "c").read_text() == "new"
        partial.remove(tmp_path / "o.zarr")
    assert both(tmp_path)[0] == "new"


def foreign(lock: Path) -> None:
    line = {**partial.ENCODING, "host": "another", "boot": "another", "pid": 1, "locked": True}
    lock.write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    ("say", "days", "swept"),
    [
        (foreign, 1.0, False),
        (foreign, 8.0, True),
        (lambda lock: lock.write_text(""), 0.0, False),
        (lambda lock: lock.write_text(""), 1.0, True),
        (lambda lock: lock.write_text("a thesis\n"), 100.0, False),
        (lambda lock: lock.write_text("{}\n"), 100.0, False),
    ],
)
def test_only_what_is_surely_abandoned_is_swept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    say: Callable[[Path], object],
    days: float,
    swept: bool,
) -> None:
    monkeypatch.setattr(partial, "_LOCAL", frozenset())
    lock = tmp_path / f".kpt-{1:016x}.lock"
    say(lock)
    write(tmp_path / f".kpt-{1:016x}.partial.zarr", "unfinished")
    write(tmp_path / ".kpt-2.partial.zarr", "somebody's")
    then = time.time() - 86400 * days
    os.utime(lock, (then, then))
    sweep(tmp_path)
    left = names(tmp_path)
    assert ".kpt-2.partial.zarr" in left
    assert len(left) == (1 if swept else 3)


def killed(folder: Path, **changed: object) -> Path:
    """Leave what a run leaves that is killed before its first move; return its lock."""
    new, target = folder / f".kpt-{1:016x}.partial.zarr", folder / "o.zarr"
    write(new, "new")
    move = {
        "from": str(new),
        "to": str(target),
        "aside": str(new.with_suffix("").with_suffix(".replaced")),
        "new": commit._identity(new),
        "old": commit._identity(target),
        **changed,
    }
    lock = folder / f".kpt-{1:016x}.lock"
    about = {**partial.ENCODING, **partial.machine(), "pid": 1, "locked": True, "target": "o.zarr"}
    lock.write_text(f"{json.dumps(about)}\n{json.dumps({'moves': [move]})}\n")
    return lock


def test_what_was_begun_is_finished(tmp_path: Path) -> None:
    killed(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == ["o.zarr"]


def test_what_another_user_left_is_neither_trusted_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path)
    (tmp_path / partial._TURN.format(os.geteuid() + 1)).touch()
    before = names(tmp_path)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    sweep(tmp_path)
    assert names(tmp_path) == before
    with replacing(tmp_path / "p.zarr") as out:
        write(out, "new")
    assert names(tmp_path) == sorted([*before, "p.zarr"])


@pytest.mark.parametrize("end", ["from", "to", "aside"])
def test_a_lock_moves_nothing_in_other_folders(tmp_path: Path, end: str) -> None:
    shared, home = tmp_path / "shared", tmp_path / "home"
    for folder in (shared, home):
        folder.mkdir()
    (home / "thesis").write_text("mine")
    (home / ".kpt-thesis").write_text("mine")
    identities = {
        "from": {"new": commit._identity(home / "thesis")},
        "to": {"old": commit._identity(home / "thesis")},
        "aside": {"old": commit._identity(home / "thesis")},
    }
    killed(shared, **{end: str(home / "thesis")}, **identities[end])
    sweep(shared)
    assert names(home) == [".kpt-thesis", "thesis"]
    assert (home / "thesis").read_text() == "mine"
    assert names(shared) == []


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_has_the_name_of_a_lock_and_is_none_stays(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / f".kpt-{1:016x}.lock"
    victim = tmp_path / "victim"
    if kind == "pipe":
        os.mkfifo(lock)
        os.mkfifo(tmp_path / partial._TURN.format(os.geteuid()))
    elif kind == "link":
        lock.symlink_to(victim)
        (tmp_path / partial._TURN.format(os.geteuid())).symlink_to(victim)
    else:
        lock.mkdir()
        (tmp_path / partial._TURN.format(os.geteuid())).mkdir()
    before = names(tmp_path)
    run(tmp_path, "new")
    assert names(tmp_path) == sorted([*before, "o.nii.gz", "o.zarr"])


def test_a_partial_output_that_became_a_link_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "theirs")

    def run() -> None:
        with replacing(tmp_path / "o.zarr") as out:
            out.symlink_to("theirs")

    with pytest.raises(OutputVanishedError):
        run()
    assert names(tmp_path) == ["theirs"]


def test_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    threads = [
        Thread(target=lambda n=n: [run(tmp_path, str(n)) for _ in range(10)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.001)
    assert len(set(both(tmp_path))) == 1
    assert names(tmp_path) == ["o.nii.gz", "o.zarr"]


def test_a_folder_that_is_written_to_is_removed(tmp_path: Path) -> None:
    """By threads that an interruption does not reach."""
    folder = tmp_path / "partial"
    folder.mkdir()

    def scribble() -> None:
        for i in chain(range(300)):
            try:
                (folder / str(i)).touch()
            except FileNotFoundError:
                return

    thread = Thread(target=scribble)
    thread.start()
    partial.remove(folder)
    thread.join()
    assert not folder.exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_the_removing_is_done(tmp_path: Path, signum: int) -> None:
    script = f"""
import os, signal, sys
from kpt_dask.output import partial
from kpt_dask.output.commit import replacing

remove = partial.remove
def slowly(path):
    os.kill(os.getpid(), {signum})
    remove(path)
partial.remove = slowly
with replacing(sys.argv[1]) as path:
    path.mkdir()
    (path / "half").touch()
    raise ZeroDivisionError
"""
    command = [sys.executable, "-c", script, str(tmp_path / "o.zarr")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signum, ended.stderr
    assert names(tmp_path) == []


@pytest.mark.parametrize(("umask", "of_worker"), [(0o022, 0o077), (0o077, 0o022)])
def test_all_of_an_output_has_the_permissions_of_who_asked_for_it(
    tmp_path: Path, two_processes: Client, umask: int, of_worker: int
) -> None:
    (tmp_path / "mine").write_text("elsewhere")
    (tmp_path / "mine").chmod(0o640)
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "out.zarr") as new:
            zarr.create_group(str(new), attributes={"encoding-type": "kpt-volume"})
            two_processes.submit(write_with_umask, new, of_worker).result()
            (new / "link").symlink_to(tmp_path / "mine")
    finally:
        os.umask(before)
    for path in (tmp_path / "out.zarr").rglob("*"):
        if not path.is_symlink():
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o640


def write_with_umask(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (folder / "0" / "c").mkdir(parents=True)
        (folder / "0" / "c" / "0").write_text("a chunk")
    finally:
        os.umask(before)
