"""NIfTI files, single or as a pair: headers to grids, voxels streamed in slabs of planes.

Knows the file format and nothing of what the voxels mean. NIfTI stores index (i, j, k) in
Fortran order, so the bytes read in C order are (k, j, i), slowest axis first. Its world is
RAS (x, y, z); ours is LPS (z, y, x).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.scans.placement import check_extent, listed, place, unusual_unit
from kpt_dask.scans.voxel_stream import Packing, VoxelStream, guarded, open_stream

PADDING = b"\0\r\n\x1a"
"""What follows the magic of NIfTI-2, for programs that exchange text files."""

# The package is not typed.
_nib: Any = nibabel


@dataclass(frozen=True, eq=False)
class NiftiFile:
    """A 3-D NIfTI file whose header has been read and found usable.

    Attributes
    ----------
    path : Path
        The file, or one of a pair.
    header : nibabel.Nifti1Header or nibabel.Nifti2Header
        The header as stored; written back with label maps.
    grid : Grid
        Grid of the voxels; shape (k, j, i).
    dtype : dtype
        Type of a stored voxel, with its byte order.
    slope, intercept : float
        Value = stored × slope + intercept.
    voxels : VoxelStream
        Position of the voxels in the file.
    doubts : tuple of str
        Doubts about the header, one sentence each.
    """

    path: Path
    header: Any
    grid: Grid
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    voxels: VoxelStream
    doubts: tuple[str, ...] = ()

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the stored voxels; see `kpt_dask.scans.contract.ScanFile`."""
        return self.voxels.slabs()


def open_nifti(path: Path) -> NiftiFile:
    """Read a NIfTI header and check that the file can be used as a scan.

    Raises
    ------
    ScanFormatError
        If the file is no NIfTI, or not one 3-D volume of real numbers on a usable grid.
    """
    head, data = _pair(path)
    header = _read_header(head)
    single = header["magic"].item().startswith(b"n+")
    if single and head != data:
        raise ScanFormatError(f"{head} holds header and voxels; rename it to {head.stem}.nii.")
    if not single and head == data:
        raise ScanFormatError(
            f"{path} is half of a .hdr/.img pair; name its files so, and keep them together."
        )
    try:
        with np.errstate(all="ignore"):
            shape = _shape(path, header)
            dtype = header.get_data_dtype()
            slope, intercept = header.get_slope_inter()
            affine, doubts = place(path, header)
    except ScanFormatError:
        raise
    except Exception as error:  # nibabel raises many kinds on hostile headers
        raise ScanFormatError(f"{path} has a damaged NIfTI header ({error}).") from error
    if dtype.kind not in "iuf":
        raise ScanFormatError(
            f"{path} holds {_kind(dtype)} voxels, not real numbers; convert it to a CT in HU."
        )
    _check_bits(path, header, dtype)
    grid = Grid(shape, affine)
    check_extent(path, header, grid)
    doubts += unusual_unit(path, header, grid)
    if slope is None:
        slope, intercept = 1.0, 0.0
    smallest = int(header.single_vox_offset) if single else 0
    voxels = VoxelStream(
        data, shape, dtype, packing(data), skip=data_offset(head, header, smallest)
    )
    voxels.check()
    # Label maps are single files, also those of a pair.
    header["magic"] = header.single_magic
    return NiftiFile(path, header, grid, dtype, float(slope), float(intercept), voxels, doubts)


def packing(path: Path) -> Packing:
    """Get the compression of a file from its name."""
    return "gzip" if path.name.lower().endswith(".gz") else "none"


def _pair(path: Path) -> tuple[Path, Path]:
    """Find the files of the header and of the voxels."""
    found = re.fullmatch(r"(.*)\.(hdr|img)(\.gz)?", path.name, re.IGNORECASE | re.DOTALL)
    if found is None:
        return path, path
    stem, given, packed = found[1], found[2], found[3] or ""
    other = {"hdr": "img", "img": "hdr"}[given.lower()]
    partner = path.with_name(f"{stem}.{other.upper() if given.isupper() else other}{packed}")
    if not partner.exists():
        raise ScanFormatError(f"{path} is half of a pair: {partner.name} must lie beside it.")
    return (path, partner) if given.lower() == "hdr" else (partner, path)


def data_offset(path: Path, header: Any, smallest: int) -> int:
    """Offset of the voxels in the (decompressed) file, bytes."""
    offset = float(header["vox_offset"])
    if offset == 0:
        return smallest
    if not np.isfinite(offset) or offset < smallest:
        raise ScanFormatError(f"{path} has a damaged NIfTI header (voxels begin at {offset}).")
    return int(offset)


def _read_header(path: Path) -> Any:
    start = b""
    with open_stream(path, packing(path)) as stream:
        # A member of a gzip file may hold less.
        while more := guarded(path, stream.read, _nib.Nifti2Header.sizeof_hdr - len(start)):
            start += more
    for kind in (_nib.Nifti1Header, _nib.Nifti2Header):
        block = start[: kind.sizeof_hdr]
        sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
        if len(block) < kind.sizeof_hdr or kind.sizeof_hdr not in sizes:
            continue
        header = kind(block, check=False)
        magics = kind.single_magic, kind.pair_magic
        if header["magic"].item().rstrip(PADDING) in [magic.rstrip(PADDING) for magic in magics]:
            return header
    raise ScanFormatError(f"{path} is not a NIfTI file.")


def _shape(path: Path, header: Any) -> tuple[int, int, int]:
    shape = [int(n) for n in header.get_data_shape()]
    if not shape or min(shape) < 1:
        raise ScanFormatError(f"{path} has shape {listed(shape)}: there are no voxels in it.")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3:
        raise ScanFormatError(
            f"{path} is {len(shape)}-dimensional ({listed(shape)}); give one 3-D volume."
        )
    return shape[2], shape[1], shape[0]


def _check_bits(path: Path, header: Any, dtype: np.dtype[Any]) -> None:
    """Refuse a type and a number of bits that contradict each other; 0 bits say nothing."""
    bits = int(header["bitpix"])
    if bits not in (0, dtype.itemsize * 8):
        raise ScanFormatError(
            f"{path} has a damaged NIfTI header: it says that voxels are {dtype.name} (datatype"
            f" {int(header['datatype'])}) and have {bits} bits (bitpix); get a new copy."
        )


def _kind(dtype: np.dtype[Any]) -> str:
    return {"c": "complex", "V": "RGB or unknown"}.get(dtype.kind, str(dtype))
