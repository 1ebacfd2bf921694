"""Conversion of a scan to a volume: resampled to the working grid while it streams.

Values are clipped to the HU of a CT and rounded to whole ones. A scan with oblique axes is first
resampled along its own axes, to a temporary array, and from there to the working grid.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import Region, blocks_of, write_region
from kpt_dask.errors import (
    GridMismatchError,
    ParameterError,
    ScanFormatError,
)
from kpt_dask.grid import Grid
from kpt_dask.output.commit import replacing
from kpt_dask.output.places import check_outputs
from kpt_dask.remote import open_group
from kpt_dask.resampling.axes import along_own_axes
from kpt_dask.resampling.blocks import interpolate, interpolate_labels, window
from kpt_dask.resampling.stream import resample, resample_labels
from kpt_dask.runtime import cluster, notices, progress, witness
from kpt_dask.scans.placement import listed
from kpt_dask.scans.scan import Scan
from kpt_dask.volumes.identity import VoxelDigest, digest_of
from kpt_dask.volumes.omezarr import (
    CHUNKS,
    create_array,
)
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.volume import Volume, create_volume, open_volume

T = TypeVar("T", bound=np.generic)

AIR_HU = -1000.0
"""HU; values below are clipped. They are noise of air, or padding outside the field of view, whose
edge to real air would look like anatomy."""
LARGEST_HU = 32000.0
"""HU; values above are clipped. Not even metal reaches it, and float32 is exact up to it."""

BLOCK = (64, 256, 256)
"""Voxels of a block of an oblique scan's second interpolation; multiples of the chunks."""

MOST_VOXELS = 1 << 32
"""Voxels of a volume at most: 16 GiB as float32, two metres at half a millimetre."""
LARGE, MOST_FINER = 1 << 28, 512
"""A volume of more than `LARGE` voxels (1 GiB) has at most `MOST_FINER` for each of the scan."""

_LOWPASS = "own_axes"
"""Name of the temporary array of an oblique scan."""


def convert(
    scan: Scan,
    out: str | Path,
    *,
    spacing: float = 2.0,
    overwrite: bool = False,
    memory: int | None = None,
    client: Client | None = None,
) -> Volume:
    """Convert a scan to a volume, which appears when it is complete.

    Parameters
    ----------
    scan : Scan
        From `open_scan`.
    out : str or Path
        Folder of the OME-Zarr image, or its URL in an object store (s3://…).
    spacing : float
        Voxel size of the working grid, mm.
    overwrite : bool
        Whether an existing output may be replaced; it is kept until the new one is complete.
    memory : int, optional
        Memory budget of making the higher levels in each process, bytes; see
        `kpt_dask.runtime.cluster.budget`. Reading the scan takes as much as a slab of level 0 that
        is one chunk thick, whatever the budget.
    client : distributed.Client, optional
        Client whose workers compute the higher levels; threads of this process by default.

    Returns
    -------
    Volume
        Open for writing, so that labels can be added.

    Raises
    ------
    OutputExistsError
        If `out` exists and `overwrite` is false.
    ScanFormatError
        If the scan is truncated or damaged, or holds NaN or infinite values.
    ParameterError
        If the spacing is not positive.

    Examples
    --------
    >>> import kpt_dask
    >>> scan = kpt_dask.open_scan("body_4_ct.nii.gz")
    >>> volume = kpt_dask.convert(scan, "volume.zarr", spacing=4.0)
    >>> volume.levels[0].shape, volume.grid.spacing.tolist()
    ((110, 65, 80), [4.0, 4.0, 4.0])
    """
    [target] = check_outputs(images=[out], inputs=[scan.path], overwrite=overwrite)
    with cluster.session(client) as session, replacing(target, overwrite=overwrite) as partial:
        group = zarr.create_group(str(partial), zarr_format=3)
        with witness.shared(session, group):
            volume = convert_into(scan, group, spacing=spacing, memory=memory, client=session)
            for level in volume.levels:
                chunk_io.check_complete(level)
    return open_volume(open_group(target, "r+"))


def convert_into(
    scan: Scan,
    group: zarr.Group,
    *,
    spacing: float = 2.0,
    memory: int | None = None,
    client: Client | None = None,
) -> Volume:
    """Convert a scan into an empty group of any store; parameters and errors as for `convert`."""
    if not (np.isfinite(spacing) and spacing > 0):
        raise ParameterError(f"The spacing must be a positive number of mm, not {spacing:g}.")
    _check_voxels(scan, spacing)
    volume = create_volume(group, scan.grid.working(spacing), scan.grid, name=scan.path.name)
    with notices.recorded() as doubts:
        digest = _write_level0(volume, scan)
    fill_pyramid(volume.levels, memory=memory, client=client)
    about: Any = group.attrs["kpt"]
    about["source"]["digest"] = digest
    about["warnings"] = [*scan.doubts, *doubts]
    group.update_attributes({"kpt": about})
    return volume


def _check_voxels(scan: Scan, spacing: float) -> None:
    """Refuse a working grid that no disk should be filled with."""
    extent = scan.grid.spacing * scan.grid.shape
    voxels = math.prod(np.maximum(extent / spacing, 1).tolist())
    scan_voxels = math.prod(scan.grid.shape)
    if voxels > MOST_VOXELS or voxels > max(LARGE, MOST_FINER * scan_voxels):
        raise ScanFormatError(
            f"{scan.path} has {scan_voxels} voxels and says it is {listed(extent)} mm large, which"
            f" makes {voxels:.2g} voxels at a spacing of {spacing:g} mm, too many; repair its"
            " header, or choose a larger --spacing (a store's is chosen when it is created)."
        )


def _write_level0(volume: Volume, scan: Scan) -> str:
    """Resample a scan to level 0; give its digest."""
    level = volume.levels[0]
    with VoxelDigest(level.shape) as total:
        for region, values in _working_blocks(scan, volume.grid, volume.group):
            total.add(region, values)
            write_region(level, region, values)
        return total.hexdigest()


def digest_scan(scan: Scan, spacing: float) -> str:
    """Digest of the volume that a scan would make (`kpt_dask.volumes.identity`)."""
    grid = scan.grid.working(spacing)
    with tempfile.TemporaryDirectory(prefix="kpt-") as folder, VoxelDigest(grid.shape) as total:
        for region, values in _working_blocks(scan, grid, open_group(folder, "w")):
            total.add(region, values)
        return total.hexdigest()


def check_made_from(volume: Volume, scan: Scan, where: str) -> None:
    """Check that a volume was made from a scan; `where` is the volume as a person knows it.

    Raises
    ------
    GridMismatchError
        If the scan lies on another grid.
    ScanFormatError
        If it has other voxels.
    """
    if not scan.grid.same_as(volume.source_grid):
        raise GridMismatchError(
            f"{scan.path} does not lie on the grid of the scan that {where} was made from: give"
            " that scan, or segment this one to another place."
        )
    if digest_scan(scan, float(volume.grid.spacing[0])) != digest_of(volume.group):
        raise ScanFormatError(
            f"{scan.path} has other voxels than the scan that {where} was made from, though they"
            " lie on the same grid: give that scan, or segment this one to another place."
        )


def _working_blocks(
    scan: Scan, target: Grid, scratch: zarr.Group
) -> Iterator[tuple[Region, NDArray[np.float32]]]:
    """Resample a scan to whole HU, nothing below air, region by region.

    An oblique scan takes an array in the group `scratch` meanwhile.
    """
    with progress.stage("Reading scan", total=scan.grid.shape[0]) as advance:
        slabs = (
            np.clip(slab, AIR_HU, LARGEST_HU) for slab in _with_progress(scan.slabs(), advance)
        )
        if scan.grid.axis_permutation() is not None:
            for region, values in resample(slabs, scan.grid, target, CHUNKS):
                yield region, _whole_hu(values)
            return
        coarse = along_own_axes(scan.grid, float(target.spacing[0]))
        with _temporary(scratch, coarse, np.float32) as lowpass:
            for region, values in resample(slabs, scan.grid, coarse, CHUNKS):
                write_region(lowpass, region, values)
            for block in blocks_of(target.shape, BLOCK):
                plan = window(coarse, target, block)
                part = chunk_io.read(lowpass, plan.region)
                yield block, _whole_hu(interpolate(part, plan))


def label_blocks(
    scan: Scan, volume: Volume
) -> Iterator[tuple[tuple[slice, slice, slice], NDArray[np.uint16]]]:
    """Resample a scan's label map to the volume's level 0, for `write_label_image`.

    Parameters
    ----------
    scan : Scan
        A label map on the voxels of the scan that the volume was made from; its axes may be stored
        in another order.
    volume : Volume
        From `convert`, opened for writing.

    Yields
    ------
    region : tuple of slice
        Aligned with the chunks.
    labels : ndarray (z, y, x), uint16
        The label of each voxel.

    Raises
    ------
    GridMismatchError
        If the label map lies on another grid than the scan.
    ScanFormatError
        If it is truncated or damaged, or holds anything but labels.
    """
    # Not the label map's own, which may differ by rounding.
    grid = volume.source_grid.stored_as(scan.grid)
    if grid is None:
        raise GridMismatchError(
            f"{scan.path} does not lie on the grid of its scan (shape {scan.grid.shape} against"
            f" {volume.source_grid.shape}, or another affine); resample it to the scan first."
        )
    with progress.stage("Reading labels", total=scan.grid.shape[0]) as advance:
        slabs = _with_progress(scan.label_slabs(), advance)
        if grid.axis_permutation() is not None:
            yield from resample_labels(slabs, grid, volume.grid, CHUNKS)
            return
        coarse = along_own_axes(grid, float(volume.grid.spacing[0]))
        with _temporary(volume.group, coarse, np.uint16) as lowpass:
            for region, labels in resample_labels(slabs, grid, coarse, CHUNKS):
                write_region(lowpass, region, labels)
            for block in blocks_of(volume.grid.shape, BLOCK):
                plan = window(coarse, volume.grid, block)
                yield block, interpolate_labels(chunk_io.read(lowpass, plan.region), plan)


def _with_progress(
    slabs: Iterator[NDArray[T]], advance: Callable[[int], None]
) -> Iterator[NDArray[T]]:
    for slab in slabs:
        yield slab
        advance(len(slab))


def _whole_hu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round in place; adding 0 turns -0 into 0, so that equal values have equal bytes."""
    np.rint(values, out=values)
    values += 0
    return values


@contextmanager
def _temporary(group: zarr.Group, grid: Grid, dtype: Any) -> Iterator[zarr.Array[Any]]:
    array = create_array(group, _LOWPASS, grid.shape, dtype)
    try:
        yield array
    finally:
        del group[_LOWPASS]
