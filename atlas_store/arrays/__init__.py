"""Voxels on disk and in memory: chunks of Zarr arrays, read and written directly.

Knows no atlas.
"""
