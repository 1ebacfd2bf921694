"""Layouts of public collections of annotated scans: where files lie, and what values mean."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atlas_store.organs import MAX_VALUE
from kpt_dask.annotations.names import printable_name
from kpt_dask.errors import ParameterError
from kpt_dask.options import LABELS, SCANS
from kpt_dask.runtime import notices
from kpt_dask.scans.pairs import Pair, find_pairs
from kpt_dask.scans.scan import READERS

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
    mr_from : int, optional
        Least number of a scan that is MR, if the folder has such as well.
    """

    does: str
    scans: str
    labels: str
    values: Mapping[int, str] = field(default_factory=dict)
    mr_from: int | None = None


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
        mr_from=500,
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
        "imagesTr/ID_0000.nii.gz with labelsTr/ID.nii.gz, all else from dataset.json",
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
        If there is no such layout, or a ``dataset.json`` is missing or damaged, names no CT, or
        has labels that are no organs of one value each.
    """
    if name not in LAYOUTS:
        raise ParameterError(f"The layout {name!r} is unknown; use one of {', '.join(LAYOUTS)}.")
    return _of_nnunet(Path(folder, "dataset.json")) if name == "nnunet" else LAYOUTS[name]


def _of_nnunet(path: Path) -> Layout:
    """Read where files lie, and what values mean, from nnU-Net's ``dataset.json``."""
    try:
        told: Any = json.loads(path.read_text("utf-8"))
        # A file that names none has one: whether it is CT, its values tell.
        channels = told.get("channel_names", told.get("modality", {"0": "CT"}))
        cts = [int(n) for n, name in channels.items() if str(name).strip().casefold() == "ct"]
        ending = str(told.get("file_ending", ".nii.gz"))
        # Version 1 gives names by value, version 2 values by name.
        pairs = [(n, o) if n.isdigit() else (o, n) for n, o in told["labels"].items()]
        labels = [(value, printable_name(name)) for value, name in pairs]
    except FileNotFoundError:
        raise ParameterError(f"{path} is missing, which names the labels of the folder.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ParameterError(
            f"{path} does not name labels and channels ({error}); mend it."
        ) from error
    if not cts:
        raise ParameterError(
            f"{path} calls no channel CT (channel_names), and only CT has HU; leave the folder out,"
            " or mend the file if the scans are CT."
        )
    if ending not in READERS:
        raise ParameterError(
            f"{path} says that files end with {printable_name(ending)} (file_ending), which are not"
            f" read; convert them to one of {', '.join(READERS)}."
        )
    return Layout(
        LAYOUTS["nnunet"].does,
        f"imagesTr/{{id}}_{min(cts):04}{ending}",
        f"labelsTr/{{id}}{ending}",
        _names_by_value(path, labels),
    )


def _names_by_value(path: Path, labels: Iterable[tuple[Any, str]]) -> dict[int, str]:
    """Find the name of each value of label maps; refuse values that stand for no organ."""
    names: dict[int, str] = {}
    for told, name in labels:
        if name.casefold() == "ignore":
            raise ParameterError(
                f"{path} has the label ignore, of voxels that nobody annotated: atlases would vote"
                " for no organ there; leave the folder out, or annotate them."
            )
        value = told[0] if isinstance(told, list) and len(told) == 1 else told
        if isinstance(value, list):
            raise ParameterError(
                f"{path} gives {name} several values ({', '.join(map(str, value))}), which is not"
                " read; give each name one value."
            )
        try:
            whole = int(value)
        except (TypeError, ValueError, OverflowError):
            whole = -1
        if whole < 0 or (isinstance(value, float) and whole != value):
            raise ParameterError(
                f"{path} gives {name} the value {printable_name(value)}; it must be a whole number."
            )
        if whole in names:
            raise ParameterError(
                f"{path} gives {names[whole]} and {name} one value, {whole}; remove one of them."
            )
        names[whole] = name
    return {value: name for value, name in names.items() if 0 < value <= MAX_VALUE}


def _without_mr(folder: str | Path, found: list[Pair], mr_from: int) -> list[Pair]:
    """Leave out scans that are MR by their number, with a warning."""
    kept = [
        pair
        for pair in found
        if (number := re.search(r"[0-9]+$", pair.id)) is None or int(number[0]) < mr_from
    ]
    if not kept:
        raise ParameterError(
            f"{folder} holds MR only (numbers from {mr_from} on), and only CT has HU."
        )
    if len(kept) < len(found):
        notices.warn(
            f"{folder}: {len(found) - len(kept)} scans with numbers from {mr_from} on are MR and"
            " are left out."
        )
    return kept


def pairs_of(
    folder: str | Path,
    layout: str | None = None,
    scans: str | None = None,
    labels: str | None = None,
    series: str | None = None,
) -> list[Pair]:
    """Find the scans of a folder and their labels, as `find_pairs` does, without the MR of AMOS.

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
        As for `layout_of` and `find_pairs`, or if all scans of AMOS are MR.
    ScanNotFoundError
        If nothing fits the pattern of the scans.
    """
    chosen = Layout("", SCANS, LABELS) if layout is None else layout_of(layout, folder)
    found = find_pairs(folder, scans or chosen.scans, labels or chosen.labels)
    if chosen.mr_from is not None:
        found = _without_mr(folder, found, chosen.mr_from)
    return [replace(pair, values=chosen.values or None, series=series) for pair in found]
