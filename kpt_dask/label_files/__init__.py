"""Label maps as files: one module for each format, one contract (`formats`).

In comes a label map on a scan's own grid, deflated in pieces of planes; out go files that other
programs read. No module here decides a voxel, or imports Dask.
"""
