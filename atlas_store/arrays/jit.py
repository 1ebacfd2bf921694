"""One way to compile kernels, for both packages, so that all of them share the same guarantees.

Kernels release the GIL (Dask threads run them side by side), are cached on disk, and
never run numba's own threads (its workqueue layer aborts the process inside Dask tasks).
`contract` alone is allowed of the fast-math flags: a fused multiply-add is the same
operation for every voxel, while reassociation would make a voxel's value depend on where
its block begins. Two kinds of loop need more to be vectorised, and may ask for it.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

from atlas_store.arrays.kernel_cache import cached

_config: Any = numba.config
if _config.DISABLE_JIT:
    raise ImportError("kpt-dask needs compiled kernels: unset NUMBA_DISABLE_JIT.")

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` without the GIL, cached, value-preserving but for fused multiply-adds."""
    return _compile(function, {"contract"})


def inlined_kernel(function: F) -> F:
    """Compile like `kernel`, and copy the code to where kernels call it.

    For loops so short that passing arrays to them would take a measurable part of the time.
    """
    return _compile(function, {"contract"}, forceinline=True)


def summing_kernel(function: F) -> F:
    """Compile like `kernel`, but sums may be split among the lanes of a vector.

    Only for sums over a list that does not depend on how the work was cut.
    """
    return _compile(function, {"contract", "reassoc", "nsz"})


def comparing_kernel(function: F) -> F:
    """Compile like `kernel`, but for numbers without NaN, so that a minimum is vectorised."""
    return _compile(function, {"nnan", "nsz"})


def _compile(function: F, fastmath: set[str], *, forceinline: bool = False) -> F:
    compile_ = numba.njit(
        nogil=True, fastmath=fastmath, error_model="numpy", forceinline=forceinline
    )
    compiled = compile_(function)
    return cast(F, cached(compiled))
