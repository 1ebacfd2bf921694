"""A plugin for napari, found by its manifest `napari.yaml`: volumes and segmentations open right.

In comes a path, out go layers as plain tuples; napari itself is not imported.
"""
