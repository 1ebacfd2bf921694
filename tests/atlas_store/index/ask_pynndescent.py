"""Ask pynndescent what a test asks, in a process of its own.

Run as a program with a folder. It holds ``segment``, as `Segment.dump` wrote it, and
``scan.npz`` with the ``descriptor``, ``scale`` and ``sign`` of a scan. What one thread finds is
written to ``found.npz``; that 2 and 4 threads and two processes at once find the same is
checked here.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from atlas_store.index.search import AtlasIndex, Neighbours
from atlas_store.index.segments import Segment


def main(folder: Path) -> None:
    segment = Segment.load((folder / "segment").read_bytes())
    assert segment is not None
    scan = np.load(folder / "scan.npz")
    cache = folder / "cache"

    def ask(mode: str = "pynndescent") -> Neighbours:
        index = AtlasIndex([segment], dict(segment.atlases), mode, cache)
        ids = [atlas_id for atlas_id, _ in segment.atlases]
        return index.query(scan["descriptor"], scan["scale"], scan["sign"], ids)

    def check(other: Neighbours) -> None:
        for name, values in vars(other).items():
            np.testing.assert_array_equal(values, getattr(found, name))

    found = ask()
    assert len(list(cache.glob("*.graph"))) == 2
    for threads in (2, 4):
        with ThreadPoolExecutor(threads) as pool:
            for other in pool.map(lambda _: ask(), range(threads)):
                check(other)
    # Forked, because a new process would compile for a minute.
    forked = []
    for _ in range(2):
        if (process := os.fork()) == 0:
            check(ask())
            os._exit(0)
        forked.append(process)
    assert [os.waitpid(process, 0)[1] for process in forked] == [0, 0]
    np.savez(folder / "found.npz", **vars(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
