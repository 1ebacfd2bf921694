"""Volume to keypoints: extrema of the difference of Gaussians (eq. 1) and their descriptors.

In: a `Volume`, whose levels are the octaves. Out: an `xarray.Dataset` of keypoints.
`extraction` plans blocks and runs sweeps; a sweep finds extrema and describes them.
Must not import matching, atlases or the transfer; its kernels know neither Dask nor Zarr.
"""
