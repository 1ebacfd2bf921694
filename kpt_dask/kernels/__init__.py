"""How kernels are made: compilation, SIMD pieces, atomics.

Knows neither Dask nor Zarr; the only room that touches llvmlite.
"""
