"""The folder of an evaluation: tables, results and a page, which appear together."""

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from atlas_store import OrganTable
from kpt_dask.output.commit import replacing
from kpt_dask.output.contents import EVALUATION

ENCODING = {"encoding-type": EVALUATION, "encoding-version": "1"}


class ResultsFolder:
    """A folder that is being written.

    Parameters
    ----------
    partial : Path
        Where it is written to; it does not exist yet.
    pictures : Path
        A temporary folder for the pictures of all scans.
    """

    def __init__(self, partial: Path, pictures: Path) -> None:
        self._partial = partial
        self._pictures = pictures
        self._number: dict[str, int] = {}

    def keep(self, scan: str, picture: str) -> None:
        """Keep the picture of a scan until it is known whether it is shown."""
        self._number[scan] = len(self._number)
        self._picture_of(scan).write_text(picture, "utf-8")

    def write(self, results: Mapping[str, Any], organs: OrganTable) -> None:
        """Write all files.

        Parameters
        ----------
        results : mapping
            From `kpt_dask.evaluate`; also ``baselines``, if there are any: by name of a method
            ``mean_dice``, ``dice_by_organ``, ``dice`` by scan and organ, and ``seconds`` by scan.
        organs : OrganTable
            For the organs' colours.
        """
        # Imported here: only the page needs matplotlib and jinja2.
        from kpt_dask.evaluation.page import render

        self._partial.mkdir()
        with (self._partial / "results.json").open("w", encoding="utf-8", errors="replace") as file:
            json.dump({**ENCODING, **results}, file, indent=2, ensure_ascii=False)
            file.write("\n")
        write_csv(self._partial / "measures.csv", measure_rows(results))
        if "limited_view" in results:
            write_csv(self._partial / "limited_view.csv", results["limited_view"]["rows"])
        shown = {
            scan: self._picture_of(scan).read_text("utf-8")
            for scan in best_median_worst(results["dice"]).values()
            if scan in self._number
        }
        (self._partial / "index.html").write_text(
            render(results, organs, shown), "utf-8", "replace"
        )

    def _picture_of(self, scan: str) -> Path:
        return self._pictures / f"{self._number[scan]}.svg"


@contextmanager
def writing(out: str | Path | None, *, overwrite: bool) -> Iterator[ResultsFolder | None]:
    """Yield the folder to write to, which appears at the end; None if none is asked for."""
    if out is None:
        yield None
        return
    with ExitStack() as stack:
        partial = stack.enter_context(replacing(out, overwrite=overwrite))
        pictures = stack.enter_context(tempfile.TemporaryDirectory(prefix="kpt-evaluate-"))
        yield ResultsFolder(partial, Path(pictures))


def measure_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List measures and claims: a row for each scan and organ; Dice of baselines in columns."""
    baselines = results.get("baselines", {})
    return [
        {"scan": scan, "organ": organ, **measures, **results["claims"][scan][organ]}
        | {f"dice_{name}": one["dice"].get(scan, {}).get(organ) for name, one in baselines.items()}
        for scan, organs in results["measures"].items()
        for organ, measures in organs.items()
    ]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, which all have the same keys; None becomes an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def best_median_worst(dice: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Choose the scans of best, median and worst mean Dice over their organs; fewer of few."""
    mean = {scan: sum(organs.values()) / len(organs) for scan, organs in dice.items() if organs}
    order = sorted(mean, key=lambda scan: (-mean[scan], scan))
    if len(order) < 3:
        return dict(zip(("best", "worst"), order, strict=False))
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
