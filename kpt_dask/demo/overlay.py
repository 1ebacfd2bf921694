"""A picture of a segmentation: three slices of the CT with the organs drawn over them.

Exactly three slices of the CT are read; the labels are streamed once, slab by slab, to count
voxels. It does not know how the labels were made.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from atlas_store.organs import Organ
from kpt_dask.atlases.profiles import Voxels, organ_profiles
from kpt_dask.errors import GridMismatchError, ParameterError
from kpt_dask.grid import Grid
from kpt_dask.output.commit import replacing
from kpt_dask.output.places import check_outputs

WINDOW = (-160.0, 240.0)
"""Soft-tissue window: HU shown black and white."""
FILL = 0.35
"""Opacity of an organ."""
SHOWN = 0.2
"""Share of its largest area from which an organ counts as visible."""

INCHES_PER_MM = 7.0 / 400
MOST_INCHES = 14.0


class Views(NamedTuple):
    """One picture per view, rows downwards and columns to the right as on a screen."""

    coronal: NDArray[Any]
    sagittal: NDArray[Any]
    axial: NDArray[Any]


class _View(NamedTuple):
    name: str
    fixed: int
    rows: int
    columns: int
    letters: tuple[str, str, str, str]


# World axes are 0 z, 1 y, 2 x; the letters stand left, right, above and below.
_VIEWS = (
    _View("coronal", 1, 0, 2, ("R", "L", "H", "F")),
    _View("sagittal", 2, 0, 1, ("A", "P", "H", "F")),
    _View("axial", 0, 1, 2, ("R", "L", "A", "P")),
)


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


def best_plane(profile: NDArray[np.int64]) -> int:
    """Choose the plane that shows most organs, and of these the one that shows them largest.

    An organ shows where its area is at least `SHOWN` of its largest. Without any organ, the
    middle.

    Parameters
    ----------
    profile : ndarray of int64, shape (organ, plane)
        Voxels of each organ in each plane.
    """
    largest = profile.max(axis=1, initial=0)
    share = profile[largest > 0] / largest[largest > 0, None]
    if len(share) == 0:
        return int(profile.shape[1] // 2)
    return int(np.argmax((share >= SHOWN).sum(axis=0) + share.mean(axis=0)))


def overlay_png(
    path: Path,
    image: Voxels,
    labels: Voxels,
    organs: Iterable[Organ],
    grid: Grid,
    title: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Draw coronal, sagittal and axial slices with the organs over them, and their volumes.

    Parameters
    ----------
    path : Path
        The PNG to write.
    image : array-like of HU, shape (k, j, i)
        NumPy or Zarr; three slices are read.
    labels : array-like of uint8 or uint16, shape (k, j, i)
        NumPy or Zarr; streamed once.
    organs : iterable of Organ
        Meaning of the label values; organs without a voxel are left out of the legend.
    grid : Grid
        Grid of the voxels.
    title : str, optional
        Stands above the slices.
    overwrite : bool
        Replace a file that exists.

    Raises
    ------
    GridMismatchError
        If image and labels do not have the grid's shape.
    OutputExistsError
        If the file exists and `overwrite` is false.
    ParameterError
        If the grid is oblique.
    """
    check_outputs(files=[path], overwrite=overwrite)
    if not tuple(image.shape) == tuple(labels.shape) == grid.shape:
        raise GridMismatchError(
            f"{path} cannot be drawn: image {tuple(image.shape)}, labels {tuple(labels.shape)} and "
            f"grid {grid.shape} differ; give labels on the image's own grid."
        )
    organs = list(organs)
    profiles = organ_profiles(labels, [organ.value for organ in organs])
    k, j, i = (best_plane(profile) for profile in profiles)
    millilitres = profiles[0].sum(axis=1) * grid.voxel_volume / 1000
    found = [(organ, ml) for organ, ml in zip(organs, millilitres, strict=True) if ml > 0]
    pictures = slices_for_display(image, grid, (k, j, i))
    overlays = slices_for_display(labels, grid, (k, j, i))
    figure, panels = _layout(grid)
    for view, panel, picture, overlay in zip(_VIEWS, panels, pictures, overlays, strict=True):
        _draw(panel, view, picture, overlay, [organ for organ, _ in found], grid)
    _legend(figure, found, title)
    with replacing(path, overwrite=overwrite) as partial:
        FigureCanvasAgg(figure)
        figure.savefig(partial, format="png", dpi=150, facecolor="black")


def _orientation(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    orientation = grid.axis_permutation()
    if orientation is None:
        raise ParameterError(
            "an oblique grid has no coronal, sagittal and axial slices; resample it first."
        )
    return orientation


def _layout(grid: Grid) -> tuple[Figure, list[Axes]]:
    """Place three panels side by side in the body's proportions, with space for a legend."""
    axes, _ = _orientation(grid)
    extent = [grid.shape[a] * grid.spacing[a] for a in axes]
    widths = [extent[view.columns] for view in _VIEWS]
    height = max(extent[view.rows] for view in _VIEWS)
    scale = min(INCHES_PER_MM, MOST_INCHES / height, MOST_INCHES / sum(widths))
    legend, margin = 2.4, 0.5
    size = (max(sum(widths) * scale, 4) + legend + 2 * margin, max(height * scale, 3) + 2 * margin)
    figure = Figure(figsize=size)
    cells = figure.add_gridspec(
        1,
        3,
        width_ratios=widths,
        left=margin / size[0],
        right=1 - (margin + legend) / size[0],
        bottom=margin / size[1],
        top=1 - margin / size[1],
        wspace=0.08,
    )
    return figure, [figure.add_subplot(cells[0, n]) for n in range(3)]


def _draw(
    panel: Axes,
    view: _View,
    picture: NDArray[Any],
    overlay: NDArray[Any],
    organs: list[Organ],
    grid: Grid,
) -> None:
    axes, _ = _orientation(grid)
    aspect = float(grid.spacing[axes[view.rows]] / grid.spacing[axes[view.columns]])
    panel.imshow(picture, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], aspect=aspect)
    fills = np.zeros((*overlay.shape, 4))
    for organ in organs:
        mask = overlay == organ.value
        colour = np.array(organ.colour) / 255
        fills[mask] = (*colour, FILL)
        # matplotlib warns where a contour is nowhere, and cannot draw it in a single line.
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            panel.contour(mask, levels=[0.5], colors=[tuple(colour)], linewidths=1.0)
    panel.imshow(fills, aspect=aspect, interpolation="nearest")
    panel.set_axis_off()
    panel.set_title(view.name, color="white", fontsize=9)
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
            fontsize=8,
        )


def _legend(figure: Figure, found: list[tuple[Organ, float]], title: str | None) -> None:
    handles = []
    for organ, ml in found:
        red, green, blue = (c / 255 for c in organ.colour)
        amount = f"{ml:.1f}" if ml < 10 else f"{ml:.0f}"
        name = organ.name.replace("_", " ")
        handles.append(Patch(facecolor=(red, green, blue), label=f"{name}  {amount} mL"))
    figure.legend(
        handles=handles,
        loc="center right",
        frameon=False,
        labelcolor="white",
        fontsize=9,
        title="organs" if handles else "no organ found",
    ).get_title().set_color("white")
    if title:
        figure.suptitle(title, color="white", fontsize=11, y=0.995, va="top")
