"""A segment of the index: keypoints of several atlases, immutable.

Small segments are searched exactly, by BLAS. In large ones a graph of neighbours proposes atlases,
which are then searched exactly (`atlas_store.index.graph`).
"""

import io
import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from atlas_store.index.graph import (
    FEWEST,
    Graph,
    build_graphs,
    cached_graph,
    nearest_in_graph,
)
from atlas_store.index.nearest import (
    Best,
    Candidates,
    Numbers,
    Query,
    search_every_atlas,
    search_listed_atlases,
)
from atlas_store.storage.digests import canonical, digest

ENCODING = {"encoding-type": "kpt-index-segment", "encoding-version": "2"}

PAYS_FROM = 1 << 18
"""Keypoints of one sign from which a graph is built without being asked for: of some 4000 atlases.
For a scan of 580 keypoints BLAS takes 0.16 s of 2000 atlases and a graph 0.28 s, on two cores; of
20 000 BLAS takes 2.0 s and a graph half as long."""

_THREADS = 4
"""Threads that search a graph, each for some of the keypoints."""
_COLUMNS = 8192
"""Descriptors of atlases whose scalar products are in memory at a time."""
_FIRST_LEVEL = 4096
"""Descriptors from which a segment is of level 1; see `merges`."""
_FANOUT = 4
"""Segments of a level that are joined to one of the next."""

_FIELDS = ("keypoint", "label", "position", "scale", "descriptor")

_graphs: dict[str, Graph] = {}
"""Graphs of this process by name: loading one takes longer than a query."""
_one_at_a_time = threading.Lock()
"""Threads that want the same graph wait for the one that loads or builds it."""


@dataclass(frozen=True, eq=False)
class SignedKeypoints:
    """Keypoints of one sign, n of them, atlas by atlas.

    Attributes
    ----------
    offsets : ndarray (A + 1), int64
        Keypoints of atlas i are ``offsets[i]`` to ``offsets[i + 1]``.
    keypoint : ndarray (n), int32
        Index of the keypoint in its atlas.
    label : ndarray (n), uint16
        Label value of its organ, 0 for none.
    position : ndarray (n, 3), float32
        (z, y, x) in mm, in the world of its atlas.
    scale : ndarray (n), float32
        mm.
    descriptor : ndarray (n, 64), uint8
        Ranks.
    """

    offsets: NDArray[np.int64]
    keypoint: NDArray[np.int32]
    label: NDArray[np.uint16]
    position: NDArray[np.float32]
    scale: NDArray[np.float32]
    descriptor: NDArray[np.uint8]

    @cached_property
    def atlas_of(self) -> NDArray[np.int32]:
        """Atlas of each keypoint."""
        counts = np.diff(self.offsets)
        return np.repeat(np.arange(counts.size, dtype=np.int32), counts)

    def only(self, atlases: NDArray[np.int64]) -> "SignedKeypoints":
        """Keypoints of these atlases, in this order."""
        counts = np.diff(self.offsets)[atlases]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[atlases] - offsets[:-1], counts)
        return SignedKeypoints(offsets, *(getattr(self, name)[rows] for name in _FIELDS))

    def search(
        self, query: Query, atlas_number: NDArray[np.int64], segment_number: int, best: Best
    ) -> None:
        """Search all atlases exactly; see `atlas_store.index.nearest`."""
        wanted = query.descriptor.astype(np.float32)
        squares = (wanted**2).sum(axis=1)
        for a, b in _runs(self.offsets):
            columns = slice(int(self.offsets[a]), int(self.offsets[b]))
            known = self.descriptor[columns].astype(np.float32)
            search_every_atlas(
                wanted @ known.T,
                (squares, (known**2).sum(axis=1)),
                query,
                Candidates(
                    self.descriptor[columns],
                    self.scale[columns],
                    self.offsets[a : b + 1] - columns.start,
                ),
                Numbers(atlas_number[a:b], segment_number, columns.start),
                best,
            )


@dataclass(frozen=True, eq=False)
class Segment:
    """Keypoints of A atlases.

    Attributes
    ----------
    atlases : tuple of (str, str)
        Id and uuid of each; a uuid names content that never changes.
    annotated : bool ndarray (A, O)
        Which organs of the store's table each atlas annotates.
    by_sign : tuple of SignedKeypoints
        Keypoints of sign -1, and of sign 1.
    """

    atlases: tuple[tuple[str, str], ...]
    annotated: NDArray[np.bool_]
    by_sign: tuple[SignedKeypoints, SignedKeypoints]

    def __len__(self) -> int:
        """Count the keypoints."""
        return sum(len(keypoints.scale) for keypoints in self.by_sign)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Join several segments."""

        def joined(by_sign: Sequence[SignedKeypoints]) -> SignedKeypoints:
            counts = np.concatenate([np.diff(keypoints.offsets) for keypoints in by_sign])
            return SignedKeypoints(
                np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                *(
                    np.concatenate([getattr(keypoints, name) for keypoints in by_sign])
                    for name in _FIELDS
                ),
            )

        first, second = (joined([part.by_sign[i] for part in parts]) for i in (0, 1))
        return cls(
            tuple(atlas for part in parts for atlas in part.atlases),
            np.concatenate([part.annotated for part in parts]),
            (first, second),
        )

    def only(self, atlases: Sequence[int]) -> "Segment":
        """Take these atlases, in this order."""
        rows = np.asarray(atlases, np.int64)
        first, second = (keypoints.only(rows) for keypoints in self.by_sign)
        chosen = tuple(self.atlases[i] for i in atlases)
        return Segment(chosen, self.annotated[rows], (first, second))

    @cached_property
    def name(self) -> str:
        """SHA-256 of its atlases' ids and uuids: the name of its content."""
        return digest(canonical([ENCODING, self.atlases]))

    def dump(self) -> bytes:
        """Write it as an ``.npz`` without pickles."""
        about = json.dumps(ENCODING | {"atlases": self.atlases}).encode()
        arrays = {
            f"{name}_{i}": getattr(keypoints, name)
            for i, keypoints in enumerate(self.by_sign)
            for name in ("offsets", *_FIELDS)
        }
        arrays["annotated"] = self.annotated
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, about=np.frombuffer(about, np.uint8), **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Self | None:
        """Read what `dump` wrote; None if another version did."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if any(about.get(key) != value for key, value in ENCODING.items()):
                return None
            first, second = (
                SignedKeypoints(*(arrays[f"{name}_{i}"] for name in ("offsets", *_FIELDS)))
                for i in (0, 1)
            )
            annotated = arrays["annotated"]
        return cls(tuple((i, uuid) for i, uuid in about["atlases"]), annotated, (first, second))

    def search(
        self,
        query: Query,
        sign: int,
        numbers: Numbers,
        best: Best,
        mode: str,
        folder: Path,
    ) -> None:
        """Search for keypoints of one sign.

        Parameters
        ----------
        query : Query
            Keypoints of a scan.
        sign : int
            -1 or 1.
        numbers : Numbers
            How to number atlases and this segment.
        best : Best
            Updated with what is nearer than its entries, which are of other segments.
        mode : str
            ``auto``, ``pynndescent`` or ``exact``.
        folder : Path
            Folder of the cached graphs.
        """
        keypoints = self.by_sign[sign > 0]
        atlas_number, segment_number = numbers.atlas, numbers.segment
        if not mostly_wanted(atlas_number):
            # Most atlases that a graph lists would be unwanted ones.
            wanted = np.flatnonzero(atlas_number >= 0)
            part = keypoints.only(wanted)
            part.search(query, atlas_number[wanted], segment_number, best)
            shift = keypoints.offsets[wanted] - part.offsets[:-1]
            found = best.segment == segment_number
            best.row[found] += shift[part.atlas_of[best.row[found]]]
        elif (graph := self.graph(sign, mode, folder)) is None:
            keypoints.search(query, atlas_number, segment_number, best)
        else:
            candidates = Candidates(keypoints.descriptor, keypoints.scale, keypoints.offsets)
            wanted_rows = atlas_number[keypoints.atlas_of] >= 0
            listed = nearest_in_threads(graph, query, candidates, wanted_rows)
            search_listed_atlases(listed, keypoints.atlas_of, query, candidates, numbers, best)

    def graph(self, sign: int, mode: str, folder: Path) -> Graph | None:
        """Get the graph of the keypoints of one sign; None if they are to be searched exactly.

        Parameters
        ----------
        sign : int
            -1 or 1.
        mode : str
            ``exact``: none. ``auto``: one from the cache; built from `PAYS_FROM` keypoints on.
            ``pynndescent``: built wherever that is possible.
        folder : Path
            Folder of the cached graphs.
        """
        if mode == "exact" or len(self.by_sign[sign > 0].scale) < FEWEST:
            return None
        with _one_at_a_time:
            for _ in build_missing([self], folder, fewest_for(mode)):
                pass
            return self._known_graph(sign, folder)

    def _known_graph(self, sign: int, folder: Path) -> Graph | None:
        stem = self._stem(sign)
        if stem not in _graphs and (found := cached_graph(folder, stem)) is not None:
            _graphs[stem] = found
        return _graphs.get(stem)

    def _stem(self, sign: int) -> str:
        """Name of the content of the keypoints of one sign."""
        return f"{self.name}-{max(sign, 0)}"

    def missing_graphs(self, folder: Path, fewest: int) -> dict[str, NDArray[np.uint8]]:
        """Descriptors of which a graph is to be built, by the name of their content."""
        return {
            self._stem(sign): self.by_sign[sign > 0].descriptor
            for sign in (-1, 1)
            if len(self.by_sign[sign > 0].scale) >= fewest
            and self._known_graph(sign, folder) is None
        }


def nearest_in_threads(
    graph: Graph, query: Query, candidates: Candidates, wanted: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Do what `nearest_in_graph` does, part by part of the query."""
    ends = np.linspace(0, query.low.size, _THREADS + 1).astype(int)
    parts = [
        Query(query.descriptor[a:b], query.low[a:b], query.high[a:b]) for a, b in pairwise(ends)
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        listed = threads.map(lambda part: nearest_in_graph(graph, part, candidates, wanted), parts)
        return np.concatenate(list(listed))


def mostly_wanted(atlas_number: NDArray[np.int64]) -> bool:
    """Whether at least half of a segment's atlases are wanted: those of no negative number."""
    return bool(2 * np.count_nonzero(atlas_number >= 0) >= atlas_number.size)


def fewest_for(mode: str) -> int:
    """Keypoints of one sign from which a search builds a graph; see `Segment.graph`."""
    return PAYS_FROM if mode == "auto" else FEWEST


def build_missing(segments: Sequence[Segment], folder: Path, fewest: int = FEWEST) -> Iterator[int]:
    """Build the graphs that segments lack, of at least so many keypoints, in one process.

    Yields
    ------
    int
        Number of keypoints of each graph, when it is built.
    """
    missing: dict[str, NDArray[np.uint8]] = {}
    for segment in segments:
        missing |= segment.missing_graphs(folder, fewest)
    if not missing:
        return
    for stem, graph in build_graphs(missing, folder):
        _graphs[stem] = graph
        yield len(missing[stem])


def merges(sizes: Sequence[int]) -> list[list[int]]:
    """Plan which segments to join, as log-structured stores do.

    Segments of similar size, within a factor of `_FANOUT`, are joined as soon as there are
    `_FANOUT` of them. So a store of n descriptors has O(log n) segments, and each descriptor
    is copied O(log n) times while they grow.

    Parameters
    ----------
    sizes : sequence of int
        Descriptors in each segment.

    Returns
    -------
    list of list of int
        Indices of the segments to join, two or more in each list.
    """
    groups = [([i], size) for i, size in enumerate(sizes)]
    while True:
        levels = defaultdict(list)
        for group in groups:
            levels[_level(group[1])].append(group)
        full = next((level for level in sorted(levels) if len(levels[level]) >= _FANOUT), None)
        if full is None:
            return [sorted(members) for members, _ in groups if len(members) > 1]
        joined = levels.pop(full)
        groups = [group for level in levels.values() for group in level]
        groups.append(([i for g in joined for i in g[0]], sum(g[1] for g in joined)))


def _level(size: int) -> int:
    level = 0
    while size >= _FIRST_LEVEL * _FANOUT**level:
        level += 1
    return level


def _runs(offsets: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut atlases into runs of at most `_COLUMNS` keypoints, or of one atlas."""
    runs = []
    a = 0
    while a < offsets.size - 1:
        b = int(np.searchsorted(offsets, offsets[a] + _COLUMNS, side="right")) - 1
        b = min(max(b, a + 1), offsets.size - 1)
        runs.append((a, b))
        a = b
    return runs
