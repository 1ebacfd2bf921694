"""The voxels that are shown: a scan and its labels around the body, at a level that fits memory.

HU become tones of one byte: fine steps in soft tissue, coarse ones in lung and bone. So a page can
change the window, and pictures stay small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box, begin_of, shape_of, slices, volume_of
from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.field_of_view import FieldOfView

MOST_VOXELS = 40_000_000
"""Most voxels that are shown: a whole body at 2 mm has about as many."""

AIR = -1000
TONES = ((AIR, 0), (-250, 50), (350, 200), (1500, 255))
"""HU and their tones, linear in between: 4 HU in a step of soft tissue, 15 and 21 HU outside."""

BODY_HU = -300
"""HU from which on a voxel counts as body."""
BODY_SPACING = 8.0
"""mm; the body is looked for at the first level of this spacing."""
MARGIN = 12.0
"""mm around the body."""
PLANES = 32
"""Planes read at a time: those of a chunk."""


@dataclass(frozen=True, eq=False)
class Display:
    """A scan and its labels, as they are shown.

    Attributes
    ----------
    grid : Grid
        Axis-aligned and isotropic; axes (z, y, x).
    tones : uint8 array (z, y, x)
        The scan; `hu_of_tones` says what they mean.
    organs : uint16 array (z, y, x)
        Number of the organ, 1 for the first one that is shown, or 0.
    """

    grid: Grid
    tones: NDArray[np.uint8]
    organs: NDArray[np.uint16]


def tones_of(hu: NDArray[Any]) -> NDArray[np.uint8]:
    """Turn whole HU into tones of the same shape."""
    first, last = TONES[0][0], TONES[-1][0]
    table = np.rint(np.interp(np.arange(first, last + 1), *np.array(TONES).T)).astype(np.uint8)
    tones: NDArray[np.uint8] = table[np.clip(np.rint(hu), first, last).astype(np.int16) - first]
    return tones


def hu_of_tones() -> NDArray[np.int16]:
    """HU of each tone, int16 array (256)."""
    hu, tones = np.array(TONES).T
    table: NDArray[np.int16] = np.rint(np.interp(np.arange(256), tones, hu)).astype(np.int16)
    return table


def display_of(
    levels: Sequence["zarr.Array[Any]"],
    labels: Sequence["zarr.Array[Any]"],
    grid: Grid,
    values: Sequence[int],
    most_voxels: int = MOST_VOXELS,
    source_grid: Grid | None = None,
) -> Display:
    """Read a scan and its labels around the body.

    Parameters
    ----------
    levels, labels : sequence of zarr.Array (z, y, x)
        Levels of a volume, HU, and of its label map; each has every second voxel of the one before.
    grid : Grid
        Grid of the first level.
    values : sequence of int
        Labels that are shown, by their numbers from 1 on.
    most_voxels : int
        Coarser levels are read where the body has more.
    source_grid : Grid, optional
        The scan's own grid; where it is oblique, what lies outside of it is shown as air.

    Returns
    -------
    Display
        At most `most_voxels`, unless the last level has more.
    """
    box = body_box(levels, labels, grid)
    numbers = np.zeros(1 << 16, np.uint16)
    numbers[list(values)] = np.arange(1, len(values) + 1)
    level = 0
    while volume_of(_at(box, level)) > most_voxels and level < len(levels) - 1:
        level += 1
    at_level = _at(box, level)
    shape = shape_of(at_level)
    image, map_ = levels[level], labels[level]
    tones, organs = np.empty(shape, np.uint8), np.empty(shape, np.uint16)
    (low, high), *sides = at_level
    spacing = float(grid.spacing[0]) * 2**level
    depth, height, width = image.shape
    at_grid = Grid.isotropic((depth, height, width), spacing, grid.origin)
    view = FieldOfView.on(at_grid, source_grid or grid)
    for z in range(low, high, PLANES):
        planes = (z, min(z + PLANES, high)), sides[0], sides[1]
        part = slices(planes)
        here = slice(z - low, min(z + PLANES, high) - low)
        tones[here] = tones_of(chunk_io.read(image, part))
        organs[here] = numbers[chunk_io.read(map_, part)]
        if view is not None:
            tones[here][view.depth(planes) < 0] = 0
    origin = grid.origin + spacing * begin_of(at_level)
    return Display(Grid.isotropic(shape, spacing, origin), tones, organs)


def around_organs(display: Display) -> Display:
    """Keep the box around all organs, two voxels wider; all of it if there is none."""
    box = []
    for axis, n in enumerate(display.organs.shape):
        others = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(display.organs.any(axis=others))
        first, last = (int(used[0]), int(used[-1])) if used.size else (0, n - 1)
        box.append(slice(max(first - 2, 0), min(last + 3, n)))
    kept = tuple(box)
    tones, organs = display.tones[kept], display.organs[kept]
    spacing = float(display.grid.spacing[0])
    origin = display.grid.origin + spacing * np.array([part.start for part in kept])
    return Display(Grid.isotropic(organs.shape, spacing, origin), tones, organs)


def coarser(display: Display) -> Display:
    """Make voxels half as large again: two of three along each axis.

    Voxel 2 m is voxel 3 m of before, and voxel 2 m + 1 lies between the two next: tones are their
    mean, organs those of the first.
    """
    tones: NDArray[Any] = display.tones
    organs = display.organs
    for axis in range(3):
        tones, organs = (np.moveaxis(one, axis, 0) for one in (tones, organs))
        n = 2 * (-(-len(tones) // 3))
        kept = [np.arange(0, n, 2) // 2 * 3, np.arange(1, n, 2) // 2 * 3 + 1]
        last = len(tones) - 1
        even, odd, next_one = kept[0], *(np.minimum(kept[1] + by, last) for by in (0, 1))
        fewer = np.empty((n, *tones.shape[1:]), np.uint8)
        fewer[0::2] = tones[even]
        fewer[1::2] = (tones[odd].astype(np.uint16) + tones[next_one] + 1) >> 1
        fewer_organs = np.empty((n, *organs.shape[1:]), np.uint16)
        fewer_organs[0::2], fewer_organs[1::2] = organs[even], organs[odd]
        tones, organs = (np.moveaxis(one, 0, axis) for one in (fewer, fewer_organs))
    spacing = 1.5 * float(display.grid.spacing[0])
    z, y, x = tones.shape
    grid = Grid.isotropic((z, y, x), spacing, display.grid.origin)
    return Display(grid, np.ascontiguousarray(tones), np.ascontiguousarray(organs))


def _at(box: Box, level: int) -> Box:
    """Box of the first level in voxels of another."""
    z, y, x = ((a >> level, -(-b >> level)) for a, b in box)
    return z, y, x


def body_box(
    levels: Sequence["zarr.Array[Any]"], labels: Sequence["zarr.Array[Any]"], grid: Grid
) -> Box:
    """Box around the body and all labels, in voxels of the first level.

    The body is the largest connected part of what is denser than fat and lung, thin parts such as
    the table left out; all of the scan if there is none.
    """
    # Imported here: only pages and pictures need it.
    from scipy import ndimage

    spacing, level = float(grid.spacing[0]), 0
    while spacing * 2**level < BODY_SPACING and level < len(levels) - 1:
        level += 1
    step = 2**level
    dense = np.asarray(levels[level][...]) > BODY_HU
    opened = ndimage.binary_opening(dense) if min(dense.shape) > 2 else dense
    parts, n = ndimage.label(opened)
    body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if n else np.ones_like(dense)
    body |= np.asarray(labels[level][...]) > 0
    margin = MARGIN + spacing * step
    box = []
    for axis, n in enumerate(grid.shape):
        others = tuple(a for a in range(3) if a != axis)
        found = np.flatnonzero(body.any(axis=others)) * step
        wider = round(margin / spacing)
        box.append((max(int(found[0]) - wider, 0), min(int(found[-1]) + wider + 1, n)))
    return box[0], box[1], box[2]
