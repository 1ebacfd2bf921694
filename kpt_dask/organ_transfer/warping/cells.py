"""Cells of a block that organs may reach.

A cell is a cube of voxels, ≈ 16 mm wide. It holds sums only for the organs that may lie there, so
a block takes memory only where organs are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.boxes import Box, enclosing, overlap, shape_of
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import LANES
from kpt_dask.organ_transfer.warping.landing import in_cells


@dataclass(frozen=True)
class Cells:
    """Cells in C order; their groups and, within these, organs are numbered one after another.

    Organs of one group share the likelihood of intensities.

    Attributes
    ----------
    index : int64 array (cell, 3)
        Lattice index (z, y, x).
    groups : int64 array (cell + 1)
        Where the groups of a cell begin.
    group : int64 array (groups)
        Index of each group in the list of ν.
    organs : int64 array (groups + 1)
        Where the organs of a group begin.
    organ : int64 array (organs)
        Index in the organ table.
    """

    index: NDArray[np.int64]
    groups: NDArray[np.int64]
    group: NDArray[np.int64]
    organs: NDArray[np.int64]
    organ: NDArray[np.int64]

    @cached_property
    def cell_of(self) -> NDArray[np.int64]:
        """Cell of each slot, int64 array (organs)."""
        return np.repeat(np.arange(len(self.index)), np.diff(self.organs[self.groups]))

    @property
    def box(self) -> Box:
        """Smallest box of cells around all of them."""
        z, y, x = zip(
            self.index.min(axis=0).tolist(), (self.index.max(axis=0) + 1).tolist(), strict=True
        )
        return z, y, x


def plan_cells(
    search_boxes: Sequence[Box | None], groups: Sequence[int], box: Box, step: int
) -> Cells:
    """Find the cells that touch a box of voxels and lie in any organ's search box.

    Parameters
    ----------
    search_boxes : sequence of Box or None
        Search box of each organ, in cells.
    groups : sequence of int
        Group of each organ; a group shares one likelihood.
    box : Box
        Box in voxels.
    step : int
        Voxels along the edge of a cell.
    """
    touched = in_cells(box, step)
    here = [overlap(search_box, touched) for search_box in search_boxes]
    whole = enclosing([part for part in here if part is not None])
    order = sorted((o for o in range(len(here)) if here[o]), key=lambda o: (groups[o], o))
    assert whole is not None
    corner = np.array([a for a, _ in whole])
    present = np.zeros((*shape_of(whole), len(order)), bool)
    for i, o in enumerate(order):
        z, y, x = (slice(a - c, b - c) for (a, b), c in zip(here[o] or (), corner, strict=True))
        present[z, y, x, i] = True
    any_organ = present.any(axis=3)
    index = np.argwhere(any_organ) + corner
    cell, slot = np.nonzero(present[any_organ])
    organ = np.array(order, np.int64)[slot]
    group = np.array(groups, np.int64)[organ]
    begins = np.ones(len(cell), bool)
    begins[1:] = (cell[1:] != cell[:-1]) | (group[1:] != group[:-1])
    organs = np.append(np.flatnonzero(begins), len(cell))
    per_cell = np.bincount(cell[begins], minlength=len(index))
    return Cells(index, np.append(0, np.cumsum(per_cell)), group[begins], organs, organ)


def width_of(step: int) -> int:
    """Voxels of a cell, rounded up to whole SIMD vectors."""
    return -(-(step**3) // LANES) * LANES


@kernel
def gather(values: Any, corner: Any, index: Any, step: Any, out: Any) -> None:
    """Copy an array into cells.

    Parameters
    ----------
    values : float32 array (z, y, x)
        Its first voxel is `corner`; voxels of the cells that it does not hold stay as they are.
    index : int64 array (cell, 3)
        Lattice indices of the cells.
    out : float32 array (cell, `width_of`)
        Changed.
    """
    for c in range(index.shape[0]):
        for i in range(step):
            z = index[c, 0] * step + i - corner[0]
            for j in range(step):
                y = index[c, 1] * step + j - corner[1]
                if z < 0 or y < 0 or z >= values.shape[0] or y >= values.shape[1]:
                    continue
                for k in range(step):
                    x = index[c, 2] * step + k - corner[2]
                    if 0 <= x < values.shape[2]:
                        out[c, (i * step + j) * step + k] = values[z, y, x]


@kernel
def spread(sums: Any, slots: Any, index: Any, corner: Any, step: Any, out: Any) -> None:
    """Write the share of one organ from its cells: votes over totals, where 0 over 0 is 0.

    Parameters
    ----------
    sums : VoteSums
        Votes and totals, float32 arrays (slot, voxel of the cell).
    slots : int64 array (n)
        The organ's rows of both.
    index : int64 array (n, 3)
        Lattice indices of their cells.
    corner : int64 array (3)
        First voxel of `out` in the scan.
    out : float32 array (z, y, x)
        Changed; what of a cell lies beyond it is left out.
    """
    depth, height, width = out.shape
    votes, totals = sums
    for c in range(index.shape[0]):
        vote, total = votes[slots[c]], totals[slots[c]]
        for i in range(step):
            z = index[c, 0] * step + i - corner[0]
            for j in range(step):
                y = index[c, 1] * step + j - corner[1]
                if z < 0 or y < 0 or z >= depth or y >= height:
                    continue
                for k in range(step):
                    x = index[c, 2] * step + k - corner[2]
                    q = (i * step + j) * step + k
                    if 0 <= x < width and total[q] > 0:
                        out[z, y, x] = vote[q] / total[q]
