"""Scan to multiscale volume: an OME-Zarr image whose levels are the octaves (eq. 1).

In: a `Scan`. Out: a `Volume` on the working grid, with its pyramid.
`scale_space` has the constants of the Gaussians, `blur` their kernels, `omezarr` the metadata.
Must not import keypoints or later stations.
"""
