"""Compiled kernels on disk: found again by what they are made of, done without where that fails.

Numba's own cache looks for changes in the file of a kernel alone, ends the program at a damaged
file or where no folder can be written, and may give a process the code that another compiled at
the same time. Here a kernel is compiled anew when its code changes, or that of a function that it
calls, or a constant that it reads, and for nothing else. A file holds its digest and the key it
was made for, and appears in one rename.
"""

import hashlib
import os
import pickle
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from numba.core import caching, compiler, config, dispatcher
from numba.core.serialize import dumps

_caching: Any = caching
_compiler: Any = compiler
_config: Any = config
_dumps: Any = dumps
_Dispatcher: Any = dispatcher.Dispatcher

_DIGEST_BYTES = hashlib.sha256().digest_size
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type(...), np.generic, np.dtype)
_LIBRARIES = sys.stdlib_module_names | {"numpy", "numba", "llvmlite"}


class KernelCacheWarning(UserWarning):
    """Compiled kernels cannot be kept: each process compiles them anew."""


class KernelCache(_caching._Cache):  # type: ignore[misc]
    """Files of one compiled kernel, by signature and processor.

    Parameters
    ----------
    kernel : Dispatcher
        From ``numba.njit``, without ``cache``.
    """

    def __init__(self, kernel: Any) -> None:
        function = kernel.py_func
        source = Path(function.__code__.co_filename)
        self._kernel = kernel
        self._stem = f"{source.stem}.{function.__qualname__}.{sys.implementation.cache_tag}"
        self._folder, self._failure = writable_folder(source.parent)
        # An administrator may have installed compiled kernels there for all users.
        self._installed = source.parent / "__pycache__"
        self._enabled = True

    @property
    def cache_path(self) -> str:
        """Folder of the files."""
        return str(self._folder or self._installed)

    def enable(self) -> None:
        """Look for compiled code, and keep it."""
        self._enabled = True

    def disable(self) -> None:
        """Compile anew."""
        self._enabled = False

    def flush(self) -> None:
        """Forget what was compiled."""
        for path in Path(self.cache_path).glob(f"{self._stem}.*.nbc"):
            with suppress(OSError):
                path.unlink()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what was compiled for a signature; None if there is nothing usable."""
        target_context.refresh()
        if not self._enabled:
            return None
        name, key = self._name_and_key(sig, target_context.codegen())
        for folder in dict.fromkeys((self._folder, self._installed)):
            # Whatever is wrong with a file, the kernel can be compiled, and replaces it.
            with suppress(Exception):
                payload = None if folder is None else _recall(folder / name, key)
                if payload is not None:
                    return _compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled for a signature; warn once if that is not possible."""
        if not self._enabled or data.library.has_dynamic_globals or data.lifted:
            return
        if self._folder is None:
            _warn(self._failure)
            return
        name, key = self._name_and_key(sig, data.codegen)
        try:
            _keep(self._folder / name, key, _dumps(data._reduce()))
        except OSError as error:
            _warn(f"{self._folder}: {error.strerror}")

    def _name_and_key(self, sig: Any, codegen: Any) -> tuple[str, bytes]:
        """Name of the file, and the digest of all that the machine code is made from."""
        # A changed kernel replaces what was compiled before; other processors' code stays.
        which = _digest([repr(sig), repr(codegen.magic_tuple())])
        made_from = [
            which.hex(),
            numba.__version__,
            f"{_config.OPT} {_config.BOUNDSCHECK}",
            stamp(self._kernel),
        ]
        return f"{self._stem}.{which.hex()[:16]}.nbc", _digest(made_from)


def cached(kernel: Any) -> Any:
    """Keep what numba compiles of a kernel on disk; return the kernel."""
    kernel._cache = KernelCache(kernel)
    return kernel


@cache
def writable_folder(source: Path) -> tuple[Path | None, str]:
    """Find where kernels of a source folder can be kept.

    That is, the first that can be written, of a folder in ``$NUMBA_CACHE_DIR``, the source
    folder's ``__pycache__``, and a folder in the user's cache.

    Returns
    -------
    folder : Path or None
    failure : str
        Reason why there is none.
    """
    resolved = os.path.abspath(source)
    own = f"{source.name}_{hashlib.sha1(resolved.encode(), usedforsecurity=False).hexdigest()}"
    choices = [source / "__pycache__"]
    if _config.CACHE_DIR:
        choices.insert(0, Path(_config.CACHE_DIR) / own)
    # Without a home, expanduser leaves the tilde, which would become a folder of that name.
    home = Path(os.path.expanduser("~"))
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        caches = home / ".cache"
    if caches.is_absolute() and (caches.is_dir() or home.is_dir()):
        choices.append(caches / "numba" / own)
    failures = []
    for folder in choices:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            failures.append(f"{folder}: {error.strerror}")
        else:
            return folder, ""
    return None, "; ".join(failures)


def _keep(path: Path, key: bytes, payload: bytes) -> None:
    partial = path.with_name(f"{path.name}.tmp.{uuid.uuid4().hex[:16]}")
    content = key + payload
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(content).digest() + content)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _recall(path: Path, key: bytes) -> bytes | None:
    """Read what was kept under a key; None if the file is missing, stale or damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest or content[:_DIGEST_BYTES] != key:
        return None
    return content[_DIGEST_BYTES:]


_warned = threading.Event()


def _warn(why: str) -> None:
    if _warned.is_set():
        return
    _warned.set()
    warnings.warn(
        "Kernels are compiled anew in each process, which takes up to a minute, because no folder"
        f" can be written to keep them in ({why}): set NUMBA_CACHE_DIR to one that can.",
        KernelCacheWarning,
        stacklevel=2,
    )


@cache
def stamp(kernel: Any) -> str:
    """Digest of what a kernel is made of: its code, what it calls, the constants it reads."""
    return _digest(_parts(kernel, set())).hex()


def _digest(parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _parts(value: Any, seen: set[int]) -> Iterator[str | bytes]:
    """Yield what makes up a value that a kernel refers to, each function once."""
    if isinstance(value, _Dispatcher):
        # Sets of flags have no order of their own.
        given = value.targetoptions
        options = {k: sorted(v) if isinstance(v, set) else v for k, v in given.items()}
        yield f"kernel {sorted(options.items())}"
        value = value.py_func
    # Numba's intrinsics hold the function that makes their code.
    value = getattr(value, "_defn", value)
    if isinstance(value, _SIMPLE):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__} {len(value)}"
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, frozenset):
        yield f"set {sorted(map(repr, value))}"
    elif isinstance(value, np.ndarray):
        yield f"array {value.dtype} {value.shape}"
        yield value.tobytes()
    elif isinstance(value, FunctionType):
        yield f"function {value.__module__}.{value.__qualname__}"
        if id(value) not in seen and _ours(value.__module__):
            seen.add(id(value))
            yield from _parts(value.__defaults__, seen)
            yield from _parts(tuple(c.cell_contents for c in value.__closure__ or ()), seen)
            yield from _code_parts(value.__code__, value.__globals__, seen)
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}"
        if _ours(value.__name__):
            yield _file_of(value.__name__)
    else:
        kind = value if isinstance(value, type) else type(value)
        yield f"object {kind.__module__}.{kind.__qualname__}"
        if _ours(kind.__module__):
            yield _file_of(kind.__module__)


def _code_parts(code: CodeType, names: dict[str, Any], seen: set[int]) -> Iterator[str | bytes]:
    yield code.co_code
    yield repr((code.co_argcount, code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant, names, seen)
        else:
            yield from _parts(constant, seen)
    for name in code.co_names:
        if name in names:
            yield from _parts(names[name], seen)


def _ours(module: str) -> bool:
    """Whether a module may change while the versions of all libraries stay."""
    return module.partition(".")[0] not in _LIBRARIES


@cache
def _file_of(module: str) -> bytes:
    path = getattr(sys.modules.get(module), "__file__", None)
    return b"" if path is None else Path(path).read_bytes()
