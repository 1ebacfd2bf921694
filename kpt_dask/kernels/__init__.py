"""Kernels: how they are compiled, and the pieces that are written in LLVM's language.

In: plain functions and NumPy arrays. Out: machine code without the GIL, cached on disk.
`jit` compiles; `handoff` passes work between threads. The other modules are SIMD operations.
Must not import Dask or Zarr; the only room of the package that imports llvmlite.
"""
