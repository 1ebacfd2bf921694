"""Label maps that are put together on a scan's grid, from parts that may overlap."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.errors import GridMismatchError, LabelError
from kpt_dask.grid import Grid
from kpt_dask.label_files.label_map import dtype_of
from kpt_dask.remote import Remote
from kpt_dask.runtime import notices
from kpt_dask.scans import voxel_stream
from kpt_dask.scans.placement import header_of

NEAR = 0.1
"""Largest distance of a voxel from one of the scan, in voxels of the scan, to be that one."""

PIECES, PLANES = 4, 3
"""Planes look skipped where an organ is in so many pieces or more, of so many planes or fewer each,
on average; an organ that is in several pieces, as ribs are, has longer ones."""

UNNAMED = -1
"""Value of stored labels that have no name."""


class Canvas:
    """Labels of a scan's grid, drawn part by part; of two at one voxel, the first stays.

    Memory is that of the voxels' labels, of which the system provides only what is drawn on.

    Parameters
    ----------
    grid : Grid
        The scan's grid.
    dtype : dtype
        uint8 or uint16.
    """

    def __init__(self, grid: Grid, dtype: np.dtype[Any]) -> None:
        self.grid = grid
        self.labels: NDArray[Any] = np.zeros(grid.shape, dtype)
        self.overlaps: dict[tuple[int, int], int] = {}
        self.outside = 0

    def draw(self, where: tuple[Any, ...], mask: NDArray[np.bool_], value: int) -> None:
        """Draw a mask of a box; `where` are the box's slices or indices, (k, j, i)."""
        part = self.labels[where]
        taken = part[mask]
        for other in np.unique(taken[(taken != 0) & (taken != value)]).tolist():
            pair = (int(other), value)
            self.overlaps[pair] = self.overlaps.get(pair, 0) + int((taken == other).sum())
        part[mask & (part == 0)] = value
        self.labels[where] = part

    def draw_voxels(
        self,
        path: Path,
        index: NDArray[np.int64],
        steps: NDArray[np.float64],
        origin: NDArray[np.float64],
        value: int,
    ) -> None:
        """Draw voxels of another grid, each on the voxel of the scan that it is.

        Parameters
        ----------
        path : Path
            The file that they are of.
        index : ndarray (n, axis), int64
            Indices on that grid.
        steps : ndarray (axis, 3), float64
            From a voxel of it to the next along each axis, (z, y, x) in mm.
        origin : ndarray (3,), float64
            Centre of its first voxel, (z, y, x) in mm.
        value : int
            Label value.

        Raises
        ------
        GridMismatchError
            If its voxels are not those of the scan.
        """
        own = steps @ np.linalg.inv(self.grid.affine[:3, :3]).T
        places = index @ own + self.grid.to_index(origin)
        nearest = np.rint(places).astype(np.int64)
        off = float(np.abs(places - nearest).max(initial=0.0))
        # Voxels of a coarser grid may lie on every second one of the scan.
        order = np.abs(np.rint(own))
        if (order.sum(axis=1) != 1).any() or order.sum(axis=0).max() > 1:
            wrong = "of another size or direction than"
        elif off > NEAR:
            wrong = f"that lie {off:.2g} voxels beside"
        else:
            inside = ((nearest >= 0) & (nearest < self.grid.shape)).all(axis=1)
            self.outside += int(np.count_nonzero(~inside))
            k, j, i = nearest[inside].T
            self.draw((k, j, i), np.ones(len(k), bool), value)
            return
        raise GridMismatchError(
            f"{path} has voxels {wrong} those of the scan; resample it to the scan first."
        )


def skipped_planes(labels: NDArray[Any]) -> Mapping[int, tuple[int, int]]:
    """Find labels that were drawn on some planes only, such as every second one.

    Parameters
    ----------
    labels : ndarray (k, j, i)
        0 is no label.

    Returns
    -------
    mapping of int to (int, int)
        By label: planes that show it, and planes from the first to the last of these, along the
        axis where planes are skipped.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((20, 5, 5), np.uint8)
    >>> labels[2:15:2, 1:4, 1:4] = 7
    >>> skipped_planes(labels)
    {7: (7, 13)}
    """
    n = int(labels.max(initial=0)) + 1
    shown = [np.zeros((n, size), np.bool_) for size in labels.shape]
    for k, plane in enumerate(labels):
        j, i = np.nonzero(plane)
        values = plane[j, i]
        shown[0][values, k] = shown[1][values, j] = shown[2][values, i] = True
    found = {}
    for planes in shown:
        for value in np.flatnonzero(planes.any(axis=1)).tolist():
            at = np.flatnonzero(planes[value])
            pieces = 1 + int(np.count_nonzero(np.diff(at) > 1))
            if pieces >= PIECES and len(at) <= PLANES * pieces:
                found[value] = len(at), int(at[-1] - at[0]) + 1
    return found


@dataclass(frozen=True, eq=False)
class DrawnLabels:
    """A label map that is drawn when it is first read; see `kpt_dask.scans.contract.ScanFile`.

    Attributes
    ----------
    path : Path
        The file or folder.
    grid : Grid
        The scan's grid.
    organs : OrganTable
        Meaning of the labels.
    draw : callable
        Draws everything on a `Canvas`.
    doubts : tuple of str
        Doubts about the headers, one sentence each.
    """

    path: Path
    grid: Grid
    organs: OrganTable
    draw: Callable[[Canvas], None]
    doubts: tuple[str, ...] = ()
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a label."""
        return dtype_of(self.organs)

    @property
    def header(self) -> Any:
        """NIfTI header for label maps on this grid."""
        return header_of(self.grid)

    @cached_property
    def labels(self) -> NDArray[Any]:
        """The label map, (k, j, i); warns of what overlaps, and of planes that were skipped."""
        canvas = Canvas(self.grid, self.dtype)
        self.draw(canvas)
        names = {organ.value: organ.name for organ in self.organs}
        if canvas.overlaps:
            told = ", ".join(
                f"{names[a]} and {names[b]} in {n} voxels"
                for (a, b), n in sorted(canvas.overlaps.items(), key=lambda pair: -pair[1])[:5]
            )
            notices.warn(f"{self.path}: organs overlap ({told}); the one named first is kept.")
        if canvas.outside:
            notices.warn(
                f"{self.path}: {canvas.outside} voxels lie outside of the scan and are left out."
            )
        if skipped := skipped_planes(canvas.labels):
            told = ", ".join(
                f"{names[value]} on {drawn} of {planes}"
                for value, (drawn, planes) in list(skipped.items())[:5]
            )
            notices.warn(
                f"{self.path}: of the planes from an organ's first to its last, some seem to have"
                f" been skipped (drawn: {told}) and stay empty; interpolate it where it was drawn."
            )
        return canvas.labels

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the labels; see `kpt_dask.scans.contract.ScanFile`."""
        planes, rows, columns = self.grid.shape
        step = max(1, voxel_stream.SLAB_BYTES // (rows * columns * self.dtype.itemsize))
        for first in range(0, planes, step):
            yield self.labels[first : first + step]


@dataclass(frozen=True, eq=False)
class RenamedLabels:
    """A label map whose values become those of a store; see `kpt_dask.scans.contract.ScanFile`.

    Attributes
    ----------
    path : Path or Remote
    grid : Grid
    source : callable
        Streams the labels as they are stored, uint16.
    values : ndarray (65536), int32
        The store's value for every stored one; 0 for what is left out, `UNNAMED` for what nobody
        named, which is an error where it occurs.
    """

    path: Path | Remote
    grid: Grid
    source: Callable[[], Iterator[NDArray[np.uint16]]]
    values: NDArray[np.int32]
    doubts: tuple[str, ...] = ()
    slope: float = 1.0
    intercept: float = 0.0
    dtype: np.dtype[Any] = np.dtype(np.uint16)  # noqa: RUF009

    @property
    def header(self) -> Any:
        """NIfTI header for label maps on this grid."""
        return header_of(self.grid)

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the labels; see `kpt_dask.scans.contract.ScanFile`."""
        for slab in self.source():
            named = self.values[slab]
            if (named == UNNAMED).any():
                found = np.unique(slab[named == UNNAMED]).tolist()
                raise LabelError(
                    f"{self.path} holds labels without a name: {', '.join(map(str, found[:12]))};"
                    " name them where the others are named, or choose the layout that it has."
                )
            yield named.astype(np.uint16)
