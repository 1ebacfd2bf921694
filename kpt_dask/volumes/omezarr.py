"""OME-Zarr 0.5 on disk: arrays, metadata, label images, and the one safe way to write voxels.

Knows the layout of multiscale images whose level o + 1 has every second voxel of level o, so
that voxel 0 of each level has the same centre; knows nothing of what the voxels mean.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import Region, blocks_of, write_region
from kpt_dask.grid import Grid

CHUNKS = (32, 128, 128)
"""Chunk shape of the levels of images, and of label images unless said otherwise (z, y, x)."""

COMPRESSOR = BloscCodec(cname="lz4", shuffle="shuffle")
"""About twice as fast as Zarr's default on CT, hardly larger."""

WINDOW = -160.0, 240.0
"""First and last HU that viewers tell apart at first: soft tissue, width 400 around 40."""
RANGE = -1000.0, 3000.0
"""HU of air and of dense bone, between which a window is chosen."""

_DIRECTIONS = {
    "z": "inferior-to-superior",
    "y": "anterior-to-posterior",
    "x": "right-to-left",
}
"""RFC-4 names of the LPS world's axes: x grows to the patient's left, which is right-to-left."""


class Labelled(Protocol):
    """Properties of a label that a label image states; an `atlas_store.Organ` has them."""

    @property
    def value(self) -> int:
        """Value in the label map, 1 to 65535."""

    @property
    def name(self) -> str:
        """Name of the organ."""

    @property
    def colour(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""


def create_levels(
    group: zarr.Group,
    shapes: Sequence[tuple[int, int, int]],
    dtype: Any,
    chunks: tuple[int, int, int] = CHUNKS,
) -> tuple[zarr.Array[Any], ...]:
    """Make the arrays "0", "1", … of a multiscale image (z, y, x).

    Validators ask that levels lie beside each other, and people that a label map's levels have the
    names of the scan's.
    """
    return tuple(
        create_array(group, str(level), shape, dtype, chunks) for level, shape in enumerate(shapes)
    )


def create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, int, int],
    dtype: Any,
    chunks: tuple[int, int, int] = CHUNKS,
) -> zarr.Array[Any]:
    """Make an array (z, y, x) in the project's layout, filled with 0.

    Every chunk of it is written: one that is missing when it is read was deleted.
    """
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=tuple(min(n, chunk) for n, chunk in zip(shape, chunks, strict=True)),
        compressors=COMPRESSOR,
        fill_value=0,
        dimension_names=("z", "y", "x"),
        attributes={chunk_io.COMPLETE: True},
        config={"write_empty_chunks": True},
    )


def multiscale(name: str, grid: Grid, n_levels: int, method: str) -> dict[str, Any]:
    """Metadata of a multiscale image.

    Parameters
    ----------
    name : str
        Name of the image.
    grid : Grid
        Grid of level 0, axis-aligned; axes (z, y, x).
    n_levels : int
        Number of levels; the spacing doubles from one to the next.
    method : str
        How a level is made from the one before.
    """
    spacing, origin = grid.spacing, grid.origin.tolist()
    return {
        "name": name,
        "type": method,
        "axes": [
            {
                "name": axis,
                "type": "space",
                "unit": "millimeter",
                "orientation": {"type": "anatomical", "value": direction},
            }
            for axis, direction in _DIRECTIONS.items()
        ],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": (spacing * 2**level).tolist()},
                    {"type": "translation", "translation": origin},
                ],
            }
            for level in range(n_levels)
        ],
    }


def rendering(planes: int) -> dict[str, Any]:
    """How viewers show a CT of so many planes at first: grey, soft tissue (HU), the middle."""
    low, high = WINDOW
    least, most = RANGE
    window = {"min": least, "max": most, "start": low, "end": high}
    channel = {"label": "CT", "active": True, "color": "FFFFFF", "window": window}
    # With all that is optional: some readers ask for it.
    channel |= {"coefficient": 1, "family": "linear", "inverted": False}
    first = {"defaultZ": planes // 2, "defaultT": 0, "model": "greyscale"}
    return {"channels": [channel], "rdefs": first}


def multiscale_grid(multiscale: Any, shape: tuple[int, int, int]) -> Grid:
    """Grid of level 0 of an isotropic multiscale image."""
    scale, translation = multiscale["datasets"][0]["coordinateTransformations"]
    return Grid.isotropic(shape, float(scale["scale"][0]), translation["translation"])


def write_label_image(
    image: zarr.Group,
    name: str,
    labels: NDArray[Any] | Iterable[tuple[Region, NDArray[Any]]],
    grid: Grid,
    organs: Iterable[Labelled],
) -> zarr.Group:
    """Write a label map as an OME-Zarr label image, ``labels/<name>`` of an image.

    Parameters
    ----------
    image : zarr.Group
        An OME-Zarr image; the label image gets as many levels.
    name : str
        Name of the label image, replaced if there is one; listed once it is complete.
    labels : ndarray (z, y, x) or iterable of (region, ndarray), integer
        The whole map, or its parts in any order; `write_region` says how they are aligned.
    grid : Grid
        Grid of the labels, axis-aligned.
    organs : iterable of Labelled
        Meaning of the label values; the map is uint8 if they fit, else uint16.

    Returns
    -------
    zarr.Group
        The label image; its levels are the arrays "0", "1", …, nearest neighbours.
    """
    organs = list(organs)
    levels = create_label_image(image, name, grid, organs)
    if isinstance(labels, np.ndarray):
        labels = [(tuple(slice(0, n) for n in labels.shape), labels)]
    for region, part in labels:
        write_region(levels[0], region, part.astype(levels[0].dtype, copy=False))
    return finish_label_image(image, name, levels, grid, organs)


def create_label_image(
    image: zarr.Group,
    name: str,
    grid: Grid,
    organs: Iterable[Labelled],
    chunks: tuple[int, int, int] = CHUNKS,
) -> tuple[zarr.Array[Any], ...]:
    """Make the levels of a label image, all 0, in place of one that may be there.

    Whoever fills the finest one calls `finish_label_image` then; before that the others are empty
    and nothing describes them.
    """
    dtype = np.min_scalar_type(max((organ.value for organ in organs), default=0))
    ome = cast(dict[str, Any], image.attrs["ome"])
    group = image.require_group("labels").create_group(name, overwrite=True)
    shapes = _halved(grid.shape, len(ome["multiscales"][0]["datasets"]))
    return create_levels(group, shapes, dtype, chunks)


def finish_label_image(
    image: zarr.Group,
    name: str,
    levels: Sequence[zarr.Array[Any]],
    grid: Grid,
    organs: Iterable[Labelled],
) -> zarr.Group:
    """Fill the coarser levels from the finest, chunk by chunk, and list the label image."""
    for fine, coarse in pairwise(levels):
        for region in blocks_of(coarse.shape, coarse.chunks):
            ends = zip(region, fine.shape, strict=True)
            wanted = tuple(slice(2 * part.start, min(2 * part.stop, n)) for part, n in ends)
            write_region(coarse, region, chunk_io.read(fine, wanted)[::2, ::2, ::2])
    labelled = image.require_group("labels")
    group = labelled.require_group(name)
    group.update_attributes(
        {
            "ome": {
                "version": "0.5",
                "multiscales": [multiscale(name, grid, len(levels), "nearest")],
                "image-label": _image_label(list(organs)),
            }
        }
    )
    names = cast(dict[str, Any], labelled.attrs.get("ome", {})).get("labels", [])
    labelled.update_attributes({"ome": {"version": "0.5", "labels": sorted({*names, name})}})
    return group


def _image_label(organs: Sequence[Labelled]) -> dict[str, Any]:
    return {
        "colors": [{"label-value": organ.value, "rgba": [*organ.colour, 255]} for organ in organs],
        "properties": [{"label-value": organ.value, "name": organ.name} for organ in organs],
        "source": {"image": "../../"},
    }


def _halved(shape: tuple[int, int, int], n: int) -> list[tuple[int, int, int]]:
    shapes = [shape]
    for _ in range(n - 1):
        z, y, x = shapes[-1]
        shapes.append((-(-z // 2), -(-y // 2), -(-x // 2)))
    return shapes
