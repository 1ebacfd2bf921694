"""Files made later: label files of a segmentation, and the scan and labels of an atlas."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client

from atlas_store import Atlas, OrganTable, OrganTableError
from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import open_array
from kpt_dask.errors import ParameterError, ScanFormatError
from kpt_dask.label_files.label_map import LabelMap, dtype_of
from kpt_dask.label_files.nifti import write_nifti
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.label_files.request import LabelRequest
from kpt_dask.options import LABELS, SCANS
from kpt_dask.organ_transfer.delivery import Decision, decided
from kpt_dask.output.commit import replacing_together
from kpt_dask.output.places import check_outputs
from kpt_dask.resampling.labels_on_scan import Shares
from kpt_dask.runtime import cluster, progress
from kpt_dask.scans.contract import ScanFile
from kpt_dask.scans.label_header import RUN
from kpt_dask.scans.nifti_writer import NiftiWriter, pack, planes_at_once
from kpt_dask.scans.placement import header_of
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import check_made_from
from kpt_dask.volumes.volume import Volume, open_volume

StrPath = str | PathLike[str]


def export(
    segmentation: StrPath,
    labels: StrPath | Sequence[StrPath] = (),
    *,
    split: StrPath | None = None,
    organs: Sequence[str] = (),
    largest: bool = False,
    scan: StrPath | None = None,
    series: str | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    client: Client | None = None,
) -> dict[str, float]:
    """Write label files of a finished segmentation, on the grid of the scan that it was made from.

    They show what `kpt_dask.segment` would have written in the same run.

    Parameters
    ----------
    segmentation : str or Path
        The OME-Zarr output of `kpt_dask.segment`, or its URL.
    labels, split, organs, largest, overwrite, memory, client
        As for `kpt_dask.segment`.
    scan : str or Path, optional
        The scan itself. With it, NIfTI keeps the scan's own header, and DICOM files refer to its
        series; without it, they lie in the same place all the same.
    series : str, optional
        UID of the DICOM series of `scan`.

    Returns
    -------
    dict of str to float
        Volume of each organ in the files, mL.

    Raises
    ------
    ParameterError
        If there is nothing to write, or an organ is unknown.
    GridMismatchError
        If `scan` lies on another grid than the scan of the segmentation.
    ScanFormatError
        If it has other voxels.
    KptError
        If a file cannot be read or written; nothing is left half-written.

    Examples
    --------
    >>> import kpt_dask
    >>> volumes = kpt_dask.export("body_4.zarr", "body_4.seg.nrrd", organs=["liver"])
    >>> list(volumes), volumes["liver"] > 0
    (['liver'], True)
    """
    found = _open(segmentation)
    request = LabelRequest.parse(labels, split, organs, largest=largest)
    if not request:
        raise ParameterError("There is nothing to write; give label files, or --split DIR.")
    request.check(found.organs, found.volume.source_grid)
    file = _scan_of(found, segmentation, scan, series)
    targets = check_outputs(
        files=request.targets(found.organs),
        inputs=[segmentation, *([] if scan is None else [scan])],
        overwrite=overwrite,
    )
    chunk_io.check_complete(found.shares.probability)
    wanted = tuple(organ.value for organ in request.wanted(found.organs))
    decision = Decision(found.shares, found.organs, wanted, found.volume.source_grid)
    with (
        cluster.session(client) as session,
        replacing_together(targets, overwrite=overwrite) as partials,
    ):
        label_map, counts = decided(decision, request, memory=memory, client=session)
        label_map = replace(label_map, scan=file, description=f"{RUN}{found.run}")
        request.write(partials, label_map)
    voxel = found.volume.source_grid.voxel_volume / 1000
    return {o.name: int(n) * voxel for o, n in zip(label_map.organs, counts, strict=True)}


def export_atlas(atlas: Atlas, folder: StrPath, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write the scan and the labels of an atlas as NIfTI, on the grid of its store.

    Added to a store of the same spacing, they make the same atlas again.

    Parameters
    ----------
    atlas : Atlas
        Atlas of a store.
    folder : str or Path
        Folder of the files, named as `kpt_dask.add_folder` looks for them.
    overwrite : bool
        Whether existing files may be replaced.

    Returns
    -------
    scan, labels : Path
        The files.

    Raises
    ------
    OutputExistsError
        If a file exists and `overwrite` is false.
    AtlasStoreError
        If the atlas is damaged.

    Examples
    --------
    >>> import kpt_dask
    >>> from atlas_store import AtlasStore
    >>> scan, labels = kpt_dask.export_atlas(AtlasStore.open("atlases")["body_1"], "back")
    >>> scan.name, labels.name
    ('body_1_ct.nii.gz', 'body_1_seg.nii.gz')
    """
    paths = [Path(folder, name.format(id=atlas.id)) for name in (SCANS, LABELS)]
    targets = check_outputs(files=paths, inputs=[atlas.objects.url], overwrite=overwrite)
    volume = open_volume(atlas.image)
    with replacing_together(targets, overwrite=overwrite) as [scan, labels]:
        header = header_of(volume.grid)
        step = planes_at_once(volume.grid.shape, np.dtype(np.int16))
        with (
            NiftiWriter(scan, header) as file,
            progress.stage("Writing scan", total=volume.grid.shape[0]) as advance,
        ):
            for planes in _slabs(volume.levels[0], step):
                file.write(pack(planes.astype(np.int16)))
                advance(len(planes))
        dtype = dtype_of(atlas.organ_table)
        slabs = (planes.astype(dtype) for planes in _slabs(atlas.labels, step))
        voxels = PackedLabels.of(volume.grid.shape, dtype, slabs)
        write_nifti(labels, LabelMap(voxels, volume.grid, atlas.organ_table.organs))
    return paths[0], paths[1]


@dataclass(frozen=True, eq=False)
class _Segmentation:
    """What a segmentation's folder holds that labels are decided of."""

    volume: Volume
    organs: OrganTable
    shares: Shares
    run: str


def _open(path: StrPath) -> _Segmentation:
    volume = open_volume(fspath(path))
    try:
        about: Any = volume.group.attrs["kpt"]
        made = about["segmentation"]
        organs = OrganTable.from_json(made["organ_table"])
        threshold, run = float(made["transfer"]["threshold"]), str(about["run"])
        probability = open_array(volume.group, "probability")
        if probability.shape != (len(organs), *volume.grid.shape):
            raise ValueError(f"probabilities of shape {probability.shape}")
    except (KeyError, TypeError, ValueError, OrganTableError) as error:
        raise ScanFormatError(
            f"{path} is no segmentation of this version ({error}); make it with kpt segment."
        ) from error
    return _Segmentation(
        volume, organs, Shares(probability, organs.values, threshold, volume.grid), run
    )


def _scan_of(
    found: _Segmentation, path: StrPath, scan: StrPath | None, series: str | None
) -> ScanFile | None:
    if scan is None:
        return None
    # Another patient's scan may lie on the same grid, and DICOM files would bear that name.
    opened = open_scan(Path(scan), series=series)
    check_made_from(found.volume, opened, fspath(path))
    return opened.file


def _slabs(array: "zarr.Array[Any]", step: int) -> Any:
    """Read planes, so many at a time."""
    return (np.asarray(array[k : k + step]) for k in range(0, array.shape[0], step))
