"""Segmentations of 3D Slicer (``.seg.nrrd``): in one layer or in several, cropped or not."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from atlas_store import Organ
from kpt_dask.annotations.drawn import Canvas
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.nrrd import open_layers

_FIELD = re.compile(r"Segment(\d{1,5})_(Name|ID|LabelValue|Layer)")


class SlicerFile:
    """A segmentation whose header has been read.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    names : mapping of int to str
        Names of the segments, by their number in the file.

    Raises
    ------
    ScanFormatError
        If it is damaged, or describes no segment.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, remarks = open_layers(path)
        segments: dict[int, dict[str, str]] = {}
        for name, value in remarks.items():
            if found := _FIELD.fullmatch(name):
                segments.setdefault(int(found[1]), {})[found[2]] = value
        if not segments:
            raise ScanFormatError(f"{path} describes no segment; save it with 3D Slicer again.")
        try:
            self.names: Mapping[int, str] = {
                n: printable_name(about.get("Name") or about["ID"]) for n, about in segments.items()
            }
            self._values = {
                n: (int(about.get("Layer", 0)), int(about.get("LabelValue", n + 1)))
                for n, about in segments.items()
            }
        except (KeyError, ValueError) as error:
            raise ScanFormatError(f"{path} has a damaged segment ({error}).") from error
        if any(not 0 <= layer < self._file.layers for layer, _ in self._values.values()):
            raise ScanFormatError(f"{path} has a segment in a layer that it has not.")

    worlds: Mapping[int, str] = MappingProxyType({})

    def draw(self, canvas: Canvas, organs: Mapping[int, Organ]) -> None:
        """Draw the segments of some numbers.

        Raises
        ------
        GridMismatchError
            If its voxels are not those of the scan.
        ScanFormatError
            If it is damaged.
        """
        grid, first = self._file.grid, 0
        steps = grid.affine[:3, :3].T
        for slab in self._file.slabs():
            for n, organ in organs.items():
                layer, value = self._values[n]
                index = np.argwhere(slab[..., layer] == value)
                if not len(index):
                    continue
                index[:, 0] += first
                canvas.draw_voxels(self.path, index, steps, grid.origin, organ.value)
            first += len(slab)
