"""Between grids: the scan onto the working grid, labels back onto the scan.

In: streams of planes and affines. Out: planes on another grid. Knows neither files nor Dask.
"""
