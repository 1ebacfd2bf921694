"""``python -m kpt_dask`` is ``kpt``."""

from kpt_dask.cli.main import main

main()
