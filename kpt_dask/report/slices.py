"""Slices in three planes, as radiologists look at them: pictures of the scan, and of the labels."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.report.display import Display
from kpt_dask.report.encoding import jpeg_uri, number_pixels, png_uri


class View(NamedTuple):
    """A plane, and how it lies on a screen.

    Attributes
    ----------
    name : str
    fixed, rows, columns : int
        World axes, 0 z, 1 y, 2 x: across the plane, downwards and to the right.
    letters : tuple of str
        What lies left, right, above and below: R, L, A (front), P (back), H (head) and F (feet).
    """

    name: str
    fixed: int
    rows: int
    columns: int
    letters: tuple[str, str, str, str]


AXIAL = View("axial", 0, 1, 2, ("R", "L", "A", "P"))
CORONAL = View("coronal", 1, 0, 2, ("R", "L", "H", "F"))
SAGITTAL = View("sagittal", 2, 0, 1, ("A", "P", "H", "F"))


def slice_of(voxels: NDArray[Any], view: View, index: int) -> NDArray[Any]:
    """Cut an array (z, y, x) of an axis-aligned grid; the head is up, the patient's right is left.

    Returns
    -------
    ndarray (row, column)
        z runs upwards, y downwards or to the right, x to the right.
    """
    region: list[Any] = [slice(None)] * 3
    region[view.fixed] = index
    picture: NDArray[Any] = voxels[tuple(region)]
    return picture[::-1] if view.rows == 0 else picture


@dataclass(frozen=True)
class Pictures:
    """Slices of one plane.

    Attributes
    ----------
    view : View
    shape : (int, int)
        Rows and columns of each picture.
    indices : list of int
        Slices that are shown, in voxels of the display across the plane.
    scan : list of str
        JPEG of each, as data URI.
    organs : list of str
        PNG of the numbers of organs; "" where there is none.
    """

    view: View
    shape: tuple[int, int]
    indices: list[int]
    scan: list[str]
    organs: list[str]


def pictures_of(display: Display, view: View, most: int) -> Pictures:
    """Make at most so many pictures of a plane, evenly spaced from end to end."""
    n = display.tones.shape[view.fixed]
    indices = np.unique(np.rint(np.linspace(0, n - 1, min(most, n))).astype(int)).tolist()
    scan, organs = [], []
    for index in indices:
        scan.append(jpeg_uri(slice_of(display.tones, view, index)))
        numbers = slice_of(display.organs, view, index)
        organs.append(png_uri(number_pixels(numbers)) if numbers.any() else "")
    rows, columns = display.tones.shape[view.rows], display.tones.shape[view.columns]
    return Pictures(view, (rows, columns), indices, scan, organs)
