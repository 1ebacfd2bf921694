"""Where a run may write: never over, into or around an input, a store or what is not its own."""

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from kpt_dask.errors import OutputExistsError, ParameterError

OWN = frozenset({"kpt-volume"})
"""``encoding-type`` of folders that this program writes, and may replace."""
STORE = "kpt-atlas-store"
"""``encoding-type`` of atlas stores, in which only atlases are written, by the store itself."""

_ENTRIES = re.compile(r"zarr\.json|\d+|labels|probability|keypoints|matches|votes|own_axes")
"""What lies in an output of this program."""
_LABELS = frozenset({"zarr.json", "organs"})
_LITTER = frozenset({".DS_Store", "Thumbs.db"})
"""What file managers put everywhere."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_LARGEST_MARKER = 16 << 20

Kind = Literal["folder", "file"]


def printable(text: str | os.PathLike[str]) -> str:
    """Replace what is no UTF-8 in a path, so that it can be printed and stored."""
    return os.fsencode(text).decode("utf-8", "replace")


def target_of(out: str | os.PathLike[str]) -> Path:
    """Say which local path an output really has: absolute, links followed.

    ``~/`` is the home folder also where no shell has said so, and ``file://`` may precede.
    What a link leads to is written, as ``cp`` does it; the link stays.

    Raises
    ------
    ParameterError
        If it is a URL of something else, empty, or leads nowhere.
    """
    text = os.fspath(out).removeprefix("file://")
    shown = printable(text)
    if found := _URL.match(text):
        raise ParameterError(
            f"{shown} cannot be written: outputs go to local folders only, not to"
            f" {found.group(1)}; give a path, and copy the result."
        )
    if not text or "\0" in text:
        raise ParameterError(f"An output needs a path, which {shown!r} is not.")
    if text == "~" or text.startswith("~/"):
        text = os.path.expanduser(text)
    target = Path(os.path.realpath(text))
    if os.path.islink(target):
        raise ParameterError(f"{shown} is a link that leads back to itself; give another path.")
    return target


def check_outputs(
    *,
    folders: Iterable[str | os.PathLike[str]] = (),
    files: Iterable[str | os.PathLike[str]] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Refuse outputs that cannot be written or would harm something, before the work begins.

    Parameters
    ----------
    folders, files : iterable of path
        What the call will write.
    inputs : iterable of path or URL
        What it reads: scans, label maps, stores. Those that are not local are left out.
    overwrite : bool
        Whether outputs of earlier calls may be replaced.

    Returns
    -------
    list of Path
        `target_of` each output, folders first.

    Raises
    ------
    OutputExistsError
        If an output exists and may not be replaced.
    ParameterError
        If an output is, contains or lies in an input, another output or an atlas store, or
        cannot be written.
    """
    outs: list[tuple[str, Path, Kind]] = [(printable(f), target_of(f), "folder") for f in folders]
    outs += [(printable(f), target_of(f), "file") for f in files]
    read = [(printable(given), path) for given in inputs for path in _local(given)]
    for i, (shown, target, kind) in enumerate(outs):
        for other, path in read:
            if relation := _relation(target, path):
                raise ParameterError(
                    f"{shown} would be written, but it {relation} {other}, which is read; nothing"
                    " was changed: give another output."
                )
        for other, path, _ in outs[:i]:
            if relation := _relation(target, path):
                raise ParameterError(
                    f"{shown} {relation} {other}, which is written too; give them places of"
                    " their own."
                )
        check_place(shown, target)
        check_replaceable(shown, target, kind, overwrite=overwrite)
    return [target for _, target, _ in outs]


def check_replaceable(shown: str, target: Path, kind: Kind, *, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is an old output and may be replaced.

    Raises
    ------
    OutputExistsError
        See `check_outputs`.
    """
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if kind == "file" and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OutputExistsError(f"{shown} exists and is {what}; give the name of a file.")
    if not overwrite:
        raise OutputExistsError(f"{shown} exists already; choose another name or overwrite it.")
    if kind == "file":
        return
    if not stat.S_ISDIR(mode):
        raise OutputExistsError(
            f"{shown} exists and is a file, but the output is a folder; choose another name."
        )
    foreign = _foreign(target)
    if foreign is not None:
        raise OutputExistsError(f"{shown} is not replaced: {foreign}; choose another name.")


def check_place(shown: str, target: Path) -> None:
    """Refuse a place where nothing can be made.

    Raises
    ------
    ParameterError
        If a name on the way is too long, a folder on the way is none or forbids to write, or the
        target lies in an atlas store.
    """
    nearest = target.parent
    try:
        while not nearest.exists():
            nearest = nearest.parent
        target.exists()
    except OSError as error:
        raise ParameterError(f"{shown} cannot be written: {error.strerror}.") from error
    if any(len(os.fsencode(part)) > 255 for part in target.parts):
        raise ParameterError(f"{shown} cannot be written: {os.strerror(errno.ENAMETOOLONG)}.")
    if not nearest.is_dir():
        raise ParameterError(f"{shown} cannot be written: {printable(nearest)} is no folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ParameterError(f"{shown} cannot be written: {printable(nearest)} does not allow it.")
    for folder in (target, *target.parents):
        if encoding_of(folder) == STORE:
            raise ParameterError(
                f"{shown} lies in {printable(folder)}, which is an atlas store; give another"
                " output."
            )


def encoding_of(folder: Path) -> str | None:
    """Tell what a Zarr group says it is: its attribute ``encoding-type``, if it has one."""
    attributes = _attributes(folder)
    kind = attributes.get("encoding-type") if attributes else None
    return kind if isinstance(kind, str) else None


def run_of(folder: Path) -> str | None:
    """Tell which run an output folder of this program is of, if it is complete."""
    said = (_attributes(folder) or {}).get("kpt")
    run = said.get("run") if isinstance(said, dict) else None
    return run if isinstance(run, str) else None


def _foreign(folder: Path) -> str | None:
    """Say why a folder is not this program's alone, if it is not."""
    entries = set(os.listdir(folder)) - _LITTER
    if not entries:
        return None
    if encoding_of(folder) not in OWN:
        return "it does not say of itself that it is an output of kpt"
    others = sorted(name for name in entries if not _ENTRIES.fullmatch(name))
    labels = folder / "labels"
    if labels.is_dir():
        others += sorted(f"labels/{name}" for name in {*os.listdir(labels)} - _LABELS - _LITTER)
    return f"{printable(others[0])} in it is not written by kpt segment" if others else None


def _attributes(folder: Path) -> dict[str, Any] | None:
    try:
        with open(folder / "zarr.json", "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            document = json.loads(file.read(_LARGEST_MARKER))
        attributes = document["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return attributes if isinstance(attributes, dict) else None


def _local(given: str | os.PathLike[str]) -> Sequence[Path]:
    """Where an input lies, and where a link to it, if that is on this machine."""
    text = os.fspath(given).removeprefix("file://")
    if "://" in text:
        return ()
    path = Path(os.path.realpath(text))
    return path, Path(os.path.realpath(os.path.dirname(os.path.abspath(text))), Path(text).name)


def _relation(output: Path, other: Path) -> str | None:
    """Say how two paths meet, if they do: in name, or as the same file under two names."""
    here, there = _identity(output), _identity(other)
    if output == other or (here is not None and here == there):
        return "is"
    if other.is_relative_to(output) or here in _around(other):
        return "contains"
    if output.is_relative_to(other) or there in _around(output):
        return "lies in"
    return None


def _around(path: Path) -> set[tuple[int, int] | None]:
    return {found for parent in path.parents if (found := _identity(parent))}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
