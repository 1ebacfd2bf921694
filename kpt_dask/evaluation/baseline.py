"""The baseline of an evaluation: the same atlases, registered to the same scans by SyN.

All in memory, and compared on the working grid.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.regions import open_array
from atlas_store.storage.cache import cache_folder
from kpt_dask.baselines.fusion import WarpedAtlas, locally_weighted, majority
from kpt_dask.baselines.syn import Image, check_installed, register
from kpt_dask.errors import ParameterError
from kpt_dask.evaluation.known_scan import Reference, planes
from kpt_dask.evaluation.overlap import dice
from kpt_dask.evaluation.summary import mean_dice
from kpt_dask.output.places import check_place, printable
from kpt_dask.runtime import progress
from kpt_dask.volumes.volume import Volume

BASELINES = ("syn",)
"""Baselines by name."""
MAJORITY, WEIGHTED = "SyN, majority", "SyN, locally weighted"
"""Names of the two ways in which the labels of registered atlases are fused."""


def check_baseline(name: str, registrations: str | Path | None = None) -> None:
    """Raise `ParameterError` if a baseline is unknown, or what it needs is not there."""
    if name not in BASELINES:
        raise ParameterError(f"The baseline {name!r} is unknown; use {', '.join(BASELINES)}.")
    check_installed()
    if registrations is not None:
        place = Path(registrations).absolute()
        check_place(printable(registrations), place)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ParameterError(
                f"{printable(registrations)} cannot hold registrations: {error.strerror}; give a"
                " folder."
            ) from error


class Baseline:
    """Registers atlases to scans, and compares what their labels make with the references.

    Parameters
    ----------
    organs : OrganTable
        The store's.
    cache : Path, optional
        Folder in which registrations are kept; in the user's cache unless given.
    """

    def __init__(self, organs: OrganTable, cache: Path | None = None) -> None:
        self._organs = organs
        self._cache = cache_folder() / "registrations" if cache is None else cache
        self._dice: dict[str, dict[str, dict[str, float]]] = {MAJORITY: {}, WEIGHTED: {}}
        self._seconds: dict[str, dict[str, float]] = {MAJORITY: {}, WEIGHTED: {}}

    def judge(
        self, name: str, volume: Volume, reference: Reference, atlases: Iterable[Atlas]
    ) -> None:
        """Segment a scan, given as a volume, by registering atlases, and compare."""
        atlases = list(atlases)
        scan = _image(volume.levels[0], volume.grid.spacing, volume.grid.origin)
        seconds, warped = 0.0, []
        with progress.stage("Registering atlases", total=len(atlases)) as advance:
            for atlas in atlases:
                where = [atlas.info.spacing, atlas.info.origin]
                image = _image(open_array(atlas.image, "0"), *where)
                found = register(scan, image, np.asarray(atlas.labels[...]), self._cache)
                values = frozenset(atlas.organ_table.by_name(n).value for n in atlas.annotated)
                warped.append(WarpedAtlas(found.image, found.labels, values))
                seconds += found.seconds
                advance(1)
        hu = np.asarray(scan.voxels, np.float32)
        fusions: Mapping[str, Callable[[], NDArray[np.uint16]]] = {
            MAJORITY: lambda: majority(warped),
            WEIGHTED: lambda: locally_weighted(hu, warped),
        }
        for method, fuse in fusions.items():
            start = time.perf_counter()
            labels = fuse()
            self._seconds[method][name] = seconds + time.perf_counter() - start
            known = planes(reference.labels)
            self._dice[method][name] = dice(
                known, iter(labels), reference.annotated, reference.organs
            )

    def summary(self) -> dict[str, Any]:
        """Summarize all scans, by method, as `kpt_dask.evaluate` documents it."""
        return {
            method: mean_dice(scores, self._organs)
            | {"dice": scores, "seconds": self._seconds[method]}
            for method, scores in self._dice.items()
        }


def _image(voxels: "zarr.Array[Any]", spacing: Iterable[float], origin: Iterable[float]) -> Image:
    dz, dy, dx = (float(step) for step in spacing)
    z, y, x = (float(at) for at in origin)
    return Image(np.asarray(voxels[...]), (dz, dy, dx), (z, y, x))
