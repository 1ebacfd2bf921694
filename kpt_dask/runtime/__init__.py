"""Where work runs: Dask clusters, teams of threads, progress, memory.

Knows no data of the way.
"""
