"""Common parts of NRRD and MetaImage: a text header, and voxels behind it or in another file."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.scans.placement import check_grid, doubt_size, header_of, listed
from kpt_dask.scans.voxel_stream import Packing, VoxelStream, guarded, open_stream

LONGEST_HEADER = 1 << 20
"""Limit of the text, bytes; a file whose header does not end before is of another format."""

MOST_DIGITS = 15
"""Limit of the digits of a whole number; no file has more voxels."""

_UNITS = {
    "millimetres": (1.0, ("mm", "millimeter", "millimetre")),
    "centimetres": (10.0, ("cm", "centimeter", "centimetre")),
    "metres": (1e3, ("m", "meter", "metre")),
    "microns": (1e-3, ("um", "µm", "μm", "micron", "micrometer", "micrometre")),
}
"""Units of length: mm in each, and how they are spelled, also with an s."""

_NO_UNIT = ("", "?", "???", "unknown")


@dataclass(frozen=True, eq=False)
class PlainFile:
    """A file whose header is text; see `kpt_dask.scans.contract.ScanFile`.

    Attributes
    ----------
    path : Path
        The file.
    grid : Grid
        Grid of the voxels.
    voxels : VoxelStream
        Position of the voxels in the file.
    doubts : tuple of str
        Doubts about the header, one sentence each.
    """

    path: Path
    grid: Grid
    voxels: VoxelStream
    doubts: tuple[str, ...]
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def of(
        cls,
        path: Path,
        grid: Grid,
        dtype: np.dtype[Any],
        *,
        data: Path,
        packing: Packing,
        start: int,
        skip: int,
        doubts: tuple[str, ...],
    ) -> "PlainFile":
        """Check that the voxels can be where a header says; a `skip` of -1 means at the end."""
        size = math.prod(grid.shape) * dtype.itemsize
        if skip < -1 or (skip == -1 and packing != "none"):
            raise ScanFormatError(f"{path} says that voxels begin at byte {skip} of its data.")
        if skip == -1:
            start, skip = max(0, data.stat().st_size - size), 0
        voxels = VoxelStream(data, grid.shape, dtype, packing, start, skip)
        voxels.check()
        return cls(path, grid, voxels, doubts)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a stored voxel."""
        return self.voxels.dtype

    @property
    def header(self) -> Any:
        """NIfTI header for label maps on this grid."""
        return header_of(self.grid)

    def slabs(self) -> Any:
        """Stream the stored voxels."""
        return self.voxels.slabs()


def read_start(path: Path, what: str, magic: re.Pattern[bytes], end: bytes) -> tuple[bytes, int]:
    """Read a header of text.

    Parameters
    ----------
    path : Path
        The file.
    what : str
        Name of the format.
    magic : Pattern
        Pattern of the first bytes.
    end : bytes
        Regular expression that ends the header, as the end of the file does.

    Returns
    -------
    text : bytes
        The header.
    end : int
        Offset of the data behind it, bytes.
    """
    with open_stream(path, "none") as stream:
        text: bytes = guarded(path, stream.read, LONGEST_HEADER)
    if not magic.match(text):
        raise ScanFormatError(f"{path} is no {what} file, or its beginning is lost.")
    found = re.search(end, text)
    if found is None and len(text) == LONGEST_HEADER:
        raise ScanFormatError(f"{path} has no end of its header; it is damaged.")
    stop = found.end() if found else len(text)
    return text[:stop], stop


def as_ints(path: Path, name: str, text: str) -> list[int]:
    """Read whole numbers, at least one."""
    words = text.split()
    if not words or not all(re.fullmatch(rf"[+-]?\d{{1,{MOST_DIGITS}}}", word) for word in words):
        raise ScanFormatError(f"{path} has a damaged “{name}” ({text[:80]!r}).")
    return [int(word) for word in words]


def as_floats(path: Path, name: str, text: str, n: int) -> list[float]:
    """Read `n` finite numbers."""
    try:
        values = [float(word) for word in text.split()]
    except ValueError as error:
        raise ScanFormatError(f"{path} has a damaged “{name}” ({text[:80]!r}).") from error
    if len(values) != n or not np.isfinite(values).all():
        raise ScanFormatError(f"{path} has a damaged “{name}” ({text[:80]!r}): {n} are needed.")
    return values


def beside(path: Path, name: str) -> Path:
    """Find the file of the voxels."""
    if not name or name.upper().split()[0] == "LIST" or "%" in name or len(name.split("\n")) > 1:
        raise ScanFormatError(f"{path} has its voxels in several files; save it as one.")
    data = path.parent / name
    try:
        found = data.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise ScanFormatError(f"{path} has its voxels in {name[:200]!r}, which is not beside it.")
    return data


class Unit(NamedTuple):
    """Unit of the lengths of a header.

    Attributes
    ----------
    name : str or None
        None for mm.
    mm : float
        Its length.
    """

    name: str | None = None
    mm: float = 1.0

    def doubts(self, path: Path, grid: Grid) -> tuple[str, ...]:
        """Doubt the unit if by it a scan has the size of no patient."""
        return doubt_size(path, self.name or "mm", grid)


def unit_of(path: Path, names: Iterable[str]) -> Unit:
    """Find the unit that a header gives lengths in, of all axes; mm if it gives none."""
    found = set()
    for name in names:
        spelled = name.strip().lower()
        if spelled in _NO_UNIT:
            continue
        if len(spelled) > 3:
            spelled = spelled.removesuffix("s")
        known = [n for n, (_, spellings) in _UNITS.items() if spelled in spellings]
        if not known:
            raise ScanFormatError(
                f"{path} gives its lengths in {name[:40]!r}, which is no unit that is known; save"
                " it in mm."
            )
        found.add(known[0])
    if len(found) > 1:
        raise ScanFormatError(
            f"{path} gives its lengths in {' and '.join(sorted(found))}; save it in mm."
        )
    name = next(iter(found), "millimetres")
    return Unit() if name == "millimetres" else Unit(name, _UNITS[name][0])


def placed(
    path: Path, sizes: Sequence[int], affine: NDArray[np.float64], unit: Unit | None = None
) -> Grid:
    """Make the grid of a volume.

    Parameters
    ----------
    path : Path
        Path to name in messages.
    sizes : sequence of int
        Number of voxels, fastest axis first.
    affine : ndarray (4, 4)
        From (i, j, k) to (x, y, z) LPS.
    unit : Unit, optional
        Unit of its lengths, mm unless given.
    """
    unit = Unit() if unit is None else unit
    if not sizes or min(sizes) < 1:
        raise ScanFormatError(f"{path} has shape {listed(sizes)}: there are no voxels in it.")
    if len(sizes) != 3:
        raise ScanFormatError(
            f"{path} is {len(sizes)}-dimensional ({listed(sizes)}); give one 3-D volume."
        )
    reverse = [2, 1, 0, 3]
    in_mm = np.diag([unit.mm, unit.mm, unit.mm, 1.0]) @ affine
    grid = Grid((sizes[2], sizes[1], sizes[0]), in_mm[reverse][:, reverse])
    check_grid(path, grid, f" (its unit of length is given as {unit.name})" if unit.name else "")
    return grid
