"""How this package compiles kernels."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

from atlas_store.arrays.kernel_cache import cached

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` without the GIL, cached on disk."""
    return cast(F, cached(numba.njit(nogil=True)(function)))
