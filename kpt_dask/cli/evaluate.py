"""``kpt evaluate``: how well scans with known labels are segmented."""

from pathlib import Path
from typing import Any

import click

from kpt_dask.cli.common import (
    console,
    fail,
    index_option,
    layout_option,
    memory_option,
    names,
    numbers,
    overwrite_option,
    print_json,
    say,
    scheduler_option,
    select_option,
    series_option,
    table,
    transfer_options,
    working,
)
from kpt_dask.options import LABELS, SCANS, TransferOptions


@click.command()
@click.argument("store", metavar="STORE")
@click.option(
    "--scans",
    type=click.Path(),
    metavar="DIR",
    help="Evaluate the scans of a folder. Without it, each atlas by means of the others.",
)
@layout_option
@click.option(
    "--scan",
    "scan_pattern",
    metavar="PATTERN",
    help=f"How scans are named in DIR.  [default: {SCANS}]",
)
@click.option(
    "--labels",
    "labels_pattern",
    metavar="PATTERN",
    help=f"How their labels are named.  [default: {LABELS}]",
)
@series_option
@transfer_options
@click.option(
    "--atlases",
    callback=numbers,
    multiple=True,
    metavar="N[,N…]",
    help="Use only the first N atlases other than the scan. Of several numbers the largest gives "
    "the answer, and the others show how Dice grows with the store.",
)
@click.option(
    "--cropped",
    callback=names,
    multiple=True,
    metavar="ORGAN[,ORGAN…]",
    help="Also crop each scan along the body around each of these organs, to a third of its "
    "length, and compare with the whole scan, in --mode and in modes across and organ.",
)
@click.option(
    "--baseline",
    metavar="NAME",
    help="Put a baseline beside the results: syn registers the same atlases to each scan by ANTs "
    "SyN, and fuses their labels by majority and by locally weighted votes. Takes minutes for each "
    "atlas and scan; needs kpt-dask[baselines].",
)
@click.option(
    "--registrations",
    type=click.Path(),
    metavar="DIR",
    help="With --baseline, keep registrations here for another time.  [default: the user's cache]",
)
@click.option("--limit", type=int, metavar="N", help="Evaluate only the first N scans.")
@select_option
@index_option
@click.option(
    "--out",
    type=click.Path(),
    metavar="DIR",
    help="Write a folder with index.html, a page of tables, plots and overlays that needs nothing "
    "else; measures.csv, a row for each scan and organ; and results.json.",
)
@overwrite_option
@memory_option
@scheduler_option
@click.option(
    "--json",
    "json_file",
    type=click.Path(),
    metavar="FILE",
    help="Write the results as JSON too, replacing FILE; - for standard output alone.",
)
def evaluate(
    store: str,
    scans: str | None,
    layout: str | None,
    scan_pattern: str | None,
    labels_pattern: str | None,
    series: str | None,
    mode: str,
    options: TransferOptions,
    atlases: tuple[int, ...] | None,
    cropped: tuple[str, ...] | None,
    baseline: str | None,
    registrations: str | None,
    limit: int | None,
    select: int | None,
    index: str,
    out: str | None,
    overwrite: bool,
    memory: int | None,
    scheduler: str | None,
    json_file: str | None,
) -> None:
    """Measure how well scans with known labels are segmented.

    Each atlas of STORE is segmented by the others (leave one out), or each scan of DIR by
    all of STORE. A scan is never segmented by its own atlas, whatever that is called.
    A scan that cannot be read does not stop the others; at the end the program names it and fails.
    Temporary files go to $TMPDIR, which all workers of a cluster must share.

    Of each scan and organ: Dice, the mean and the 95 % Hausdorff distance of the surfaces, and the
    surface Dice at 3 mm, with 95 % bootstrap intervals over scans. Also how
    far confidence follows Dice, and how many volumes are in their intervals.

    \b
    Examples:
      kpt evaluate atlases --out evaluation
      kpt evaluate atlases --limit 20 --atlases 19 --json results.json
      kpt evaluate atlases --scans test --labels '{id}_organs.nii.gz' --out evaluation
      kpt evaluate atlases --atlases 5,10,20,40 --cropped liver,trachea --out evaluation
      kpt evaluate atlases --limit 8 --atlases 10 --baseline syn --out evaluation
    """
    from atlas_store import AtlasStore
    from kpt_dask.annotations.layouts import pairs_of
    from kpt_dask.evaluation.run import evaluate as evaluate_store
    from kpt_dask.output.places import check_outputs

    opened = AtlasStore.open(store)
    pairs = None
    if scans is not None:
        pairs = pairs_of(scans, layout, scan_pattern, labels_pattern, series)
    if json_file not in (None, "-"):
        read = [path for pair in pairs or () for path in (pair.scan, pair.labels)]
        check_outputs(files=[json_file], inputs=[opened.url, *read], overwrite=True)
        if out is not None:
            check_outputs(folders=[out], files=[json_file], overwrite=True)
    with working(scheduler) as client:
        results = evaluate_store(
            opened,
            pairs,
            out=out,
            mode=mode,
            options=options,
            atlases=atlases,
            cropped=cropped or (),
            baseline=baseline,
            registrations=registrations,
            limit=limit,
            select=select,
            index=index,
            overwrite=overwrite,
            memory=memory,
            client=client,
        )
    ours = f"grid of the store, {opened.parameters['spacing']:g} mm, not that of the scans"
    _write(results, ours if pairs is None else "scans' own grids", out, json_file)
    if failed := results["failed"]:
        number = len(failed) + results["scans"]
        fail(f"{len(failed)} of {number} scans were not evaluated: {', '.join(failed)}.")


def _write(results: dict[str, Any], grid: str, out: str | None, json_file: str | None) -> None:
    """Print results, and write them to the file that was asked for."""
    import json

    from kpt_dask.output.commit import replacing

    if json_file == "-":
        print_json(results)
        return
    if json_file is not None:
        with replacing(json_file, overwrite=True) as partial:
            answer = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
            partial.write_text(answer, "utf-8", "replace")
    _print_results(results, grid)
    if out is not None:
        say(f"Written: {out}; open {Path(out) / 'index.html'}.")


def _print_results(results: dict[str, Any], grid: str) -> None:
    organs = table(
        "organ",
        "Dice",
        "mean mm",
        "95 % mm",
        "surface Dice",
        "keypoints",
        "% labelled",
        "% correct",
    )
    for name, dice in results["dice_by_organ"].items():
        measures = results["measures_by_organ"][name]
        mean, most, surface = (
            measures[one]["mean"] for one in ("mean_distance_mm", "distance_95_mm", "surface_dice")
        )
        organs.add_row(
            name,
            f"{dice:.3f}",
            *(_number(one, 2) for one in (mean, most)),
            f"{surface:.3f}",
            *_keypoints(results["keypoints"][name]),
        )
    organs.add_section()
    organs.add_row("background", "", "", "", "", *_keypoints(results["background"]))
    organs.add_row("mean", f"{results['mean_dice']:.3f}")
    stations = table("station", "seconds per scan")
    for name, seconds in results["seconds"].items():
        if name == "total":
            stations.add_section()
        stations.add_row(name, f"{seconds:.2f}")
    answer = console()
    answer.print(organs)
    answer.print()
    answer.print(stations)
    for row in results.get("by_atlases", ()):
        plural = "atlas" if row["atlases"] == 1 else "atlases"
        click.echo(f"{row['atlases']} {plural}: mean Dice {row['mean_dice']:.3f}.")
    for mode, one in results.get("limited_view", {}).get("modes", {}).items():
        click.echo(
            f"Mode {mode}, cropped: Dice {one['cropped']:.3f} of the organs inside, where the whole"
            f" scan gives {one['whole']:.3f}."
        )
    told = results["trust"]
    rho = told["rank_correlation"]
    click.echo(
        f"Volumes: {told['volume_in_interval']:.0%} of the references' are within their intervals."
        + ("" if rho is None else f" Confidence: rank correlation with Dice {rho:.2f}.")
    )
    click.echo(f"Measured on the {grid}.")
    ends = results["mean_dice_interval"]
    interval = "" if ends is None else f" (95 % interval {ends[0]:.3f} to {ends[1]:.3f})"
    click.echo(
        f"Mode {results['mode']}: mean Dice {results['mean_dice']:.3f}{interval} over"
        f" {results['scans']} scans, {results['atlases']} atlases for each."
    )


def _keypoints(counts: dict[str, float | None]) -> list[str]:
    return [
        _number(counts["mean"], 1),
        _number(counts["labelled"], 0),
        _number(counts["correct"], 0),
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
