"""Kernels: how they are compiled, and the pieces that are written in LLVM's language.

In: plain functions and NumPy arrays. Out: machine code without the GIL, cached on disk.
`jit` compiles; `handoff` passes work between threads; `row_filter` and `strip_sum` are vectorised.
Each piece in LLVM's language has a twin in plain numba: ``KPT_PLAIN_KERNELS=1`` runs on these.
Must not import Dask or Zarr; the only room of the package that imports llvmlite.
"""
