"""Scan to multiscale volume: an OME-Zarr image whose levels are the octaves.

In: a `Scan`. Out: a `Volume`. Knows the scale space (eq. 1), no keypoints.
"""
