"""Parts shared by all commands: errors, options, and the layout of answers.

Light to import, as are all modules of the command line: modules that compute are imported inside
the commands, so that ``kpt --help`` is fast.
"""

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from textwrap import fill
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import click

from kpt_dask.cli.plain_text import printable, printable_json
from kpt_dask.options import (
    MEMORY,
    MODES,
    RHO,
    SIGMA_T,
    SIGMA_X,
    TransferOptions,
    parse_across,
    parse_nu,
)

if TYPE_CHECKING:
    from distributed import Client
    from rich.console import Console
    from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""

GAP = "   "
"""Space between columns."""

HEADER_WIDTH = 6
"""Characters of a column's header after which it is wrapped, on terminals."""

PIPED_WIDTH = 500
"""Limit, in characters, of a table that goes to a file or another program: never reached."""


LINES = "\n"
"""What sentences of several lines keep."""


def say(text: str, *, err: bool = False) -> None:
    """Write an answer, in which others may have put what steers a terminal."""
    click.echo(printable(text, keep=LINES), err=err)


class Failure(click.ClickException):
    """A sentence for the user; the program ends with 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the sentence to standard error."""
        click.echo(f"kpt: {printable(self.message, keep=LINES)}", file=file, err=True)


class _Imported(dict[str, click.Command]):
    """Commands by name; those that are named here are imported when they are looked up."""

    def __init__(self, later: Container[str]) -> None:
        super().__init__()
        self._later = later

    def __missing__(self, name: str) -> click.Command:
        if name not in self._later:
            raise KeyError(name)
        self[name] = getattr(import_module(f"kpt_dask.cli.{name}"), name)
        return self[name]


class Commands(click.Group):
    """The commands; what they raise becomes a sentence, unless ``KPT_DEBUG`` is set.

    Parameters
    ----------
    later : mapping of str to str
        Commands that are imported when they are asked for, so that others start sooner: each lies
        in the module of its name; and the first sentence of its help.
    """

    def __init__(self, *args: Any, later: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._later = later
        self.commands = _Imported(later)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of all commands, sorted."""
        return sorted({*self.commands, *self._later})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Get a command, imported if need be."""
        known = cmd_name in self.commands or cmd_name in self._later
        return self.commands[cmd_name] if known else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing any."""
        listed = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, listed))
        rows = [
            (
                name,
                click.Command(name, help=self._later[name]).get_short_help_str(width)
                if name in self._later
                else self.commands[name].get_short_help_str(width),
            )
            for name in listed
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        from kpt_dask.runtime import notices

        warnings.showwarning = _show_warning
        try:
            with notices.shown(_warn):
                answer = super().invoke(ctx)
                sys.stdout.flush()
                return answer
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("kpt: interrupted; nothing is left half-written.", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except Exception as error:
            # Click handles a pipe whose reader has gone.
            gone = isinstance(error, OSError) and error.errno == errno.EPIPE
            if gone or os.environ.get("KPT_DEBUG"):
                raise
            from kpt_dask.errors import sentence_of

            raise Failure(sentence_of(error)) from error


_show_any_warning = warnings.showwarning


def _show_warning(
    message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> None:
    """Show a warning of these packages as a sentence, and any other as Python does."""
    if category.__module__.partition(".")[0] in ("kpt_dask", "atlas_store"):
        _warn(str(message))
    else:
        _show_any_warning(message, category, *where, **more)


def _warn(sentence: str) -> None:
    click.echo(f"kpt: warning: {printable(sentence, keep=LINES)}", err=True)


def fail(sentence: str) -> NoReturn:
    """End the program with a sentence."""
    raise Failure(sentence)


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from dask.utils import parse_bytes

    try:
        size: int = parse_bytes(value)
    except (ValueError, AttributeError):
        size = 0
    if size <= 0:
        raise click.BadParameter(f"{value!r} is no amount of memory; write for instance 2GiB.")
    return size


def scheduler_option(command: F) -> F:
    """Add ``--scheduler``, which the command gets, and ``--wait``, which is Dask's ``kpt.wait``."""
    address = click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Compute on a running Dask cluster: its address or scheduler file. "
        "Without it, on all cores of this machine.",
    )
    wait = click.option(
        "--wait",
        expose_value=False,
        callback=_wait,
        metavar="TIME",
        help="With --scheduler, how long to wait for a cluster or workers that are not there, do "
        "not answer or do not work; as in 90s, 15m.  [default: 30s]",
    )
    return address(wait(command))


def _wait(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    import dask.config

    from kpt_dask.errors import ParameterError
    from kpt_dask.runtime.patience import wait_seconds

    setting = {"kpt.wait": value}
    try:
        # A context that refuses its parameters never ends, so it must not hold a wrong one.
        with dask.config.set(setting):
            wait_seconds()
    except ParameterError as error:
        raise click.BadParameter(str(error)) from error
    ctx.with_resource(dask.config.set(setting))


memory_option = click.option(
    "--memory",
    callback=_bytes,
    metavar="SIZE",
    help="Memory that the large arrays may take in each process, such as 2GiB.  [default: half of"
    f" what is free on the machine or in the container, at most {MEMORY >> 30}GiB]",
)
series_option = click.option(
    "--series",
    metavar="UID",
    help="Which DICOM series to read, where a scan holds several: its UID, or words of its "
    "description; without it they are listed.",
)
layout_option = click.option(
    "--layout",
    metavar="NAME",
    help="Layout of a public collection, in place of --scan and --labels: totalsegmentator "
    "(ID/ct.nii.gz with ID/segmentations/NAME.nii.gz), amos (imagesTr, labelsTr), btcv (img, "
    "label) or nnunet (imagesTr, labelsTr, dataset.json). Names decide what is which organ; those "
    "that the store does not know are reported.",
)


def names(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...] | None:
    """Read names that are separated by commas; None if the option was not given."""
    if not values:
        return None
    found = tuple(name.strip() for value in values for name in value.split(","))
    if not all(found):
        raise click.BadParameter(
            f"{','.join(values)!r}: write the names of organs, separated by commas."
        )
    return found


annotated_option = click.option(
    "--annotated",
    callback=names,
    multiple=True,
    metavar="NAME,…",
    help="The organs that whoever annotated the scan looked for. Labels of others are left "
    "out. Unless given, the organs whose labels occur.",
)
store_argument = click.argument("store", metavar="STORE")


def numbers(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[int, ...] | None:
    """Read whole numbers that are separated by commas; None if the option was not given."""
    if not values:
        return None
    try:
        return tuple(int(number) for value in values for number in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{','.join(values)!r} is no whole number, nor several separated by commas."
        ) from None


def label_options(which: str) -> Callable[[F], F]:
    """Add the options of label files but for the files: ``split``, ``organs``, ``largest``.

    `which` is the help on ``organs``.
    """

    def add(command: F) -> F:
        adapted: Any = _LARGEST(command)
        adapted = click.option(
            "--organs", callback=names, multiple=True, metavar="NAME,…", help=which
        )(adapted)
        return cast(F, _SPLIT(adapted))

    return add


LABEL_FORMATS = (
    ".nii.gz or .nii (NIfTI, names in a header extension), .seg.nrrd (3D Slicer: names, colours,"
    " codes), .nrrd, .mha, .dcm (DICOM SEG), .label (names and colours for ITK-SNAP);"
    " rtstruct:FILE.dcm writes contours for radiotherapy"
)

labels_option = click.option(
    "--labels",
    type=click.Path(),
    multiple=True,
    metavar="FILE",
    help="Write the label map on the scan's own grid as well, in the format of the ending: "
    f"{LABEL_FORMATS}. May be repeated.",
)

_SPLIT = click.option(
    "--split",
    type=click.Path(),
    metavar="DIR",
    help="Write a mask of each organ on the scan's own grid as DIR/NAME.nii.gz.",
)
_LARGEST = click.option(
    "--largest",
    is_flag=True,
    help="In label files, keep only the largest connected part of each organ.",
)

picture_option = click.option(
    "--picture",
    type=click.Path(),
    metavar="FILE.png",
    help="Write a picture for a slide, 1600 × 900: the organs over a coronal, a sagittal and an "
    "axial slice.",
)

overwrite_option = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an output that exists, once the new one is complete.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the answer as JSON, for a program to read."
)


def transfer_options(command: F) -> F:
    """Add the options of the transfer; the command gets ``mode`` and ``options``."""

    @wraps(command)
    def with_options(
        *,
        threshold: float | None,
        nu: str,
        across: tuple[str, ...],
        rho: float,
        sigma_x: float,
        sigma_t: float,
        fast: bool,
        **others: Any,
    ) -> Any:
        options = TransferOptions(
            threshold, parse_nu(nu), rho, sigma_x, sigma_t, parse_across(across), fast
        )
        return command(options=options, **others)

    adapted: Any = with_options
    for option in reversed(_TRANSFER):
        adapted = option(adapted)
    return cast(F, adapted)


_TRANSFER = (
    click.option(
        "--mode",
        default=next(iter(MODES)),
        show_default=True,
        metavar="MODE",
        help="How organs are transferred, the most accurate first: "
        + "; ".join(f"{name} {mode.does}" for name, mode in MODES.items())
        + ".",
    ),
    click.option(
        "--threshold",
        type=float,
        metavar="SHARE",
        help="A voxel is background where no organ's share of the votes reaches this; lower finds"
        " more, and more that is wrong. Mode local finds organs that the atlases hardly agree on at"
        " a lower share, unless this is given.  [default: "
        + ", ".join(f"{mode.threshold:g} in mode {name}" for name, mode in MODES.items())
        + "]",
    ),
    click.option(
        "--nu",
        default="1",
        show_default=True,
        metavar="NU",
        help="How much intensities of scan and atlas may differ: a factor for every organ, or HU"
        " by organ, as in mandible=300,larynx=80. An organ's own nu is in the store's table; "
        + " and ".join(
            f"{name} takes at least {mode.least_nu:g}"
            for name, mode in MODES.items()
            if mode.least_nu
        )
        + ".",
    ),
    click.option(
        "--across",
        multiple=True,
        metavar="ORGAN=ORGANS",
        help="Let matches in other organs move an organ, as in spleen=spleen,lung_left,liver; may"
        " be repeated. Not in mode local.",
    ),
    click.option(
        "--rho",
        type=float,
        default=RHO,
        show_default=True,
        metavar="MM",
        help="Mode across: a match d mm from an organ counts exp(-d²/2ρ²).",
    ),
    click.option(
        "--sigma-x",
        type=float,
        default=SIGMA_X,
        show_default=True,
        metavar="MM",
        help="Mode local: matches d mm away count exp(-d²/2σ_x²) for an atlas's displacement.",
    ),
    click.option(
        "--sigma-t",
        type=float,
        default=SIGMA_T,
        show_default=True,
        metavar="MM",
        help="Mode local: matches whose translation is t mm from what the others agree on count"
        " exp(-t²/2σ_t²).",
    ),
    click.option(
        "--fast",
        is_flag=True,
        help="Mode local: refine the atlases' fields down to 6 mm instead of 3 mm; a few times as"
        " fast, and about a hundredth of Dice less.",
    ),
)

select_option = click.option(
    "--select",
    type=int,
    metavar="K",
    help="Use only the K atlases whose keypoints agree best with the scan; all, if the store has no"
    " more.  [default: 20]",
)
index_option = click.option(
    "--index",
    default="auto",
    show_default=True,
    metavar="WAY",
    help="How --select finds like keypoints: exact compares all; pynndescent searches graphs that "
    "are built once, in minutes, and kept in your cache (kpt atlas index); auto takes graphs that "
    "are there, and builds those of some 4000 atlases or more. A graph may miss a few of the "
    "atlases that exact finds.",
)


@contextmanager
def working(scheduler: str | None) -> Iterator["Client | None"]:
    """Show progress, and connect to a cluster if one is asked for."""
    from kpt_dask.runtime import cluster, progress

    with progress.shown(), _quiet():
        if scheduler is None:
            yield None
        else:
            with cluster.session(scheduler=scheduler) as client:
                yield client


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide errors that Dask logs, as they are reported as sentences; not under ``KPT_DEBUG``."""
    if os.environ.get("KPT_DEBUG"):
        yield
        return
    import logging

    roots = ("distributed", "dask", "tornado", "asyncio", "bokeh")
    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in roots]
    loggers = [logging.getLogger(name) for name in {*roots, *known}]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def print_json(answer: Any) -> None:
    """Write an answer for a program."""
    # Where the encoding lacks letters, JSON escapes mean the same to a program.
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(printable_json(json.dumps(answer, indent=2, ensure_ascii=plain)))


def console() -> "Console":
    """Make the console for answers; its tables are cut on terminals only."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(markup=False, highlight=False, width=width)


def table(*columns: str, left: int = 1) -> "Table":
    """Make a table; all columns after the first `left` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        header = (
            fill(column, HEADER_WIDTH, break_long_words=False) if sys.stdout.isatty() else column
        )
        # Names are folded where a terminal is narrow, numbers last.
        made.add_column(
            header, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left
        )
    return made


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int]) -> str:
    """Lay out a long list faster than `table`; all columns but the first `left` hold numbers.

    Cells that do not fit on a terminal go into lines of their own.
    """
    from shutil import get_terminal_size

    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    most = get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH
    lines: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        taken = sum(widths[k] + len(GAP) for k in lines[-1]) + len(GAP) * (len(lines) > 1)
        if lines[-1] and taken + width > most:
            lines.append([])
        lines[-1].append(i)
    rule = tuple("─" * width for width in widths)
    return "\n".join(
        (GAP if line[0] else "")
        + GAP.join(
            row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in line
        ).rstrip()
        for row in (header, rule, *rows)
        for line in lines
        if row is not rule or line is lines[-1]
    )


def size(shape: tuple[int, int, int], spacing: float) -> str:
    """Describe the size of a volume."""
    return f"{' × '.join(map(str, shape))} at {spacing:g} mm"
