"""Volume to keypoints: extrema of the difference of Gaussians (eq. 1) and their descriptors.

In: a `Volume`. Out: an `xarray.Dataset` of keypoints. Kernels know neither Dask nor Zarr.
"""
