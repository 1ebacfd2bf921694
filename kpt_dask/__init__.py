"""Keypoint transfer segmentation of CT scans, streamed with Dask and Zarr."""
