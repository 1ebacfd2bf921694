"""Between grids: a scan onto the working grid, labels and probabilities back onto the scan.

In: planes or blocks, and two grids. Out: the same on the other grid, anti-aliased or trilinear.
`stream` resamples parallel axes plane by plane, `blocks` interpolates between any two grids.
Must not import Dask or stations: it knows neither files nor volumes.
"""
