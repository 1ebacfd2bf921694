"""Where organs land, and the displacement fields that bring them there: plans of mode `local`.

Fields live on one lattice that begins at the scan's first voxel, so a part of a field is the
same whatever block asks for it. Reads no voxel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from kpt_dask.boxes import Box, enclosing, overlap
from kpt_dask.fields import Widths, regress
from kpt_dask.grid import Grid
from kpt_dask.matching import slices_by_atlas

NODE = 10.0
"""Distance between the nodes of the fields' lattice, mm."""
MARGIN = 15.0
"""How far beyond where the corners of its box land an organ may reach, mm."""
LEAST_SUPPORT = 0.01
"""Matches that must agree on where an organ lands for its atlas to have a say in where to look."""


@dataclass(frozen=True)
class Matched:
    """What a field is made of: matches of one atlas.

    Attributes
    ----------
    position, translation : float32 arrays (m, 3)
        Of the test keypoints, and from the atlas to the scan, mm.
    """

    position: NDArray[np.float32]
    translation: NDArray[np.float32]


@dataclass(frozen=True)
class Field:
    """One atlas's displacement field on a box of the lattice.

    Attributes
    ----------
    first : tuple of int
        Lattice index of the first node (z, y, x).
    nodes : float32 array (z, y, x, 4)
        What to add to a voxel index of the scan to get the atlas's, (z, y, x), and the support.
    """

    first: tuple[int, int, int]
    nodes: NDArray[np.float32]

    def part(self, box: Box, step: float) -> "Field":
        """Cut out the nodes that the voxels of `box` lie between, `step` voxels apart."""
        low, high = lattice(box, step)
        cut = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, self.first, strict=True))
        return Field(low, self.nodes[cut])

    def source(self, box: Box, held: Box) -> Box | None:
        """Find the atlas's voxels, of those `held`, that the field can bring to `box`, if any."""
        shifts = (self.nodes[..., axis] for axis in range(3))
        z, y, x = (
            (int(np.floor(a + shift.min() - 1)), int(np.ceil(b + shift.max() + 1)))
            for (a, b), shift in zip(box, shifts, strict=True)
        )
        return overlap((z, y, x), held)


def lattice(box: Box, step: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First node, and the one past the last, that the voxels of `box` lie between."""
    # The quotient, not the floor division: it is what the kernel computes.
    z, y, x = ((int(start / step), int((stop - 1) / step) + 2) for start, stop in box)
    return (z[0], y[0], x[0]), (z[1], y[1], x[1])


def by_atlas(keypoints: xr.Dataset, matches: xr.Dataset, n: int) -> list[Matched]:
    """Take apart the matches of `n` atlases."""
    position = keypoints.position.values[matches.keypoint.values]
    translation = matches.translation.values
    return [Matched(position[own], translation[own]) for own in slices_by_atlas(matches, n)]


def landing_boxes(
    atlas: Atlas, matched: Matched, organs: OrganTable, grid: Grid, widths: Widths
) -> list[Box | None]:
    """Find where each organ of an atlas lands in the scan, in voxels, with a margin.

    The same regression with the roles exchanged says where the corners and the centre of the
    organ's box go, as far as matches support that.
    """
    boxes: list[Box | None] = []
    source = Grid.isotropic(atlas.info.shape, float(grid.spacing[0]), atlas.info.origin)
    for organ in organs:
        if organ.name not in atlas.organs:
            boxes.append(None)
            continue
        ends = np.array(atlas.organs[organ.name].bounding_box, np.float64) - (0, 1)
        along = [(low, (low + high) / 2, high) for low, high in ends]
        points = source.to_mm(list(product(*along)))
        moved = regress(points, matched.position - matched.translation, matched.translation, widths)
        sure = moved[:, 3] >= LEAST_SUPPORT
        if not sure.any():
            boxes.append(None)
            continue
        at = grid.to_index((points + moved[:, :3])[sure])
        margin = MARGIN / grid.spacing
        low = np.maximum(np.floor(at.min(axis=0) - margin), 0).astype(int).tolist()
        high = np.minimum(np.ceil(at.max(axis=0) + margin) + 1, grid.shape).astype(int).tolist()
        empty = any(a >= b for a, b in zip(low, high, strict=True))
        boxes.append(None if empty else ((low[0], high[0]), (low[1], high[1]), (low[2], high[2])))
    return boxes


def join(landed: Sequence[Sequence[Box | None]]) -> list[Box | None]:
    """Enclose what each atlas says of each organ."""
    return [enclosing([b for b in boxes if b is not None]) for boxes in zip(*landed, strict=True)]


def fit(atlas: Atlas, matched: Matched, grid: Grid, box: Box, widths: Widths) -> Field:
    """Regress an atlas's field at the nodes around a box of the scan's voxels."""
    spacing = float(grid.spacing[0])
    first, stop = lattice(box, NODE / spacing)
    axes = [grid.origin[a] + NODE * np.arange(first[a], stop[a]) for a in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    nodes = regress(points, matched.position, matched.translation, widths)
    nodes[:, :3] = (grid.origin - np.array(atlas.info.origin) - nodes[:, :3]) / spacing
    return Field(first, nodes.reshape(*(b - a for a, b in zip(first, stop, strict=True)), 4))
