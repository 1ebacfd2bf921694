"""``kpt batch``: many scans, one after another."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kpt_dask.cli.common import (
    columns,
    index_option,
    json_option,
    memory_option,
    names,
    print_json,
    say,
    scheduler_option,
    select_option,
    series_option,
    transfer_options,
    working,
)

if TYPE_CHECKING:
    from kpt_dask.batches import Outcome

COLUMNS = (
    *("scan", "organ", "volume_ml", "low_ml", "high_ml", "mean_hu", "sd_hu"),
    *("votes", "confidence", "at_border", "warnings", "error"),
)
"""Columns of the table for spreadsheets."""


@click.command()
@click.argument("scans", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.argument("store", metavar="STORE")
@click.argument("out", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@transfer_options
@click.option("--exclude", multiple=True, metavar="ID", help="Leave an atlas out; may be repeated.")
@select_option
@index_option
@series_option
@click.option(
    "--organs", callback=names, multiple=True, metavar="NAME,…", help="As of kpt segment."
)
@click.option(
    "--csv",
    "as_csv",
    is_flag=True,
    help="Print a table for a spreadsheet: a line for each organ of each scan.",
)
@memory_option
@scheduler_option
@json_option
def batch(
    scans: tuple[Path, ...],
    store: str,
    out: Path,
    series: str | None,
    organs: tuple[str, ...] | None,
    as_csv: bool,
    memory: int | None,
    scheduler: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Segment SCANS from the atlases of STORE, one after another.

    Each scan gets OUT/NAME.zarr, as of kpt segment, and OUT/NAME.nii.gz, the label map on its own
    grid. A scan that cannot be segmented does not stop the others; the end lists it. After an
    interruption, or after mending a scan, give the same command again: answers for the same voxels
    are kept, whatever options they were made with; move them away to make them anew. Where scans
    have the same name, NAME begins with the folders that tell them apart.

    \b
    Examples:
      kpt batch scans/*.nii.gz atlases results
      kpt batch scans/*.nii.gz atlases results --fast --csv > organs.csv
      kpt batch patients/*/ct_dicom atlases results
    """
    from atlas_store import AtlasStore
    from kpt_dask.batches import check_outcomes, outputs, segment_batch
    from kpt_dask.output.places import target_of
    from kpt_dask.segmentation import choose

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other.")
    options["organs"] = organs or ()
    choose(AtlasStore.open(store), **options)
    named = outputs(scans, target_of(out))
    done: list[Outcome] = []
    with working(scheduler) as client:
        for one in segment_batch(
            scans, store, out, client, series=series, memory=memory, **options
        ):
            done.append(one)
            say(f"kpt: {len(done)} of {len(named)}: {one}", err=True)
    if as_json:
        print_json([_answer(one) for one in done])
    elif as_csv:
        say(_table(done))
    else:
        _show(done)
    check_outcomes(done)


def _table(done: list["Outcome"]) -> str:
    """Write a line for each organ of each scan, and for each scan that failed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in done:
        if one.error is not None:
            writer.writerow([one.scan, *[""] * (len(COLUMNS) - 2), one.error])
        for name, organ in one.organs.items():
            low, high = organ.interval_ml
            writer.writerow(
                [
                    *(one.scan, name, organ.volume_ml, low, high, organ.mean_hu, organ.sd_hu),
                    *(organ.votes, organ.confidence, organ.at_border),
                    *(" ".join(one.warnings), ""),
                ]
            )
    return text.getvalue().rstrip("\n")


def _answer(one: "Outcome") -> dict[str, Any]:
    """Say all of a scan."""
    return {
        "scan": str(one.scan),
        "path": str(one.output.segmentation),
        "labels": str(one.output.labels),
        "seconds": one.seconds,
        "organs": {name: asdict(organ) for name, organ in one.organs.items()},
        "warnings": list(one.warnings),
        "error": one.error,
    }


def _show(done: list["Outcome"]) -> None:
    """Show a line for each scan."""
    header = ["scan", "organs", "least sure", "confidence", "warnings"]
    rows = []
    for one in done:
        found = {name: organ for name, organ in one.organs.items() if organ.volume_ml}
        least = min(found, key=lambda name: found[name].confidence, default=None)
        rows.append(
            [
                one.output.segmentation.stem,
                "failed" if one.error is not None else f"{len(found)} of {len(one.organs)}",
                least or "",
                "" if least is None else f"{found[least].confidence:.2f}",
                str(len(one.warnings) or ""),
            ]
        )
    say(columns(header, rows, left=(0, 2)))
