"""Partial outputs: temporary names beside a target, and leftovers of killed runs under such names.

A partial output is ``.kpt-<id>.partial`` in the folder of its target. Beside it lies
``.kpt-<id>.lock``, a file locked as long as the run lives, which names the target. The next run
that writes to the folder removes partial outputs whose lock is free; a file without a lock beside
it is not this program's. In a folder that users share, each user's runs trust and remove only files
of that user.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from kpt_dask.output.interruption import uninterrupted

ENCODING = {"encoding-type": "kpt-partial", "encoding-version": "1"}

NAME = re.compile(r"\.kpt-[0-9a-f]{16}\.lock")

FOREIGN_DAYS = 7.0
"""Age after which the lock of another machine counts as abandoned, on file systems that may not
share locks between machines. No run takes so long."""
UNWRITTEN_SECONDS = 60.0
"""Age after which an empty lock counts as abandoned: its run was killed while making it."""

_TURN = ".kpt-turn-{}.lock"
"""Lock held while outputs are moved to their targets; waiters check that it was not removed. One
per user, because another user could hold a shared one for ever."""
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs"})
"""File systems of one machine: a lock that can be taken there is free."""
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
_ENDING_LENGTH = 32


class Partial:
    """A temporary name for one output, beside its target, and its lock.

    Parameters
    ----------
    target : Path
        Target from `kpt_dask.output.places.target_of`. Its folder is made if it is missing.

    Attributes
    ----------
    path : Path
        Path to write to; it does not exist yet.
    lock : Path
        Lock that describes `path`.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._made = _make_folder(target.parent)
        try:
            self._file, self.lock = _new_lock(target.parent, {"target": target.name})
        except BaseException:
            _remove_folders(self._made)
            raise
        self.path = self.lock.with_name(self.lock.stem + ".partial" + _ending(target.name))

    def note(self, line: dict[str, Any]) -> None:
        """Append a line to the lock, and sync it."""
        os.write(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file)

    def close(self, *, failed: bool) -> None:
        """Remove partial output and lock; after a failure, also the folders made for them."""
        with uninterrupted():
            try:
                remove(self.path)
                self.lock.unlink(missing_ok=True)
                if failed:
                    _remove_folders(self._made)
            finally:
                os.close(self._file)


class Turn:
    """A lock: only one process of a user at a time moves outputs to their targets in a folder.

    Parameters
    ----------
    folder : Path
        Folder of the targets.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _TURN.format(os.geteuid())
        self._file: int | None = None
        while self._file is None:
            try:
                file = os.open(self._path, _OPEN | os.O_CREAT, 0o666)
            except OSError:
                # A file of somebody else, or a link: work without a lock.
                return
            if not _is_own(file):
                os.close(file)
                return
            _lock(file, wait=True)
            if _is_at(file, self._path):
                self._file = file
            else:
                os.close(file)

    @staticmethod
    def forget(folder: Path) -> None:
        """Remove the lock of a killed process."""
        if (folder / _TURN.format(os.geteuid())).exists():
            Turn(folder).end()

    def end(self) -> None:
        """Remove and release the lock."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)


def abandoned(folder: Path) -> list[tuple[Path, int, list[dict[str, Any]]]]:
    """Find this user's locks in a folder whose runs have ended without removing them.

    Returns
    -------
    list of (Path, int, list of dict)
        Path of the lock; its descriptor, locked, which the caller closes; and its lines.
    """
    locks = []
    for name in _names(folder):
        if not NAME.fullmatch(name):
            continue
        path = folder / name
        try:
            file = os.open(path, _OPEN)
        except OSError:
            continue
        if not _is_own(file):
            os.close(file)
            continue
        locked = _lock(file, wait=False)
        lines = _lines(file)
        ended = locked is not None and _is_abandoned(file, lines, locked)
        if ended and _is_at(file, path):
            locks.append((path, file, lines))
        else:
            os.close(file)
    return locks


def noted(lock: Path) -> list[dict[str, Any]]:
    """Read the lines of a lock; none if it is not this user's."""
    try:
        file = os.open(lock, _OPEN)
    except OSError:
        return []
    try:
        return _lines(file) if _is_own(file) else []
    finally:
        os.close(file)


def lock_of(path: Path) -> Path:
    """Name the lock of a partial output, or of an old one set aside."""
    return path.with_name(f".{path.name.removeprefix('.').partition('.')[0]}.lock")


def is_own(path: Path) -> bool:
    """Whether a path belongs to this user."""
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file or folder, also if a thread is still writing into it."""
    for attempt in range(100):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY) or attempt == 99:
                raise
            time.sleep(0.01)


def leftovers(lock: Path) -> list[Path]:
    """List this user's files with the name of a lock: partial outputs, and old ones set aside."""
    names = [name for name in _names(lock.parent) if name.startswith(lock.stem + ".")]
    paths = [lock.with_name(name) for name in names if name != lock.name]
    return [path for path in paths if is_own(path)]


def _ending(name: str) -> str:
    """Get the ending of the target's name, by which writers choose the format."""
    count = 2 if name.lower().endswith(".gz") else 1
    return "".join(Path(name).suffixes[-count:])[-_ENDING_LENGTH:]


def _new_lock(folder: Path, content: dict[str, Any]) -> tuple[int, Path]:
    while True:
        path = folder / f".kpt-{uuid.uuid4().hex[:16]}.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        locked = _lock(file, wait=False)
        # Between the two calls another process may have removed it as abandoned.
        if locked is not None and _is_at(file, path):
            line = {**ENCODING, **content, **machine(), "pid": os.getpid(), "locked": locked}
            try:
                os.write(file, json.dumps(line).encode() + b"\n")
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(file)
                raise
            return file, path
        path.unlink(missing_ok=True)
        os.close(file)


def _lock(file: int, *, wait: bool) -> bool | None:
    """Lock a file; None if another process holds it, False if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_own(file: int) -> bool:
    """Whether an open file is a regular one of this user."""
    status = os.fstat(file)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _is_abandoned(file: int, lines: list[dict[str, Any]], locked: bool) -> bool:
    """Whether the run of a lock has ended; `locked`: whether this process could lock it."""
    status = os.fstat(file)
    age = time.time() - status.st_mtime
    if not lines:
        return status.st_size == 0 and locked and age > UNWRITTEN_SECONDS
    run, here = lines[0], machine()
    same_boot = run.get("boot") == here["boot"] is not None
    if locked and run.get("locked"):
        rebooted = run.get("host") == here["host"] and run.get("machine") == here["machine"]
        known = same_boot or rebooted or _file_system(file) in _LOCAL
    elif same_boot and run.get("processes") == here["processes"]:
        return not os.path.exists(f"/proc/{run.get('pid')}")
    else:
        known = False
    return known or age > FOREIGN_DAYS * 86400


def has_ended(run: dict[str, Any]) -> bool | None:
    """Whether a run, known by `machine` and ``pid``, has ended; None if that cannot be known."""
    here = machine()
    if run.get("boot") == here["boot"] is not None:
        same = run.get("processes") == here["processes"] is not None
        return not os.path.exists(f"/proc/{run.get('pid')}") if same else None
    known = None not in (run.get("boot"), here["boot"], here["machine"])
    rebooted = known and all(run.get(name) == here[name] for name in ("host", "machine"))
    return True if rebooted else None


def machine() -> dict[str, Any]:
    """Identify this machine, its boot and its PID namespace."""
    return {
        "host": socket.gethostname(),
        "machine": _text("/etc/machine-id"),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
    }


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text("ascii").strip()
    except (OSError, ValueError):
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _file_system(file: int) -> str | None:
    """Get the type of the file system that a file lies on."""
    device = os.fstat(file).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return None


def _lines(file: int) -> list[dict[str, Any]]:
    """Read the complete lines of a lock; none if it is not this program's."""
    *complete, _ = os.pread(file, 1 << 20, 0).split(b"\n")
    try:
        lines = [json.loads(line) for line in complete]
    except ValueError:
        return []
    if not all(isinstance(line, dict) for line in lines):
        return []
    return lines if lines and ENCODING.items() <= lines[0].items() else []


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder with its parents; return those that were missing, innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_folders(made: list[Path]) -> None:
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
