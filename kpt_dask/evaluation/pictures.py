"""Pictures of a judged scan: three slices, the reference filled and the result outlined.

The slices are pixels, the organs are outlines in SVG, which stay sharp at any size.
"""

import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import Organ
from kpt_dask.atlases.profiles import Voxels, best_plane, organ_profiles
from kpt_dask.report.encoding import data_uri
from kpt_dask.report.slices import AXIAL, CORONAL, SAGITTAL, View
from kpt_dask.volumes.omezarr import WINDOW

AROUND_MM = 25.0
"""Distance from the organs to the edge of a picture."""


def draw_scan(
    image: Voxels, reference: Voxels, found: Voxels, organs: Sequence[Organ], spacing: float
) -> str:
    """Draw coronal, sagittal and axial slices of a scan on the working grid, as SVG.

    Parameters
    ----------
    image : array-like of HU (z, y, x)
        NumPy or Zarr; three slices are read.
    reference, found : array-like of labels (z, y, x)
        Streamed once; the organs of `reference` are filled, those of `found` are outlined.
    organs : sequence of Organ
        Organs that are drawn.
    spacing : float
        Of the working grid, mm.

    Returns
    -------
    str
        Three ``svg`` elements.
    """
    values = [organ.value for organ in organs]
    profiles = organ_profiles(reference, values)
    both = [a + b for a, b in zip(profiles, organ_profiles(found, values), strict=True)]
    index = [best_plane(profile) for profile in profiles]
    box = [_around(profile.sum(axis=0), AROUND_MM / spacing) for profile in both]
    drawn = []
    lengths = [part.stop - part.start for part in box]
    # The views stand beside each other: coronal and axial along x, sagittal along y.
    letters = (2 * lengths[2] + lengths[1]) / 60
    for view in (CORONAL, SAGITTAL, AXIAL):
        region: list[Any] = list(box)
        region[view.fixed] = index[view.fixed]
        planes = [np.asarray(array[tuple(region)]) for array in (image, reference, found)]
        if view.rows == 0:
            planes = [plane[::-1] for plane in planes]
        drawn.append(_svg(view, planes[0], planes[1], planes[2], organs, letters))
    return "\n".join(drawn)


def _around(profile: NDArray[np.int64], margin: float) -> slice:
    """Planes that show anything, with a margin."""
    at = profile.nonzero()[0]
    if not at.size:
        return slice(0, profile.size)
    return slice(max(int(at[0] - margin), 0), min(int(at[-1] + 1 + np.ceil(margin)), profile.size))


def _svg(
    view: View,
    picture: NDArray[Any],
    reference: NDArray[Any],
    found: NDArray[Any],
    organs: Sequence[Organ],
    letters: float,
) -> str:
    height, width = picture.shape
    # Widths in the proportion of the views: one scale for all.
    style = f"flex: {width} 1 0; aspect-ratio: {width} / {height}"
    parts = [
        f'<svg class="slice" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{view.name} slice" style="{style}">',
        f'<image width="{width}" height="{height}" href="{_png(picture)}"/>',
    ]
    for organ in organs:
        name = escape(organ.name.replace("_", " "))
        colour = "#{:02x}{:02x}{:02x}".format(*organ.colour)
        for labels, style, whose in (
            (reference, f'class="reference" fill="{colour}"', "reference"),
            (found, f'class="found" stroke="{colour}"', "found"),
        ):
            if path := outline(labels == organ.value):
                parts.append(f'<path {style} d="{path}"><title>{name}, {whose}</title></path>')
    places = ((2, 50), (98, 50), (50, 2), (50, 98))
    aligned = (("start", "middle"), ("end", "middle"), ("middle", "hanging"), ("middle", "auto"))
    for letter, (x, y), (anchor, base) in zip(view.letters, places, aligned, strict=True):
        parts.append(
            f'<text x="{x}%" y="{y}%" font-size="{letters:.1f}" text-anchor="{anchor}" '
            f'dominant-baseline="{base}">{letter}</text>'
        )
    return "".join([*parts, "</svg>"])


def outline(mask: NDArray[np.bool_]) -> str:
    """Outline a mask (row, column) as the data of an SVG path; a pixel is 1 × 1, the first at 0."""
    import contourpy

    if not mask.any():
        return ""
    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(np.float32)).lines(0.5)
    parts = []
    for line in lines:
        # Half a pixel from the corner of a pixel to its centre, and one of padding.
        points = " ".join(f"{x:g} {y:g}" for x, y in np.asarray(line)[:-1] - 0.5)
        parts.append(f"M{points}Z")
    return "".join(parts)


def _png(picture: NDArray[Any]) -> str:
    """Encode a slice, in HU, as the URL of a PNG."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, picture, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], format="png")
    return data_uri(file.getvalue(), "image/png")
