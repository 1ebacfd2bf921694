"""What label files somebody asks for: which files, of which organs, cleaned or not.

Everything that can be refused is refused by `LabelRequest.check`, before any work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path

from atlas_store import Organ, OrganTable
from atlas_store.storage.full_disk import naming
from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.label_files.components import largest_components
from kpt_dask.label_files.formats import FORMATS, LabelFile
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.runtime import notices
from kpt_dask.scans.label_header import RUN, run_of

SPLIT_ENDING = ".nii.gz"
"""Ending of the files of single organs."""


@dataclass(frozen=True)
class LabelRequest:
    """Label files to be written of one scan.

    Attributes
    ----------
    files : tuple of LabelFile
        Files of all wanted organs.
    split : str, optional
        Folder for a mask of each wanted organ, ``NAME.nii.gz``, 1 where the organ is.
    organs : tuple of str
        Names of the wanted organs; all if empty.
    largest : bool
        Whether only the largest connected component of each organ is kept.
    """

    files: tuple[LabelFile, ...] = ()
    split: str | None = None
    organs: tuple[str, ...] = ()
    largest: bool = False

    @classmethod
    def parse(
        cls,
        files: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
        split: str | PathLike[str] | None = None,
        organs: Sequence[str] = (),
        *,
        largest: bool = False,
    ) -> "LabelRequest":
        """Understand what was asked; one file needs no list.

        Raises
        ------
        ScanFormatError
            If a file has an ending that no format has.
        """
        given = [files] if isinstance(files, str | PathLike) else files or []
        parsed = tuple(LabelFile.parse(file) for file in given)
        folder = None if split is None else fspath(split)
        return cls(parsed, folder, (organs,) if isinstance(organs, str) else tuple(organs), largest)

    def __bool__(self) -> bool:
        """Whether any file is wanted."""
        return bool(self.files) or self.split is not None

    def wanted(self, table: OrganTable) -> tuple[Organ, ...]:
        """Organs that are wanted, in the order of the table."""
        return (table.only(self.organs) if self.organs else table).organs

    def check(self, table: OrganTable, grid: Grid) -> None:
        """Refuse organs that the table lacks, and formats that cannot hold the scan's grid.

        Raises
        ------
        ParameterError
            If an organ is unknown, or components are chosen and no file is asked for.
        ScanFormatError
            If a format has no label maps on such a grid.
        """
        if self.largest and not self:
            raise ParameterError(
                "--largest is about label files: add --labels FILE or --split DIR."
            )
        if unknown := sorted({*self.organs} - {*table.names}):
            raise ParameterError(
                f"The segmentation holds no organ {', '.join(unknown)}, only"
                f" {', '.join(table.names)}; segment the scan again for others."
            )
        for file in self.files:
            file.check(grid)
        if self.split is not None:
            LabelFile(self.split, FORMATS[SPLIT_ENDING]).check(grid)

    def targets(self, table: OrganTable) -> list[str]:
        """Paths of all files that will be written: `files`, then one for each organ."""
        folder = self.split
        masks = [] if folder is None else [o.name + SPLIT_ENDING for o in self.wanted(table)]
        return [file.path for file in self.files] + [str(Path(folder or "", m)) for m in masks]

    def cleaned(self, label_map: LabelMap) -> LabelMap:
        """Keep the largest components, if that is wanted."""
        if not self.largest:
            return label_map
        return replace(label_map, voxels=largest_components(label_map.voxels))

    def write(self, paths: Sequence[Path], label_map: LabelMap) -> None:
        """Write all files.

        Parameters
        ----------
        paths : sequence of Path
            Where to write, in the order of `targets`: usually names for the time being.
        label_map : LabelMap
            Of the wanted organs.
        """
        for file, path in zip(self.files, paths, strict=False):
            with naming(path):
                file.format.write(path, label_map)
        if self.split is None:
            return
        extents = label_map.extents()
        for organ, path in zip(label_map.organs, paths[len(self.files) :], strict=True):
            with naming(path):
                mask = label_map.only(organ, extents.get(organ.value))
                FORMATS[SPLIT_ENDING].write(path, mask)
        self._doubt_others(Path(self.split), label_map)

    def _doubt_others(self, folder: Path, label_map: LabelMap) -> None:
        """Warn of masks beside those written that are of another run: readers take all as one."""
        own = {organ.name + SPLIT_ENDING for organ in label_map.organs}
        runs = {
            path.name: run_of(path)
            for path in sorted(folder.glob("*" + SPLIT_ENDING))
            if path.name not in own
        }
        if others := [n for n, run in runs.items() if run and RUN + run != label_map.description]:
            notices.warn(
                f"{folder} also holds masks of another run ({', '.join(others)}), which are no part"
                " of this answer; move them away before anything reads the folder."
            )
