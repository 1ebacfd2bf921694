"""The largest connected component of every organ: found slab by slab, whatever the map's size.

A slab is labelled together with the last plane of the one before. A component of the one and one of
the other that share a voxel of that plane are the same, which a union-find keeps.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import cc3d
import numpy as np
from numpy.typing import NDArray

from kpt_dask.label_files.packed import PackedLabels

_cc3d: Any = cc3d

CONNECTIVITY = 26
"""Neighbours of a voxel: those that share a corner with it are connected."""


class _Slab(NamedTuple):
    """Labels of a slab, and its components, numbered from 1.

    Attributes
    ----------
    labels : ndarray (n, j, i)
    components : ndarray (n, j, i), uint32
    shared : ndarray (j, i), uint32
        Its components in the last plane of the slab before; 0 in the first slab.
    number : int
    """

    labels: NDArray[Any]
    components: NDArray[np.uint32]
    shared: NDArray[np.uint32]
    number: int


def largest_components(labels: PackedLabels) -> PackedLabels:
    """Keep the largest component of each label, by voxels; of equally large ones, the first.

    Parameters
    ----------
    labels : PackedLabels
        Streamed twice; a few slabs are in memory at a time.
    """
    kept = _kept(labels)

    def cleaned() -> Iterator[NDArray[Any]]:
        first = 0
        for slab in _slabs(labels):
            own = kept[first : first + slab.number + 1].copy()
            own[0] = False
            first += slab.number
            yield np.where(own[slab.components], slab.labels, labels.dtype.type(0))

    return PackedLabels.of(labels.shape, labels.dtype, cleaned())


def _slabs(labels: PackedLabels) -> Iterator[_Slab]:
    last = np.zeros((0, *labels.shape[1:]), labels.dtype)
    for planes in labels.slabs():
        both = np.concatenate([last, planes])
        components, number = _cc3d.connected_components(
            both, connectivity=CONNECTIVITY, return_N=True, out_dtype=np.uint32
        )
        n = len(last)
        shared = components[0] if n else np.zeros(labels.shape[1:], np.uint32)
        yield _Slab(planes, components[n:], shared, int(number))
        last = planes[-1:]


def _kept(labels: PackedLabels) -> NDArray[np.bool_]:
    """Tell of every component of every slab, numbered throughout, whether it is kept."""
    parent, size, label = [0], [0], [0]

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    before = np.zeros(labels.shape[1:], np.int64)
    for slab in _slabs(labels):
        first = len(parent) - 1
        parent += range(first + 1, first + slab.number + 1)
        size += np.bincount(slab.components.reshape(-1), minlength=slab.number + 1)[1:].tolist()
        values = np.zeros(slab.number + 1, labels.dtype)
        values[slab.components.reshape(-1)] = slab.labels.reshape(-1)
        label += values[1:].tolist()
        where = slab.shared > 0
        pairs = np.unique(np.stack([before[where], slab.shared[where] + first]), axis=1)
        for one, other in pairs.T.tolist():
            roots = sorted((root(one), root(other)))
            parent[roots[1]] = roots[0]
        before = np.where(slab.components[-1] > 0, slab.components[-1] + np.int64(first), 0)
    roots = [root(one) for one in range(len(parent))]
    total = np.bincount(roots, size, minlength=len(parent))
    best: dict[int, int] = {}
    for one in sorted(set(roots) - {0}):
        if total[one] > total[best.get(label[one], 0)]:
            best[label[one]] = one
    return np.isin(roots, list(best.values()))
