"""DICOM structure sets (RTSTRUCT): contours, filled on the planes of a scan.

A contour within another is a hole, and one that is joined to it by a channel is, too. Contours that
overlap otherwise are united, unless the file says that they exclude each other.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlas_store import Organ
from kpt_dask.annotations.contours import excluding, united
from kpt_dask.annotations.dicom_objects import damaged, numbers, read_object
from kpt_dask.annotations.drawn import Canvas
from kpt_dask.annotations.names import printable_name, words_of
from kpt_dask.errors import GridMismatchError, some_of
from kpt_dask.grid import Grid
from kpt_dask.runtime import notices

OFF_PLANE = 0.25
"""Largest distance of a contour from a plane of the scan, in planes."""

CORNERS = 3
"""Corners of a contour that encloses something."""


class StructureFile:
    """A structure set whose regions have been read.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    names : mapping of int to str
        Names of the regions, by their number, but for empty ones that are called as others are.
    worlds : mapping of int to str
        UIDs of their frames of reference, "" where it is not given.

    Raises
    ------
    ScanFormatError
        If it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._excluding: set[int] = set()
        self._open: Counter[int] = Counter()
        dataset = read_object(path)
        try:
            self.names: Mapping[int, str] = {
                int(one.ROINumber): printable_name(one.ROIName)
                for one in dataset.StructureSetROISequence
            }
            self.worlds: Mapping[int, str] = {
                int(one.ROINumber): str(one.get("ReferencedFrameOfReferenceUID") or "")
                for one in dataset.StructureSetROISequence
            }
            self._contours: dict[int, list[NDArray[np.float64]]] = {}
            for roi in dataset.ROIContourSequence:
                number = int(roi.ReferencedROINumber)
                for one in roi.get("ContourSequence") or []:
                    kind = str(one.ContourGeometricType)
                    if kind.endswith("XOR"):
                        self._excluding.add(number)
                    if kind.startswith("OPEN"):
                        self._open[number] += 1
                    if kind.startswith("CLOSED"):
                        data = one.ContourData
                        points = numbers(data, len(data)).reshape(-1, 3)
                        # Planning systems leave points behind, which enclose nothing.
                        if len(points) >= CORNERS:
                            found = self._contours.setdefault(number, [])
                            found.append(np.ascontiguousarray(points[:, ::-1]))
        except Exception as error:  # pydicom decodes on access, and raises many kinds
            raise damaged(path, error) from error
        # Planning systems leave empty regions behind, under the name of a full one too.
        held = self._contours.keys() | self._open.keys()
        drawn = {words_of(name) for number, name in self.names.items() if number in held}
        self.names = {
            number: name
            for number, name in self.names.items()
            if number in held or words_of(name) not in drawn
        }

    def draw(self, canvas: Canvas, organs: Mapping[int, Organ]) -> None:
        """Draw the regions of some numbers; warns of contours that are not drawn as they are.

        Raises
        ------
        GridMismatchError
            If contours lie in no planes of the scan.
        """
        outside, twice, crossing = Counter[int](), Counter[int](), Counter[int]()
        for number, organ in organs.items():
            axis, by_plane = self._by_plane(canvas.grid, number)
            shape = np.delete(canvas.grid.shape, axis)
            fill = excluding if number in self._excluding else united
            for plane, contours in by_plane.items():
                if not 0 <= plane < canvas.grid.shape[axis]:
                    outside[number] += len(contours)
                    continue
                # A contour may reach to the outer edge of the voxels at the border.
                outside[number] += sum(
                    bool(((one <= -1) | (one >= shape)).any()) for one in contours
                )
                filled = fill(contours, (int(shape[0]), int(shape[1])))
                where: list[int | slice] = [slice(None)] * 3
                where[axis] = plane
                canvas.draw(tuple(where), filled.mask, organ.value)
                twice[number] += filled.twice
                crossing[number] += filled.crossing
        self._warn(
            Counter({number: self._open[number] for number in organs}),
            "are open and enclose nothing",
            "they are left out, so close them where they were drawn",
        )
        self._warn(
            outside,
            "lie partly or wholly outside of the scan",
            "what does is left out, so see that it is the scan that they were drawn on",
        )
        self._warn(twice, "are listed twice", "each is drawn once")
        self._warn(
            crossing,
            "overlap others of their organ",
            "they are united, so look at it before it is used",
        )

    def _by_plane(
        self, grid: Grid, number: int
    ) -> tuple[int, Mapping[int, list[NDArray[np.float64]]]]:
        """Sort contours of a region, (row, column), by their planes along an axis of the scan."""
        found: dict[int, list[NDArray[np.float64]]] = {}
        indices = [grid.to_index(contour) for contour in self._contours.get(number, [])]
        # One contour may be as short along another axis.
        axis = int(np.sum([np.ptp(index, axis=0) for index in indices] or [[0]], axis=0).argmin())
        for index in indices:
            along = index[:, axis]
            plane = round(float(along.mean()))
            if np.abs(along - plane).max() > OFF_PLANE:
                raise GridMismatchError(
                    f"{self.path}: a contour of {self.names.get(number, number)} lies between"
                    " the planes of the scan; give the series that it was drawn on."
                )
            found.setdefault(plane, []).append(np.delete(index, axis, axis=1))
        return axis, found

    def _warn(self, counts: Counter[int], wrong: str, what: str) -> None:
        """Warn of contours of some regions, if there are any."""
        if told := [
            f"{n} of {self.names.get(number, number)}" for number, n in counts.items() if n
        ]:
            notices.warn(f"{self.path}: contours {wrong} ({some_of(told)}); {what}.")
