"""Atomic outputs: written beside the target, moved when complete, removed on failure.

Outputs of one call are moved together. The planned moves are first recorded in the locks beside
them: if the process is killed in between, the next one that writes to the folder completes them.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from atlas_store.storage.full_disk import naming
from atlas_store.storage.objects import Objects, finish_writes
from kpt_dask.errors import KptError, OutputVanishedError, ParameterError
from kpt_dask.output.interruption import uninterrupted
from kpt_dask.output.object_store import Upload, scratch_of
from kpt_dask.output.partial import (
    Partial,
    Turn,
    abandoned,
    is_own,
    leftovers,
    lock_of,
    noted,
    remove,
)
from kpt_dask.output.places import (
    Kind,
    check_place,
    check_replaceable,
    place_of,
    printable,
)
from kpt_dask.remote import Remote

_ASIDE = ".replaced"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replacing(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or a folder to; move it to `target` at the end.

    An old output is replaced only after the new one is complete. If the block raises, the new
    output is removed and the old one stays as it was.

    Raises
    ------
    OutputExistsError
        If `target` exists and `overwrite` is false, or it is not an output of this program.
    ParameterError
        If `target` cannot be written.
    OutputVanishedError
        If another process removed the new output before it was complete.
    """
    with replacing_together([target], overwrite=overwrite) as [partial]:
        yield partial


@contextmanager
def replacing_together(
    targets: Sequence[str | os.PathLike[str]], *, overwrite: bool = False
) -> Iterator[list[Path]]:
    """Do what `replacing` does, for several outputs that belong together.

    A target may be a URL of an object store; it is written as `kpt_dask.output.object_store` says.
    """
    places = [place_of(target) for target in targets]
    for place, target in zip(places, targets, strict=True):
        local = scratch_of(place) if isinstance(place, Remote) else place
        sweep(local.parent)
        check_place(printable(target), local)
        if isinstance(place, Path) and place.exists():
            kind: Kind = "folder" if place.is_dir() else "file"
            check_replaceable(printable(target), place, kind, overwrite=overwrite)
    outputs: list[Partial | Upload] = []
    failed = True
    try:
        for place, target in zip(places, targets, strict=True):
            try:
                # Not interrupted between making a lock and knowing of it.
                with uninterrupted():
                    outputs.append(
                        Upload(place, overwrite=overwrite)
                        if isinstance(place, Remote)
                        else Partial(place)
                    )
            except KptError:
                raise
            except OSError as error:
                raise ParameterError(
                    f"{printable(target)} cannot be written: {error.strerror}."
                ) from error
        first = places[0]
        # A full disk is that of the local folder, whatever the target is.
        filled = scratch_of(first).parent if isinstance(first, Remote) else targets[0]
        with naming(printable(filled)):
            yield [output.path for output in outputs]
        partials = [output for output in outputs if isinstance(output, Partial)]
        uploads = [output for output in outputs if isinstance(output, Upload)]
        # An upload may remove an old output, so nothing known may come in between.
        _check(partials, overwrite=overwrite)
        for upload in uploads:
            upload.send()
        with uninterrupted():
            _commit(partials, uploads, overwrite=overwrite)
            failed = False
    finally:
        with uninterrupted():
            if failed:
                finish_writes()
            _close(outputs, failed=failed)


def sweep(folder: Path) -> None:
    """Finish the moves that killed runs of this user began in a folder; remove their leftovers."""
    for lock, file, lines in abandoned(folder):
        with uninterrupted():
            try:
                if len(lines) > 1:
                    _finish(lines[1].get("moves", []))
                # The user may have lost the right to write to the folder.
                with suppress(OSError):
                    for path in leftovers(lock):
                        remove(path)
                    lock.unlink(missing_ok=True)
            finally:
                os.close(file)
    with suppress(OSError):
        Turn.forget(folder)


def _close(outputs: Sequence[Partial | Upload], *, failed: bool) -> None:
    with ExitStack() as stack:
        for output in outputs:
            stack.callback(output.close, failed=failed)


def _check(partials: Sequence[Partial], *, overwrite: bool) -> None:
    """Refuse local targets that appeared, or changed, during the run."""
    for partial in partials:
        kind: Kind = "folder" if partial.path.is_dir() else "file"
        check_replaceable(printable(partial.target), partial.target, kind, overwrite=overwrite)


def _commit(partials: Sequence[Partial], uploads: Sequence[Upload], *, overwrite: bool) -> None:
    for partial in partials:
        if not partial.path.exists() or partial.path.is_symlink():
            raise OutputVanishedError(
                f"{printable(partial.path)} is gone: something deleted it during the run; run it"
                " again, to a folder that nobody cleans."
            )
        Objects.at(partial.path.parent).settle(partial.path.name)
    with ExitStack() as stack:
        for folder in sorted({partial.target.parent for partial in partials}):
            stack.callback(Turn(folder).end)
        _check(partials, overwrite=overwrite)
        moves = [_move_of(partial) for partial in partials]
        # Before the moves: they can be undone, or finished by another run, without a network.
        for upload in uploads:
            upload.publish()
        for partial in partials:
            partial.note({"moves": moves})
        _move_all(moves)
        for partial in partials:
            _sync_folder(partial.target.parent)


def _move_of(partial: Partial) -> dict[str, Any]:
    """Describe a move, so that a later process can tell whether it happened."""
    return {
        "from": str(partial.path),
        "to": str(partial.target),
        "aside": str(partial.lock.with_suffix(_ASIDE)),
        "new": _identity(partial.path),
        "old": _identity(partial.target),
    }


def _move_all(moves: Sequence[dict[str, Any]]) -> None:
    """Move all, or none if one cannot be moved."""
    done: list[dict[str, Any]] = []
    try:
        for move in moves:
            _move(move)
            done.append(move)
    except OSError:
        for move in reversed(done):
            source, target = Path(move["from"]), Path(move["to"])
            if move["old"] is None:
                target.rename(source)
            elif _identity(source) == move["old"]:
                _exchange(source, target)
        raise


def _move(move: dict[str, Any]) -> None:
    source, target, aside = (Path(move[end]) for end in ("from", "to", "aside"))
    if not target.exists():
        source.rename(target)
    elif _exchange(source, target):
        # The old output now has the partial's name and is removed with it.
        return
    elif not target.is_dir():
        source.replace(target)
    else:
        # A folder cannot be renamed onto another.
        target.rename(aside)
        try:
            source.rename(target)
        except OSError:
            aside.rename(target)
            raise
        remove(aside)


def _finish(moves: Any) -> None:
    """Complete the moves of a killed run, unless the targets have changed since."""
    with ExitStack() as stack:
        try:
            if not all(_is_done(move) or _is_vouched_for(move, moves) for move in moves):
                return
            for folder in sorted({Path(move["to"]).parent for move in moves}):
                stack.callback(Turn(folder).end)
            for move in moves:
                source, target, aside = (Path(move[end]) for end in ("from", "to", "aside"))
                now = _identity(target)
                if now is None and _identity(aside) == move["old"] is not None:
                    aside.rename(target)
                    now = move["old"]
                if _identity(source) == move["new"] and now == move["old"]:
                    _move(move)
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            # Moves that cannot be finished are left: the old outputs are in their places.
            return


def _is_vouched_for(move: dict[str, Any], moves: Any) -> bool:
    """Whether a lock of this user, beside the source, records the same moves and the target.

    Somebody who can write a lock into one folder must not be able to move files in another.
    """
    source, target, aside = (Path(move[end]) for end in ("from", "to", "aside"))
    lock = lock_of(source)
    lines = noted(lock)
    return (
        len(lines) > 1
        and bool(lines[1].get("moves") == moves)
        and target == lock.with_name(lines[0]["target"])
        and aside == lock.with_suffix(_ASIDE)
        and all(is_own(path) for path in (source, aside) if os.path.lexists(path))
    )


def _is_done(move: dict[str, Any]) -> bool:
    return bool(_identity(Path(move["to"])) == move["new"])


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically, if the kernel and the file system support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


def _sync_folder(folder: Path) -> None:
    # Some file systems cannot sync folders.
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    changed = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
    return [status.st_dev, status.st_ino, changed]
