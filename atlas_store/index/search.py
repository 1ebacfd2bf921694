"""Which atlases have keypoints like those of a scan: an index over their descriptors.

An atlas is represented by its keypoints in organs and, where these are few, by its largest
others: they are found again most often, and there are enough of them to tell atlases apart.

Derived data. It is made from a store's keypoints when it is opened, kept as a few segments in
the user's own cache, and joined as it grows (`atlas_store.index.segments`). Nothing of it lies in
the store, so that a store cannot run code and adding an atlas writes nothing shared.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from atlas_store.errors import AtlasNotFoundError
from atlas_store.index.nearest import Best, nothing
from atlas_store.index.segments import Segment, Side, merges
from atlas_store.storage.cache import forget, index_folder, keep, recall
from atlas_store.store import AtlasStore

MODES = ("auto", "pynndescent", "exact")
"""Ways to search: `auto` asks pynndescent where a segment is so large that it pays."""
LISTED_ATLASES = 32
"""For each keypoint of a scan, the atlases with the nearest keypoints that a query gives."""

REPRESENTED_BY = 128
"""Keypoints of an atlas in the index: all that lie in organs, and others up to this number.

For 51 scans and 100 atlases of 16 organ keypoints each: of the 20 atlases that agree best by
all their keypoints, the index has 79 % among its first 60 by organ keypoints alone, 96 % with
the largest up to 128, 95 % with the strongest, 92 % with those nearest to organs."""

_THREADS = 4
_BATCH = 4096
"""Atlases read before their keypoints are joined."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What atlases have nearest to each of n keypoints; k at most for each.

    Attributes
    ----------
    atlas : ndarray (n, k), int64
        Index of the atlas in the ids that were asked for, nearest first; -1 for none.
    keypoint : ndarray (n, k), int64
        Which keypoint of that atlas is the nearest of those in the index whose sign and scale
        fit (eq. 2).
    label : ndarray (n, k), uint16
        Label value of its organ; 0 for none.
    position : ndarray (n, k, 3), float32
        Its position, (z, y, x) in mm.
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

    `open` it anew to see what was added, replaced or removed since.

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
        """Bring what the user's cache holds of this store's index up to date.

        Only atlases that the cache does not know are read from the store.

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
        cached = {path: _load(path) for path in sorted(folder.glob("*.npz"))}
        kept, loose = _alive([s for s in cached.values() if s is not None], uuids)
        known = {atlas for segment in (*kept, *loose) for atlas in segment.atlases}
        missing = [i for i, uuid in uuids.items() if (i, uuid) not in known]
        loose += list(_read(store, missing))
        if loose:
            kept.append(Segment.join(loose))
        segments = _joined(kept)
        names = {segment.name for segment in segments}
        there = set()
        for path in folder.glob("*"):
            name = path.name.partition("-")[0]
            if name not in names or (path in cached and cached[path] is None):
                forget(path)
            elif path in cached:
                there.add(name)
        for segment in segments:
            if segment.name not in there:
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
        differ by at most `scale_ratio`. `exact` looks at every atlas. pynndescent proposes
        atlases, and these are then searched exactly: so nearest and second nearest need no
        bound where its list ends, and an atlas that is not in the list counts as farther
        away than all that are.

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
            If one of them was not in the store when the index was opened.
        """
        places = self._places(ids)
        scale = np.asarray(scale, np.float32)
        ratio = np.float32(scale_ratio)
        columns = _columns(len(scale))
        for s in (-1, 1):
            rows = np.flatnonzero(np.asarray(sign) == s)
            best = nothing(rows.size, LISTED_ATLASES)
            limits = scale[rows] / ratio, scale[rows] * ratio
            for number, (segment, place) in enumerate(zip(self.segments, places, strict=True)):
                if (place >= 0).any():
                    segment.query(
                        *(descriptor[rows], limits, s, place, number, best),
                        *(self.mode, self._folder),
                    )
            sides = [segment.sides[s > 0] for segment in self.segments]
            for name, values in _look_up(best, sides).items():
                columns[name][rows] = values
        return Neighbours(**columns)

    def annotated(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Which organs of the store's table atlases annotate, (atlas, organ).

        Raises
        ------
        AtlasNotFoundError
            If one of them was not in the store when the index was opened.
        """
        places = self._places(ids)
        organs = max((segment.annotated.shape[1] for segment in self.segments), default=0)
        annotated = np.zeros((len(ids), organs), np.bool_)
        for segment, place in zip(self.segments, places, strict=True):
            annotated[place[place >= 0]] = segment.annotated[place >= 0]
        return annotated

    def _places(self, ids: Sequence[str]) -> list[NDArray[np.int64]]:
        """Where among `ids` each atlas of each segment is; -1 if it is not."""
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
    atlas, _, _, first, second = nothing(n, LISTED_ATLASES)
    return {
        "atlas": atlas,
        "keypoint": atlas.copy(),
        "label": np.zeros(atlas.shape, np.uint16),
        "position": np.zeros((*atlas.shape, 3), np.float32),
        "first": first,
        "second": second,
    }


def _look_up(best: Best, sides: Sequence[Side]) -> dict[str, NDArray[Any]]:
    """Say which keypoints of which atlases were found."""
    atlas, segment, row, first, second = best
    columns = _columns(len(atlas)) | {"atlas": atlas, "first": first, "second": second}
    for number, side in enumerate(sides):
        here = segment == number
        for name in ("keypoint", "label", "position"):
            columns[name][here] = getattr(side, name)[row[here]]
    return columns


def _load(path: Path) -> Segment | None:
    data = recall(path)
    return None if data is None else Segment.load(data)


def _alive(
    segments: Sequence[Segment], uuids: Mapping[str, str]
) -> tuple[list[Segment], list[Segment]]:
    """Tell segments that are good as they are from what is worth keeping of the others."""
    seen: set[tuple[str, str]] = set()
    kept, loose = [], []
    for segment in sorted(segments, key=len, reverse=True):
        alive = [
            i
            for i, (atlas_id, uuid) in enumerate(segment.atlases)
            if uuids.get(atlas_id) == uuid and (atlas_id, uuid) not in seen
        ]
        # A few removed atlases are passed over when searching; many would cost too much. Two
        # processes that brought the cache up to date at once may have left atlases twice.
        whole = seen.isdisjoint(segment.atlases)
        seen.update(segment.atlases[i] for i in alive)
        if whole and 4 * len(alive) >= 3 * len(segment.atlases):
            kept.append(segment)
        elif alive:
            loose.append(segment.only(alive))
    return kept, loose


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Join segments as `merges` plans it."""
    plan = merges([len(segment) for segment in segments])
    moved = {i for group in plan for i in group}
    left = [segment for i, segment in enumerate(segments) if i not in moved]
    return left + [Segment.join([segments[i] for i in group]) for group in plan]


def _read(store: AtlasStore, ids: Sequence[str]) -> Iterator[Segment]:
    """Read keypoints from a store; atlases that are removed meanwhile are left out."""
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
    # Those in organs first, then the largest; ties go to the first.
    order = np.lexsort((-arrays["scale"], arrays["label"] == 0))
    organ = np.count_nonzero(arrays["label"])
    chosen = np.sort(order[: max(organ, REPRESENTED_BY)])
    sides = []
    for sign in (-1, 1):
        rows = chosen[arrays["sign"][chosen] == sign]
        sides.append(
            Side(
                np.array([0, rows.size], np.int64),
                rows.astype(np.int32),
                *(arrays[name][rows] for name in ("label", "position", "scale", "descriptor")),
            )
        )
    return Segment((atlas,), np.array([annotated], np.bool_), (sides[0], sides[1]))
