"""Proof that workers see what the client sees, and are of the same version.

Before work, the client writes a random token into the folder of the run. Every worker must
read it there, also one that joins later, when its first task begins; see the inputs as they
are; and leave a file in the folder that the client finds. Else zeros would be read where a
chunk does not seem to exist, and the answer would be wrong in silence.
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
from kpt_dask.runtime.patience import saying, scheduler_address, wait_seconds

FOLDER = ".kpt-witness"
"""Where the token lies while a run lasts."""

PACKAGES = ("kpt-dask", "numpy", "numba", "llvmlite", "scipy", "zarr", "numcodecs")
"""What decides on the bytes of an answer."""

SEEN_WITHIN = 5.0
"""Seconds that a file of a worker may take to be seen by the client: NFS keeps listings."""

_MISSING = re.compile(r"No module named [\\]*'([\w.]+)")
_PROCESS = uuid.uuid4().hex
_LOCK = Lock()
_proven: set[str] = set()
"""Tokens that this process has proven to see."""


@dataclass(frozen=True)
class Proof:
    """What a worker must show.

    Attributes
    ----------
    folder : Objects
        The store in which the folder of the run lies.
    path : str
        Of that folder in it.
    token : str
        What the token holds, and its name.
    inputs : tuple of (Objects, str, str)
        Objects that are read: where, key, SHA-256.
    versions : mapping of str to str
        From `versions`.
    process : str
        Whoever asks; its own workers see what it sees.
    """

    folder: Objects
    path: str
    token: str
    inputs: tuple[tuple[Objects, str, str], ...]
    versions: Mapping[str, str]
    process: str = field(default=_PROCESS)


_current: ContextVar[Proof | None] = ContextVar("proof", default=None)


def current() -> Proof | None:
    """Proof that tasks of this run must bring, if any."""
    return _current.get()


@contextmanager
def shared(
    client: Client, group: zarr.Group, inputs: Sequence[tuple[Objects, str]] = ()
) -> Iterator[None]:
    """Let only workers compute that see a group that is written, and the inputs.

    Parameters
    ----------
    client : distributed.Client
        Whose workers compute what is asked for inside the `with`.
    group : zarr.Group
        In the folder of the run.
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
    """Prove in a task, once in each process, that this worker sees what it must.

    Raises
    ------
    ClusterError
        If it does not.
    """
    if proof is None or proof.process == _PROCESS or proof.token in _proven:
        return
    with _LOCK:
        if proof.token not in _proven:
            prove(proof)
            _proven.add(proof.token)


def prove(proof: Proof, dask_worker: Worker | None = None) -> str:
    """Show that this worker sees what it must; return the name of the file that it leaves."""
    who = _name(dask_worker or get_worker())
    own = versions()
    differing = [
        f"{name} {own.get(name, 'none')} instead of {asked}"
        for name, asked in proof.versions.items()
        if own.get(name) != asked
    ]
    if differing:
        raise ClusterError(
            f"{who} has {', '.join(differing)}: give all workers the same environment."
        )
    where = f"{proof.folder.url}/{FOLDER}"
    if proof.folder.read(f"{proof.path}/{proof.token}") != proof.token.encode():
        raise ClusterError(
            f"{who} does not see {where}, which is written here: use an output folder that "
            "all workers share."
        )
    for objects, key, digest in proof.inputs:
        if _digest(objects, key) != digest:
            raise ClusterError(
                f"{who} does not see {objects.url}/{key} as it is here: use a folder that all "
                "workers share."
            )
    name = f"{proof.token}-{uuid.uuid4().hex}"
    try:
        _leave(proof, name)
    except OSError as error:
        raise ClusterError(
            f"{who} cannot write to {where} ({error.strerror or error}): give it the right to."
        ) from error
    _proven.add(proof.token)
    return name


def _leave(proof: Proof, name: str) -> None:
    store = proof.folder.store
    if isinstance(store, LocalStore):
        # Never makes the folder, which another may just have removed.
        with open(store.root / proof.path / name, "xb") as file:
            file.write(name.encode())
    else:
        proof.folder.write(f"{proof.path}/{name}", name.encode())


def _ask_all(client: Client, proof: Proof) -> None:
    """Let every worker that is there prove what it sees."""
    try:
        with saying(f"waiting for the workers at {scheduler_address(client)} to answer"):
            answers = client.sync(
                client._run, prove, proof, on_error="return", callback_timeout=wait_seconds()
            )
    except TimeoutError as error:
        raise ClusterError(
            f"A worker at {scheduler_address(client)} does not answer: see the logs of its "
            "workers, and end those that hang."
        ) from error
    for address, answer in answers.items():
        if isinstance(answer, ClusterError):
            raise answer
        # Dask keeps no more than the text of what is raised while a function is unpacked.
        if isinstance(answer, Exception) and (found := _MISSING.search(str(answer))):
            raise lacking(found[1], f"The worker {address}") from answer
        if isinstance(answer, OSError):
            # It went away, or cannot be reached: the scheduler will find out.
            continue
        if isinstance(answer, BaseException):
            raise ClusterError(
                f"The worker {address} cannot compute ({type(answer).__name__}: {answer}): give "
                "all workers the environment that you have here."
            ) from answer
        if not _seen(proof, answer):
            raise ClusterError(
                f"What the worker {address} writes to {proof.folder.url} is not seen here: use an "
                "output folder that all workers share."
            )


def lacking(package: str, who: str) -> ClusterError:
    """Say that a worker has another environment."""
    return ClusterError(
        f"{who} lacks the package {package}: install kpt-dask {version('kpt-dask')} in "
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
    """Versions of what decides on the bytes of an answer; of this program, with its code."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["kpt-dask"] = f"{found.get('kpt-dask', '')} (code {_code()})"
    return found


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
    """Name a worker as a person would look for it."""
    return f"The worker {worker.address} (process {os.getpid()} on {socket.gethostname()})"
