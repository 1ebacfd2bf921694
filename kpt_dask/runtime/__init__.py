"""Where work runs: Dask clusters, teams of threads, progress, memory.

In: functions with tasks. Out: results in the order in which tasks end, or a clear error.
`cluster` runs Dask tasks, `team` shares one task among threads, `progress` names stages.
Must not import a station: it knows neither scans nor keypoints.
"""
