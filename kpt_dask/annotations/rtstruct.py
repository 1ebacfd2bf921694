"""DICOM structure sets (RTSTRUCT): contours, filled on the planes of a scan.

A voxel belongs to an organ where its centre lies inside an odd number of the organ's contours, so
that a contour within another is a hole, and one that is joined to it by a channel is, too.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlas_store import Organ
from kpt_dask.annotations.dicom_objects import damaged, numbers, read_object
from kpt_dask.annotations.drawn import Canvas
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import GridMismatchError

OFF_PLANE = 0.25
"""Largest distance of a contour from a plane of the scan, in planes."""


class StructureFile:
    """A structure set whose regions have been read.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    names : mapping of int to str
        Names of the regions, by their number.

    Raises
    ------
    ScanFormatError
        If it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        dataset = read_object(path)
        try:
            self.names: Mapping[int, str] = {
                int(one.ROINumber): printable_name(one.ROIName)
                for one in dataset.StructureSetROISequence
            }
            self._contours: dict[int, list[NDArray[np.float64]]] = {}
            for roi in dataset.ROIContourSequence:
                found = self._contours.setdefault(int(roi.ReferencedROINumber), [])
                for one in roi.get("ContourSequence") or []:
                    if str(one.ContourGeometricType).startswith("CLOSED"):
                        data = one.ContourData
                        points = numbers(data, len(data)).reshape(-1, 3)
                        found.append(np.ascontiguousarray(points[:, ::-1]))
        except Exception as error:  # pydicom decodes on access, and raises many kinds
            raise damaged(path, error) from error

    def draw(self, canvas: Canvas, organs: Mapping[int, Organ]) -> None:
        """Draw the regions of some numbers.

        Raises
        ------
        GridMismatchError
            If contours lie in no planes of the scan.
        """
        for number, organ in organs.items():
            by_plane: dict[int, list[NDArray[np.float64]]] = {}
            axis: int | None = None
            for contour in self._contours.get(number, []):
                index = canvas.grid.to_index(contour)
                if axis is None:
                    axis = int(np.ptp(index, axis=0).argmin())
                along = index[:, axis]
                plane = round(float(along.mean()))
                if np.abs(along - plane).max() > OFF_PLANE:
                    raise GridMismatchError(
                        f"{self.path}: a contour of {self.names.get(number, number)} lies between"
                        " the planes of the scan; give the series that it was drawn on."
                    )
                by_plane.setdefault(plane, []).append(np.delete(index, axis, axis=1))
            for plane, contours in by_plane.items():
                assert axis is not None
                self._fill(canvas, axis, plane, contours, organ.value)

    def _fill(
        self,
        canvas: Canvas,
        axis: int,
        plane: int,
        contours: list[NDArray[np.float64]],
        value: int,
    ) -> None:
        if not 0 <= plane < canvas.grid.shape[axis]:
            canvas.outside += 1
            return
        rows, columns = np.delete(canvas.grid.shape, axis)
        crossings = np.zeros((rows, columns + 1), np.int32)
        for contour in contours:
            count_crossings(contour, crossings)
        mask = crossings.cumsum(axis=1)[:, :columns] % 2 == 1
        where: list[int | slice] = [slice(None)] * 3
        where[axis] = plane
        canvas.draw(tuple(where), mask, value)


def count_crossings(contour: NDArray[np.float64], crossings: NDArray[np.int32]) -> None:
    """Count where the edges of a closed contour cross the rows of a plane.

    Parameters
    ----------
    contour : ndarray (n, 2), float64
        (row, column) of the corners.
    crossings : ndarray (row, column + 1), int32
        Is given, at the first column whose centre is beyond it, one more for each crossing.
    """
    start, end = contour, np.roll(contour, -1, axis=0)
    flip = start[:, 0] > end[:, 0]
    low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
    # Rows of an edge: from its lower end, which counts, to its upper end, which does not.
    first = np.clip(np.ceil(low[:, 0]), 0, len(crossings)).astype(np.int64)
    last = np.clip(np.ceil(high[:, 0]), 0, len(crossings)).astype(np.int64)
    number = last - first
    edge = np.repeat(np.arange(len(contour)), number)
    row = np.arange(number.sum()) - np.repeat(number.cumsum() - number, number) + first[edge]
    rise = high[edge, 0] - low[edge, 0]
    at = low[edge, 1] + (row - low[edge, 0]) / rise * (high[edge, 1] - low[edge, 1])
    column = np.clip(np.ceil(at), 0, crossings.shape[1] - 1).astype(np.int64)
    np.add.at(crossings, (row, column), 1)
