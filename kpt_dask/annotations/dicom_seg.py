"""DICOM segmentations (SEG), binary, fractional or label maps, drawn on a scan's grid."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array

from atlas_store import Organ
from kpt_dask.annotations.dicom_objects import damaged, numbers, read_object
from kpt_dask.annotations.drawn import Canvas
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import GridMismatchError, ScanFormatError
from kpt_dask.scans.dicom_header import MOST_PIXELS

HALF = 0.5
"""Share of the largest value from which a voxel of a fractional segment belongs to it."""

AT_RIGHT_ANGLES = 1e-3
"""How far axes of pixels may be from lengths of 1 and from right angles, as cosines."""


class SegmentationFile:
    """A segmentation whose header has been read.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    names : mapping of int to str
        Labels of the segments, by their number.
    worlds : mapping of int to str
        UIDs of their frames of reference, "" where it is not given.

    Raises
    ------
    ScanFormatError
        If it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dataset = read_object(path)
        try:
            self.names: Mapping[int, str] = {
                int(one.SegmentNumber): printable_name(one.SegmentLabel)
                for one in self._dataset.SegmentSequence
            }
            world = str(self._dataset.get("FrameOfReferenceUID") or "")
            self.worlds: Mapping[int, str] = dict.fromkeys(self.names, world)
            self._rows, self._columns = int(self._dataset.Rows), int(self._dataset.Columns)
            self._frames = int(self._dataset.NumberOfFrames)
            groups = self._dataset.PerFrameFunctionalGroupsSequence
            if len(groups) != self._frames or self._frames < 1:
                raise ValueError(f"{self._frames} frames, of which {len(groups)} are described")
            if not 0 < self._rows * self._columns <= MOST_PIXELS:
                raise ValueError(f"{self._rows} × {self._columns} pixels")
            self._bits = int(self._dataset.BitsAllocated)
            self._check_size()
        except Exception as error:  # pydicom decodes on access, and raises many kinds
            raise damaged(path, error) from error

    def draw(self, canvas: Canvas, organs: Mapping[int, Organ]) -> None:
        """Draw the segments of some numbers.

        Raises
        ------
        GridMismatchError
            If its voxels are not those of the scan.
        ScanFormatError
            If it is damaged.
        """
        try:
            # Of segments that overlap, the first is kept: not that of the first frame of a plane.
            segments = [self._segment(n) for n in range(self._frames)]
            for n in sorted(range(self._frames), key=lambda n: segments[n] or 0):
                self._draw_frame(canvas, n, segments[n], organs)
        except (GridMismatchError, ScanFormatError):
            raise
        except Exception as error:
            raise damaged(self.path, error) from error

    def _segment(self, n: int) -> int | None:
        """Find the segment of a frame; None if its pixels tell."""
        group = self._dataset.PerFrameFunctionalGroupsSequence[n]
        if "SegmentIdentificationSequence" in group:
            return int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        if len(self.names) == 1 and self._dataset.get("SegmentationType") != "LABELMAP":
            return next(iter(self.names))
        return None

    def _draw_frame(
        self, canvas: Canvas, n: int, segment: int | None, organs: Mapping[int, Organ]
    ) -> None:
        if segment is not None and segment not in organs:
            return
        group = self._dataset.PerFrameFunctionalGroupsSequence[n]
        pixels = self._pixels(n)
        if segment is None:
            masks = {number: pixels == number for number in np.unique(pixels).tolist()}
        else:
            least = HALF * float(self._dataset.get("MaximumFractionalValue") or 1)
            fractional = self._dataset.get("SegmentationType") == "FRACTIONAL"
            masks = {segment: pixels >= least if fractional else pixels > 0}
        for number, mask in masks.items():
            if number in organs and mask.any():
                steps, origin = self._placement(group)
                canvas.draw_voxels(
                    self.path, np.argwhere(mask), steps, origin, organs[number].value
                )

    def _placement(self, group: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Place a frame: steps to the next row and column, and its first pixel, (z, y, x) in mm."""
        position = numbers(self._macro(group, "PlanePositionSequence").ImagePositionPatient, 3)
        cosines = numbers(self._macro(group, "PlaneOrientationSequence").ImageOrientationPatient, 6)
        spacing = numbers(self._macro(group, "PixelMeasuresSequence").PixelSpacing, 2)
        axes = cosines.reshape(2, 3)
        skewed = np.abs(axes @ axes.T - np.eye(2)).max()
        if skewed > AT_RIGHT_ANGLES or spacing.min() <= 0:
            raise ValueError("pixels that vanish, or whose axes are not at right angles")
        # The first axis of the orientation is the one along a row, from column to column.
        return spacing[:, None] * axes[::-1, ::-1], position[::-1]

    def _macro(self, group: Dataset, name: str) -> Dataset:
        shared = self._dataset.get("SharedFunctionalGroupsSequence") or [Dataset()]
        found: Dataset = (group.get(name) or shared[0].get(name))[0]
        return found

    def _check_size(self) -> None:
        """Refuse pixels that are fewer than the header says."""
        if not self._dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            needed = math.ceil(self._frames * self._rows * self._columns * self._bits / 8)
            if len(self._dataset.PixelData) < needed:
                raise ValueError(f"{len(self._dataset.PixelData)} bytes of pixels, not {needed}")

    def _pixels(self, n: int) -> NDArray[Any]:
        if self._bits != 1 or self._dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            return pixel_array(self._dataset, index=n)
        size = self._rows * self._columns
        first, last = n * size, (n + 1) * size
        data = np.frombuffer(
            self._dataset.PixelData, np.uint8, -(-last // 8) - first // 8, first // 8
        )
        bits = np.unpackbits(data, bitorder="little")[first % 8 :][:size]
        return bits.reshape(self._rows, self._columns)
