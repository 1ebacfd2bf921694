"""Measures of each label of a label map, by streaming it beside its scan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.annotations.opening import has_names_only, open_pair
from kpt_dask.errors import GridMismatchError, LabelError
from kpt_dask.grid import Grid
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.measures.comparison import compare_labels
from kpt_dask.measures.surfaces import Agreement
from kpt_dask.remote import scheme_of
from kpt_dask.runtime import progress
from kpt_dask.scans.dicom_files import is_zarr
from kpt_dask.scans.scan import Scan, open_labels, open_scan


@dataclass(frozen=True)
class LabelMeasures:
    """Measures of one label.

    Attributes
    ----------
    name : str
        Name of the organ, or ``label N`` where no table names it.
    value : int
        Label value.
    voxels : int
    volume_ml : float
    mean_hu, sd_hu : float or None
        Mean and standard deviation of the scan's values; None if the label does not occur.
    centroid_mm : (float, float, float) or None
        Mean position (z, y, x) of its voxels, LPS.
    at_border : bool
        Whether it reaches the first or last voxels of the scan: it may be cut off.
    agreement : Agreement or None
        Comparison with the other labels, if there are any.
    """

    name: str
    value: int
    voxels: int
    volume_ml: float
    mean_hu: float | None
    sd_hu: float | None
    centroid_mm: tuple[float, float, float] | None
    at_border: bool
    agreement: Agreement | None = None


def measure(
    scan: str | Path,
    labels: str | Path,
    *,
    organs: OrganTable | None = None,
    reference: str | Path | None = None,
    tolerance_mm: float = 3.0,
    series: str | None = None,
) -> list[LabelMeasures]:
    """Measure every label of any label map, and compare it with another one.

    Parameters
    ----------
    scan : str or Path
        As for `kpt_dask.open_scan`.
    labels : str or Path
        Labels on the grid of the scan; with `organs` in any format that an atlas's may have,
        without it a label map of values.
    organs : OrganTable, optional
        Names of the values; these are measured whether they occur or not.
    reference : str or Path, optional
        Labels to compare with, like `labels`.
    tolerance_mm : float
        For the surface Dice.
    series : str, optional
        UID of the DICOM series of the scan.

    Returns
    -------
    list of LabelMeasures
        In the order of the table; then what it does not name, in the order of the values.

    Raises
    ------
    GridMismatchError
        If labels do not lie on the grid of the scan.
    LabelError, ScanNotFoundError, ScanFormatError
        If something cannot be read, or is no label map.

    Examples
    --------
    >>> from atlas_store import load_organs
    >>> found = measure("body_1_ct.nii.gz", "body_1_seg.nii.gz", organs=load_organs("visceral"))
    >>> found[0].name, found[0].volume_ml > 0
    ('liver', True)
    """
    source, labelled = _opened(scan, labels, organs, series)
    sums = _Sums.of(source, labelled)
    both: list[LabelMap] = []
    if reference is not None:
        _, compared = _opened(scan, reference, organs, series)
        other = _packed(compared, "Reading reference")
        both = [LabelMap(one, source.grid, ()) for one in (sums.labels, other)]
    extents = [one.extents() for one in both]
    table = {organ.value: organ.name for organ in organs or ()}
    values = set(np.flatnonzero(sums.voxels).tolist()).union(*extents) - {0}
    table |= {value: f"label {value}" for value in sorted(values - table.keys())}
    compared_with = {}
    if both:
        compared_with = compare_labels(both, extents, list(table), tolerance_mm)
    return [
        sums.measures(name, value, source.grid, compared_with.get(value))
        for value, name in table.items()
    ]


def _opened(
    scan: str | Path, labels: str | Path, organs: OrganTable | None, series: str | None
) -> tuple[Scan, Scan]:
    if organs is None and has_names_only(labels):
        raise LabelError(
            f"{labels} has names for its labels instead of values, so a table is needed that"
            " knows them: give --organs visceral, openkbp or a TOML file."
        )
    try:
        if organs is not None:
            source, labelled = open_pair(scan, labels, organs, series=series)
        else:
            source, labelled = open_scan(scan, series=series), open_labels(labels)
        if not source.grid.same_as(labelled.grid):
            order = source.grid.stored_as(labelled.grid) is not None
            what = (
                "stores its axes in another order than" if order else "does not lie on the grid of"
            )
            raise GridMismatchError(f"{labels} {what} {scan}; resample it to the scan first.")
    except GridMismatchError as error:
        if scheme_of(str(labels)) is None and not is_zarr(Path(labels)):
            raise
        raise GridMismatchError(
            f"{labels} has its labels on a grid of its own and not on that of {scan}: write them on"
            " the scan's with kpt export, and measure what that writes."
        ) from error
    return source, labelled


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the voxels of each label value; `labels` is the label map that was read."""

    labels: PackedLabels
    voxels: NDArray[np.int64]
    hu: NDArray[np.float64]
    squares: NDArray[np.float64]
    indices: NDArray[np.float64]
    border: NDArray[np.bool_]

    @classmethod
    def of(cls, scan: Scan, labelled: Scan) -> "_Sums":
        size = np.iinfo(np.uint16).max + 1
        voxels = np.zeros(size, np.int64)
        hu, squares, indices = np.zeros(size), np.zeros(size), np.zeros((size, 3))
        border = np.zeros(size, np.bool_)
        shape = scan.grid.shape
        rows, columns = np.indices(shape[1:], np.float64).reshape(2, -1)

        def planes() -> Iterator[NDArray[np.uint16]]:
            with progress.stage("Measuring", total=shape[0]) as advance:
                pairs = zip(_planes(scan.slabs()), _planes(labelled.label_slabs()), strict=True)
                for k, (values, plane) in enumerate(pairs):
                    shown = np.flatnonzero(plane)
                    at, of = plane.reshape(-1)[shown], values.reshape(-1)[shown].astype(np.float64)
                    largest = int(at.max(initial=0)) + 1
                    here = np.bincount(at, minlength=largest)
                    voxels[:largest] += here
                    hu[:largest] += np.bincount(at, of, largest)
                    squares[:largest] += np.bincount(at, of * of, largest)
                    indices[:largest, 0] += k * here
                    indices[:largest, 1] += np.bincount(at, rows[shown], largest)
                    indices[:largest, 2] += np.bincount(at, columns[shown], largest)
                    edges = (plane[0], plane[-1], plane[:, 0], plane[:, -1])
                    for edge in (plane,) if k in (0, shape[0] - 1) else edges:
                        border[edge] = True
                    advance(1)
                    yield plane[None]

        labels = PackedLabels.of(shape, np.dtype(np.uint16), planes())
        return cls(labels, voxels, hu, squares, indices, border)

    def measures(
        self, name: str, value: int, grid: Grid, compared: Agreement | None
    ) -> LabelMeasures:
        n = int(self.voxels[value])
        volume = n * grid.voxel_volume / 1000
        if n == 0:
            return LabelMeasures(name, value, 0, 0.0, None, None, None, False, compared)
        mean = float(self.hu[value] / n)
        variance = max(float(self.squares[value] / n) - mean * mean, 0.0)
        z, y, x = (grid.affine @ np.append(self.indices[value] / n, 1.0))[:3].tolist()
        border = bool(self.border[value])
        sd = math.sqrt(variance)
        return LabelMeasures(name, value, n, volume, mean, sd, (z, y, x), border, compared)


def _planes(slabs: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for slab in slabs:
        yield from slab


def _packed(labelled: Scan, description: str) -> PackedLabels:
    with progress.stage(description, total=labelled.grid.shape[0]) as advance:

        def slabs() -> Iterator[NDArray[np.uint16]]:
            for slab in labelled.label_slabs():
                yield slab
                advance(len(slab))

        return PackedLabels.of(labelled.grid.shape, np.dtype(np.uint16), slabs())
