"""A picture of a segmentation: three slices of the CT with the organs drawn over them.

Exactly three slices of the CT are read; the labels are streamed once, slab by slab, to count
voxels. It does not know how the labels were made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from atlas_store.organs import Organ
from kpt_dask.atlases.profiles import Voxels, best_plane, organ_profiles
from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.report.display import BODY_HU
from kpt_dask.report.slices import AXIAL, CORONAL, SAGITTAL, View
from kpt_dask.volumes.omezarr import WINDOW

FILL = 0.35
"""Opacity of an organ."""

SIZE = 1600, 900
"""Width and height of the picture, pixels: a slide's."""
DPI = 100
LEGEND, HEADING, GAP = 2.7, 0.6, 0.15
"""Inches: width of the legend, height of the heading, and what lies between panels."""
MOST_NAMED = 44
"""Organs in the legend, at most: the largest."""


class Views(NamedTuple):
    """One picture per view, rows downwards and columns to the right as on a screen."""

    coronal: NDArray[Any]
    sagittal: NDArray[Any]
    axial: NDArray[Any]


_VIEWS = (CORONAL, SAGITTAL, AXIAL)


def slices_for_display(array: Voxels, grid: Grid, index: tuple[int, int, int]) -> Views:
    """Read the three slices through a voxel, turned as radiologists look at them.

    Coronal and axial show the patient's right on the left; coronal and sagittal have the
    head up; the front is up in axial and on the left in sagittal.

    Parameters
    ----------
    array : array-like, shape (k, j, i)
        NumPy or Zarr; of a Zarr array only the three slices are read.
    grid : Grid
        Grid of the voxels; its axes run along the world's, in any order and direction.
    index : tuple of int
        The voxel (k, j, i) where the slices meet.

    Raises
    ------
    ParameterError
        If the grid is oblique.
    """
    axes, flipped = _orientation(grid)
    pictures = []
    for view in _VIEWS:
        region: list[Any] = [slice(None)] * 3
        region[axes[view.fixed]] = index[axes[view.fixed]]
        picture = np.asarray(array[tuple(region)])
        if axes[view.rows] > axes[view.columns]:
            picture = picture.T
        # On a screen rows run down, while z runs up.
        upside_down = flipped[view.rows] != (view.rows == 0)
        picture = picture[::-1] if upside_down else picture
        pictures.append(picture[:, ::-1] if flipped[view.columns] else picture)
    return Views(*pictures)


def draw_overlay(
    path: Path,
    image: Voxels,
    labels: Voxels,
    organs: Sequence[Organ],
    grid: Grid,
    title: str | None = None,
    volumes_ml: Sequence[float] | None = None,
) -> None:
    """Draw coronal, sagittal and axial slices with the organs over them, and their volumes.

    The picture has the size of a slide, `SIZE`; each slice is cropped to the body.

    Parameters
    ----------
    path : Path
        The PNG to write, which nobody else sees yet.
    image : array-like of HU, shape (k, j, i)
        NumPy or Zarr; three slices are read.
    labels : array-like of unsigned integers, shape (k, j, i)
        NumPy or Zarr; streamed once.
    organs : sequence of Organ
        Meaning of the label values; organs without a volume are left out of the legend.
    grid : Grid
        Grid of the voxels.
    title : str, optional
        Stands above the slices.
    volumes_ml : sequence of float, optional
        Volumes of the organs for the legend, mL; by default, those that are drawn.

    Raises
    ------
    ParameterError
        If the grid is oblique.
    """
    profiles = organ_profiles(labels, [organ.value for organ in organs])
    k, j, i = (best_plane(profile) for profile in profiles)
    millilitres = volumes_ml or profiles[0].sum(axis=1) * grid.voxel_volume / 1000
    found = [(organ, ml) for organ, ml in zip(organs, millilitres, strict=True) if ml > 0]
    pictures = list(slices_for_display(image, grid, (k, j, i)))
    overlays = list(slices_for_display(labels, grid, (k, j, i)))
    axes, _ = _orientation(grid)
    sizes = []
    for n, view in enumerate(_VIEWS):
        kept = _around_body(pictures[n], overlays[n])
        pictures[n], overlays[n] = pictures[n][kept], overlays[n][kept]
        rows, columns = overlays[n].shape
        wide, high = grid.spacing[axes[view.columns]], grid.spacing[axes[view.rows]]
        sizes.append((columns * float(wide), rows * float(high)))
    figure, panels = _panels(sizes)
    for view, panel, picture, overlay in zip(_VIEWS, panels, pictures, overlays, strict=True):
        _draw(panel, view, picture, overlay, [organ for organ, _ in found])
    _legend(figure, found, title)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI, facecolor="black")


def _orientation(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    orientation = grid.axis_permutation()
    if orientation is None:
        raise ParameterError(
            "an oblique grid has no coronal, sagittal and axial slices; resample it first."
        )
    return orientation


def _around_body(picture: NDArray[Any], overlay: NDArray[Any]) -> tuple[slice, slice]:
    """Rows and columns around the body and the organs in a slice; all where there is no body."""
    seen = (picture > BODY_HU) | (overlay > 0)
    found = []
    for axis, n in enumerate(seen.shape):
        used = np.flatnonzero(seen.any(axis=1 - axis))
        margin = max(n // 50, 1)
        first, last = (int(used[0]), int(used[-1])) if used.size else (0, n - 1)
        found.append(slice(max(first - margin, 0), min(last + margin + 1, n)))
    return found[0], found[1]


Place = tuple[float, float, float, float]
"""Left, bottom, width and height."""


def arrange(sizes: Sequence[tuple[float, float]], room: tuple[float, float]) -> list[Place]:
    """Arrange three panels to one scale, as large as there is room.

    They stand side by side, or one beside the two others.

    Parameters
    ----------
    sizes : sequence of (float, float)
        Width and height of each panel, in any unit.
    room : (float, float)
        Width and height that there is, inches; between panels, `GAP` is kept.

    Returns
    -------
    list of (float, float, float, float)
        Left, bottom, width and height of each panel, inches.
    """
    columns: list[list[list[int]]] = [[[0], [1], [2]], [[0], [1, 2]], [[0, 1], [2]], [[1], [0, 2]]]

    def scale_of(arranged: list[list[int]]) -> float:
        wide = sum(max(sizes[n][0] for n in column) for column in arranged)
        gaps = GAP * (len(arranged) - 1)
        highs = [
            (room[1] - GAP * (len(column) - 1)) / sum(sizes[n][1] for n in column)
            for column in arranged
        ]
        return min((room[0] - gaps) / wide, *highs)

    best = max(columns, key=scale_of)
    scale = scale_of(best)
    places: list[Place] = [(0.0, 0.0, 0.0, 0.0)] * 3
    wides = [max(sizes[n][0] for n in column) * scale for column in best]
    left = (room[0] - sum(wides) - GAP * (len(best) - 1)) / 2
    for column, wide in zip(best, wides, strict=True):
        high = sum(sizes[n][1] for n in column) * scale + GAP * (len(column) - 1)
        top = (room[1] + high) / 2
        for n in column:
            width, height = (scale * size for size in sizes[n])
            places[n] = (left + (wide - width) / 2, top - height, width, height)
            top -= height + GAP
        left += wide + GAP
    return places


def _panels(sizes: Sequence[tuple[float, float]]) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel for each view, of these sizes in mm."""
    width, height = (n / DPI for n in SIZE)
    figure = Figure(figsize=(width, height), dpi=DPI)
    room = width - LEGEND - 2 * GAP, height - HEADING - GAP
    places = (
        ((GAP + left) / width, (GAP + bottom) / height, wide / width, high / height)
        for left, bottom, wide, high in arrange(sizes, room)
    )
    return figure, [figure.add_axes(place) for place in places]


def _draw(
    panel: Axes,
    view: View,
    picture: NDArray[Any],
    overlay: NDArray[Any],
    organs: list[Organ],
) -> None:
    panel.imshow(
        picture,
        cmap="gray",
        vmin=WINDOW[0],
        vmax=WINDOW[1],
        aspect="auto",
        interpolation="bilinear",
    )
    fills = np.zeros((*overlay.shape, 4))
    for organ in organs:
        mask = overlay == organ.value
        colour = np.array(organ.colour) / 255
        fills[mask] = (*colour, FILL)
        # matplotlib warns where a contour is nowhere, and cannot draw it in a single line.
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            panel.contour(mask, levels=[0.5], colors=[tuple(colour)], linewidths=1.0)
    panel.imshow(fills, aspect="auto", interpolation="nearest")
    panel.set_axis_off()
    panel.text(0.02, 0.98, view.name, transform=panel.transAxes, va="top", color="white", **_TEXT)
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    aligned = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (horizontal, vertical) in zip(view.letters, places, aligned, strict=True):
        panel.text(
            x,
            y,
            letter,
            transform=panel.transAxes,
            ha=horizontal,
            va=vertical,
            color="yellow",
            **_TEXT,
        )


_TEXT: dict[str, Any] = {
    "fontsize": 12,
    "path_effects": [withStroke(linewidth=2, foreground="black")],
}


def _legend(figure: Figure, found: list[tuple[Organ, float]], title: str | None) -> None:
    largest = sorted((ml for _, ml in found), reverse=True)[:MOST_NAMED]
    named = [(organ, ml) for organ, ml in found if ml >= largest[-1]] if found else []
    handles = []
    for organ, ml in named:
        red, green, blue = (c / 255 for c in organ.colour)
        amount = f"{ml:.1f}" if ml < 10 else f"{ml:.0f}"
        name = organ.name.replace("_", " ")
        handles.append(Patch(facecolor=(red, green, blue), label=f"{name}  {amount} mL"))
    heading = "no organ found"
    if named:
        more = len(found) - len(named)
        heading = "organs" if not more else f"organs ({more} smaller ones are not listed)"
    figure.legend(
        handles=handles,
        loc="center right",
        frameon=False,
        labelcolor="white",
        fontsize=11 if len(named) <= 24 else 7,
        title=heading,
        title_fontsize=11,
    ).get_title().set_color("white")
    if title:
        # A dollar sign in a file's name is no mathematics.
        figure.suptitle(title, color="white", fontsize=14, y=0.985, va="top", parse_math=False)
