"""Outputs in an object store: made in a local folder, uploaded when complete, the root last.

An object store has no rename, which is what puts a local output in place at once. Instead:

- A run computes in a local folder, as for a local output, and uploads it at the end. Blocks read
  what other blocks wrote, tables are rewritten, workers write in parallel: all this is quick and
  safe on a disk, and an upload that fails costs no computation on half an answer.
- ``zarr.json`` of the root is uploaded last. Without it, readers of Zarr find nothing, so what a
  killed run leaves opens as nothing, though its objects are there.
- An object `CLAIM` says who writes there. It is made before any work, only where there is none, so
  of two runs one is refused, and a missing bucket or right is told at once. What a killed run left
  is known by it, and the next run removes it: only if that run is surely over, or if asked to
  overwrite.
- Every object is made only where there is none (``If-None-Match: *``). Nobody's object is replaced,
  and a run that was thought dead cannot change what another one uploads.

An old output that is to be overwritten is removed once the new one is complete on the local disk;
if the upload fails then, neither is there.
"""

import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from atlas_store.errors import StoreFormatError
from atlas_store.storage.objects import Objects
from kpt_dask.errors import (
    KptError,
    OutputExistsError,
    OutputVanishedError,
    ParameterError,
    UnreachableError,
)
from kpt_dask.output.contents import LARGEST_ROOT, OWN, ROOT, STORE, UNKNOWN, encoding_in, stranger
from kpt_dask.output.partial import FOREIGN_DAYS, Partial, has_ended, machine
from kpt_dask.remote import Remote, reaching
from kpt_dask.runtime import progress

SCHEME = "s3://"
CLAIM = ".kpt-upload.json"
"""Name of the object that says which run writes to a place."""
ENCODING = {"encoding-type": "kpt-upload", "encoding-version": "1"}
THREADS = 8
"""Objects uploaded at once, each held in memory: a few MiB."""
SCRATCH = "KPT_SCRATCH"
"""Environment variable that names the folder to compute in; by default that of temporary files."""

_PATTERN = re.compile(r"[*?\[\]\0]")
"""Characters of patterns: what deletes objects by name would take them for others."""
_LARGEST_CLAIM = 1 << 16
_living: set[str] = set()
"""Tokens of the claims of this process's runs."""


def is_url(text: str) -> bool:
    """Whether it is the URL of a place in an object store."""
    return text.lower().startswith(SCHEME)


def target_of(url: str) -> Remote:
    """Read the URL of an output, ``s3://BUCKET/NAME.zarr``.

    Raises
    ------
    ParameterError
        If it names no place in a bucket, or one that cannot be written safely.
    """
    bucket, _, key = url[len(SCHEME) :].partition("/")
    key = key.rstrip("/")
    if not bucket or not key:
        raise ParameterError(f"{url} is no place in a bucket; write {SCHEME}BUCKET/NAME.zarr.")
    if set(key.split("/")) & {"", ".", ".."} or _PATTERN.search(key):
        raise ParameterError(
            f"{url} cannot be written: no part of the name may be empty, . or .., or hold one of"
            " * ? [ ]; give another name."
        )
    return Remote(f"{SCHEME}{bucket}/{key}")


def scratch_of(target: Remote) -> Path:
    """Local path that stands for a target until it is uploaded."""
    folder = os.environ.get(SCRATCH) or tempfile.gettempdir()
    return Path(os.path.realpath(folder), target.name)


def check(
    target: Remote, inputs: Iterable[str | os.PathLike[str]] = (), *, overwrite: bool
) -> None:
    """Refuse a target that cannot be written or would overwrite other data.

    Parameters
    ----------
    target : Remote
        From `target_of`.
    inputs : iterable of path or URL
        What is read; paths are skipped.
    overwrite : bool
        Whether an output of an earlier run may be replaced.

    Raises
    ------
    OutputExistsError
        If something is there and may not be replaced, or another run writes there.
    ParameterError
        If it is, contains or lies in an input or an atlas store.
    UnreachableError
        If the object store cannot be reached, or does not allow it.
    """
    for given in inputs:
        text = os.fspath(given)
        if is_url(text) and (relation := _relation(target.url, text)):
            raise ParameterError(
                f"{target} would be written, but it {relation} {text}, which is read; nothing was"
                " changed: give another output."
            )
    with reaching(target):
        _refuse_store(target)
        _refuse(target, _look(Objects.at(target)), overwrite=overwrite)


class Upload:
    """An output that is made in a local folder and goes to an object store.

    Parameters
    ----------
    target : Remote
        From `target_of`.
    overwrite : bool
        Whether an output of an earlier run may be replaced.

    Attributes
    ----------
    path : Path
        Local folder to write to; it does not exist yet.

    Raises
    ------
    KptError
        See `check`.
    """

    def __init__(self, target: Remote, *, overwrite: bool) -> None:
        self.target = target
        with reaching(target):
            self._objects = Objects.at(target)
        self._made: list[str] = []
        self._reachable = True
        self._token = uuid.uuid4().hex
        self._claim = json.dumps(
            {**ENCODING, **machine(), "pid": os.getpid(), "token": self._token, "at": time.time()}
        ).encode()
        self._partial = Partial(scratch_of(target))
        self.path = self._partial.path
        _living.add(self._token)
        try:
            with reaching(target):
                self._old = self._take(overwrite=overwrite)
        except BaseException:
            self._forget(failed=True)
            raise

    def send(self) -> None:
        """Upload everything but the root's ``zarr.json``; remove the old output before.

        Raises
        ------
        OutputVanishedError
            If the local folder, or the claim, is gone.
        OutputExistsError
            If another run wrote there meanwhile.
        UnreachableError
            If the upload fails.
        """
        if not self.path.is_dir() or self.path.is_symlink():
            raise OutputVanishedError(
                f"{self.path} is gone: something deleted it during the run; run it again, with"
                f" {SCRATCH} naming a folder that nobody cleans."
            )
        files = (Path(folder, name) for folder, _, names in os.walk(self.path) for name in names)
        keys = sorted(file.relative_to(self.path).as_posix() for file in files)
        keys.remove(ROOT)
        self._reach(self._make_way)
        pool = ThreadPoolExecutor(THREADS)
        try:
            with progress.stage("Uploading", total=len(keys)) as advance:
                for _ in pool.map(self._put, keys):
                    advance(1)
        finally:
            pool.shutdown(cancel_futures=True)

    def publish(self) -> None:
        """Upload the root's ``zarr.json``, with which the output is there; errors as of `send`."""
        self._reach(self._check_claim)
        self._put(ROOT)

    def close(self, *, failed: bool) -> None:
        """Remove the local folder and the claim; after a failure, also what was uploaded."""
        try:
            # What cannot be removed is known by its claim; the next run removes it.
            with suppress(KptError):
                if self._reachable:
                    self._reach(lambda: self._release(failed=failed))
        finally:
            self._forget(failed=failed)

    def _forget(self, *, failed: bool) -> None:
        _living.discard(self._token)
        self._partial.close(failed=failed)

    def _reach(self, action: Callable[[], None]) -> None:
        try:
            with reaching(self.target):
                action()
        except UnreachableError:
            self._reachable = False
            raise

    def _take(self, *, overwrite: bool) -> frozenset[str]:
        """Claim the place, and remove what a killed run left; give what is to be replaced."""
        there = _look(self._objects)
        _refuse(self.target, there, overwrite=overwrite)
        if there.claim is None:
            taken = self._objects.write_new(CLAIM, self._claim)
        else:
            self._objects.write(CLAIM, self._claim)
            taken = self._is_claimed()
        if not taken:
            raise _written_by(self.target, None)
        try:
            # Again: until now another run may have finished there.
            there = _look(self._objects)
            _refuse(self.target, there, overwrite=overwrite, own=True)
            if there.root is None:
                self._remove(there.names)
        except BaseException:
            with suppress(KptError, OSError):
                self._objects.delete(CLAIM)
            raise
        return there.names if there.root is not None else frozenset()

    def _is_claimed(self) -> bool:
        return _read(self._objects, CLAIM, _LARGEST_CLAIM) == self._claim

    def _check_claim(self) -> None:
        if not self._is_claimed():
            raise OutputVanishedError(
                f"{self.target} was taken over by another run, or {CLAIM} was deleted there; run it"
                " again, to another name."
            )

    def _make_way(self) -> None:
        self._check_claim()
        self._remove(self._old)

    def _remove(self, names: Iterable[str]) -> None:
        """Remove objects and folders; the root first, so that nothing opens of which parts lack."""
        for name in sorted(names, key=lambda one: one != ROOT):
            self._objects.delete_folder(name)

    def _put(self, key: str) -> None:
        data = (self.path / key).read_bytes()

        def put() -> None:
            # An answer that was lost is asked for again: then the object is there, by this run.
            if not self._objects.write_new(key, data) and self._objects.read(key) != data:
                raise OutputExistsError(
                    f"{self.target}/{key} was written by somebody else meanwhile; run it again, to"
                    " another name."
                )
            self._made.append(key)

        self._reach(put)

    def _release(self, *, failed: bool) -> None:
        if not self._is_claimed():
            return
        if failed:
            # Object by object: others may have put theirs beside them meanwhile. The root first.
            if ROOT in self._made:
                self._objects.delete(ROOT)
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(self._objects.delete, self._made))
        self._objects.delete(CLAIM)


@dataclass(frozen=True)
class _There:
    """What lies at a place: names directly in it, in ``labels``, its root, and who claims it."""

    names: frozenset[str]
    labels: frozenset[str]
    root: bytes | None
    claim: dict[str, Any] | None


def _look(objects: Objects) -> _There:
    # An object that stands for the folder itself, as web consoles make them, has no name.
    names = frozenset(objects.names("")) - {""}
    claim = _parse(_read(objects, CLAIM, _LARGEST_CLAIM)) if CLAIM in names else None
    return _There(
        names - ({CLAIM} if claim is not None else set()),
        frozenset(objects.names("labels")) - {""} if "labels" in names else frozenset(),
        _read(objects, ROOT, LARGEST_ROOT) if ROOT in names else None,
        claim,
    )


def _read(objects: Objects, key: str, limit: int) -> bytes | None:
    """Read an object; one that is too large is none of this program's, and as good as empty."""
    try:
        return objects.read(key, limit)
    except StoreFormatError:
        return b""


def _parse(document: bytes | None) -> dict[str, Any] | None:
    try:
        claim = json.loads(document or b"")
    except (ValueError, RecursionError):
        return None
    return claim if isinstance(claim, dict) and ENCODING.items() <= claim.items() else None


def _refuse(target: Remote, there: _There, *, overwrite: bool, own: bool = False) -> None:
    """Refuse a place by what lies there; `own`: the claim is this run's."""
    if there.root is not None and not overwrite:
        raise OutputExistsError(f"{target} exists already; choose another name or overwrite it.")
    if there.claim is not None and not own:
        ended = _is_over(there.claim)
        if ended is False or not (ended or overwrite):
            raise _written_by(target, there.claim)
    unclaimed = bool(there.names) and there.root is None and there.claim is None
    if unclaimed and not overwrite:
        raise OutputExistsError(f"{target} holds objects already; choose another name.")
    unknown = there.root is not None and encoding_in(there.root) not in OWN
    why = UNKNOWN if unclaimed or unknown else stranger(there.names, there.labels)
    if why is not None:
        raise OutputExistsError(f"{target} is not replaced: {why}; choose another name.")


def _is_over(claim: dict[str, Any]) -> bool | None:
    """Whether the run of a claim has ended; None if that cannot be known."""
    ended = has_ended(claim)
    if ended is False and claim.get("pid") == os.getpid():
        return claim.get("token") not in _living
    made = claim.get("at")
    old = isinstance(made, int | float) and time.time() - made > FOREIGN_DAYS * 86400
    return True if ended is None and old else ended


def _written_by(target: Remote, claim: dict[str, Any] | None) -> OutputExistsError:
    if claim is None:
        return OutputExistsError(f"{target} is being written by another run; wait for it.")
    who = f"process {str(claim.get('pid'))[:20]} on {str(claim.get('host'))[:80]}"
    if _is_over(claim) is False:
        return OutputExistsError(f"{target} is being written by {who}; wait for it.")
    return OutputExistsError(
        f"{target} is being written, or was left half-written, by {who}; wait for it, or if it has"
        " ended, overwrite it."
    )


def _refuse_store(target: Remote) -> None:
    bucket, *parts = target.url[len(SCHEME) :].split("/")
    for depth in range(len(parts), -1, -1):
        folder = SCHEME + "/".join([bucket, *parts[:depth]])
        # The right to write to a folder does not include those above it.
        with suppress(PermissionError):
            if encoding_in(_read(Objects.at(folder), ROOT, LARGEST_ROOT)) == STORE:
                raise ParameterError(
                    f"{target} lies in {folder}, which is an atlas store; give another output."
                )


def _relation(output: str, other: str) -> str | None:
    """Describe how two places overlap; None if they are apart."""
    one, two = (PurePosixPath(text[len(SCHEME) :]) for text in (output, other))
    if one == two:
        return "is"
    if two.is_relative_to(one):
        return "contains"
    return "lies in" if one.is_relative_to(two) else None
