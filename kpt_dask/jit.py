"""One way to compile kernels, so that all of them share the same guarantees.

Kernels release the GIL (Dask threads run them side by side), are cached on disk, and
never run numba's own threads (its workqueue layer aborts the process inside Dask tasks).
`contract` alone is allowed of the fast-math flags: a fused multiply-add is the same
operation for every voxel, while reassociation would make a voxel's value depend on where
its block begins.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` without the GIL, cached, value-preserving but for fused multiply-adds."""
    compiled: Any = numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")(
        function
    )
    return cast(F, compiled)
