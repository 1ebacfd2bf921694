"""The command line: ``kpt``."""

import gc
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, cast

import click

from kpt_dask.cli.common import (
    Commands,
    console,
    index_option,
    json_option,
    label_options,
    labels_option,
    memory_option,
    overwrite_option,
    picture_option,
    print_json,
    say,
    scheduler_option,
    select_option,
    series_option,
    size,
    table,
    transfer_options,
    working,
)
from kpt_dask.cli.streams import keep_streams_open
from kpt_dask.options import TransferOptions
from kpt_dask.output.interruption import ENDING
from kpt_dask.runtime.allocator import share_freed_memory

LATER = {
    "atlas": "Keep a store of annotated scans: the atlases.",
    "batch": "Segment SCANS from the atlases of STORE, one after another.",
    "evaluate": "Measure how well scans with known labels are segmented.",
    "measure": "Measure every label of LABELS, which lie on the grid of SCAN.",
    "report": "Show OUT.zarr, which kpt segment made: one page that needs no network.",
}
"""Commands in modules of their own, which are imported when they are run, and what they do."""

COLLECTED_AFTER = 50_000
"""Objects made until garbage is collected. Libraries make many as they are imported, and no
garbage: with Python's 700, collections take a tenth of a start."""
AGAIN_AFTER = 0.01
"""Seconds until a lost interruption is repeated."""


def main() -> None:
    """Run the command line."""
    if sys.flags.optimize:
        _run_with_assertions()
    # Set for a debugger of other programs: here kernels take pointers, which Python has not.
    os.environ.pop("NUMBA_DISABLE_JIT", None)
    keep_streams_open()
    share_freed_memory()
    gc.set_threshold(COLLECTED_AFTER)
    for signum in ENDING:
        # Signals ignored at the start, as by nohup, stay ignored.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    sys.unraisablehook = _repeat_interruption
    try:
        kpt()
    except OSError as error:
        # Output outside of commands: --help.
        if os.environ.get("KPT_DEBUG"):
            raise
        click.echo(f"kpt: {error.filename}: {error.strerror}.", err=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code not in {128 + signum for signum in ENDING}:
            raise
        _leave(end)
        # Everything is closed and removed by now. Libraries' threads that still run could crash
        # the interpreter during its shutdown.
        for stream in (sys.stdout, sys.stderr):
            # The terminal may have gone.
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(int(cast(int, end.code)))


def _run_with_assertions() -> NoReturn:
    """Start again without ``-O`` or ``PYTHONOPTIMIZE``.

    Under them Zarr cannot read a group, as it does so in an assertion, and help is lost.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
    command = [sys.executable, "-m", "kpt_dask", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


def _leave(error: BaseException | None) -> None:
    """Release the frames of an interruption.

    A context manager that was entered when the interruption came, and of which nobody knew yet, is
    left when the frame that refers to it is released.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()


def _interrupt(signum: int, _: object) -> NoReturn:
    """Raise an interruption, so that partial outputs are removed."""
    # Once: a second signal would interrupt the removal. SIGQUIT and SIGKILL still end it.
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
    # What libraries log, or their threads raise, about the interruption helps nobody.
    if disable := getattr(sys.modules.get("logging"), "disable", None):
        disable()
    threading.excepthook = _ignore
    sys.unraisablehook = _repeat_interruption_alone
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def _ignore(_: object) -> None:
    """Report nothing."""


def _repeat_interruption(lost: "sys.UnraisableHookArgs") -> None:
    """Interrupt again: Python drops exceptions raised during garbage collection."""
    if not isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(lost)
    _repeat_interruption_alone(lost)


def _repeat_interruption_alone(lost: "sys.UnraisableHookArgs") -> None:
    """Interrupt again; nothing else is reported."""
    error = lost.exc_value
    if not isinstance(error, KeyboardInterrupt | SystemExit):
        return

    def interrupt(*_: object) -> None:
        raise error

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)


@click.group(cls=Commands, later=LATER, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kpt-dask", message="kpt-dask %(version)s")
def kpt() -> None:
    """Segment organs in CT scans from annotated examples, by keypoint transfer.

    \b
    To begin:
      kpt demo                                            see it work on a phantom
      kpt atlas create atlases                            make a store for the examples
      kpt atlas add atlases SCAN.nii.gz LABELS.nii.gz     add an annotated scan
      kpt segment SCAN.nii.gz atlases OUT.zarr            segment another scan
      kpt batch SCANS… atlases OUT                        segment many
    """


@kpt.command()
@click.argument("scan", type=click.Path())
@click.argument("out", metavar="OUT.zarr", type=click.Path())
@click.option(
    "--spacing", type=float, default=2.0, show_default=True, help="Of the isotropic grid, mm."
)
@series_option
@overwrite_option
@memory_option
@scheduler_option
@json_option
def convert(
    scan: str,
    out: str,
    spacing: float,
    series: str | None,
    overwrite: bool,
    memory: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Convert SCAN to an OME-Zarr image on an isotropic grid.

    SCAN is a DICOM series (folder, zip or file), an OME-Zarr image (folder, or URL: s3://…,
    http://…), or a NIfTI, NRRD or MetaImage file.

    \b
    Example:
      kpt convert scan.nii.gz scan.zarr --spacing 1.5
    """
    from kpt_dask.scans.scan import open_scan
    from kpt_dask.volumes.conversion import convert as convert_scan

    with working(scheduler) as client:
        volume = convert_scan(
            open_scan(scan, series=series),
            out,
            spacing=spacing,
            overwrite=overwrite,
            memory=memory,
            client=client,
        )
    grid = volume.grid
    if as_json:
        print_json(
            {
                "path": out,
                "shape": list(grid.shape),
                "spacing": grid.spacing.tolist(),
                "origin": grid.origin.tolist(),
                "levels": [list(level.shape) for level in volume.levels],
                "warnings": list(volume.warnings),
            }
        )
    else:
        click.echo(f"{out}: {size(grid.shape, grid.spacing[0])}, {len(volume.levels)} levels.")


@kpt.command()
@click.argument("scan", type=click.Path())
@click.argument("store", metavar="STORE")
@click.argument("out", metavar="OUT.zarr", type=click.Path())
@transfer_options
@click.option("--exclude", multiple=True, metavar="ID", help="Leave an atlas out; may be repeated.")
@select_option
@index_option
@series_option
@labels_option
@label_options(
    "Only these organs. A few of many are segmented in less time; their labels differ a little "
    "from those of all organs, which compete for voxels."
)
@click.option(
    "--report",
    "page",
    type=click.Path(),
    metavar="FILE.html",
    help="Write a page that shows the answer and why, as kpt report does.",
)
@picture_option
@overwrite_option
@memory_option
@scheduler_option
@json_option
def segment(
    scan: str,
    store: str,
    out: str,
    mode: str,
    options: TransferOptions,
    exclude: tuple[str, ...],
    select: int | None,
    index: str,
    series: str | None,
    labels: tuple[str, ...],
    split: str | None,
    organs: tuple[str, ...] | None,
    largest: bool,
    page: str | None,
    picture: str | None,
    overwrite: bool,
    memory: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Segment SCAN from the atlases of STORE.

    SCAN is a DICOM series (folder, zip or file), an OME-Zarr image (folder, or URL: s3://…,
    http://…), or a NIfTI, NRRD or MetaImage file.

    OUT.zarr is an OME-Zarr image of the scan with the label map labels/organs; it also holds
    the probability of each organ, keypoints, matches and votes. It may be s3://BUCKET/NAME.zarr: it
    is made in KPT_SCRATCH, or where temporary files go, and uploaded when it is complete.

    \b
    Examples:
      kpt segment scan.nii.gz atlases scan.zarr --labels organs.nii.gz
      kpt segment scan.nii.gz atlases scan.zarr --report scan.html --picture scan.png
      kpt segment ct_folder atlases scan.zarr --labels organs.dcm --labels organs.seg.nrrd
      kpt segment scan.nii.gz atlases scan.zarr --split masks --organs liver,spleen --largest
      kpt segment scan.nii.gz atlases s3://bucket/cases/scan.zarr --labels organs.nii.gz
    """
    from dataclasses import asdict

    from kpt_dask.segmentation import segment as segment_scan

    with working(scheduler) as client:
        found = segment_scan(
            scan,
            store,
            out,
            mode=mode,
            options=options,
            exclude=exclude,
            select=select,
            index=index,
            series=series,
            labels=labels,
            split=split,
            organs=organs or (),
            largest=largest,
            report=page,
            picture=picture,
            overwrite=overwrite,
            memory=memory,
            client=client,
        )
    if as_json:
        print_json(
            {
                "path": out,
                "labels": list(labels),
                "split": split,
                "report": page,
                "picture": picture,
                "mode": mode,
                "organs": {name: asdict(organ) for name, organ in found.organs.items()},
                "volume_grid": found.volume_grid,
                "atlases": list(found.atlases),
                "keypoints": found.n_keypoints,
                "matches": found.n_matches,
                "seconds": found.seconds,
                "warnings": list(found.warnings),
                "unshown": list(found.unshown),
            }
        )
        return
    rows = table("organ", "volume (mL)", "between", "mean HU", "votes", "confidence", "border")
    for name, organ in found.organs.items():
        if organ.volume_ml == 0:
            why = "no atlas shows it" if name in found.unshown else "not found"
            rows.add_row(name, why, "", "", str(organ.votes), "", "")
            continue
        low, high = organ.interval_ml
        rows.add_row(
            name,
            f"{organ.volume_ml:.1f}",
            f"{low:.1f} – {high:.1f}",
            "" if organ.mean_hu is None else f"{organ.mean_hu:.0f}",
            str(organ.votes),
            f"{organ.confidence:.2f}",
            "yes" if organ.at_border else "",
        )
    console().print(rows)
    if any(organ.at_border for organ in found.organs.values()):
        click.echo("border: the organ reaches the border of the scan and may go on beyond it.")
    click.echo(
        f"{found.n_keypoints} keypoints, {found.n_matches} matches with {len(found.atlases)}"
        f" atlases, {found.seconds:.1f} s."
    )
    click.echo(f"Written: {', '.join(filter(None, (out, *labels, split, page, picture)))}.")


@kpt.command()
@click.argument("segmentation", metavar="OUT.zarr", type=click.Path())
@click.argument("files", metavar="[FILE]…", nargs=-1, type=click.Path())
@label_options("Only these organs of OUT.zarr.")
@click.option(
    "--scan",
    type=click.Path(),
    metavar="SCAN",
    help="The scan that OUT.zarr was made from: DICOM files then refer to its series, and NIfTI "
    "keeps its header.",
)
@series_option
@overwrite_option
@memory_option
@json_option
def export(
    segmentation: str,
    files: tuple[str, ...],
    split: str | None,
    organs: tuple[str, ...] | None,
    largest: bool,
    scan: str | None,
    series: str | None,
    overwrite: bool,
    memory: int | None,
    as_json: bool,
) -> None:
    """Write label files of OUT.zarr, which kpt segment made, on the grid of its scan.

    OUT.zarr is a folder or a URL (s3://…).

    Endings: .nii.gz or .nii (NIfTI with names), .seg.nrrd (3D Slicer), .nrrd, .mha, .dcm (DICOM
    SEG), .label (names and colours for ITK-SNAP); rtstruct:FILE.dcm is a DICOM RTSTRUCT.

    \b
    Examples:
      kpt export scan.zarr organs.seg.nrrd
      kpt export scan.zarr organs.dcm rtstruct:contours.dcm --scan ct_folder
      kpt export scan.zarr --split masks --organs liver,spleen --largest
    """
    from kpt_dask.exports import export as export_labels
    from kpt_dask.runtime import notices

    with notices.recorded() as doubts, working(None) as client:
        volumes = export_labels(
            segmentation,
            files,
            split=split,
            organs=organs or (),
            largest=largest,
            scan=scan,
            series=series,
            overwrite=overwrite,
            memory=memory,
            client=client,
        )
    if as_json:
        answer = {"files": list(files), "split": split, "volumes_ml": volumes}
        print_json(answer | {"warnings": doubts})
        return
    shown = ", ".join(f"{name} {ml:.1f} mL" for name, ml in volumes.items() if ml) or "no organ"
    say(f"Written: {', '.join(filter(None, (*files, split)))}: {shown}.")


@kpt.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for everything that is made.",
)
@memory_option
@scheduler_option
def demo(out: Path, memory: int | None, scheduler: str | None) -> None:
    """Make whole-body phantoms, and segment one from eight others.

    A second run reuses the store of the first.

    \b
    Example:
      kpt demo --out somewhere
    """
    from kpt_dask.demo import run as demonstration

    with working(scheduler) as client:
        shown = demonstration.demo(out, memory=memory, client=client)
    organs = table("organ", "Dice", "volume (mL)")
    for name, score in shown.dice.items():
        organs.add_row(name, f"{score:.3f}", f"{shown.segmentation.organs[name].volume_ml:.0f}")
    organs.add_section()
    organs.add_row("mean", f"{sum(shown.dice.values()) / len(shown.dice):.3f}", "")
    console().print(organs)
    click.echo(f"Segmented in {shown.segmentation.seconds:.1f} s. Open the result:")
    for line in demonstration.how_to_open(out):
        click.echo(line)
