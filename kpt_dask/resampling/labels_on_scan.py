"""The label map on the scan's own grid, from probabilities on the working grid.

Shares are interpolated and then decided, so borders are as smooth as the shares are; a vote
of neighbouring labels would show the working grid's steps. The map streams, plane by plane.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from kpt_dask.grid import Grid
from kpt_dask.kernels.jit import kernel
from kpt_dask.resampling.blocks import (
    Geometry,
    Region,
    Window,
    find_row,
    neighbours,
    trilinear,
    window,
)

SLAB_VOXELS = 8 << 20
"""About how many voxels are made at a time."""


class Shares(NamedTuple):
    """Shares of organs on the working grid, of which labels are decided.

    Attributes
    ----------
    probability : float32 zarr.Array or ndarray (organ, z, y, x)
        Only the part under each slab is read.
    values : sequence of int
        Labels of the organs.
    threshold : float
        Voxels whose largest share is below this are background; over 0.
    grid : Grid
        The working grid.
    """

    probability: Any
    values: Sequence[int]
    threshold: float
    grid: Grid


def labels_onto(shares: Shares, target: Grid) -> Iterator[NDArray[np.uint16]]:
    """Decide the organ of each voxel of any grid, slab by slab.

    Trilinear interpolation of each organ's share; a voxel gets the organ with the largest
    (ties go to the organ that comes first), or 0 where that is below the threshold. On the
    working grid itself that is the working grid's label map. Farther than one voxel outside
    the working grid there is background.

    Parameters
    ----------
    shares : Shares
    target : Grid
        The grid to fill, for instance a scan's own; axes in stored order.

    Yields
    ------
    slab : ndarray (n, j, i), uint16
        All planes of the target, in order.
    """
    planes, height, width = target.shape
    step = max(1, SLAB_VOXELS // (height * width))
    for first in range(0, planes, step):
        yield decide_planes(shares, target, first, min(first + step, planes))


def decide_planes(
    shares: Shares, target: Grid, first: int, last: int, wanted: Sequence[int] | None = None
) -> NDArray[np.uint16]:
    """Decide the planes of a grid from `first` to before `last`; else as `labels_onto`.

    `wanted` are the labels that are shown, all if not given. The other organs compete as well, but
    are looked at only around these.
    """
    _, height, width = target.shape
    labels = np.zeros((last - first, height, width), np.uint16)
    slab: Region = (slice(first, last), slice(0, height), slice(0, width))
    if wanted is not None and set(wanted) != set(shares.values):
        around = _around(shares, target, slab, wanted)
        if around is None:
            return labels
        inside = _within(around, slab)
        part = labels[inside]
        _decide(shares, target, around, part)
        shown = np.zeros(max(shares.values) + 1, np.uint16)
        shown[list(wanted)] = wanted
        labels[inside] = shown[part]
        return labels
    _decide(shares, target, slab, labels)
    return labels


def _decide(shares: Shares, target: Grid, block: Region, labels: NDArray[np.uint16]) -> None:
    """Decide the labels of a block of the target, 0 before."""
    below = np.nextafter(np.float32(shares.threshold), np.float32(0))
    plan = window(shares.grid, target, block)
    largest = np.full(labels.shape, below, np.float32)
    for organ, value in enumerate(shares.values):
        part = _read(shares.probability, (slice(organ, organ + 1), *plan.region))[0]
        box = _reached(part > below, plan)
        if box is None:
            continue
        inside = _within(box, block)
        _claim(
            part,
            Geometry.of(replace(plan, block=box)),
            np.uint16(value),
            largest[inside],
            labels[inside],
        )


def _around(shares: Shares, target: Grid, block: Region, wanted: Sequence[int]) -> Region | None:
    """Box the voxels of a block that any of the wanted organs can claim."""
    below = np.nextafter(np.float32(shares.threshold), np.float32(0))
    plan = window(shares.grid, target, block)
    boxes = []
    for organ, value in enumerate(shares.values):
        if value in wanted:
            part = _read(shares.probability, (slice(organ, organ + 1), *plan.region))[0]
            boxes.append(_reached(part > below, plan))
    found = [box for box in boxes if box is not None]
    if not found:
        return None
    z, y, x = (
        slice(min(part.start for part in along), max(part.stop for part in along))
        for along in zip(*found, strict=True)
    )
    return z, y, x


def _within(box: Region, block: Region) -> tuple[slice, ...]:
    """Give the place of a box in a block."""
    return tuple(
        slice(b.start - s.start, b.stop - s.start) for b, s in zip(box, block, strict=True)
    )


@kernel
def count_values(labels: Any, counts: Any) -> None:
    """Add to `counts` how many voxels (z, y, x) have each label but 0."""
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                value = labels[z, y, x]
                if value:
                    counts[value] += 1


def _read(probability: Any, region: tuple[slice, ...]) -> NDArray[np.float32]:
    if isinstance(probability, zarr.Array):
        return chunk_io.read(probability, region).astype(np.float32, copy=False)
    return np.ascontiguousarray(probability[region], np.float32)


def _reached(mask: NDArray[np.bool_], plan: Window) -> Region | None:
    """Find the voxels of the target that lie within one voxel of a mask of the source, boxed.

    An interpolated share is never above all of the eight that it comes from, so no other
    voxel can reach the threshold.
    """
    if not mask.any():
        return None
    ends = []
    for axis, part in enumerate(plan.region):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        ends.append((part.start + hit[0] - 1.01, part.start + hit[-1] + 1.01))
    inverse = np.linalg.inv(plan.affine)
    at = np.array(list(product(*ends))) @ inverse[:3, :3].T + inverse[:3, 3]
    low, high = np.floor(at.min(axis=0)).astype(int), np.ceil(at.max(axis=0)).astype(int) + 1
    z, y, x = (
        slice(max(int(a), s.start), min(int(b), s.stop))
        for a, b, s in zip(low, high, plan.block, strict=True)
    )
    if z.start >= z.stop or y.start >= y.stop or x.start >= x.stop:
        return None
    return z, y, x


@kernel
def _claim(part: Any, geometry: Any, value: Any, largest: Any, labels: Any) -> None:
    """Label a box with one organ where its share is the largest so far."""
    at = np.empty(3)
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            find_row(geometry, z, y, at)
            for x in range(labels.shape[2]):
                on_z, on_y, on_x = neighbours(geometry, at, x)
                if max(on_z[3], on_y[3], on_x[3]) > 1:
                    continue
                share = trilinear(part, on_z, on_y, on_x)
                if share > largest[z, y, x]:
                    largest[z, y, x] = share
                    labels[z, y, x] = value
