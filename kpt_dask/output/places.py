"""Targets that a run may write: never over, into or around an input, a store or a user's file."""

import errno
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from kpt_dask.errors import OutputExistsError, ParameterError
from kpt_dask.output import object_store
from kpt_dask.output.contents import OWN, STORE, encoding_of, foreign
from kpt_dask.remote import Remote

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")

Kind = Literal["folder", "file"]


def printable(text: str | os.PathLike[str]) -> str:
    """Replace bytes of a path that are no UTF-8, so that it can be printed and stored."""
    return os.fsencode(text).decode("utf-8", "replace")


def target_of(out: str | os.PathLike[str]) -> Path:
    """Resolve the local path of an output: absolute, links followed.

    ``~/`` is expanded, as a shell does, and a leading ``file://`` is dropped. The target of a link
    is written, as by ``cp``; the link stays.

    Raises
    ------
    ParameterError
        If it is another URL, empty, or a link to itself.
    """
    text = os.fspath(out).removeprefix("file://")
    shown = printable(text)
    if found := _URL.match(text):
        raise ParameterError(
            f"{shown} cannot be written: this output goes to local folders only, not to"
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


def place_of(out: str | os.PathLike[str]) -> Path | Remote:
    """Resolve the place of an output that may lie in an object store.

    Raises
    ------
    ParameterError
        See `target_of` and `kpt_dask.output.object_store.target_of`.
    """
    text = os.fspath(out)
    return object_store.target_of(text) if object_store.is_url(text) else target_of(text)


def check_outputs(
    *,
    images: Iterable[str | os.PathLike[str]] = (),
    folders: Iterable[str | os.PathLike[str]] = (),
    files: Iterable[str | os.PathLike[str]] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> list[Path | Remote]:
    """Refuse outputs that cannot be written or would overwrite other data, before the work begins.

    Parameters
    ----------
    images : iterable of path or URL
        OME-Zarr outputs of the call, which may lie in an object store.
    folders, files : iterable of path
        Other outputs of the call.
    inputs : iterable of path or URL
        Inputs of the call: scans, label maps, stores. Those that are not local are skipped.
    overwrite : bool
        Whether outputs of earlier calls may be replaced.

    Returns
    -------
    list of Path or Remote
        `place_of` each output, those in object stores first, then images, folders and files.

    Raises
    ------
    OutputExistsError
        If an output exists and may not be replaced.
    ParameterError
        If an output is, contains or lies in an input, another output or an atlas store, or
        cannot be written.
    UnreachableError
        If an object store cannot be reached.
    """
    remote, outs = [], list[tuple[str, Path, Kind]]()
    for image in images:
        place = place_of(image)
        if isinstance(place, Remote):
            remote.append(place)
        else:
            outs.append((printable(image), place, "folder"))
    outs += [(printable(f), target_of(f), "folder") for f in folders]
    outs += [(printable(f), target_of(f), "file") for f in files]
    inputs = list(inputs)
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
    for place in remote:
        object_store.check(place, inputs, overwrite=overwrite)
    return [*remote, *(target for _, target, _ in outs)]


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
        actual = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise OutputExistsError(f"{shown} exists and is {actual}; give the name of a file.")
    if not overwrite:
        raise OutputExistsError(f"{shown} exists already; choose another name or overwrite it.")
    if kind == "file":
        return
    if not stat.S_ISDIR(mode):
        raise OutputExistsError(
            f"{shown} exists and is a file, but the output is a folder; choose another name."
        )
    why = foreign(target)
    if why is not None:
        raise OutputExistsError(f"{shown} is not replaced: {printable(why)}; choose another name.")


def check_place(shown: str, target: Path) -> None:
    """Refuse a target that cannot be made.

    Raises
    ------
    ParameterError
        If a name in the path is too long, a parent is no folder or not writable, or the target
        lies in an atlas store or in another output.
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
        encoding = encoding_of(folder)
        if encoding == STORE:
            raise ParameterError(
                f"{shown} lies in {printable(folder)}, which is an atlas store; give another"
                " output."
            )
        if encoding in OWN and folder != target:
            raise ParameterError(
                f"{shown} lies in {printable(folder)}, an output of kpt, and would go with it; give"
                " a place outside."
            )


def _local(given: str | os.PathLike[str]) -> Sequence[Path]:
    """Resolve a local input: its path, and that of a link to it; nothing for other URLs."""
    text = os.fspath(given).removeprefix("file://")
    if "://" in text:
        return ()
    path = Path(os.path.realpath(text))
    return path, Path(os.path.realpath(os.path.dirname(os.path.abspath(text))), Path(text).name)


def _relation(output: Path, other: Path) -> str | None:
    """Describe how two paths overlap, by name or as one file under two names; None if apart."""
    output_file, other_file = _identity(output), _identity(other)
    if output == other or (output_file is not None and output_file == other_file):
        return "is"
    if other.is_relative_to(output) or output_file in _around(other):
        return "contains"
    if output.is_relative_to(other) or other_file in _around(output):
        return "lies in"
    return None


def _around(path: Path) -> set[tuple[int, int] | None]:
    return {identity for parent in path.parents if (identity := _identity(parent))}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
