"""Summary of judged scans: means, intervals and tables, in JSON types."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from atlas_store import AtlasStore, OrganTable
from kpt_dask.evaluation.bootstrap import mean_interval
from kpt_dask.evaluation.claims import Claim, trust
from kpt_dask.evaluation.limited_view import Judged
from kpt_dask.evaluation.table1 import Background, background_statistics, organ_statistics
from kpt_dask.measures.surfaces import Agreement
from kpt_dask.options import TransferOptions

LIBRARIES = ("kpt-dask", "dask", "numba", "numpy", "scipy", "xarray", "zarr")
"""Libraries whose versions are stored with the results."""

MEASURES = Agreement._fields
"""Measures of a scan and an organ: Dice, mean and 95 % Hausdorff distance in mm, surface Dice."""


@dataclass(frozen=True, eq=False)
class ScanResult:
    """Measures of one scan's segmentation.

    Attributes
    ----------
    measures : dict of str to Agreement
        Agreement by organ, of those that the reference annotates.
    claims : dict of str to Claim
        What the answer says of each of them.
    keypoints : dict of str to (int, int, int)
        Numbers by organ: keypoints in it, those that got a vote, those whose vote is right.
    background : Background
        Numbers of keypoints in no organ.
    seconds : dict of str to float
        Time by station, seconds.
    total : float
        Seconds from the scan or its volume to the label map.
    by_atlases : dict of int to dict of str to float
        Dice by organ with other numbers of atlases.
    limited : sequence of Judged
        Dice of cropped scans.
    """

    measures: Mapping[str, Agreement]
    claims: Mapping[str, Claim]
    keypoints: Mapping[str, tuple[int, int, int]]
    background: Background
    seconds: Mapping[str, float]
    total: float
    by_atlases: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    limited: Sequence[Judged] = ()

    @property
    def dice(self) -> dict[str, float]:
        """Dice by organ."""
        return {name: one.dice for name, one in self.measures.items()}


def summarize(
    results: Mapping[str, ScanResult],
    store: AtlasStore,
    mode: str,
    options: TransferOptions,
    atlases: int,
) -> dict[str, Any]:
    """Summarize judged scans, as `kpt_dask.evaluate` documents it."""
    scores = {name: result.dice for name, result in results.items()}
    stations = _in_order([list(result.seconds) for result in results.values()])
    seconds = {
        name: {n: result.seconds.get(n, 0.0) for n in stations} | {"total": result.total}
        for name, result in results.items()
    }
    return {
        **mean_dice(scores, store.organs),
        "dice": scores,
        "measures": {
            name: {organ: one._asdict() for organ, one in result.measures.items()}
            for name, result in results.items()
        },
        "claims": {
            name: {organ: one._asdict() for organ, one in result.claims.items()}
            for name, result in results.items()
        },
        "measures_by_organ": _by_organ(results, store.organs),
        "trust": trust([(result.claims, result.measures) for result in results.values()]),
        "keypoints": organ_statistics([r.keypoints for r in results.values()], store.organs),
        "background": background_statistics([r.background for r in results.values()]),
        "seconds": {
            name: float(np.mean([one[name] for one in seconds.values()]))
            for name in (*stations, "total")
        },
        "seconds_by_scan": seconds,
        "scans": len(results),
        "atlases": atlases,
        "mode": mode,
        "transfer": options.to_json(mode, store.organs),
        "store": {"url": store.url, "uuid": store.uuid, "parameters": dict(store.parameters)},
        "versions": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
        "machine": _machine(),
    }


def mean_dice(scores: Mapping[str, Mapping[str, float]], organs: OrganTable) -> dict[str, Any]:
    """Average Dice by scan and organ: over all, with an interval, and by organ."""
    by_organ = {
        name: [scan[name] for scan in scores.values() if name in scan] for name in organs.names
    }
    return {
        "mean_dice": float(np.mean([value for values in by_organ.values() for value in values])),
        "mean_dice_interval": mean_interval([list(scan.values()) for scan in scores.values()]),
        "dice_by_organ": {n: float(np.mean(values)) for n, values in by_organ.items() if values},
    }


def numbers_of_atlases(
    results: Mapping[str, ScanResult], used: Mapping[int, int], organs: OrganTable
) -> list[dict[str, Any]]:
    """Summarize Dice against the number of atlases.

    Parameters
    ----------
    used : mapping of int to int
        By number of atlases asked for, how many of them vote for a scan.
    """
    rows = []
    for number, voting in used.items():
        scores = {
            name: result.by_atlases.get(number, result.dice) for name, result in results.items()
        }
        rows.append({"atlases": number, "voting": voting, **mean_dice(scores, organs)})
    return rows


def _in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """Merge the stations of several scans: one that others lack follows the one before it."""
    merged: list[str] = []
    for stations in lists:
        at = 0
        for station in stations:
            if station in merged:
                at = merged.index(station) + 1
            else:
                merged.insert(at, station)
                at += 1
    return merged


def _by_organ(results: Mapping[str, ScanResult], organs: OrganTable) -> dict[str, Any]:
    """Average each measure by organ; distances over the scans in which both show the organ."""
    table = {}
    for name in organs.names:
        known = [r.measures[name] for r in results.values() if name in r.measures]
        if not known:
            continue
        row: dict[str, Any] = {
            "scans": len(known),
            "only_one_shows": sum(one.dice == 0 and one.mean_distance_mm is None for one in known),
        }
        for measure in MEASURES:
            values = [getattr(one, measure) for one in known]
            values = [value for value in values if value is not None]
            row[measure] = {
                "mean": float(np.mean(values)) if values else None,
                "interval": mean_interval([[value] for value in values]),
            }
        table[name] = row
    return table


def _machine() -> str:
    """Processor and number of cores of this machine."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            models = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        models = []
    return f"{models[0] if models else name}, {os.cpu_count()} cores"
