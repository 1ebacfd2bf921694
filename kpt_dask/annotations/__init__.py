"""Labels that others drew: masks, segmentations and contours, brought to a scan's grid by name.

In comes a path, a scan and the organs of a store; out goes a label map with the store's values on
the scan's grid. Names decide where a format has them, values elsewhere.
"""
