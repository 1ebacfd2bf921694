"""Where organs land in the scan by the fields of their atlases: plans of mode `local`.

What is planned for is cells, cubes of voxels of which the first begins at the scan's first voxel,
so that a cell is the same whatever block it is in. Reads no voxel.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.boxes import Box, enclosing, overlap
from kpt_dask.grid import Grid
from kpt_dask.matching.displacement import Field, Widths
from kpt_dask.matching.first_pass import slices_by_atlas

CELL = 16.0
"""Edge of a cell, mm, rounded to whole voxels."""
MARGIN = 15.0
"""How far beyond where the corners of its box land an organ may reach, mm."""


def by_atlas(keypoints: xr.Dataset, matches: xr.Dataset, n: int) -> list[Field]:
    """Fit a field to the matches of each of `n` atlases."""
    position = keypoints.position.values[matches.keypoint.values]
    translation = matches.translation.values
    return [Field.of(position[own], translation[own]) for own in slices_by_atlas(matches, n)]


def landing_boxes(
    atlas: Atlas, field: Field, organs: OrganTable, grid: Grid, widths: Widths
) -> list[Box | None]:
    """Find where each organ of an atlas lands in the scan, in voxels, with a margin.

    The same field with the roles exchanged says where the corners, the centre and what is midway
    of the organ's box go.
    """
    boxes: list[Box | None] = [None] * len(organs)
    names, shows = organs.names, atlas.organs
    shown = [o for o, name in enumerate(names) if name in shows]
    if not shown:
        return boxes
    source = Grid.isotropic(atlas.info.shape, float(grid.spacing[0]), atlas.info.origin)
    bounds = np.array([shows[names[o]].bounding_box for o in shown], np.float64)
    low, high = bounds[..., 0], bounds[..., 1] - 1
    along = np.stack([low, (low + high) / 2, high])
    # Low, middle or high along each axis.
    at = along[np.indices((3, 3, 3)).reshape(3, 27).T, :, range(3)]
    points = source.to_mm(at.transpose(2, 0, 1).reshape(-1, 3))
    moved = field.reversed().at(points, widths)
    landed = grid.to_index(points + moved[:, :3]).reshape(-1, 27, 3)
    sure = moved[:, 3].reshape(-1, 27, 1) > 0
    margin = MARGIN / grid.spacing
    first = np.floor(np.where(sure, landed, np.inf).min(axis=1) - margin)
    stop = np.ceil(np.where(sure, landed, -np.inf).max(axis=1) + margin) + 1
    first, stop = np.maximum(first, 0), np.minimum(stop, grid.shape)
    for i in np.flatnonzero((first < stop).all(axis=1)).tolist():
        z, y, x = zip(first[i].astype(int).tolist(), stop[i].astype(int).tolist(), strict=True)
        boxes[shown[i]] = z, y, x
    return boxes


def domains_of(landed: Sequence[Sequence[Box | None]], step: int) -> list[Box | None]:
    """Enclose what each atlas says of each organ, in cells."""
    found = []
    for boxes in zip(*landed, strict=True):
        box = enclosing([b for b in boxes if b is not None])
        found.append(None if box is None else in_cells(box, step))
    return found


def in_cells(box: Box, step: int) -> Box:
    """Cells that the voxels of a box lie in."""
    z, y, x = ((a // step, -(-b // step)) for a, b in box)
    return z, y, x


def in_voxels(box: Box, step: int) -> Box:
    """Voxels of cells."""
    z, y, x = ((a * step, b * step) for a, b in box)
    return z, y, x


def in_grid(box: Box, grid: Grid, step: int) -> Box:
    """Voxels of cells that the grid has."""
    depth, height, width = grid.shape
    found = overlap(in_voxels(box, step), ((0, depth), (0, height), (0, width)))
    assert found is not None
    return found


def step_of(grid: Grid) -> int:
    """Voxels along the edge of a cell: as near to `CELL` as whole voxels come."""
    return max(round(CELL / float(grid.spacing[0])), 1)
