"""A segment of the index: organ keypoints of some atlases, never changed once made.

Small segments are searched exactly, by BLAS. Large ones by a graph of neighbours
(pynndescent), which proposes atlases that are then searched exactly.
"""

import io
import json
import math
import pickle
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from atlas_store.cache import keep, recall
from atlas_store.info import canonical, digest
from atlas_store.keypoints import DESCRIPTOR_BINS
from atlas_store.nearest import of_every_atlas, of_listed_atlases

ENCODING = {"encoding-type": "kpt-index-segment", "encoding-version": "1"}

PAYS_FROM = 1 << 18
"""Descriptors of one sign from which a graph beats BLAS; see scripts/benchmark_store.py."""
LISTED = 256
"""Neighbours that a graph is asked for."""

_FEWEST = 512
"""Descriptors of which a graph can be made."""
_COLUMNS = 8192
"""Descriptors whose distances are held at a time."""
_FIRST_LEVEL = 4096
_FANOUT = 4

_FIELDS = ("keypoint", "label", "position", "scale", "descriptor")

_one_at_a_time = threading.Lock()
"""pynndescent 0.7.0 gives wrong neighbours to two threads that query one graph."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]
"""Atlas (-1 for none), row, first and second squared distance; each (n, some)."""


@dataclass(frozen=True, eq=False)
class Side:
    """Organ keypoints of one sign, n of them, atlas by atlas.

    Attributes
    ----------
    offsets : ndarray (A + 1), int64
        Those of atlas i are ``offsets[i]`` to ``offsets[i + 1]``.
    keypoint : ndarray (n), int32
        Which keypoint of its atlas it is.
    label : ndarray (n), uint16
        Label value of its organ.
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

    def only(self, atlases: NDArray[np.int64]) -> "Side":
        """Those of some atlases, in that order."""
        counts = np.diff(self.offsets)[atlases]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[atlases] - offsets[:-1], counts)
        return Side(offsets, *(getattr(self, name)[rows] for name in _FIELDS))

    def search(
        self, descriptor: NDArray[np.uint8], scale: NDArray[np.float32], ratio: float
    ) -> list[Pairs]:
        """Search all atlases exactly; a part for every few atlases."""
        low, high = _limits(scale, ratio)
        test = descriptor.astype(np.float32)
        squared = (test**2).sum(axis=1)[:, None]
        parts = []
        for a, b in _runs(self.offsets):
            columns = slice(int(self.offsets[a]), int(self.offsets[b]))
            other = self.descriptor[columns].astype(np.float32)
            distances = test @ other.T
            distances *= -2
            distances += (other**2).sum(axis=1)
            distances += squared
            shape = len(test), b - a
            nearest = np.empty(shape, np.int64)
            first, second = np.empty(shape, np.float32), np.empty(shape, np.float32)
            offsets = self.offsets[a : b + 1] - self.offsets[a]
            of_every_atlas(
                distances, low, high, self.scale[columns], offsets, nearest, first, second
            )
            atlas = np.where(nearest >= 0, np.arange(a, b), -1)
            parts.append((atlas, nearest + columns.start, first, second))
        return parts

    def search_some(
        self,
        atlases: NDArray[np.int64],
        descriptor: NDArray[np.uint8],
        scale: NDArray[np.float32],
        ratio: float,
    ) -> list[Pairs]:
        """Search some atlases exactly."""
        some = self.only(atlases)
        moved = self.offsets[atlases] - some.offsets[:-1]
        return [
            (np.where(atlas >= 0, atlases[atlas], -1), row + moved[atlas], first, second)
            for atlas, row, first, second in some.search(descriptor, scale, ratio)
        ]

    def search_listed(
        self,
        listed: NDArray[np.int32],
        descriptor: NDArray[np.uint8],
        scale: NDArray[np.float32],
        ratio: float,
        wanted: NDArray[np.bool_],
    ) -> Pairs:
        """Search exactly the wanted atlases whose keypoints are listed for each descriptor."""
        low, high = _limits(scale, ratio)
        atlas = np.full(listed.shape, -1, np.int64)
        nearest = np.zeros(listed.shape, np.int64)
        first = np.full(listed.shape, np.inf, np.float32)
        second = first.copy()
        of_listed_atlases(
            listed,
            descriptor,
            low,
            high,
            self.descriptor,
            self.scale,
            self.atlas_of,
            self.offsets,
            wanted,
            atlas,
            nearest,
            first,
            second,
        )
        return atlas, nearest, first, second


@dataclass(frozen=True, eq=False)
class Segment:
    """Organ keypoints of A atlases.

    Attributes
    ----------
    atlases : tuple of (str, str)
        Id and uuid of each; a uuid names content that never changes.
    sides : tuple of Side
        Those of sign -1, and those of sign 1.
    """

    atlases: tuple[tuple[str, str], ...]
    sides: tuple[Side, Side]

    def __len__(self) -> int:
        """Count the keypoints."""
        return sum(len(side.scale) for side in self.sides)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One segment of several."""

        def joined(sides: Sequence[Side]) -> Side:
            counts = np.concatenate([np.diff(side.offsets) for side in sides])
            return Side(
                np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                *(np.concatenate([getattr(side, name) for side in sides]) for name in _FIELDS),
            )

        first, second = (joined([part.sides[i] for part in parts]) for i in (0, 1))
        return cls(tuple(atlas for part in parts for atlas in part.atlases), (first, second))

    def only(self, atlases: Sequence[int]) -> "Segment":
        """Those of some atlases, in that order."""
        rows = np.asarray(atlases, np.int64)
        first, second = (side.only(rows) for side in self.sides)
        return Segment(tuple(self.atlases[i] for i in atlases), (first, second))

    @cached_property
    def name(self) -> str:
        """Names its content, as far as the uuids of the atlases do."""
        return digest(canonical([ENCODING, self.atlases]))

    def dump(self) -> bytes:
        """Write it as an ``.npz`` without pickles."""
        about = json.dumps(ENCODING | {"atlases": self.atlases}).encode()
        arrays = {
            f"{name}_{i}": getattr(side, name)
            for i, side in enumerate(self.sides)
            for name in ("offsets", *_FIELDS)
        }
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
                Side(*(arrays[f"{name}_{i}"] for name in ("offsets", *_FIELDS))) for i in (0, 1)
            )
        return cls(tuple((i, uuid) for i, uuid in about["atlases"]), (first, second))

    def query(
        self,
        descriptor: NDArray[np.uint8],
        scale: NDArray[np.float32],
        sign: int,
        ratio: float,
        wanted: NDArray[np.bool_],
        mode: str,
        folder: Path,
    ) -> list[Pairs]:
        """Search for keypoints of one sign.

        Parameters
        ----------
        wanted : bool array (A)
            Which atlases to look at; others may be given as well.
        mode : str
            ``auto``, ``pynndescent`` or ``exact``.
        folder : Path
            Where graphs are cached.
        """
        side = self.sides[sign > 0]
        fewest = {"auto": PAYS_FROM, "pynndescent": _FEWEST}.get(mode, math.inf)
        if 2 * wanted.sum() < wanted.size:
            # A list that mostly names atlases nobody wants would say too little.
            return side.search_some(np.flatnonzero(wanted), descriptor, scale, ratio)
        if len(side.scale) < fewest:
            return side.search(descriptor, scale, ratio)
        stem = f"{self.name}-{max(sign, 0)}-pynndescent-{version('pynndescent')}"
        listed = _listed(side.descriptor, descriptor, folder, stem)
        return [side.search_listed(listed, descriptor, scale, ratio, wanted)]


def merges(sizes: Sequence[int]) -> list[list[int]]:
    """Plan which segments to join, as log-structured stores do.

    Segments of a like size, within a factor of `_FANOUT`, are joined as soon as there are
    `_FANOUT` of them. So a store of n descriptors has O(log n) segments, and each descriptor
    is moved O(log n) times while they grow.

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


def _limits(
    scale: NDArray[np.float32], ratio: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scale = np.asarray(scale, np.float32)
    return scale / np.float32(ratio), scale * np.float32(ratio)


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


def _listed(
    known: NDArray[np.uint8], descriptor: NDArray[np.uint8], folder: Path, stem: str
) -> NDArray[np.int32]:
    """Rows of `known` that are probably the nearest, (n, `LISTED`); -1 where there are fewer."""
    assert known.shape[1] == DESCRIPTOR_BINS
    with _one_at_a_time:
        graph = _graph(known, folder, stem)
        listed, _ = graph.query(descriptor.astype(np.float32), k=LISTED, epsilon=0.3)
        return np.ascontiguousarray(listed, np.int32)


_graphs: dict[str, Any] = {}
"""Graphs of this process by name: reading one takes longer than asking it."""


def _graph(known: NDArray[np.uint8], folder: Path, stem: str) -> Any:
    """Get a graph: of this process, of the user's cache, or made now."""
    # Imported where it pays: it takes seconds, and a minute the first time on a machine.
    from pynndescent import NNDescent

    graph = _graphs.get(stem)
    for path in folder.glob(f"{stem}-*.graph") if graph is None else ():
        # A pickle, but one that this user's own process wrote; never one of a store.
        if (data := recall(path)) is not None:
            graph = pickle.loads(data)
            break
    if graph is None:
        graph = NNDescent(known.astype(np.float32), random_state=0)
        graph.prepare()
        keep(folder, stem, ".graph", pickle.dumps(graph))
    _graphs[stem] = graph
    return graph
