"""Plots of an evaluation as SVG: text stays text, colours follow the page, points lead to scans."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import count
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from scipy.optimize import isotonic_regression

INK, PAPER = "#010203", "#fdfcfb"
"""Colours that nothing else has: the page's own stand for them."""
COLOURS = ("#2f7ebc", "#d9772b", "#3f9b57", "#a75bb0", "#b8860b", "#5f6b7a")
WIDTH = 7.6
"""Inches; the page scales plots to its width."""
ROW = 0.36
"""Inches of a row of a plot of organs or stations."""

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kpt",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
_numbers = count(1)


class Plot:
    """A plot being drawn; `svg` after it is complete."""

    def __init__(self, label: str, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.svg = ""
        self._label = label

    def finish(self, titles: Mapping[str, str]) -> None:
        """Write the SVG; links to anchors get titles."""
        file = io.StringIO()
        FigureCanvasSVG(self.figure)
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        # Several plots share a page: their ids must differ.
        prefix = f"p{next(_numbers)}-"
        text = re.sub(r'( id="|url\(#|href="#)(?!scan-)', rf"\g<1>{prefix}", text)
        text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
        text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="plot"', text, count=1)
        text = re.sub(
            r'<a xlink:href="#(scan-\d+)">',
            # No tab stops: hundreds of points would stand before the next section.
            lambda found: (
                f'<a xlink:href="#{found[1]}" tabindex="-1">'
                f"<title>{escape(titles.get(found[1], ''))}</title>"
            ),
            text,
        )
        label = escape(self._label, quote=True)
        self.svg = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@contextmanager
def _plot(label: str, height: float, titles: Mapping[str, str] | None = None) -> Iterator[Plot]:
    with mpl.rc_context(_SETTINGS):
        plot = Plot(label, height)
        yield plot
        plot.finish(titles or {})


def dice_plot(
    dice: Mapping[str, Mapping[str, float]],
    organs: Sequence[str],
    anchors: Mapping[str, str],
    baselines: Mapping[str, Mapping[str, float]],
) -> str:
    """Draw Dice by organ: a box of the scans, a point for each, a mark for each baseline's mean.

    Parameters
    ----------
    dice : mapping
        By scan and organ.
    organs : sequence of str
        Names of the organs, in the order of the rows.
    anchors : mapping of str to str
        Element of the page that tells of a scan, by scan.
    baselines : mapping
        Mean Dice by method and organ.
    """
    titles = {anchor: scan for scan, anchor in anchors.items()}
    with _plot("Dice of each organ", ROW * len(organs) + 0.9, titles) as plot:
        axes = plot.axes
        rows = [{s: scores[o] for s, scores in dice.items() if o in scores} for o in organs]
        if len(dice) > 3:
            for y, row in enumerate(rows):
                _box(axes, y, list(row.values()))
        for y, row in enumerate(rows):
            # Neighbours are shifted against each other so that both can be seen.
            shift = (np.arange(len(row)) * 0.618) % 1 * 0.44 - 0.22
            points = axes.scatter(
                list(row.values()), y + shift, s=17, color=COLOURS[0], alpha=0.75, linewidth=0
            )
            points.set_urls([f"#{anchors[scan]}" for scan in row])
        for (name, means), colour in zip(baselines.items(), _more_colours(), strict=False):
            at = [y for y, organ in enumerate(organs) if organ in means]
            axes.scatter(
                [means[organs[y]] for y in at],
                at,
                s=52,
                marker="D",
                color=colour,
                label=f"{name}, mean",
            )
        low = _from_below(value for row in rows for value in row.values())
        axes.set(xlabel="Dice", xlim=(low, 1.0), ylim=(len(rows) - 0.5, -0.5))
        _name_rows(axes, organs)
        if baselines:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return plot.svg


def seconds_plot(seconds: Mapping[str, float], baselines: Mapping[str, float]) -> str:
    """Draw the seconds of each station, and of whole baselines, on a logarithmic axis."""
    rows = {**seconds, **baselines}
    floor = 10 ** np.floor(np.log10(max(min(rows.values()), 1e-2)))
    with _plot("Seconds of each station", ROW * len(rows) + 0.7) as plot:
        axes = plot.axes
        for y, (name, value) in enumerate(rows.items()):
            kind = 1 if name in baselines else 2 if name == "total" else 0
            shown = max(value, floor)
            axes.barh(y, shown - floor / 2, left=floor / 2, height=0.66, color=COLOURS[kind])
            text = (
                f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
            )
            axes.annotate(text, (shown, y), xytext=(4, 0), textcoords="offset points", va="center")
        top = max(rows.values())
        axes.set(
            xscale="log",
            xlabel="seconds per scan",
            xlim=(floor / 2, max(top, floor) * 2.5),
            ylim=(len(rows) - 0.5, -0.5),
        )
        _plain_numbers(axes)
        _name_rows(axes, list(rows))
    return plot.svg


def atlases_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw mean Dice, with its interval, and that of each organ against the number of atlases."""
    with _plot("Dice against the number of atlases", 3.8) as plot:
        axes = plot.axes
        x = [row["atlases"] for row in rows]
        organs = list(rows[-1]["dice_by_organ"])
        for organ in organs:
            y = [row["dice_by_organ"][organ] for row in rows]
            axes.plot(x, y, color=INK, alpha=0.3, linewidth=1)
        # Names at the ends of lines, apart from each other.
        ends = sorted((rows[-1]["dice_by_organ"][organ], organ) for organ in organs)
        shown = [row["dice_by_organ"][o] for row in rows for o in organs]
        shown += [end for row in rows for end in row["mean_dice_interval"] or ()]
        low, high = _limits(shown)
        for at, (_, organ) in zip(
            _apart([e for e, _ in ends], (high - low) / 16), ends, strict=True
        ):
            axes.annotate(
                organ.replace("_", " "),
                (1, at),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                alpha=0.8,
            )
        mean = np.array([row["mean_dice"] for row in rows])
        ends_of = [row["mean_dice_interval"] or [m, m] for row, m in zip(rows, mean, strict=True)]
        errors = np.abs(np.array(ends_of).T - mean)
        axes.errorbar(
            x, mean, yerr=errors, color=COLOURS[0], marker="o", capsize=3, linewidth=2, label="mean"
        )
        axes.set(xlabel="atlases", ylabel="Dice", ylim=(low, high))
        axes.set_xscale("log")
        axes.set_xticks(x, [str(n) for n in x])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.legend(loc="lower right")
    return plot.svg


def limited_view_plot(modes: Mapping[str, Mapping[str, Any]], organs: Sequence[str]) -> str:
    """Draw Dice of whole and cropped scans, by mode and organ, in the order of the organs."""
    organs = [o for o in organs if any(o in one["by_organ"] for one in modes.values())]
    height = (0.2 + 0.2 * len(modes)) * (len(organs) + 1) + 1.1
    with _plot("Dice of whole and cropped scans", height) as plot:
        axes = plot.axes
        step = 0.7 / len(modes)
        for k, (mode, one) in enumerate(modes.items()):
            rows = [one["by_organ"][organ] for organ in organs] + [one]
            y = np.arange(len(rows)) + (k - (len(modes) - 1) / 2) * step
            whole, cropped = ([row[which] for row in rows] for which in ("whole", "cropped"))
            axes.hlines(y, whole, cropped, color=COLOURS[k], alpha=0.7, linewidth=1.5)
            axes.scatter(
                whole, y, s=30, facecolor=PAPER, edgecolor=COLOURS[k], linewidth=1.4, zorder=3
            )
            axes.scatter(cropped, y, s=30, color=COLOURS[k], zorder=3, label=f"{mode}, cropped")
        axes.scatter([], [], s=30, facecolor=PAPER, edgecolor=INK, label="whole scan")
        axes.axhline(len(organs) - 0.5, color=INK, linewidth=0.6, alpha=0.4)
        low = _from_below(
            row[which]
            for one in modes.values()
            for row in one["by_organ"].values()
            for which in ("whole", "cropped")
        )
        axes.set(xlabel="Dice", xlim=(low, 1), ylim=(len(organs) + 0.5, -0.5))
        _name_rows(axes, [*organs, "mean"])
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(modes) + 1, fontsize=9)
    return plot.svg


def _box(axes: Axes, y: float, values: Sequence[float]) -> None:
    """Draw the middle half of the values as a box, nine in ten as a line, and the median."""
    least, low, median, high, most = np.percentile(values, [5, 25, 50, 75, 95])
    for start, end in ((least, low), (high, most)):
        axes.hlines(y, start, end, color=INK, alpha=0.55, linewidth=1)
    axes.barh(y, high - low, left=low, height=0.62, facecolor="none", edgecolor=INK, alpha=0.55)
    axes.vlines(median, y - 0.31, y + 0.31, color=INK, linewidth=1.8)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _plain_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _more_colours() -> Iterator[str]:
    while True:
        yield from COLOURS[1:]


def _from_below(values: Iterable[float]) -> float:
    """Begin an axis of Dice at a tenth below the values, or a little below 0 if some are 0."""
    least = min(values)
    return -0.02 if least < 0.02 else max(0.0, np.floor(least * 10 - 0.5) / 10)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max((high - low) * 0.1, 0.02)
    return max(low - margin, -0.02), min(high + margin, 1.02)


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Move ascending places as little as possible until neighbours are a distance apart."""
    steps = least * np.arange(len(places))
    moved: list[float] = (isotonic_regression(np.array(places) - steps).x + steps).tolist()
    return moved
