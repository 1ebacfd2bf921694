"""The page of an evaluation: one HTML file that needs nothing else."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2

from atlas_store import OrganTable
from kpt_dask.evaluation.claims import FAILED
from kpt_dask.evaluation.folder import best_median_worst
from kpt_dask.evaluation.plots import atlases_plot, dice_plot, limited_view_plot, seconds_plot
from kpt_dask.organ_transfer.measures import UNSURE

TEMPLATE = "page.html"


def render(results: Mapping[str, Any], organs: OrganTable, pictures: Mapping[str, str]) -> str:
    """Render the page.

    Parameters
    ----------
    results : mapping
        From `kpt_dask.evaluate`; see `kpt_dask.evaluation.folder.ResultsFolder.write`.
    organs : OrganTable
        For the organs' colours.
    pictures : mapping of str to str
        SVG of some scans, by name.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(name=_name, number=_number, interval=_interval)
    template = environment.from_string(
        files("kpt_dask.evaluation").joinpath(TEMPLATE).read_text("utf-8")
    )
    anchors = {scan: f"scan-{i}" for i, scan in enumerate(results["dice"])}
    baselines = {
        name: {**one, "total": _seconds(one["seconds"])}
        for name, one in results.get("baselines", {}).items()
    }
    chosen = best_median_worst(results["dice"])
    rows = results.get("by_atlases")
    limited = results.get("limited_view")
    judged = [organ for organ in organs if organ.name in results["dice_by_organ"]]
    names = [organ.name for organ in judged]
    return template.render(
        results=results,
        failed=FAILED,
        unsure=UNSURE,
        organs=judged,
        anchors=anchors,
        baselines=baselines,
        shown=[(which, scan, pictures[scan]) for which, scan in chosen.items() if scan in pictures],
        mean_of={
            scan: sum(scores.values()) / len(scores) if scores else None
            for scan, scores in results["dice"].items()
        },
        dice_plot=dice_plot(
            results["dice"],
            names,
            anchors,
            {n: one["dice_by_organ"] for n, one in baselines.items()},
        ),
        seconds_plot=seconds_plot(
            results["seconds"], {name: one["total"] for name, one in baselines.items()}
        ),
        atlases_plot=atlases_plot(rows) if rows else "",
        limited_plot=limited_view_plot(limited["modes"], names) if limited else "",
    )


def _seconds(given: Any) -> float:
    """Mean seconds of a scan, of a number or numbers by scan."""
    if isinstance(given, Mapping):
        return sum(given.values()) / len(given)
    return float(given)


def _name(organ: str) -> str:
    return organ.replace("_", " ")


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    # Adding 0 turns -0 into 0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _interval(ends: list[float] | None, digits: int = 2) -> str:
    if ends is None:
        return ""
    between = " to " if min(ends) < 0 else " – "
    return between.join(_number(end, digits) for end in ends)
