"""The keypoints of many atlases in memory, ready to be searched atlas by atlas."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from atlas_store.atlas import Atlas
from atlas_store.errors import EmptyStoreError
from atlas_store.keypoints import VARIABLES
from atlas_store.store import AtlasStore

_THREADS = 4
"""Readers at once; they help where reading means waiting, on a network or object store."""


@dataclass(frozen=True, eq=False)
class AtlasKeypoints:
    """Keypoints of A atlases, N in all, one atlas after the other.

    Attributes
    ----------
    ids : tuple of str
        The atlases, in the order asked for.
    offsets : ndarray, shape (A + 1,), int64
        The keypoints of atlas i are ``offsets[i]`` to ``offsets[i + 1]``.
    position : ndarray, shape (N, 3), float32
        (z, y, x) in mm, in the world of its atlas.
    scale : ndarray, shape (N,), float32
        mm.
    sign : ndarray, shape (N,), int8
        Sign of the extremum, -1 or 1.
    response : ndarray, shape (N,), float32
        HU.
    descriptor : ndarray, shape (N, 64), uint8
        Ranks 0 to 63.
    frame : ndarray, shape (N, 3, 3), float32
        The axes of the descriptor, (z, y, x), as rows; a keypoint comes once in each of its
        frames, one after the other.
    octave : ndarray, shape (N,), uint8
        Octave of the scale space.
    label : ndarray, shape (N,), uint16
        Label value of the organ it lies in, 0 for none.

    Examples
    --------
    >>> from atlas_store import AtlasKeypoints, AtlasStore
    >>> keypoints = AtlasKeypoints.load(AtlasStore.open("atlases"), ["body_1", "body_3"])
    >>> keypoints.ids
    ('body_1', 'body_3')
    >>> keypoints.descriptor.shape == (keypoints.offsets[-1], 64)
    True
    """

    ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    position: NDArray[np.float32]
    scale: NDArray[np.float32]
    sign: NDArray[np.int8]
    response: NDArray[np.float32]
    descriptor: NDArray[np.uint8]
    frame: NDArray[np.float32]
    octave: NDArray[np.uint8]
    label: NDArray[np.uint16]

    @classmethod
    def load(cls, store: AtlasStore, ids: Iterable[str] | None = None) -> Self:
        """Load the keypoints of some atlases of a store.

        Parameters
        ----------
        store : AtlasStore
            Store of the atlases.
        ids : iterable of str, optional
            Ids of the atlases, in order; by default all, in natural order.

        Raises
        ------
        EmptyStoreError
            If there is no atlas to load.
        AtlasNotFoundError
            If an atlas is not there, or was removed meanwhile.
        KeypointsFormatError
            If keypoints are damaged.
        """
        atlases = store.atlases(ids)
        if not atlases:
            raise EmptyStoreError(f"{store.url} has no atlas to use: add one.")
        return cls.of(atlases)

    @classmethod
    def of(cls, atlases: Sequence[Atlas]) -> Self:
        """Load the keypoints of atlases, at least one.

        Raises
        ------
        AtlasNotFoundError
            If an atlas was removed meanwhile.
        KeypointsFormatError
            If keypoints are damaged.
        """
        with ThreadPoolExecutor(_THREADS) as threads:
            loaded = list(threads.map(Atlas.keypoint_arrays, atlases))
        counts = [len(arrays["label"]) for arrays in loaded]
        return cls(
            ids=tuple(atlas.id for atlas in atlases),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            **{name: np.concatenate([arrays[name] for arrays in loaded]) for name in VARIABLES},
        )

    def only(self, atlases: Sequence[int]) -> "AtlasKeypoints":
        """Keep some atlases, given by their indices, in that order."""
        own = [self.slice_of(i) for i in atlases]
        counts = [part.stop - part.start for part in own]
        return AtlasKeypoints(
            ids=tuple(self.ids[i] for i in atlases),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            **{n: np.concatenate([getattr(self, n)[part] for part in own]) for n in VARIABLES},
        )

    def __len__(self) -> int:
        """Count the atlases."""
        return len(self.ids)

    def slice_of(self, atlas: int) -> slice:
        """Slice of the arrays that holds the keypoints of the atlas with this index."""
        return slice(int(self.offsets[atlas]), int(self.offsets[atlas + 1]))
