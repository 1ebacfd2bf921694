"""Chunks gathered from the rows of a region: which hold data, and their voxels in C order."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas_store.arrays.boxes import Region
from atlas_store.arrays.flat import as_flat_view
from atlas_store.arrays.jit import kernel


class RegionRows(NamedTuple):
    """Rows of a region of an array, and how chunks cut them.

    Attributes
    ----------
    memory : ndarray (n)
        Flat view of the region's data.
    step : int
        Elements of `memory` from one row (along the last axis) to the next.
    filled : bool array (rows)
        False for rows known to be all 0.
    shape : tuple of int
        Shape of the region.
    begin : tuple of int
        Where the region begins in the first chunk that it touches.
    unit : tuple of int
        Shape of a chunk.
    """

    memory: NDArray[Any]
    step: int
    filled: NDArray[np.bool_]
    shape: tuple[int, ...]
    begin: tuple[int, ...]
    unit: tuple[int, ...]

    @classmethod
    def of(
        cls,
        data: NDArray[Any],
        region: Region,
        unit: tuple[int, ...],
        filled: NDArray[np.bool_],
    ) -> "RegionRows":
        """Describe the data of a region; copied only if its rows are not contiguous."""
        rows = data.reshape(-1, data.shape[-1])
        try:
            memory, (step, _) = as_flat_view(rows)
        except ValueError:
            memory, (step, _) = as_flat_view(np.ascontiguousarray(rows))
        begin = tuple(part.start % size for part, size in zip(region, unit, strict=True))
        return cls(memory, step, filled.ravel(), data.shape, begin, unit)

    def occupied(self) -> NDArray[np.bool_]:
        """Mark the chunks that hold anything but 0, one axis per axis of the region."""
        axes = zip(self.begin, self.shape, self.unit, strict=True)
        occupied = np.zeros([-(-(a + n) // size) for a, n, size in axes], np.bool_)
        _mark(self, occupied.reshape(-1, occupied.shape[-1]))
        return occupied

    def gather(self, chosen: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Gather chunks, numbered (n, axis) from the first that is touched; 0 beside the region."""
        _gather(self, chosen, out.reshape(len(out), -1, self.unit[-1]))


@kernel
def _mark(rows: Any, occupied: Any) -> None:
    """Do what `RegionRows.occupied` does; `occupied` is 2-D, (row of chunks, chunk)."""
    shape, begin, unit = rows.shape, rows.begin, rows.unit
    for row in range(rows.filled.size):
        if not rows.filled[row]:
            continue
        row_of_chunks, rest, stride = 0, row, 1
        for back in range(2, len(shape) + 1):
            index = rest % shape[-back] + begin[-back]
            row_of_chunks += stride * (index // unit[-back])
            stride *= -(-(begin[-back] + shape[-back]) // unit[-back])
            rest //= shape[-back]
        marks = occupied[row_of_chunks]
        values = rows.memory[row * rows.step : row * rows.step + shape[-1]]
        for c in range(marks.size):
            # Most are marked by their first rows.
            if marks[c]:
                continue
            first = max(c * unit[-1] - begin[-1], 0)
            found = 0
            for x in range(first, min((c + 1) * unit[-1] - begin[-1], shape[-1])):
                found |= values[x] != 0
            marks[c] = found != 0


@kernel
def _gather(rows: Any, chosen: Any, out: Any) -> None:
    """Do what `RegionRows.gather` does; `out` is 3-D, (chunk, row of the chunk, column)."""
    shape, begin, unit = rows.shape, rows.begin, rows.unit
    for n in range(chosen.shape[0]):
        # First column in the region and in the chunk, and how many columns they share.
        before = chosen[n, -1] * unit[-1] - begin[-1]
        source, target = max(before, 0), max(-before, 0)
        columns = min(shape[-1] - source, unit[-1] - target)
        for row in range(out.shape[1]):
            region_row, rest, stride, inside = 0, row, 1, True
            for back in range(2, len(shape) + 1):
                index = chosen[n, -back] * unit[-back] + rest % unit[-back] - begin[-back]
                inside &= (index >= 0) & (index < shape[-back])
                region_row += stride * index
                stride *= shape[-back]
                rest //= unit[-back]
            chunk_row = out[n, row]
            inside = inside and rows.filled[region_row]
            if not inside or columns < chunk_row.size:
                chunk_row[:] = 0
            if inside:
                first = region_row * rows.step + source
                chunk_row[target : target + columns] = rows.memory[first : first + columns]
