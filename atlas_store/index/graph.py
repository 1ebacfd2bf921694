"""A graph of neighbours among keypoints, built by pynndescent and searched by a kernel.

The graph is two plain arrays. Only building it imports pynndescent, which takes seconds and
compiles for a minute, so that is done in a process of its own. The search needs no lock and no
pickle, and gives the same result in any number of threads.
"""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.jit import kernel
from atlas_store.errors import AtlasStoreError
from atlas_store.index.nearest import Candidates, Query
from atlas_store.storage.cache import keep, recall

FEWEST = 512
"""Fewest descriptors of which a graph can be made."""
LISTED = 64
"""Neighbours that a search lists for each keypoint."""
SLACK = 1.1
"""Candidates are followed up to this factor of the squared distance of the last neighbour."""
ENTRIES = 64
"""Rows at which a search begins, evenly spaced."""
MOST_COMPARED = 1 << 14
"""Limit of the rows that a search compares with a keypoint, where few have a similar scale."""

LOWER_HALF = 0xFFFFFFFF
"""Bits of a key that hold the row; see `_Search`."""

PROGRAM = "from atlas_store.index.graph import build; build()"
"""Program of the process that builds graphs."""

_SUFFIX = ".graph"


class Graph(NamedTuple):
    """Neighbours of m keypoints.

    Attributes
    ----------
    begin : int32 array (m + 1)
        Neighbours of row i are ``neighbours[begin[i] : begin[i + 1]]``.
    neighbours : int32 array (e)
        Rows.
    """

    begin: NDArray[np.int32]
    neighbours: NDArray[np.int32]

    def dump(self) -> bytes:
        """Write it as an ``.npz`` without pickles."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, begin=self.begin, neighbours=self.neighbours)
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> "Graph":
        """Read what `dump` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(arrays["begin"], arrays["neighbours"])


def cached_graph(folder: Path, stem: str) -> Graph | None:
    """Get the graph of this name from the user's cache; None if it is not there, or damaged."""
    for path in folder.glob(f"{_name(stem)}-*{_SUFFIX}"):
        if (data := recall(path)) is not None:
            return Graph.load(data)
    return None


def build_graphs(
    wanted: Mapping[str, NDArray[np.uint8]], folder: Path
) -> Iterator[tuple[str, Graph]]:
    """Build graphs in a process of their own, and keep them in the cache.

    Parameters
    ----------
    wanted : mapping of str to uint8 array (m, 64)
        Descriptors (ranks), `FEWEST` or more, by a name of their content.
    folder : Path
        Folder of the cache.

    Yields
    ------
    str, Graph
        Each as soon as it is built.

    Raises
    ------
    AtlasStoreError
        If pynndescent cannot build one, most often for lack of memory.
    """
    with tempfile.TemporaryDirectory(prefix="kpt-graph-") as name:
        place = Path(name)
        for stem, descriptor in wanted.items():
            np.save(place / f"{stem}.npy", descriptor, allow_pickle=False)
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
        # It finds packages where this process does.
        found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with (
            open(place / "errors", "w+") as errors,
            subprocess.Popen(
                [*command, *(str(place / stem) for stem in wanted)],
                env=os.environ | found,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            built = 0
            try:
                for stem, line in zip(wanted, process.stdout, strict=False):
                    assert Path(line.strip()).name == stem
                    data = (place / f"{stem}{_SUFFIX}").read_bytes()
                    keep(folder, _name(stem), _SUFFIX, data)
                    built += 1
                    yield stem, Graph.load(data)
            finally:
                if built < len(wanted):
                    process.kill()
            if built < len(wanted):
                errors.seek(0)
                *_, said = ["it ended", *errors.read().split("\n")[:-1]]
                n = len(list(wanted.values())[built])
                raise AtlasStoreError(
                    f"pynndescent could not build a graph of {n} keypoints ({said}); give it more"
                    " memory, or search with --index exact."
                )


def _name(stem: str) -> str:
    return f"{stem}-pynndescent-{version('pynndescent')}"


def build() -> None:
    """Build the graphs of the files that the command line names."""
    for path in sys.argv[1:]:
        _build(path)


def _build(path: str) -> None:
    """Build the graph of the descriptors in a file; runs in a process of its own."""
    from pynndescent import NNDescent

    descriptor = np.load(f"{path}.npy", allow_pickle=False)
    index: Any = NNDescent(descriptor.astype(np.float32), random_state=0)
    index.prepare()
    # pynndescent sorts the rows by its trees, and numbers its graph in that order.
    edges, row_of = index._search_graph.tocoo(), np.asarray(index._vertex_order)
    ends = row_of[edges.row], row_of[edges.col]
    order = np.lexsort(ends[::-1])
    begin = np.searchsorted(ends[0][order], np.arange(len(descriptor) + 1))
    graph = Graph(begin.astype(np.int32), ends[1][order].astype(np.int32))
    Path(f"{path}{_SUFFIX}").write_bytes(graph.dump())
    print(path, flush=True)


@kernel
def _push(heap: NDArray[np.int64], size: int, key: int) -> None:
    """Add a key to a heap of `size`, the smallest first."""
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if heap[parent] <= key:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = key


@kernel
def _sink(heap: NDArray[np.int64], size: int, key: int) -> None:
    """Replace the smallest key of a heap of `size`."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = key


@kernel
def _squared_distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> Any:
    total = np.int32(0)
    for i in range(one.size):
        difference = np.int32(one[i]) - np.int32(other[i])
        total += difference * difference
    return np.int64(total)


class _Search(NamedTuple):
    """What a search knows of one keypoint.

    A key holds the squared distance of a row in its upper half and the row in its lower one, so
    that heaps have one order.

    Attributes
    ----------
    stamp : int32 array (m)
        Last keypoint that each row was compared with.
    ahead : int64 array (`MOST_COMPARED`)
        Heap of the keys of rows whose neighbours were not looked at, the nearest first.
    near : int64 array (`LISTED`)
        Heap of the negated keys of the nearest rows that may be listed, the farthest first.
    sizes : int64 array (3)
        Rows in `ahead`, in `near`, and compared so far.
    """

    stamp: NDArray[np.int32]
    ahead: NDArray[np.int64]
    near: NDArray[np.int64]
    sizes: NDArray[np.int64]


@kernel
def _limit(search: _Search) -> float:
    """Squared distance up to which rows are followed."""
    if search.sizes[1] < LISTED:
        return np.inf
    return SLACK * float(-search.near[0] >> 32)


@kernel
def _compare(
    search: _Search, i: int, row: int, query: Query, candidates: Candidates, wanted: Any
) -> None:
    """Compare a row with keypoint i, unless that was done."""
    sizes = search.sizes
    if search.stamp[row] == i or sizes[2] == MOST_COMPARED:
        return
    search.stamp[row] = i
    sizes[2] += 1
    squared = _squared_distance(query.descriptor[i], candidates.descriptor[row])
    key = squared << 32 | row
    if squared <= _limit(search):
        _push(search.ahead, sizes[0], key)
        sizes[0] += 1
    if wanted[row] and query.low[i] <= candidates.scale[row] <= query.high[i]:
        if sizes[1] < LISTED:
            _push(search.near, sizes[1], -key)
            sizes[1] += 1
        elif key < -search.near[0]:
            _sink(search.near, LISTED, -key)


@kernel
def nearest_in_graph(
    graph: Graph, query: Query, candidates: Candidates, wanted: NDArray[np.bool_]
) -> Any:
    """List rows that are probably the nearest to each keypoint, under the constraints of eq. 2.

    Best-first search: of the rows known so far, the nearest whose neighbours were not yet looked
    at is next, until that is farther than `SLACK` times the farthest of those listed. Rows that a
    constraint refuses lead on, but are not listed.

    Parameters
    ----------
    graph : Graph
    query : Query
        n keypoints of a scan.
    candidates : Candidates
        m keypoints of atlases, rows of the graph.
    wanted : bool array (m)
        Rows that may be listed.

    Returns
    -------
    int32 array (n, `LISTED`)
        Rows in no order; -1 where there are fewer.
    """
    n, m = query.low.size, wanted.size
    listed = np.full((n, LISTED), -1, np.int32)
    stamp, near = np.full(m, -1, np.int32), np.empty(LISTED, np.int64)
    search = _Search(stamp, np.empty(MOST_COMPARED, np.int64), near, np.zeros(3, np.int64))
    for i in range(n):
        sizes = search.sizes
        sizes[:] = 0
        for entry in range(ENTRIES):
            _compare(search, i, entry * m // ENTRIES, query, candidates, wanted)
        while sizes[0] and (search.ahead[0] >> 32) <= _limit(search):
            row = search.ahead[0] & LOWER_HALF
            sizes[0] -= 1
            _sink(search.ahead, sizes[0], search.ahead[sizes[0]])
            for edge in range(graph.begin[row], graph.begin[row + 1]):
                _compare(search, i, graph.neighbours[edge], query, candidates, wanted)
        for k in range(sizes[1]):
            listed[i, k] = -near[k] & LOWER_HALF
    return listed
