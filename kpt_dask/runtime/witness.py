"""Proof that workers see the client's files, and run the same version.

Before work, the client writes a random token into the folder of the run. Every worker must read
the token, read the same inputs, and write a file that the client can read; a worker that joins
later does so before its first task. Without this, a worker would read a chunk that it does not see
as zeros, and the answer would be wrong without an error.
"""

import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock

import zarr
from distributed import Client, Worker, get_worker
from zarr.storage import LocalStore

from atlas_store.storage.objects import Objects
from kpt_dask.errors import ClusterError
from kpt_dask.runtime.connect import is_own
from kpt_dask.runtime.patience import ask, lost, saying, scheduler_address, wait_seconds

FOLDER = ".kpt-witness"
"""Name of the folder that holds the token during a run."""

PACKAGES = ("kpt-dask", "numpy", "numba", "llvmlite", "scipy", "zarr", "numcodecs")
"""Packages whose versions may change the bytes of an answer."""

SEEN_WITHIN = 5.0
"""Seconds until the client must see a worker's file: NFS caches listings."""

_MISSING = re.compile(r"No module named [\\]*'([\w.]+)")
_PROCESS = uuid.uuid4().hex
_LOCK = Lock()
_proven: set[str] = set()
"""Tokens for which this process has given its proof."""


@dataclass(frozen=True)
class Proof:
    """Conditions that a worker must meet.

    Attributes
    ----------
    folder : Objects
        Store that holds the folder of the run.
    path : str
        Path of that folder in the store.
    token : str
        Name of the token, and its content.
    inputs : tuple of (Objects, str, str)
        Objects that are read: store, key, SHA-256.
    versions : mapping of str to str
        From `versions`.
    process : str
        Identity of the client's process; workers in it need no proof.
    """

    folder: Objects
    path: str
    token: str
    inputs: tuple[tuple[Objects, str, str], ...]
    versions: Mapping[str, str]
    process: str = field(default=_PROCESS)


_current: ContextVar[Proof | None] = ContextVar("proof", default=None)


def current() -> Proof | None:
    """Proof that workers of this run must give, if any."""
    return _current.get()


@contextmanager
def shared(
    client: Client, group: zarr.Group, inputs: Sequence[tuple[Objects, str]] = ()
) -> Iterator[None]:
    """Require workers that see the group to be written, and the inputs.

    Parameters
    ----------
    client : distributed.Client
        Client whose workers compute inside the `with`.
    group : zarr.Group
        Group in the folder of the run.
    inputs : sequence of (Objects, str)
        Objects by store and key that must be the same for all.

    Raises
    ------
    ClusterError
        If a worker does not see them, or is of another version.
    """
    if is_own(client):
        yield
        return
    folder = Objects(group.store_path.store, str(group.store_path))
    path = f"{group.path}/{FOLDER}".lstrip("/")
    known = tuple((objects, key, _digest(objects, key)) for objects, key in inputs)
    proof = Proof(folder, path, uuid.uuid4().hex, known, versions())
    folder.write(f"{path}/{proof.token}", proof.token.encode())
    token = _current.set(proof)
    try:
        _ask_all(client, proof)
        yield
    finally:
        _current.reset(token)
        folder.delete_folder(path)


def check(proof: Proof | None) -> None:
    """Give the proof in a task, once per process.

    Raises
    ------
    ClusterError
        If this worker does not see the files, or is of another version.
    """
    if proof is None or proof.process == _PROCESS or proof.token in _proven:
        return
    with _LOCK:
        if proof.token not in _proven:
            prove(proof)
            _proven.add(proof.token)


def prove(proof: Proof, dask_worker: Worker | None = None) -> str:
    """Check what this worker sees; return the name of the file that it writes."""
    worker_name = _name(dask_worker or get_worker())
    installed = versions()
    differing = [
        f"{name} {installed.get(name, 'none')} instead of {asked}"
        for name, asked in proof.versions.items()
        if installed.get(name) != asked
    ]
    if differing:
        raise ClusterError(
            f"{worker_name} has {', '.join(differing)}: give all workers the same environment."
        )
    where = f"{proof.folder.url}/{FOLDER}"
    if proof.folder.read(f"{proof.path}/{proof.token}") != proof.token.encode():
        raise ClusterError(
            f"{worker_name} does not see {where}, which is written here: use an output folder "
            "that all workers share (for s3://, name one in KPT_SCRATCH)."
        )
    for objects, key, digest in proof.inputs:
        if _digest(objects, key) != digest:
            raise ClusterError(
                f"{worker_name} does not see {objects.url}/{key} as it is here: use a folder that "
                "all workers share."
            )
    name = f"{proof.token}-{uuid.uuid4().hex}"
    try:
        _leave(proof, name)
    except OSError as error:
        raise ClusterError(
            f"{worker_name} cannot write to {where} ({error.strerror or error}): give it the right"
            " to."
        ) from error
    _proven.add(proof.token)
    return name


def _leave(proof: Proof, name: str) -> None:
    store = proof.folder.store
    if isinstance(store, LocalStore):
        # Unlike zarr's store, does not make the folder, which the client may have removed.
        with open(store.root / proof.path / name, "xb") as file:
            file.write(name.encode())
    else:
        proof.folder.write(f"{proof.path}/{name}", name.encode())


def _ask_all(client: Client, proof: Proof) -> None:
    """Let every connected worker give the proof."""
    try:
        with saying(f"waiting for the workers at {scheduler_address(client)} to answer"):
            answers = ask(
                client,
                client._run,
                prove,
                proof,
                on_error="return",
                callback_timeout=wait_seconds(),
            )
    except TimeoutError as error:
        raise ClusterError(
            f"A worker at {scheduler_address(client)} does not answer: see the logs of its "
            "workers, and end those that hang."
        ) from error
    except OSError as error:
        raise lost(client, "Asking the workers", error) from error
    for address, answer in answers.items():
        if isinstance(answer, ClusterError):
            raise answer
        # Dask keeps only the text of an error raised while a function is deserialised.
        if isinstance(answer, Exception) and (found := _MISSING.search(str(answer))):
            raise lacking(found[1], f"The worker {address}") from answer
        if isinstance(answer, OSError):
            # The worker has gone, or cannot be reached: the scheduler will notice.
            continue
        if isinstance(answer, BaseException):
            raise ClusterError(
                f"The worker {address} cannot compute ({type(answer).__name__}: {answer}): give "
                "all workers the environment that you have here."
            ) from answer
        if not _seen(proof, answer):
            raise ClusterError(
                f"What the worker {address} writes to {proof.folder.url} is not seen here: use an "
                "output folder that all workers share (for s3://, name one in KPT_SCRATCH)."
            )


def lacking(package: str, worker: str) -> ClusterError:
    """Make the error for a worker that lacks a package."""
    return ClusterError(
        f"{worker} lacks the package {package}: install kpt-dask {version('kpt-dask')} in "
        "the environment of all workers."
    )


def _seen(proof: Proof, name: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while proof.folder.read(f"{proof.path}/{name}") != name.encode():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@cache
def versions() -> dict[str, str]:
    """Versions of `PACKAGES`; that of this program includes a digest of its code."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    installed["kpt-dask"] = f"{installed.get('kpt-dask', '')} (code {_code()})"
    return installed


def _code() -> str:
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("atlas_store", "kpt_dask"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _digest(objects: Objects, key: str) -> str:
    return hashlib.sha256(objects.read(key) or b"").hexdigest()


def _name(worker: Worker) -> str:
    """Name a worker by address, process and host."""
    return f"The worker {worker.address} (process {os.getpid()} on {socket.gethostname()})"
