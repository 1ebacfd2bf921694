"""Label maps as NIfTI: the scan's own geometry bit by bit, and names in a header extension.

The extension is the label table of Caret's XML, in which TotalSegmentator keeps the names of its
label maps; other programs skip it.
"""

from pathlib import Path

from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.scans.label_header import header_like
from kpt_dask.scans.nifti_writer import NiftiWriter

_EXTENSION_CODE = 0
"""Code of an extension of no registered kind: the one that TotalSegmentator writes and reads."""

_ALIGNMENT = 16
"""Bytes of which the size of an extension is a multiple."""


def write_nifti(path: Path, label_map: LabelMap) -> None:
    """Write a label map as NIfTI.

    Parameters
    ----------
    path : Path
        File to write, compressed if its name ends in ``.gz``.
    label_map : LabelMap
        Affines, their codes, spacings and units of its header are kept bit by bit.
    """
    voxels = label_map.voxels
    header = header_like(label_map.header, voxels.shape, voxels.dtype)
    with NiftiWriter(path, header, _extension(label_map)) as file:
        file.description = label_map.description
        for piece in voxels.pieces:
            file.write(piece)


def _extension(label_map: LabelMap) -> bytes:
    """Make the extension with names and colours: size, code, XML."""
    labels = "\n".join(
        f'<Label Key="{organ.value}" Red="{red:.4f}" Green="{green:.4f}" Blue="{blue:.4f}"'
        f' Alpha="1"><![CDATA[{organ.name}]]></Label>'
        for organ in label_map.organs
        for red, green, blue in [[part / 255 for part in organ.colour]]
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension>\n'
        f'<VolumeInformation Index="0">\n<LabelTable>\n{labels}\n</LabelTable>\n'
        "<StudyMetaDataLinkSet>\n</StudyMetaDataLinkSet>\n"
        "<VolumeType><![CDATA[Label]]></VolumeType>\n</VolumeInformation>\n</CaretExtension>\n"
    )
    content = text.encode()
    size = -(-(8 + len(content)) // _ALIGNMENT) * _ALIGNMENT
    # Spaces, not zeros: readers hand all of it to an XML parser.
    content = content.ljust(size - 8)
    return size.to_bytes(4, "little") + _EXTENSION_CODE.to_bytes(4, "little") + content
