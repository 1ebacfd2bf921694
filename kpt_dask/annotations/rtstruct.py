"""DICOM structure sets (RTSTRUCT): contours, filled on the planes of a scan.

A contour within another is a hole, and one that is joined to it by a channel is, too. Contours that
overlap otherwise are united, unless the file says that they exclude each other.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlas_store import Organ
from kpt_dask.annotations.contours import excluding, united
from kpt_dask.annotations.dicom_objects import damaged, numbers, read_object
from kpt_dask.annotations.drawn import Canvas
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import GridMismatchError
from kpt_dask.runtime import notices

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
        self._excluding: set[int] = set()
        dataset = read_object(path)
        try:
            self.names: Mapping[int, str] = {
                int(one.ROINumber): printable_name(one.ROIName)
                for one in dataset.StructureSetROISequence
            }
            self._contours: dict[int, list[NDArray[np.float64]]] = {}
            for roi in dataset.ROIContourSequence:
                number = int(roi.ReferencedROINumber)
                found = self._contours.setdefault(number, [])
                for one in roi.get("ContourSequence") or []:
                    kind = str(one.ContourGeometricType)
                    if kind.endswith("XOR"):
                        self._excluding.add(number)
                    if kind.startswith("CLOSED"):
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
            fill = excluding if number in self._excluding else united
            twice = crossing = 0
            for plane, contours in by_plane.items():
                assert axis is not None
                if not 0 <= plane < canvas.grid.shape[axis]:
                    canvas.outside += 1
                    continue
                rows, columns = np.delete(canvas.grid.shape, axis).tolist()
                filled = fill(contours, (rows, columns))
                where: list[int | slice] = [slice(None)] * 3
                where[axis] = plane
                canvas.draw(tuple(where), filled.mask, organ.value)
                twice += filled.twice
                crossing += filled.crossing
            name = self.names.get(number, number)
            if twice:
                notices.warn(
                    f"{self.path}: contours of {name} are listed twice ({twice} in all); each is"
                    " drawn once."
                )
            if crossing:
                notices.warn(
                    f"{self.path}: contours of {name} overlap others of it ({crossing} in all) and"
                    " are united; look at it before it is used."
                )
