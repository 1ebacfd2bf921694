"""``python -m kpt_dask`` is ``kpt``."""

from kpt_dask.cli import main

main()
