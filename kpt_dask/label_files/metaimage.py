"""Label maps as MetaImage, ``.mha``: one file, compressed by zlib.

Source: the format's definition, https://itk.org/Wiki/ITK/MetaIO/Documentation. Its world is LPS.
"""

from pathlib import Path

import numpy as np

from kpt_dask.label_files.label_map import LabelMap

_TYPES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT"}


def write_metaimage(path: Path, label_map: LabelMap) -> None:
    """Write a label map as ``.mha``."""
    spacing = label_map.grid.spacing
    directions = label_map.grid.affine[:3, :3] / spacing
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        "CompressedDataSize": str(label_map.voxels.zlib_size),
        # Each row is the direction of an axis.
        "TransformMatrix": _spelled(directions[::-1, ::-1].T.ravel()),
        "Offset": _spelled(label_map.grid.origin[::-1]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _spelled(spacing[::-1]),
        "DimSize": " ".join(map(str, label_map.voxels.shape[::-1])),
        "ElementType": _TYPES[label_map.voxels.dtype.name],
        "ElementDataFile": "LOCAL",
    }
    with path.open("wb") as file:
        file.write("".join(f"{name} = {value}\n" for name, value in fields.items()).encode())
        label_map.voxels.write_zlib(file)


def _spelled(numbers: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> str:
    return " ".join(map(repr, numbers.tolist()))
