"""A family of whole-body CT phantoms: one template anatomy, deformed anew for every seed.

The template is a list of implicit shapes (capsules, ellipsoids, drums) in template
millimetres, painted in order; the last one wins. It repeats every `PERIOD` mm along z, so a
volume of any height has the same density of content. A subject is a smooth motion of space
(size, turn, shift, waves), an amount of fat, a contrast phase and a little clutter of its
own. A voxel depends on nothing but the seed, the grid and its own index, so a volume can be
made slab by slab. Knows nothing of Zarr or Dask.

Phantoms are for demonstrations and timing; they say nothing about accuracy on patients.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atlas_store.organs import load_organs
from kpt_dask.demo.phantom.geometry import PERIOD
from kpt_dask.demo.phantom.render import NOISE, render_planes
from kpt_dask.demo.phantom.shapes import REGION
from kpt_dask.demo.phantom.subject import make_subject
from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.output.commit import replacing
from kpt_dask.output.places import check_outputs
from kpt_dask.scans.nifti_writer import NiftiWriter, pack
from kpt_dask.scans.placement import header_of

__all__ = [
    "NOISE",
    "PERIOD",
    "make_phantom",
    "phantom_grid",
    "phantom_slab",
    "write_phantom",
]

Shape = tuple[int, int, int]

PLANES = 32
"""Planes that are made, and compressed, at a time."""


def phantom_grid(shape: Shape = (300, 130, 160), spacing: float = 2.0) -> Grid:
    """Where a phantom's voxels lie: its feet-side face at z = 0, the body's axis in the middle.

    Parameters
    ----------
    shape : tuple of int
        Voxels along (z, y, x).
    spacing : float
        Edge length of a voxel, mm.

    Raises
    ------
    ParameterError
        If a size or the spacing is not positive.
    """
    if min(shape) < 1 or not 0 < spacing < np.inf:
        raise ParameterError(
            f"a phantom of shape {shape} at {spacing} mm cannot be made; give positive numbers."
        )
    half = spacing / 2
    return Grid.isotropic(shape, spacing, (half, half - shape[1] * half, half - shape[2] * half))


def phantom_slab(
    seed: int, shape: Shape, spacing: float, z0: int, z1: int, size_spread: float = 0.0
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Make planes z0 ≤ z < z1 of a phantom: the same voxels however it is cut.

    Parameters
    ----------
    seed : int
        Chooses the subject.
    shape : tuple of int
        Shape of the whole phantom, (z, y, x).
    spacing : float
        Edge length of a voxel, mm.
    z0, z1 : int
        First plane, and the one after the last.
    size_spread
        As for `make_phantom`.

    Returns
    -------
    image : ndarray of int16, shape (z1 − z0, y, x)
        HU.
    labels : ndarray of uint8, shape (z1 − z0, y, x)
        Values of the table ``visceral``.

    Raises
    ------
    ParameterError
        If a size, the spacing or the planes cannot be used.
    """
    grid = phantom_grid(shape, spacing)
    if not 0 <= z0 <= z1 <= shape[0]:
        raise ParameterError(
            f"planes {z0} to {z1} are not in a phantom of {shape[0]}; give 0 ≤ z0 ≤ z1 ≤ height."
        )
    subject = make_subject(seed, shape[0] * spacing, size_spread)
    organs, label_of = load_organs("visceral"), np.zeros(256, np.uint8)
    for name, region in REGION.items():
        label_of[region] = organs.by_name(name).value
    image = np.empty((z1 - z0, *shape[1:]), np.int16)
    labels = np.empty(image.shape, np.uint8)
    render_planes(seed, subject, grid.origin, float(spacing), z0, label_of, image, labels)
    return image, labels


def make_phantom(
    seed: int,
    shape: Shape = (300, 130, 160),
    spacing: float = 2.0,
    *,
    size_spread: float = 0.0,
) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """Make a phantom.

    Parameters
    ----------
    seed : int
        Chooses the subject; all seeds share one anatomy.
    shape : tuple of int
        Voxels along (z, y, x). A body is 700 mm tall; above it another begins.
    spacing : float
        Edge length of a voxel, mm.
    size_spread : float
        Standard deviation of the bodies' sizes along each axis, about the middle of the trunk, as
        a fraction: 0.12 in people. With it, a body may not fit into the default shape.

    Returns
    -------
    image : ndarray of int16, shape (z, y, x)
        HU.
    labels : ndarray of uint8, shape (z, y, x)
        Values of the table ``visceral``.
    grid : Grid
        Grid of the voxels.

    Raises
    ------
    ParameterError
        If a size or the spacing is not positive.
    """
    image, labels = phantom_slab(seed, shape, spacing, 0, shape[0], size_spread)
    return image, labels, phantom_grid(shape, spacing)


def write_phantom(
    ct: Path,
    labels: Path,
    seed: int,
    shape: Shape = (300, 130, 160),
    spacing: float = 2.0,
    *,
    size_spread: float = 0.0,
    overwrite: bool = False,
) -> None:
    """Write a phantom and its labels as two NIfTI files, slab by slab.

    Parameters
    ----------
    ct, labels : Path
        Where to write HU (int16) and labels (uint8); compressed if named ``.gz``.
    seed, shape, spacing, size_spread
        As for `make_phantom`.
    overwrite : bool
        Replace files that exist.

    Raises
    ------
    OutputExistsError
        If one of the files exists and `overwrite` is false.
    ParameterError
        If a size or the spacing is not positive.
    """
    grid = phantom_grid(shape, spacing)
    check_outputs(files=(ct, labels), overwrite=overwrite)
    with ExitStack() as stack:
        writers = []
        for path, dtype in ((ct, np.int16), (labels, np.uint8)):
            partial = stack.enter_context(replacing(path, overwrite=overwrite))
            writers.append(stack.enter_context(NiftiWriter(partial, header_of(grid, dtype))))
        for z in range(0, shape[0], PLANES):
            stop = min(z + PLANES, shape[0])
            image, label = phantom_slab(seed, shape, spacing, z, stop, size_spread)
            writers[0].write(pack(image))
            writers[1].write(pack(label))
