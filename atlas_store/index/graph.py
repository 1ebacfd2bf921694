"""A graph of neighbours among keypoints, built by pynndescent and searched by a kernel.

Keypoints of many atlases lie in clusters, each of one place in the body, and a graph of nearest
neighbours hardly leads from one to another. So there are layers: every keypoint is in the lowest,
one of `THINNING` at random also in the next, and so on. In upper layers, few of a cluster are left,
and neighbours are in other ones.

The graph is plain arrays. Only building it imports pynndescent, which takes seconds and
compiles for a minute, so that is done in a process of its own. The search needs no lock and no
pickle, and gives the same result in any number of threads.
"""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.jit import inlined_kernel, kernel
from atlas_store.errors import AtlasStoreError
from atlas_store.index.nearest import Candidates, Query
from atlas_store.storage.cache import keep, recall

FEWEST = 512
"""Fewest descriptors of which a graph can be made."""
LISTED = 64
"""Neighbours that a search lists for each keypoint."""
SLACK = 1.05
"""Nodes are followed up to this factor of the squared distance of the last neighbour. Among 1780
atlases made of 8 patients, 6 % of the nearest keypoints are missed, and 15 % among 20 000; with 1.0
10 % and 30 %, with 1.1 in twice the time 3 % and 10 %. Without layers, 86 % are among 1780."""
THINNING = 16
"""Keypoints of a layer for each one that is in the next layer, too."""
MOST_COMPARED = 1 << 14
"""Limit of the nodes that a search compares with a keypoint, where few have a similar scale."""

LOWER_HALF = 0xFFFFFFFF
"""Bits of a key that hold the node; see `_Search`."""

PROGRAM = "from atlas_store.index.graph import build; build()"
"""Program of the process that builds graphs."""

_SUFFIX = ".graph"


class Graph(NamedTuple):
    """Neighbours of m keypoints.

    Nodes 0 to m - 1 are the keypoints, those after them copies in upper layers. The first
    neighbour of a copy is the node of the same keypoint in the layer below.

    Attributes
    ----------
    begin : int32 array (nodes + 1)
        Neighbours of node i are ``neighbours[begin[i] : begin[i + 1]]``.
    neighbours : int32 array (e)
        Nodes.
    copies : int32 array (nodes - m)
        Row of the keypoint of each node in an upper layer, layer by layer.
    layers : int32 array (layers)
        First node of each layer.
    """

    begin: NDArray[np.int32]
    neighbours: NDArray[np.int32]
    copies: NDArray[np.int32]
    layers: NDArray[np.int32]

    def dump(self) -> bytes:
        """Write it as an ``.npz`` without pickles."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **self._asdict())
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> "Graph":
        """Read what `dump` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(*(arrays[name] for name in cls._fields))


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
    return f"{stem}-layers-pynndescent-{version('pynndescent')}"


def build() -> None:
    """Build the graphs of the files that the command line names."""
    for path in sys.argv[1:]:
        _build(path)


def _build(path: str) -> None:
    """Build the graph of the descriptors in a file; runs in a process of its own."""
    descriptor = np.load(f"{path}.npy", allow_pickle=False)
    graph = layered_graph(descriptor, _neighbours)
    Path(f"{path}{_SUFFIX}").write_bytes(graph.dump())
    print(path, flush=True)


def layered_graph(
    descriptor: NDArray[np.uint8],
    neighbours: Callable[[NDArray[np.uint8]], tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Graph:
    """Make a graph in layers.

    Parameters
    ----------
    descriptor : uint8 array (m, 64)
        `FEWEST` or more.
    neighbours : callable
        Given some of them, returns pairs as two int64 arrays, row and neighbour.
    """
    order = np.random.default_rng(0).permutation(len(descriptor))
    rows, below = np.arange(len(descriptor)), np.zeros(0, np.int64)
    layers, degrees, ends, copies = [0], [], [], [np.zeros(0, np.int64)]
    while rows.size:
        # All of the highest layer are compared, so it needs no neighbours.
        pairs = neighbours(descriptor[rows]) if rows.size >= FEWEST else (below[:0], below[:0])
        start = np.concatenate([np.arange(below.size), pairs[0]])
        end = np.concatenate([below, layers[-1] + pairs[1]])
        ends.append(end[np.argsort(start, kind="stable")])
        degrees.append(np.bincount(start, minlength=rows.size))
        if rows.size < FEWEST:
            break
        kept = np.sort(order[: rows.size // THINNING])
        below = layers[-1] + np.searchsorted(rows, kept)
        layers.append(layers[-1] + rows.size)
        rows = kept
        copies.append(rows)
    begin = np.cumsum(np.concatenate([[0], *degrees]))
    arrays = begin, np.concatenate(ends), np.concatenate(copies), np.array(layers)
    return Graph(*(array.astype(np.int32) for array in arrays))


def _neighbours(descriptor: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find neighbours by pynndescent: pairs of row and neighbour."""
    from pynndescent import NNDescent

    index: Any = NNDescent(descriptor.astype(np.float32), random_state=0)
    index.prepare()
    # pynndescent sorts the rows by its trees, and numbers its graph in that order.
    edges, row_of = index._search_graph.tocoo(), np.asarray(index._vertex_order)
    start, end = row_of[edges.row].astype(np.int64), row_of[edges.col].astype(np.int64)
    order = np.lexsort((end, start))
    return start[order], end[order]


@inlined_kernel
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


@inlined_kernel
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


@inlined_kernel
def _squared_distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> Any:
    total = np.int32(0)
    for i in range(one.size):
        difference = np.int32(one[i]) - np.int32(other[i])
        total += difference * difference
    return np.int64(total)


class _Search(NamedTuple):
    """What a search knows of one keypoint.

    A key holds the squared distance of a node in its upper half and the node in its lower one, so
    that heaps have one order.

    Attributes
    ----------
    stamp : int32 array (nodes)
        Last keypoint that each node was compared with.
    ahead : int64 array (`MOST_COMPARED`)
        Heap of the keys of nodes whose neighbours were not looked at, the nearest first.
    near : int64 array (`LISTED`)
        Heap of the negated keys of the nearest rows that may be listed, the farthest first.
    sizes : int64 array (3)
        Nodes in `ahead`, in `near`, and compared so far.
    """

    stamp: NDArray[np.int32]
    ahead: NDArray[np.int64]
    near: NDArray[np.int64]
    sizes: NDArray[np.int64]


@inlined_kernel
def _limit(search: _Search) -> float:
    """Squared distance up to which nodes are followed."""
    if search.sizes[1] < LISTED:
        return np.inf
    return SLACK * float(-search.near[0] >> 32)


@inlined_kernel
def _compare(
    search: _Search,
    i: int,
    node: int,
    graph: Graph,
    query: Query,
    candidates: Candidates,
    wanted: Any,
) -> None:
    """Compare a node with keypoint i, unless that was done."""
    sizes = search.sizes
    if search.stamp[node] == i or sizes[2] == MOST_COMPARED:
        return
    search.stamp[node] = i
    sizes[2] += 1
    row = node if node < wanted.size else graph.copies[node - wanted.size]
    squared = _squared_distance(query.descriptor[i], candidates.descriptor[row])
    key = squared << 32 | node
    if squared <= _limit(search):
        _push(search.ahead, sizes[0], key)
        sizes[0] += 1
    if wanted[row] and query.low[i] <= candidates.scale[row] <= query.high[i]:
        if sizes[1] < LISTED:
            _push(search.near, sizes[1], -key)
            sizes[1] += 1
        elif key < -search.near[0]:
            _sink(search.near, LISTED, -key)


@inlined_kernel
def _follow(
    search: _Search,
    i: int,
    layer: int,
    graph: Graph,
    query: Query,
    candidates: Candidates,
    wanted: Any,
) -> None:
    """Search a layer from the nodes that were compared."""
    sizes, ahead = search.sizes, search.ahead
    down = 1 if layer > 0 else 0
    while sizes[0] and (ahead[0] >> 32) <= _limit(search):
        node = ahead[0] & LOWER_HALF
        sizes[0] -= 1
        _sink(ahead, sizes[0], ahead[sizes[0]])
        for edge in range(graph.begin[node] + down, graph.begin[node + 1]):
            _compare(search, i, graph.neighbours[edge], graph, query, candidates, wanted)


@kernel
def nearest_in_graph(
    graph: Graph, query: Query, candidates: Candidates, wanted: NDArray[np.bool_]
) -> Any:
    """List rows that are probably the nearest to each keypoint, under the constraints of eq. 2.

    All of the highest layer are compared. Below, a search begins at those listed above, and is
    best-first: of the nodes known so far, the nearest whose neighbours were not yet looked at is
    next, until that is farther than `SLACK` times the farthest of those listed. Rows that a
    constraint refuses lead on, but are listed in no layer.

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
    n, nodes, top = query.low.size, graph.begin.size - 1, graph.layers.size - 1
    listed = np.full((n, LISTED), -1, np.int32)
    stamp, near = np.full(nodes, -1, np.int32), np.empty(LISTED, np.int64)
    search = _Search(stamp, np.empty(MOST_COMPARED, np.int64), near, np.zeros(3, np.int64))
    entries = np.empty(1 + top * LISTED, np.int32)
    for i in range(n):
        search.sizes[:] = 0
        for node in range(graph.layers[top], nodes):
            _compare(search, i, node, graph, query, candidates, wanted)
        # The nearest leads on, whether or not a constraint refuses it.
        entries[0] = search.ahead[0] & LOWER_HALF
        known = 1
        for layer in range(top, 0, -1):
            _follow(search, i, layer, graph, query, candidates, wanted)
            for k in range(search.sizes[1]):
                entries[known] = -near[k] & LOWER_HALF
                known += 1
            search.sizes[:] = 0
            for k in range(known):
                # The first neighbour of a copy is the same keypoint in the layer below.
                entries[k] = graph.neighbours[graph.begin[entries[k]]]
                _compare(search, i, entries[k], graph, query, candidates, wanted)
        _follow(search, i, 0, graph, query, candidates, wanted)
        for k in range(search.sizes[1]):
            listed[i, k] = -near[k] & LOWER_HALF
    return listed
