"""Layouts of public collections of annotated scans: where files lie, and what values mean."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atlas_store.organs import MAX_VALUE
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import ParameterError
from kpt_dask.options import LABELS, SCANS
from kpt_dask.scans.pairs import Pair, find_pairs

_ABDOMEN = ("spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach")


@dataclass(frozen=True)
class Layout:
    """A layout of a folder.

    Attributes
    ----------
    does : str
        Description in a few words.
    scans, labels : str
        Patterns, as for `kpt_dask.scans.pairs.find_pairs`.
    values : mapping of int to str
        Names of the values of label maps; empty where files have names of their own.
    """

    does: str
    scans: str
    labels: str
    values: Mapping[int, str] = field(default_factory=dict)


def _numbered(*names: str) -> dict[int, str]:
    return dict(enumerate(names, 1))


LAYOUTS = {
    "totalsegmentator": Layout(
        "ID/ct.nii.gz with ID/segmentations/NAME.nii.gz",
        "{id}/ct.nii.gz",
        "{id}/segmentations",
    ),
    "amos": Layout(
        "imagesTr/ID.nii.gz with labelsTr/ID.nii.gz",
        "imagesTr/{id}.nii.gz",
        "labelsTr/{id}.nii.gz",
        _numbered(
            *_ABDOMEN,
            *("aorta", "inferior_vena_cava", "pancreas", "adrenal_gland_right"),
            *("adrenal_gland_left", "duodenum", "urinary_bladder", "prostate"),
        ),
    ),
    "btcv": Layout(
        "img/imgID.nii.gz with label/labelID.nii.gz",
        "img/img{id}.nii.gz",
        "label/label{id}.nii.gz",
        _numbered(
            *_ABDOMEN,
            *("aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas"),
            *("adrenal_gland_right", "adrenal_gland_left"),
        ),
    ),
    "nnunet": Layout(
        "imagesTr/ID_0000.nii.gz with labelsTr/ID.nii.gz, names from dataset.json",
        "imagesTr/{id}_0000.nii.gz",
        "labelsTr/{id}.nii.gz",
    ),
}
"""Layouts by name."""


def layout_of(name: str, folder: str | Path) -> Layout:
    """Find a layout, and what the folder itself says of its values.

    Raises
    ------
    ParameterError
        If there is no such layout, or a ``dataset.json`` is missing or damaged.
    """
    if name not in LAYOUTS:
        raise ParameterError(f"The layout {name!r} is unknown; use one of {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    if name != "nnunet":
        return layout
    path = Path(folder, "dataset.json")
    try:
        labels: Any = json.loads(path.read_text("utf-8"))["labels"]
        values = {}
        for one, other in labels.items():
            # Version 1 gives names by value, version 2 values by name.
            value, label = (int(one), str(other)) if one.isdigit() else (int(other), one)
            if 0 < value <= MAX_VALUE:
                values[value] = printable_name(label)
    except FileNotFoundError:
        raise ParameterError(f"{path} is missing, which names the labels of the folder.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ParameterError(f"{path} does not name labels ({error}); mend it.") from error
    return Layout(layout.does, layout.scans, layout.labels, values)


def pairs_of(
    folder: str | Path,
    layout: str | None = None,
    scans: str | None = None,
    labels: str | None = None,
    series: str | None = None,
) -> list[Pair]:
    """Find the scans of a folder and their labels, as `find_pairs` does.

    Parameters
    ----------
    folder : str or Path
        Folder to search.
    layout : str, optional
        One of `LAYOUTS`.
    scans, labels : str, optional
        Patterns instead of those of the layout, or of the usual ones.
    series : str, optional
        Which DICOM series of every scan it is.

    Raises
    ------
    ParameterError
        As for `layout_of` and `find_pairs`.
    ScanNotFoundError
        If nothing fits the pattern of the scans.
    """
    chosen = Layout("", SCANS, LABELS) if layout is None else layout_of(layout, folder)
    found = find_pairs(folder, scans or chosen.scans, labels or chosen.labels)
    return [replace(pair, values=chosen.values or None, series=series) for pair in found]
