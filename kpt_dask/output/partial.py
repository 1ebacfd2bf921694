"""Names beside a target to write to, and what killed runs left under such names.

A partial output is ``.kpt-<id>.partial`` in the folder of its target. Beside it lies
``.kpt-<id>.lock``, held locked as long as the run lives, which says what it is a lock of. What
nobody holds any more is removed by the next run that writes to the folder; what has no lock
beside it is not this program's. In a folder that users share, each trusts and removes only what
is the user's own.
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
"""Days after which the lock of another machine counts as abandoned where its file system need not
pass on locks: no run takes so long."""
UNWRITTEN_SECONDS = 60.0
"""Seconds after which a lock that says nothing counts as abandoned: its run was killed as it made
it."""

_TURN = ".kpt-turn-{}.lock"
"""Who holds it puts outputs in their places; who waits for it minds that it is removed. Each user
has an own one: what others made, they could hold for ever."""
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs"})
"""File systems of one machine: what can be locked there is held by nobody."""
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
_ENDING_LENGTH = 32


class Partial:
    """A name to write one output to, beside its target, and the lock that goes with it.

    Parameters
    ----------
    target : Path
        From `kpt_dask.output.places.target_of`. Its folder is made if need be.

    Attributes
    ----------
    path : Path
        Where to write; nothing is there yet.
    lock : Path
        Says what `path` is.
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
        """Add to what the lock says; on disk on return."""
        os.write(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file)

    def close(self, *, failed: bool) -> None:
        """Remove what is left; of a failed run also the folders that were made for it."""
        with uninterrupted():
            try:
                remove(self.path)
                self.lock.unlink(missing_ok=True)
                if failed:
                    _remove_folders(self._made)
            finally:
                os.close(self._file)


class Turn:
    """Only one process of a user at a time puts outputs in their places in a folder.

    Parameters
    ----------
    folder : Path
        That the outputs come into.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _TURN.format(os.geteuid())
        self._file: int | None = None
        while self._file is None:
            try:
                file = os.open(self._path, _OPEN | os.O_CREAT, 0o666)
            except OSError:
                # Somebody else's, or a link: nobody's turn.
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
        """Remove what is left if somebody died at it."""
        if (folder / _TURN.format(os.geteuid())).exists():
            Turn(folder).end()

    def end(self) -> None:
        """Let the next one begin."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)


def abandoned(folder: Path) -> list[tuple[Path, int, list[dict[str, Any]]]]:
    """Find this user's locks of a folder whose runs have ended without removing them.

    Returns
    -------
    list of (Path, int, list of dict)
        The lock, its file, open and locked, which the caller closes, and the lines that it holds.
    """
    found = []
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
            found.append((path, file, lines))
        else:
            os.close(file)
    return found


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
    """Tell whether something is this user's."""
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
    """End the name as that of the target: writers look at it."""
    count = 2 if name.lower().endswith(".gz") else 1
    return "".join(Path(name).suffixes[-count:])[-_ENDING_LENGTH:]


def _new_lock(folder: Path, about: dict[str, Any]) -> tuple[int, Path]:
    while True:
        path = folder / f".kpt-{uuid.uuid4().hex[:16]}.lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        locked = _lock(file, wait=False)
        # Between the two somebody may have taken it for abandoned.
        if locked is not None and _is_at(file, path):
            line = {**ENCODING, **about, **_machine(), "pid": os.getpid(), "locked": locked}
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
    """Lock a file; None if somebody else holds it, False if the file system knows no locks."""
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
    """Tell whether an open file is a regular one of this user."""
    status = os.fstat(file)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _is_abandoned(file: int, lines: list[dict[str, Any]], locked: bool) -> bool:
    """Tell whether the run of a lock that nobody was seen to hold has ended."""
    status = os.fstat(file)
    age = time.time() - status.st_mtime
    if not lines:
        return status.st_size == 0 and locked and age > UNWRITTEN_SECONDS
    run, here = lines[0], _machine()
    same_boot = run.get("boot") == here["boot"] is not None
    if locked and run.get("locked"):
        rebooted = run.get("host") == here["host"] and run.get("machine") == here["machine"]
        known = same_boot or rebooted or _file_system(file) in _LOCAL
    elif same_boot and run.get("processes") == here["processes"]:
        return not os.path.exists(f"/proc/{run.get('pid')}")
    else:
        known = False
    return known or age > FOREIGN_DAYS * 86400


def _machine() -> dict[str, Any]:
    """Tell this machine, since when it runs, and which numbers its processes have."""
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
    """Name the kind of file system that a file lies on."""
    device = os.fstat(file).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return None


def _lines(file: int) -> list[dict[str, Any]]:
    """Read the complete lines of a lock; none if it is not one of ours."""
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
    """Make a folder and those around it; return those that were not there, innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_folders(made: list[Path]) -> None:
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
