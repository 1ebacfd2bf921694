"""Folders with a mask for each organ, such as ``segmentations/liver.nii.gz``."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from atlas_store import Organ
from kpt_dask.annotations.drawn import Canvas
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import GridMismatchError, ScanFormatError
from kpt_dask.runtime import progress
from kpt_dask.scans.scan import READERS, open_labels, scan_name


def mask_files(folder: Path) -> Mapping[str, Path]:
    """Find the masks of a folder by the names of their organs; empty if there is none.

    Raises
    ------
    ScanFormatError
        If a mask is a link that leads nowhere, or two have the same name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if not name.endswith(tuple(READERS)) or name.startswith("."):
            continue
        if path.is_symlink() and not os.path.exists(path):
            raise ScanFormatError(f"{path} is a link that leads nowhere; an organ would be lost.")
        if not path.is_file():
            continue
        organ = scan_name(path)
        if organ in found and not _is_pair(path, found[organ]):
            raise ScanFormatError(f"{path} and {found[organ]} are masks of one name; keep one.")
        found[organ] = path
    return found


def _is_pair(one: Path, other: Path) -> bool:
    """Whether two files are the header and the voxels of one mask."""
    endings = {path.name.lower().removesuffix(".gz")[-4:] for path in (one, other)}
    return endings == {".hdr", ".img"}


class MaskFolder:
    """Masks of organs, of which only the names have been looked at.

    Attributes
    ----------
    names : mapping of int to str
        Names of the masks, by their number in alphabetical order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = mask_files(path)
        self._paths = list(files.values())
        self.names: Mapping[int, str] = dict(enumerate(map(printable_name, files)))

    worlds: Mapping[int, str] = MappingProxyType({})

    def draw(self, canvas: Canvas, organs: Mapping[int, Organ]) -> None:
        """Draw the masks of some numbers.

        Raises
        ------
        GridMismatchError
            If a mask lies on another grid than the scan.
        ScanFormatError
            If a mask cannot be read.
        """
        with progress.stage("Reading masks", total=len(organs)) as advance:
            for n, organ in organs.items():
                mask = open_labels(self._paths[n])
                if canvas.grid.stored_as(mask.grid) is None:
                    raise GridMismatchError(
                        f"{mask.path} does not lie on the grid of the scan; resample it first."
                    )
                steps, origin = mask.grid.affine[:3, :3].T, mask.grid.origin
                # Masks with the scan's order of axes are drawn five times as fast.
                in_order = mask.grid.same_as(canvas.grid)
                first = value = 0
                for slab in mask.label_slabs():
                    value = value or int(slab.max())
                    shown = slab > 0
                    if (slab[shown] != value).any():
                        raise ScanFormatError(
                            f"{mask.path} holds several labels; a mask of one organ has one."
                        )
                    if in_order:
                        where = (slice(first, first + len(slab)), slice(None), slice(None))
                        canvas.draw(where, shown, organ.value)
                    else:
                        index = np.argwhere(shown)
                        index[:, 0] += first
                        canvas.draw_voxels(self._paths[n], index, steps, origin, organ.value)
                    first += len(slab)
                advance(1)
