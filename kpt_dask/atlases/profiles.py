"""Profiles of organs: voxels of each organ in each plane of a label map.

From these profiles come an organ's size, bounding box and centroid, and the planes in which
most organs show.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

SLAB_VOXELS = 1 << 24
"""Voxels read at a time, typical."""

SHOWN = 0.2
"""Share of its largest area from which an organ counts as visible."""


class Voxels(Protocol):
    """Interface common to NumPy and Zarr arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        ...

    def __getitem__(self, region: Any) -> Any:
        """Read a region."""
        ...


def organ_profiles(labels: Voxels, values: Iterable[int]) -> tuple[NDArray[np.int64], ...]:
    """Count each organ's voxels in every plane across each axis, in one streamed pass.

    Parameters
    ----------
    labels : array-like of unsigned integers, shape (k, j, i)
        NumPy or Zarr.
    values : iterable of int
        The organs' label values; others are not counted.

    Returns
    -------
    tuple of three ndarray of int64, shapes (organ, k), (organ, j), (organ, i)
    """
    values = list(values)
    number_of = np.full(1 << 16, len(values))
    number_of[values] = np.arange(len(values))
    profiles = tuple(np.zeros((len(values) + 1, n), np.int64) for n in labels.shape)
    tall = _planes_per_read(labels)
    for k in range(0, labels.shape[0], tall):
        slab = np.asarray(labels[k : k + tall])
        where = np.nonzero(slab)
        organ = number_of[slab[where]]
        for axis, profile in enumerate(profiles):
            position = where[axis] + (k if axis == 0 else 0)
            flat = np.bincount(organ * profile.shape[1] + position, minlength=profile.size)
            profile += flat.reshape(profile.shape)
    return tuple(profile[:-1] for profile in profiles)


def best_plane(profile: NDArray[np.int64]) -> int:
    """Choose the plane that shows most organs, and of these the one that shows them largest.

    An organ shows where its area is at least `SHOWN` of its largest. Without any organ, the
    middle.

    Parameters
    ----------
    profile : ndarray of int64, shape (organ, plane)
        Voxels of each organ in each plane.
    """
    largest = profile.max(axis=1, initial=0)
    share = profile[largest > 0] / largest[largest > 0, None]
    if len(share) == 0:
        return int(profile.shape[1] // 2)
    return int(np.argmax((share >= SHOWN).sum(axis=0) + share.mean(axis=0)))


def _planes_per_read(labels: Voxels) -> int:
    """Planes of as many whole chunks (or shards) as fit in `SLAB_VOXELS`."""
    unit = getattr(labels, "shards", None) or getattr(labels, "chunks", None) or (1,)
    fit = SLAB_VOXELS // (labels.shape[1] * labels.shape[2] * unit[0])
    return int(unit[0] * max(fit, 1))
