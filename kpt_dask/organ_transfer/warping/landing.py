"""Boxes of the scan where organs are predicted by the fields of their atlases.

Plans are made in cells, cubes of voxels counted from the scan's first voxel, so a cell is the same
whatever block it is in. Reads no voxel.
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
"""Margin around the predicted corners of an organ's box, mm."""


def by_atlas(keypoints: xr.Dataset, matches: xr.Dataset, n: int) -> list[Field]:
    """Fit a field to the matches of each of `n` atlases."""
    position = keypoints.position.values[matches.keypoint.values]
    translation = matches.translation.values
    return [Field.of(position[own], translation[own]) for own in slices_by_atlas(matches, n)]


def predicted_boxes(
    atlas: Atlas, field: Field, organs: OrganTable, grid: Grid, widths: Widths
) -> list[Box | None]:
    """Predict the box of each organ of an atlas in the scan, in voxels, with `MARGIN` around it.

    The reversed field maps the 27 points at low, middle and high of the organ's box.
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
    at = along[np.indices((3, 3, 3)).reshape(3, 27).T, :, range(3)]
    points = source.to_mm(at.transpose(2, 0, 1).reshape(-1, 3))
    moved = field.reversed().at(points, widths)
    predicted = grid.to_index(points + moved[:, :3]).reshape(-1, 27, 3)
    supported = moved[:, 3].reshape(-1, 27, 1) > 0
    margin = MARGIN / grid.spacing
    first = np.floor(np.where(supported, predicted, np.inf).min(axis=1) - margin)
    stop = np.ceil(np.where(supported, predicted, -np.inf).max(axis=1) + margin) + 1
    first, stop = np.maximum(first, 0), np.minimum(stop, grid.shape)
    for i in np.flatnonzero((first < stop).all(axis=1)).tolist():
        z, y, x = zip(first[i].astype(int).tolist(), stop[i].astype(int).tolist(), strict=True)
        boxes[shown[i]] = z, y, x
    return boxes


def search_boxes_of(predicted: Sequence[Sequence[Box | None]], step: int) -> list[Box | None]:
    """Enclose each organ's predicted boxes of all atlases, in cells."""
    found = []
    for boxes in zip(*predicted, strict=True):
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
    """Voxels of cells, clipped to the grid."""
    depth, height, width = grid.shape
    found = overlap(in_voxels(box, step), ((0, depth), (0, height), (0, width)))
    assert found is not None
    return found


def step_of(grid: Grid) -> int:
    """Edge of a cell, voxels: `CELL` rounded to whole voxels."""
    return max(round(CELL / float(grid.spacing[0])), 1)
