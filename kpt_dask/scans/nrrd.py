"""NRRD files: ``.nrrd`` with the voxels, ``.nhdr`` with the voxels in a file beside it.

Source: the format's definition, https://teem.sourceforge.net/nrrd/format.html.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.errors import ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.scans.plain_header import (
    PlainFile,
    Unit,
    as_floats,
    as_ints,
    beside,
    placed,
    read_start,
    unit_of,
)
from kpt_dask.scans.voxel_stream import Packing, VoxelStream

TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong",
        "long long",
        "long long int",
        "signed long long",
        "signed long long int",
        "int64",
        "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
"""Names of types of voxels."""

ENCODINGS: dict[str, Packing] = {
    "raw": "none",
    "gzip": "gzip",
    "gz": "gzip",
    "bzip2": "bz2",
    "bz2": "bz2",
}

SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "las": (1, -1, 1),
}
"""Signs that take (x, y, z) of a space to LPS."""

MOST_LAYERS = 256
"""Limit of the layers of a segmentation."""

_VECTOR = re.compile(r"\(([^()]*)\)|none", re.IGNORECASE)

_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class _Fields:
    """Fields of a header, named in small letters."""

    path: Path
    values: dict[str, str]

    def get(self, *names: str) -> str | None:
        return next((self.values[name] for name in names if name in self.values), None)

    def need(self, name: str) -> str:
        value = self.get(name)
        if value is None:
            raise ScanFormatError(f"{self.path} has no field “{name}”; get a new copy.")
        return value


@dataclass(frozen=True, eq=False)
class Layers:
    """A file of one or more volumes on one grid, which alternate voxel by voxel.

    Attributes
    ----------
    layers : int
        Number of volumes.
    grid : Grid
        Their grid.
    """

    layers: int
    grid: Grid
    voxels: VoxelStream
    dtype: np.dtype[Any]

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the voxels, (n, j, i, layer)."""
        for slab in self.voxels.slabs():
            yield slab.view(self.dtype).reshape(*slab.shape, self.layers)


def open_layers(path: Path) -> tuple[Layers, dict[str, str]]:
    """Read the header of a segmentation of 3D Slicer.

    Returns
    -------
    layers : Layers
    remarks : dict of str to str
        What it says by ``name:=value``.

    Raises
    ------
    ScanFormatError
        As for `open_nrrd`.
    """
    fields, _, remarks = _read(path)
    sizes = as_ints(path, "sizes", fields.need("sizes"))
    layers = sizes[0] if len(sizes) == 4 else 1
    if not 0 < layers <= MOST_LAYERS:
        raise ScanFormatError(f"{path} has {layers} layers, which no segmentation has.")
    file, dtype = _open(path, layers)
    return Layers(layers, file.grid, file.voxels, dtype), remarks


def open_nrrd(path: Path) -> PlainFile:
    """Read an NRRD header.

    Raises
    ------
    ScanFormatError
        If the file is no NRRD, or not one 3-D volume of real numbers on a usable grid.
    """
    return _open(path, 1)[0]


def _read(path: Path) -> tuple["_Fields", int, dict[str, str]]:
    """Read the fields of a header, the offset of the data behind it, and its remarks."""
    start, end = read_start(path, "NRRD", re.compile(rb"NRRD000[1-5]\r?\n"), rb"\r?\n\r?\n")
    values, remarks = {}, {}
    for line in start.decode("utf-8", "replace").splitlines()[1:]:
        if line.startswith("#"):
            continue
        if ":=" in line:
            name, _, value = line.partition(":=")
            remarks[name.strip()] = value.strip()
        elif ":" in line:
            name, _, value = line.partition(":")
            values[name.strip().lower()] = value.strip()
    return _Fields(path, values), end, remarks


def _open(path: Path, layers: int) -> tuple[PlainFile, np.dtype[Any]]:
    """Read a header of so many volumes; of several, a voxel is a tuple of values."""
    fields, end, _ = _read(path)
    sizes = as_ints(path, "sizes", fields.need("sizes"))
    if as_ints(path, "dimension", fields.need("dimension")) != [len(sizes)]:
        raise ScanFormatError(f"{path} has a “dimension” that is not the number of its “sizes”.")
    columns, origin, doubts = _space(fields, sizes)
    if layers > 1 and columns[0] is None:
        del sizes[0], columns[0]
    while len(sizes) > 3 and 1 in sizes:
        # A non-spatial axis of length 1: a list of one volume.
        at = next((i for i, n in enumerate(sizes) if n == 1 and columns[i] is None), None)
        if at is None:
            break
        del sizes[at], columns[at]
    affine = np.eye(4)
    affine[:3, 3] = origin
    if len(sizes) == 3 and all(column is not None for column in columns):
        affine[:3, :3] = np.stack([c for c in columns if c is not None], axis=1)
    elif len(sizes) == 3:
        raise ScanFormatError(f"{path} has an axis without a direction; give one 3-D volume.")
    name = " ".join(fields.need("type").lower().split())
    code = next((code for code, names in TYPES.items() if name in names), None)
    if code is None:
        raise ScanFormatError(f"{path} holds {name[:40]!r} voxels, not real numbers.")
    dtype = np.dtype(code)
    if dtype.itemsize > 1:
        endian = fields.need("endian").lower()
        if endian not in ("little", "big"):
            raise ScanFormatError(f"{path} has the endian {endian[:40]!r}, which is none.")
        dtype = dtype.newbyteorder("<" if endian == "little" else ">")
    encoding = fields.need("encoding").lower()
    if encoding not in ENCODINGS:
        raise ScanFormatError(
            f"{path} has the encoding {encoding[:40]!r}, which is not read; save it as gzip or raw."
        )
    skip = as_ints(path, "byte skip", fields.get("byte skip", "byteskip") or "0")
    if fields.get("line skip", "lineskip") not in (None, "0"):
        raise ScanFormatError(f"{path} has a “line skip”, which is not read; save it without.")
    name_of_data = fields.get("data file", "datafile")
    data = path if name_of_data is None else beside(path, name_of_data)
    unit = _unit(fields)
    where = placed(path, sizes, affine, unit)
    stored = np.dtype((np.void, layers * dtype.itemsize)) if layers > 1 else dtype
    file = PlainFile.of(
        path,
        where,
        stored,
        data=data,
        packing=ENCODINGS[encoding],
        start=end if name_of_data is None else 0,
        skip=skip[0],
        doubts=(*doubts, *unit.doubts(path, where)),
    )
    return file, dtype


def _space(
    fields: _Fields, sizes: list[int]
) -> tuple[list[NDArray[np.float64] | None], NDArray[np.float64], list[str]]:
    """Read the step along each axis, None for an axis not of space, and the origin, LPS."""
    path, doubts = fields.path, []
    space = fields.get("space")
    guess = (
        f"{path} does not say in which space it lies, so its orientation is a guess (LPS) and left"
        " and right may be exchanged; make it anew from the DICOM series."
    )
    signs = np.ones(3)
    if space is None:
        doubts.append(guess)
    elif space.lower() in SPACES:
        signs = np.array(SPACES[space.lower()], np.float64)
    else:
        raise ScanFormatError(
            f"{path} lies in the space {space[:60]!r}, which is none of a patient; save it as LPS."
        )
    given = fields.get("space directions")
    columns: list[NDArray[np.float64] | None]
    if given is not None:
        found = list(_VECTOR.finditer(given))
        if len(found) != len(sizes) or _VECTOR.sub("", given).strip():
            raise ScanFormatError(f"{path} has damaged “space directions” ({given[:80]!r}).")
        columns = [
            None if match[1] is None else signs * _vector(path, "space directions", match[1])
            for match in found
        ]
    else:
        spacings = as_floats(path, "spacings", fields.get("spacings") or "", len(sizes))
        if not doubts:
            doubts.append(guess)
        columns = [np.eye(3)[i] * length if i < 3 else None for i, length in enumerate(spacings)]
    at = fields.get("space origin")
    if at is None:
        return columns, np.zeros(3), doubts
    match = _VECTOR.fullmatch(at)
    if match is None or match[1] is None:
        raise ScanFormatError(f"{path} has a damaged “space origin” ({at[:80]!r}).")
    return columns, signs * _vector(path, "space origin", match[1]), doubts


def _unit(fields: _Fields) -> Unit:
    """Read the unit of lengths: those of the space, or of the axes where only spacings are."""
    of_space = fields.get("space directions") is not None
    given = fields.get("space units" if of_space else "units") or ""
    return unit_of(fields.path, _QUOTED.findall(given) or given.split())


def _vector(path: Path, name: str, text: str) -> NDArray[np.float64]:
    return np.array(as_floats(path, name, text.replace(",", " "), 3))
