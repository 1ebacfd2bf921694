"""MetaImage files: ``.mha`` with the voxels, ``.mhd`` with the voxels in a file beside it.

Source: the format's definition, https://itk.org/Wiki/ITK/MetaIO/Documentation. Its world is LPS.
"""

import re
from pathlib import Path

import numpy as np

from kpt_dask.errors import ScanFormatError
from kpt_dask.scans.plain_header import (
    PlainFile,
    as_floats,
    as_ints,
    beside,
    placed,
    read_start,
    unit_of,
)

TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
"""Types of voxels; a long has four bytes, whatever the machine."""

_START = re.compile(rb"\s*(ObjectType|NDims|Comment|ObjectSubType)\s*=")


def open_metaimage(path: Path) -> PlainFile:
    """Read a MetaImage header.

    Raises
    ------
    ScanFormatError
        If the file is no MetaImage, or not one 3-D volume of real numbers on a usable grid.
    """
    start, end = read_start(path, "MetaImage", _START, rb"ElementDataFile\s*=[^\r\n]*\r?\n?")
    fields = {}
    for line in start.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition("=")
        fields[name.strip()] = value.strip()

    def get(*names: str) -> str | None:
        return next((fields[name] for name in names if name in fields), None)

    def need(name: str) -> str:
        if name not in fields:
            raise ScanFormatError(f"{path} has no {name}; get a new copy.")
        return fields[name]

    def flag(*names: str) -> bool:
        return (get(*names) or "False").lower() in ("true", "1")

    n = as_ints(path, "NDims", need("NDims"))[0]
    sizes = as_ints(path, "DimSize", need("DimSize"))
    if n != len(sizes) or not 0 < n < 10:
        raise ScanFormatError(f"{path} has NDims {n}, but {len(sizes)} numbers in DimSize.")
    if get("ElementNumberOfChannels") not in (None, "1"):
        raise ScanFormatError(f"{path} has several channels; give one volume of real numbers.")
    if flag("BinaryData") is False and "BinaryData" in fields:
        raise ScanFormatError(f"{path} holds voxels as text; save it as binary data.")
    spacing = as_floats(path, "ElementSpacing", need("ElementSpacing"), n)
    turned = get("TransformMatrix", "Rotation", "Orientation")
    doubts: tuple[str, ...] = ()
    if turned is None:
        matrix = np.eye(n)
        doubts = (
            f"{path} has no TransformMatrix, so its orientation is a guess (LPS) and left and right"
            " may be exchanged; make it anew from the DICOM series.",
        )
    else:
        # Each row is the direction of an axis.
        matrix = np.array(as_floats(path, "TransformMatrix", turned, n * n)).reshape(n, n).T
    origin = as_floats(path, "Offset", get("Offset", "Position", "Origin") or "0 " * n, n)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    affine = np.eye(4)
    if len(sizes) == 3:
        affine[:3, :3] = (matrix * spacing)[:3, :3]
        affine[:3, 3] = origin[:3]
    kind = need("ElementType")
    if kind not in TYPES:
        raise ScanFormatError(f"{path} holds {kind[:40]} voxels, not real numbers.")
    big = flag("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if big else "<")
    name = need("ElementDataFile")
    local = name.upper() == "LOCAL"
    skip = as_ints(path, "HeaderSize", get("HeaderSize") or "0")[0]
    unit = unit_of(path, [get("DistanceUnits") or ""])
    grid = placed(path, sizes, affine, unit)
    return PlainFile.of(
        path,
        grid,
        dtype,
        data=path if local else beside(path, name),
        packing="zlib" if flag("CompressedData") else "none",
        start=end if local else 0,
        skip=skip,
        doubts=doubts + unit.doubts(path, grid),
    )
