"""Names of labels in a NIfTI file: the label table of Caret's XML, in a header extension.

TotalSegmentator and this program write it. It is looked for by a pattern, not by a parser of XML.
"""

import re
from collections.abc import Mapping

from atlas_store.organs import MAX_VALUE
from kpt_dask.annotations.names import printable_name
from kpt_dask.scans.nifti import NiftiFile
from kpt_dask.scans.voxel_stream import guarded, open_stream

LARGEST = 4 << 20
"""Bytes before the voxels that are looked at."""

_LABEL = re.compile(
    rb"<Label\b[^<>]{0,200}?\bKey=\"(\d{1,5})\"[^<>]{0,400}>\s{0,20}"
    rb"(?:<!\[CDATA\[([^\]<>]{1,200})\]\]>|([^<>]{1,200}))\s{0,20}</Label>"
)


def label_names(file: NiftiFile) -> Mapping[int, str]:
    """Names by value; empty where the file has none.

    Raises
    ------
    ScanFormatError
        If the file is truncated or damaged.
    """
    voxels = file.voxels
    text = b""
    with open_stream(voxels.path, voxels.packing, voxels.start) as stream:
        size = min(voxels.skip, LARGEST)
        # A member of a gzip file may hold less.
        while len(text) < size and (more := guarded(voxels.path, stream.read, size - len(text))):
            text += more
    return {
        value: printable_name((found[2] or found[3]).decode("utf-8", "replace"))
        for found in _LABEL.finditer(text)
        if 0 < (value := int(found[1])) <= MAX_VALUE
    }
