"""Which atlases have keypoints like those of a scan: an index over their descriptors.

An atlas is represented by its keypoints in organs and, where these are few, by its largest
other keypoints, which recur most often in other scans of the same body.

The index is derived data. It is built from a store's keypoints when it is opened, cached as a few
segments in the user's own folder, and merged as it grows (`atlas_store.index.segments`). Nothing
of it lies in the store: so a store cannot run code, and adding an atlas writes nothing shared.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from atlas_store.errors import AtlasNotFoundError
from atlas_store.index.graph import FEWEST
from atlas_store.index.nearest import Best, Numbers, Query
from atlas_store.index.segments import (
    Segment,
    SignedKeypoints,
    build_missing,
    fewest_for,
    merges,
    mostly_wanted,
)
from atlas_store.storage.cache import forget, index_folder, keep, recall
from atlas_store.store import AtlasStore

MODES = ("auto", "pynndescent", "exact")
"""Ways to search: `auto` uses pynndescent for segments large enough to gain from it."""
LISTED_ATLASES = 32
"""Atlases that a query returns for each keypoint of a scan, those with the nearest keypoints."""

REPRESENTED_BY = 128
"""Keypoints of an atlas in the index: all in organs, and others up to this number.

For 51 scans and 100 atlases of 16 organ keypoints each: of the 20 atlases that agree best by
all their keypoints, the index has 79 % among its first 60 by organ keypoints alone, 96 % with
the largest up to 128, 95 % with the strongest, 92 % with those nearest to organs."""

_loaded: dict[Path, tuple[object, Segment | None]] = {}
"""Segments that this process opened last, with the version of each file: for the next scan."""

_THREADS = 4
"""Threads that read atlases."""
_BATCH = 4096
"""Atlases read before their keypoints are joined to a segment."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The atlases with the nearest keypoints to each of n keypoints, at most k for each.

    Attributes
    ----------
    atlas : ndarray (n, k), int64
        Index of the atlas in the queried ids, nearest first; -1 for none.
    keypoint : ndarray (n, k), int64
        Index, in that atlas, of its nearest keypoint with the same sign and a similar scale
        (eq. 2).
    label : ndarray (n, k), uint16
        Label value of the organ of that keypoint; 0 for none.
    position : ndarray (n, k, 3), float32
        Position of that keypoint, (z, y, x) in mm.
    first, second : ndarray (n, k), float32
        Squared distances of the descriptors of the nearest and the second nearest of them,
        both exact; infinite for none.
    """

    atlas: NDArray[np.int64]
    keypoint: NDArray[np.int64]
    label: NDArray[np.uint16]
    position: NDArray[np.float32]
    first: NDArray[np.float32]
    second: NDArray[np.float32]


class AtlasIndex:
    """An index over the keypoints that represent the atlases of a store.

    It shows the store as it was when the index was opened.

    Attributes
    ----------
    mode : str
        One of `MODES`.
    segments : tuple of Segment
        Each atlas is in one of them.
    """

    def __init__(
        self, segments: Sequence[Segment], uuids: Mapping[str, str], mode: str, folder: Path
    ) -> None:
        self.segments = tuple(segments)
        self.mode = mode
        self._uuids = uuids
        self._folder = folder

    @classmethod
    def open(cls, store: AtlasStore, mode: str = "auto") -> Self:
        """Open the index of a store, from the user's cache as far as that is up to date.

        Only atlases that are missing in the cache are read from the store.

        Raises
        ------
        ValueError
            If the mode is unknown.
        KeypointsFormatError
            If an atlas is damaged.
        """
        if mode not in MODES:
            raise ValueError(f"The index {mode!r} is unknown; use {', '.join(MODES)}.")
        folder = index_folder(store.uuid)
        uuids = store.uuids()
        cached = _load_all(folder)
        current, stale = _sort_out([s for s in cached.values() if s is not None], uuids)
        known = {atlas for segment in (*current, *stale) for atlas in segment.atlases}
        missing = [i for i, uuid in uuids.items() if (i, uuid) not in known]
        read = list(_read(store, missing))
        gone = set(missing) - {atlas_id for segment in read for atlas_id, _ in segment.atlases}
        uuids = {i: uuid for i, uuid in uuids.items() if i not in gone}
        stale += read
        if stale:
            current.append(Segment.join(stale))
        segments = _merge(current)
        names = {segment.name for segment in segments}
        on_disk = set()
        for path in folder.glob("*"):
            name = path.name.partition("-")[0]
            if name not in names or (path in cached and cached[path] is None):
                forget(path)
            elif path in cached:
                on_disk.add(name)
        for segment in segments:
            if segment.name not in on_disk:
                keep(folder, segment.name, ".npz", segment.dump())
        return cls(segments, uuids, mode, folder)

    def __len__(self) -> int:
        """Count the keypoints."""
        return sum(len(segment) for segment in self.segments)

    def query(
        self,
        descriptor: NDArray[np.uint8],
        scale: NDArray[np.float32],
        sign: NDArray[np.int8],
        ids: Sequence[str],
        *,
        scale_ratio: float = 2.0,
    ) -> Neighbours:
        """Find, for each keypoint of a scan, the atlases with the nearest keypoints.

        The constraints are inside the argmin, as in eq. 2: equal signs, and scales that
        differ by at most the factor `scale_ratio`. The mode ``exact`` searches every atlas.
        A graph proposes atlases, which are then searched exactly; an atlas that it does not
        propose counts as farther away than all others.

        Parameters
        ----------
        descriptor : ndarray (n, 64), uint8
        scale : ndarray (n), float32
            mm.
        sign : ndarray (n)
            -1 or 1.
        ids : sequence of str
            The atlases to search.

        Raises
        ------
        AtlasNotFoundError
            If one of them was not in the store when the index was opened, or was removed before
            it was read.
        """
        atlas_numbers = self._atlas_numbers(ids)
        scale = np.asarray(scale, np.float32)
        ratio = np.float32(scale_ratio)
        columns = _columns(len(scale))
        for s in (-1, 1):
            rows = np.flatnonzero(np.asarray(sign) == s)
            best = Best.none(rows.size, LISTED_ATLASES)
            query = Query(descriptor[rows], scale[rows] / ratio, scale[rows] * ratio)
            for i, (segment, numbers) in enumerate(zip(self.segments, atlas_numbers, strict=True)):
                if (numbers >= 0).any():
                    segment.search(query, s, Numbers(numbers, i), best, self.mode, self._folder)
            found = _look_up(best, [segment.by_sign[s > 0] for segment in self.segments])
            for name, values in found.items():
                columns[name][rows] = values
        return Neighbours(**columns)

    def build_graphs(self) -> Iterator[int]:
        """Build the graphs that the cache lacks, of all segments large enough for one.

        Yields
        ------
        int
            Number of keypoints of each graph, when it is built.

        Raises
        ------
        AtlasStoreError
            If pynndescent cannot build one.
        """
        return build_missing(self.segments, self._folder)

    def build_needed(self, ids: Sequence[str]) -> Iterator[int]:
        """Build the graphs that a query needs and the cache lacks, as the query itself would.

        Yields
        ------
        int
            Number of keypoints of each graph, when it is built.

        Raises
        ------
        AtlasStoreError
            If pynndescent cannot build one.
        AtlasNotFoundError
            As for `query`.
        """
        return build_missing(self._searched(ids), self._folder, fewest_for(self.mode))

    def n_needed(self, ids: Sequence[str]) -> int:
        """Count the graphs that `build_needed` would build."""
        fewest = fewest_for(self.mode)
        return sum(len(s.missing_graphs(self._folder, fewest)) for s in self._searched(ids))

    def _searched(self, ids: Sequence[str]) -> list[Segment]:
        """Segments that a query searches in graphs, where they are large enough."""
        if self.mode == "exact":
            return []
        numbers = self._atlas_numbers(ids)
        return [s for s, n in zip(self.segments, numbers, strict=True) if mostly_wanted(n)]

    @property
    def n_graphs(self) -> int:
        """Number of the graphs that can be built."""
        counts = (len(keypoints.scale) for s in self.segments for keypoints in s.by_sign)
        return sum(n >= FEWEST for n in counts)

    def annotated(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which organs of the store's table atlases annotate, (atlas, organ).

        Raises
        ------
        AtlasNotFoundError
            As for `query`.
        """
        atlas_numbers = self._atlas_numbers(ids)
        organs = max((segment.annotated.shape[1] for segment in self.segments), default=0)
        annotated = np.zeros((len(ids), organs), np.bool_)
        for segment, numbers in zip(self.segments, atlas_numbers, strict=True):
            annotated[numbers[numbers >= 0]] = segment.annotated[numbers >= 0]
        return annotated

    def _atlas_numbers(self, ids: Sequence[str]) -> list[NDArray[np.int64]]:
        """Index in `ids` of each atlas of each segment; -1 if it is not wanted."""
        order = {atlas_id: i for i, atlas_id in enumerate(ids)}
        for atlas_id in order:
            if atlas_id not in self._uuids:
                raise AtlasNotFoundError(f"the index has no atlas {atlas_id!r}: open it again.")
        return [
            np.array(
                [order.get(i, -1) if self._uuids.get(i) == u else -1 for i, u in segment.atlases],
                np.int64,
            )
            for segment in self.segments
        ]


def _columns(n: int) -> dict[str, NDArray[Any]]:
    """Make the arrays of `Neighbours` for n keypoints, without a neighbour."""
    atlas, _, _, first, second = Best.none(n, LISTED_ATLASES)
    return {
        "atlas": atlas,
        "keypoint": atlas.copy(),
        "label": np.zeros(atlas.shape, np.uint16),
        "position": np.zeros((*atlas.shape, 3), np.float32),
        "first": first,
        "second": second,
    }


def _look_up(best: Best, segments: Sequence[SignedKeypoints]) -> dict[str, NDArray[Any]]:
    """Look up the keypoints that were found in the segments."""
    columns = _columns(len(best.atlas))
    columns |= {"atlas": best.atlas, "first": best.first, "second": best.second}
    for number, keypoints in enumerate(segments):
        found = best.segment == number
        for name in ("keypoint", "label", "position"):
            columns[name][found] = getattr(keypoints, name)[best.row[found]]
    return columns


def _load_all(folder: Path) -> dict[Path, Segment | None]:
    """Load the segments of a folder; None for one that is damaged or of another version."""
    found: dict[Path, tuple[object, Segment | None]] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            status = path.stat()
        except OSError:  # deleted meanwhile
            continue
        version = status.st_ino, status.st_mtime_ns, status.st_size
        known = _loaded.get(path)
        if known is None or known[0] != version:
            data = recall(path)
            known = version, None if data is None else Segment.load(data)
        found[path] = known
    _loaded.clear()
    _loaded.update(found)
    return {path: segment for path, (_, segment) in found.items()}


def _sort_out(
    segments: Sequence[Segment], uuids: Mapping[str, str]
) -> tuple[list[Segment], list[Segment]]:
    """Separate segments that can stay from what is still valid of the others."""
    seen: set[tuple[str, str]] = set()
    current, stale = [], []
    for segment in sorted(segments, key=len, reverse=True):
        alive = [
            i
            for i, (atlas_id, uuid) in enumerate(segment.atlases)
            if uuids.get(atlas_id) == uuid and (atlas_id, uuid) not in seen
        ]
        # Skipping a few removed atlases in each search is cheap, skipping many is not. Two
        # processes that updated the cache at the same time may have written atlases twice.
        whole = seen.isdisjoint(segment.atlases)
        seen.update(segment.atlases[i] for i in alive)
        if whole and 4 * len(alive) >= 3 * len(segment.atlases):
            current.append(segment)
        elif alive:
            stale.append(segment.only(alive))
    return current, stale


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Join segments as `merges` plans it."""
    plan = merges([len(segment) for segment in segments])
    merged = {i for group in plan for i in group}
    others = [segment for i, segment in enumerate(segments) if i not in merged]
    return others + [Segment.join([segments[i] for i in group]) for group in plan]


def _read(store: AtlasStore, ids: Sequence[str]) -> Iterator[Segment]:
    """Read keypoints from a store; atlases removed meanwhile are left out."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            parts = threads.map(lambda i: read_atlas(store, i), batch)
            if joined := [part for part in parts if part is not None]:
                yield Segment.join(joined)


def read_atlas(store: AtlasStore, atlas_id: str) -> Segment | None:
    """Read the keypoints that represent an atlas; None if it was removed meanwhile."""
    try:
        atlas = store[atlas_id]
        annotated = [name in atlas.annotated for name in store.organs.names]
        return represent((atlas.id, atlas.info.uuid), annotated, atlas.keypoint_arrays())
    except AtlasNotFoundError:
        return None


def represent(
    atlas: tuple[str, str], annotated: Sequence[bool], arrays: Mapping[str, NDArray[Any]]
) -> Segment:
    """Make a segment of one atlas, given its id, uuid, annotated organs and keypoints."""
    # Keypoints in organs first, then the largest; ties go to the first.
    order = np.lexsort((-arrays["scale"], arrays["label"] == 0))
    organ = np.count_nonzero(arrays["label"])
    chosen = np.sort(order[: max(organ, REPRESENTED_BY)])
    by_sign = []
    for sign in (-1, 1):
        rows = chosen[arrays["sign"][chosen] == sign]
        by_sign.append(
            SignedKeypoints(
                np.array([0, rows.size], np.int64),
                rows.astype(np.int32),
                *(arrays[name][rows] for name in ("label", "position", "scale", "descriptor")),
            )
        )
    return Segment((atlas,), np.array([annotated], np.bool_), (by_sign[0], by_sign[1]))
