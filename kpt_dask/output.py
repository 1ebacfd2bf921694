"""Nothing half-written: write beside the target, rename when complete, remove on failure."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlas_store.storage.objects import finish_writes
from kpt_dask.errors import OutputExistsError


def check_absent(target: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, before the work for it begins.

    Raises
    ------
    OutputExistsError
        If `target` exists and `overwrite` is false.
    """
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists already; choose another name or overwrite it.")


@contextmanager
def replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path beside `target` to write a file or a folder to; rename it at the end.

    An old output is replaced only after the new one is complete; if the block raises,
    what it wrote is removed and the old output stays as it was.

    Raises
    ------
    OutputExistsError
        If `target` exists and `overwrite` is false.
    """
    check_absent(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex[:8]}.partial.{target.name}")
    try:
        yield partial
        check_absent(target, overwrite=overwrite)
        _swap(partial, target)
    except BaseException:
        finish_writes()
        raise
    finally:
        _remove(partial)


def _swap(partial: Path, target: Path) -> None:
    """Move `partial` to `target`; a folder cannot be renamed onto another, so step aside first."""
    if not target.is_dir():
        partial.replace(target)
        return
    aside = target.with_name(partial.name.replace(".partial.", ".replaced.", 1))
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
