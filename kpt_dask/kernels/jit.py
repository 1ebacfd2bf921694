"""How kernels of this package are compiled, and whether they use LLVM's language.

A few pieces of kernels are written in LLVM's language, for speed alone. Each has a twin in plain
numba that gives the same bytes: its test, and its fallback where a release of llvmlite breaks it.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from atlas_store.arrays.jit import inlined_kernel, kernel, summing_kernel

__all__ = ["PLAIN", "either", "inlined_kernel", "kernel", "summing_kernel"]

F = TypeVar("F", bound=Callable[..., Any])

PLAIN = os.environ.get("KPT_PLAIN_KERNELS", "") not in ("", "0")
"""Whether the program runs on the twins: ``KPT_PLAIN_KERNELS=1`` in the environment."""


def either(llvm: Callable[..., Any], plain: F) -> F:
    """Choose what kernels call: a piece in LLVM's language, or its twin.

    Kernels are cached by what they call, so the two choices never share compiled code.
    """
    return plain if PLAIN else llvm  # type: ignore[return-value]
