"""Limited field of view: scans cropped along the body around an organ, as in the paper's Fig. 7."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zarr
from distributed import Client

from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import blocks_of, write_region
from kpt_dask.evaluation.bootstrap import mean_interval
from kpt_dask.grid import Grid
from kpt_dask.volumes.omezarr import CHUNKS
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.volume import Volume, create_volume

SHARE = 1 / 3
"""Part of the scan's length that is left."""
MARGIN_MM = 10.0
"""Length that is left on either side of the organ at least."""
MODES = ("across", "organ")
"""Modes that are compared besides the one asked for: with transfer across labels, and without."""


class Crop(NamedTuple):
    """Planes of a volume that are left.

    Attributes
    ----------
    around : str
        The organ in the middle.
    first, last : int
        First plane, and the one after the last.
    inside : tuple of str
        Annotated organs that lie inside as a whole: these are judged.
    """

    around: str
    first: int
    last: int
    inside: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """Dice of an organ in a whole scan and in a cropped one, by one mode."""

    scan: str
    around: str
    mode: str
    organ: str
    whole: float
    cropped: float


def crop_around(
    organ: str, extents: Mapping[str, tuple[int, int]], planes: int, spacing: float
) -> Crop:
    """Choose planes around an organ: a third of the scan, and the whole organ with a margin.

    Parameters
    ----------
    organ : str
        One of `extents`.
    extents : mapping of str to (int, int)
        First plane of each annotated organ, and the one after its last.
    planes : int
        Planes of the volume.
    spacing : float
        Distance of planes, mm.
    """
    low, high = extents[organ]
    length = max(math.ceil(SHARE * planes), high - low + 2 * math.ceil(MARGIN_MM / spacing))
    first = max(0, min((low + high - length) // 2, planes - length))
    last = min(planes, first + length)
    inside = tuple(name for name, (a, b) in extents.items() if first <= a and b <= last)
    return Crop(organ, first, last, inside)


def cropped_volume(
    volume: Volume,
    crop: Crop,
    group: zarr.Group,
    *,
    memory: int | None = None,
    client: Client | None = None,
) -> Volume:
    """Make the volume of a cropped scan in an empty group.

    Parameters
    ----------
    volume : Volume
        The whole scan.
    crop : Crop
        Planes that are left.
    group : zarr.Group
        An empty group that the workers see.
    memory, client
        As for `kpt_dask.convert`.
    """
    _, height, width = volume.grid.shape
    origin = volume.grid.to_mm((crop.first, 0, 0))
    grid = Grid.isotropic(
        (crop.last - crop.first, height, width), float(volume.grid.spacing[0]), origin
    )
    made = create_volume(group, grid, grid, name=f"around {crop.around}")
    for region in blocks_of(grid.shape, (CHUNKS[0], height, width)):
        planes = slice(region[0].start + crop.first, region[0].stop + crop.first)
        values = chunk_io.read(volume.levels[0], (planes, *region[1:]))
        write_region(made.levels[0], region, values)
    fill_pyramid(made.levels, memory=memory, client=client)
    return made


def limited_view_summary(judged: Sequence[Judged], asked: Sequence[str]) -> dict[str, Any]:
    """Summarize the Dice of cropped scans against whole ones.

    Returns
    -------
    dict
        In JSON types: ``around``, the organs asked for; ``share`` and ``margin_mm`` of a crop;
        ``modes``, by mode: ``whole`` and ``cropped``, mean Dice over scans, crops and the organs
        inside; ``loss``, their difference, and its ``interval``; ``by_organ``, the same means;
        ``rows``, one for each scan, crop, mode and organ.
    """
    modes = {}
    for mode in dict.fromkeys(one.mode for one in judged):
        rows = [one for one in judged if one.mode == mode]
        scans = dict.fromkeys(one.scan for one in rows)
        losses = [[one.whole - one.cropped for one in rows if one.scan == scan] for scan in scans]
        organs = dict.fromkeys(one.organ for one in rows)
        modes[mode] = {
            **_means(rows),
            "interval": mean_interval(losses),
            "by_organ": {
                name: _means([one for one in rows if one.organ == name]) for name in organs
            },
        }
    return {
        "around": list(asked),
        "share": SHARE,
        "margin_mm": MARGIN_MM,
        "modes": modes,
        "rows": [vars(one) for one in judged],
    }


def _means(rows: Sequence[Judged]) -> dict[str, float]:
    whole = float(np.mean([one.whole for one in rows]))
    cropped = float(np.mean([one.cropped for one in rows]))
    return {"whole": whole, "cropped": cropped, "loss": whole - cropped}
