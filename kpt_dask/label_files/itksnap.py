"""Names and colours for ITK-SNAP: its label description, a text file beside a label map."""

from pathlib import Path

from kpt_dask.label_files.label_map import LabelMap

_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
    0     0    0    0        0  0  0    "Clear Label"
"""


def write_label_description(path: Path, label_map: LabelMap) -> None:
    """Write the label description of a label map; ITK-SNAP opens it under Segmentation."""
    lines = (
        f"{organ.value:5} {organ.colour[0]:5} {organ.colour[1]:4} {organ.colour[2]:4}"
        f'        1  1  1    "{organ.name}"\n'
        for organ in label_map.organs
    )
    path.write_text(_HEAD + "".join(lines), "utf-8")
