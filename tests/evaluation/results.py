"""Results of an evaluation that nobody made, for tests of what is written of them."""

from typing import Any

import numpy as np

from atlas_store import load_organs
from kpt_dask.evaluation.claims import Claim

ORGANS = load_organs("visceral")
CLAIM = Claim(0.5, 10.0, 8.0, 12.0, 11.0)._asdict()


def made_up(scans: int = 5, *, full: bool = True) -> dict[str, Any]:
    """Results of some scans with three organs, with everything optional if `full`."""
    rng = np.random.default_rng(scans)
    organs = ("liver", "lung_left", "spleen")
    names = [f"scan <{i}> & 'x'" for i in range(scans)]
    measures = {
        name: {
            organ: {
                "dice": float(rng.random()),
                "mean_distance_mm": float(rng.random()),
                "distance_95_mm": float(3 * rng.random()),
                "surface_dice": float(rng.random()),
            }
            for organ in organs
        }
        for name in names
    }
    measures[names[-1]].pop("spleen")
    measures[names[0]]["liver"] |= {
        "dice": 0.0,
        "mean_distance_mm": None,
        "distance_95_mm": None,
        "surface_dice": 0.0,
    }
    row = {"mean": 0.5, "interval": [0.4, 0.6]}
    empty = {"mean": None, "interval": None}
    by_organ = {
        organ: {
            "scans": scans,
            "only_one_shows": 1,
            "dice": row,
            "mean_distance_mm": row if organ != "liver" else empty,
            "distance_95_mm": row,
            "surface_dice": row,
        }
        for organ in organs
    }
    seconds = {"Matching": 0.034, "Refining": 1.5, "Nothing": 0.0, "total": 2.0}
    results: dict[str, Any] = {
        "mean_dice": 0.5,
        "mean_dice_interval": [0.4, 0.6] if scans > 1 else None,
        "dice_by_organ": dict.fromkeys(organs, 0.5),
        "dice": {n: {o: one["dice"] for o, one in m.items()} for n, m in measures.items()},
        "measures": measures,
        "claims": {n: dict.fromkeys(m, CLAIM) for n, m in measures.items()},
        "measures_by_organ": by_organ,
        "trust": {
            "answers": 3 * scans - 1,
            "rank_correlation": 0.5 if scans > 1 else None,
            "failed": 2,
            "not_found": 0,
            "unsure": 1,
            "failed_and_unsure": 1,
            "volume_in_interval": 1.0,
        },
        "keypoints": {o: {"mean": 3.5, "labelled": 50.0, "correct": None} for o in organs},
        "background": {"mean": 60.0, "labelled": 90.0, "correct": 80.0, "in_organ": 10.0},
        "seconds": seconds,
        "seconds_by_scan": dict.fromkeys(names, seconds),
        "scans": scans,
        "atlases": 4,
        "mode": "local",
        "transfer": {"threshold": 0.4, "fast": True},
        "store": {"url": "a store <1>", "uuid": "1234", "parameters": {"spacing": 2.0}},
        "versions": {"kpt-dask": "0.1", "numpy": "2.0"},
        "date": "2026-11-30",
        "machine": "a machine, 2 cores",
        "left_out": {},
        "warnings": ["It is doubtful whether 1 < 0."],
    }
    if full:
        dice = {"mean_dice": 0.5, "mean_dice_interval": [0.4, 0.6], "dice_by_organ": by(organs)}
        results["by_atlases"] = [{"atlases": n, "voting": min(n, 20), **dice} for n in (5, 40)]
        means = {"whole": 0.6, "cropped": 0.61, "loss": -0.01}
        results["limited_view"] = {
            "around": ["lung_left"],
            "share": 1 / 3,
            "margin_mm": 10.0,
            "modes": {
                mode: {**means, "interval": [-0.02, 0.01], "by_organ": {"liver": means}}
                for mode in ("local", "across", "organ")
            },
            "rows": [
                {
                    "scan": names[0],
                    "around": "lung_left",
                    "mode": "local",
                    "organ": "liver",
                    "whole": 0.6,
                    "cropped": 0.61,
                }
            ],
        }
        results["baselines"] = {
            "SyN <1>": {
                "mean_dice": 0.512,
                "dice_by_organ": by(organs),
                "dice": {names[0]: {"liver": 0.25, "spleen": 0.75}},
                "seconds": {names[0]: 300.0, names[1]: 500.0},
            }
        }
    return results


def by(organs: tuple[str, ...]) -> dict[str, float]:
    return dict(zip(organs, (0.3, 0.55, 0.56), strict=True))
