"""What every writer is given: labels on a scan's own grid, what they mean, and of which scan.

Extents and parts of a label map are found by streaming it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import Organ
from kpt_dask.grid import Grid
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.scans.contract import ScanFile
from kpt_dask.scans.label_header import DESCRIPTION
from kpt_dask.scans.placement import header_of

Extent = tuple[slice, slice, slice]


def dtype_of(organs: Iterable[Organ]) -> np.dtype[Any]:
    """Type of a label map of these organs: uint8 where their values fit, else uint16."""
    largest = max((organ.value for organ in organs), default=0)
    return np.dtype(np.uint8 if largest <= np.iinfo(np.uint8).max else np.uint16)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A label map to be written.

    Attributes
    ----------
    voxels : PackedLabels
        Labels, in the stored order of the scan.
    grid : Grid
        Grid of the voxels.
    organs : tuple of Organ
        Organs that it may show.
    scan : ScanFile or None
        The scan, if it is at hand: what refers to it, or keeps its header, needs it.
    description : str
        What made it, for formats that have a place for it.
    """

    voxels: PackedLabels
    grid: Grid
    organs: tuple[Organ, ...]
    scan: ScanFile | None = None
    description: str = DESCRIPTION

    @property
    def header(self) -> Any:
        """NIfTI header with the scan's geometry."""
        return header_of(self.grid) if self.scan is None else self.scan.header

    def extents(self) -> Mapping[int, Extent]:
        """Find the box of every label that occurs, (k, j, i) voxels."""
        # Imported here, because few formats need it: it takes a tenth of a start.
        from scipy.ndimage import find_objects

        low: dict[int, NDArray[np.int64]] = {}
        high: dict[int, NDArray[np.int64]] = {}
        first = 0
        for slab in self.voxels.slabs():
            for label, box in enumerate(find_objects(slab), 1):
                if box is not None:
                    begin, end = (
                        np.array(ends) + np.array((first, 0, 0))
                        for ends in zip(*((part.start, part.stop) for part in box), strict=True)
                    )
                    low[label] = np.minimum(low.get(label, begin), begin)
                    high[label] = np.maximum(high.get(label, end), end)
            first += len(slab)
        return {
            label: (slice(a[0], b[0]), slice(a[1], b[1]), slice(a[2], b[2]))
            for label in sorted(low)
            for a, b in [(low[label].tolist(), high[label].tolist())]
        }

    def only(self, organ: Organ, extent: Extent | None) -> "LabelMap":
        """Mask of one organ: 1 where it is, uint8; its extent is None where it does not occur."""
        voxels = self.voxels.mask(organ.value, slice(0, 0) if extent is None else extent[0])
        return replace(self, voxels=voxels, organs=(replace(organ, value=1),))
