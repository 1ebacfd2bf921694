"""``kpt measure``: volumes, HU and distances of any label map."""

from typing import TYPE_CHECKING, Any

import click

from kpt_dask.cli.common import (
    columns,
    json_option,
    overwrite_option,
    print_json,
    say,
    series_option,
    working,
)

if TYPE_CHECKING:
    from kpt_dask.measures.label_measures import LabelMeasures


@click.command()
@click.argument("scan", type=click.Path())
@click.argument("labels", type=click.Path())
@click.option(
    "--organs",
    metavar="TABLE",
    help="What the label values mean: visceral, openkbp, or a TOML file; others are shown as "
    "label N. Needed where labels have names instead of values.",
)
@click.option(
    "--to",
    "reference",
    type=click.Path(),
    metavar="LABELS",
    help="Compare with these labels of the same scan: Dice, distances of the surfaces, and how "
    "much of them lies within --tolerance.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0),
    default=3.0,
    show_default=True,
    metavar="MM",
    help="Distance that counts as none in the surface Dice.",
)
@click.option(
    "--csv", "csv_file", type=click.Path(), metavar="FILE", help="Also write a table to FILE."
)
@series_option
@overwrite_option
@json_option
def measure(
    scan: str,
    labels: str,
    organs: str | None,
    reference: str | None,
    tolerance: float,
    csv_file: str | None,
    series: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure every label of LABELS, which lie on the grid of SCAN.

    The volume, the mean and standard deviation of HU, the position, and whether a label reaches the
    border of the scan. With --to, how far it agrees with other labels: Dice; the mean and the 95 %
    Hausdorff distance of the surfaces; the surface Dice.

    \b
    Examples:
      kpt measure scan.nii.gz organs.nii.gz --organs visceral
      kpt measure scan.nii.gz organs.nii.gz --to truth.nii.gz --csv measures.csv
    """
    from atlas_store import load_organs
    from kpt_dask.measures.label_measures import measure as measure_labels
    from kpt_dask.output.commit import replacing
    from kpt_dask.output.places import check_outputs
    from kpt_dask.runtime import notices

    table = None if organs is None else load_organs(organs)
    if csv_file is not None:
        inputs = [path for path in (scan, labels, reference) if path is not None]
        check_outputs(files=[csv_file], inputs=inputs, overwrite=overwrite)
    with notices.recorded() as doubts, working(None):
        found = measure_labels(
            scan,
            labels,
            organs=table,
            reference=reference,
            tolerance_mm=tolerance,
            series=series,
        )
        if not any(one.voxels for one in found):
            notices.warn(f"{labels} shows nothing that could be measured.")
    rows = [_row(one) for one in found]
    if csv_file is not None:
        with replacing(csv_file, overwrite=overwrite) as partial:
            _write_csv(partial, rows)
    if as_json:
        print_json({"labels": rows, "warnings": doubts})
        return
    _show(found, compared=reference is not None)


def _row(one: "LabelMeasures") -> dict[str, Any]:
    """Flatten the measures of a label."""
    z, y, x = one.centroid_mm or (None, None, None)
    row = {
        "label": one.name,
        "value": one.value,
        "voxels": one.voxels,
        "volume_ml": one.volume_ml,
        "mean_hu": one.mean_hu,
        "sd_hu": one.sd_hu,
        "z_mm": z,
        "y_mm": y,
        "x_mm": x,
        "at_border": one.at_border,
    }
    return row if one.agreement is None else row | one.agreement._asdict()


def _write_csv(path: Any, rows: list[dict[str, Any]]) -> None:
    import csv

    names = list(rows[0]) if rows else ["label"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _show(found: list["LabelMeasures"], *, compared: bool) -> None:
    header = ["label", "value", "volume (mL)", "mean HU", "sd HU", "border"]
    header += ["Dice", "mean mm", "95 % mm", "surface Dice"] if compared else []
    rows = []
    for one in found:
        row = [
            one.name,
            str(one.value),
            f"{one.volume_ml:.2f}",
            _number(one.mean_hu, 0),
            _number(one.sd_hu, 0),
            "yes" if one.at_border else "",
        ]
        if one.agreement is not None:
            dice, mean, most, surface = one.agreement
            row += [f"{dice:.3f}", _number(mean, 1), _number(most, 1), f"{surface:.3f}"]
        rows.append(row)
    if rows:
        say(columns(header, rows, left=(0,)))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
