"""A volume: an OME-Zarr image on the working grid, with its scale space as levels.

Level 0 holds whole HU as float32. `kpt_dask.volumes.conversion` fills it, and
`kpt_dask.volumes.omezarr` knows how the image lies on disk.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from atlas_store import AtlasStoreError
from atlas_store.arrays.regions import open_array
from kpt_dask.errors import (
    ScanFormatError,
    ScanNotFoundError,
)
from kpt_dask.grid import Grid
from kpt_dask.output.places import printable
from kpt_dask.remote import Remote, open_group
from kpt_dask.volumes.omezarr import (
    create_levels,
    multiscale,
    multiscale_grid,
    rendering,
)
from kpt_dask.volumes.scale_space import octave_shapes

ENCODING_TYPE = "kpt-volume"
ENCODING_VERSION = "1"


@dataclass(frozen=True, eq=False)
class Volume:
    """A multiscale image on the working grid.

    Attributes
    ----------
    group : zarr.Group
        The OME-Zarr image.
    grid : Grid
        Grid of level 0: axis-aligned, isotropic, axes (z, y, x).
    source_grid : Grid
        Grid of the scan it was made from, axes in stored order: the field of view.
    levels : tuple of zarr.Array (z, y, x), float32
        Level 0 in whole HU, then the octaves of its scale space.
    """

    group: zarr.Group
    grid: Grid
    source_grid: Grid
    levels: tuple[zarr.Array[Any], ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was doubtful about the scan, one sentence each."""
        about: Any = self.group.attrs["kpt"]
        return tuple(about.get("warnings", ()))


def create_volume(
    group: zarr.Group | str | Path,
    grid: Grid,
    source_grid: Grid,
    *,
    name: str,
) -> Volume:
    """Make the arrays and metadata of a volume; its voxels are written later.

    Parameters
    ----------
    group : zarr.Group, str or Path
        An empty group, or where to make one.
    grid : Grid
        Grid of level 0, axis-aligned and isotropic.
    source_grid : Grid
        Grid of the scan, axes in stored order.
    name : str
        Name of the image: the scan's file name.
    """
    if not isinstance(group, zarr.Group):
        group = zarr.create_group(str(group), zarr_format=3)
    shapes = octave_shapes(grid.shape)
    levels = create_levels(group, shapes, np.float32)
    group.update_attributes(
        {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "kpt": {
                "software": f"kpt-dask {version('kpt-dask')}",
                "spacing": float(grid.spacing[0]),
                "source": {
                    "file": printable(name),
                    "shape": list(source_grid.shape),
                    "affine": source_grid.affine.tolist(),
                },
            },
            "ome": {
                "version": "0.5",
                "multiscales": [multiscale(name, grid, len(shapes), "gaussian")],
                "omero": rendering(grid.shape[0]),
            },
        }
    )
    return Volume(group, grid, source_grid, levels)


def open_volume(group: zarr.Group | str | Path | Remote) -> Volume:
    """Open a volume: read-only from a path, as it was opened from a group.

    Raises
    ------
    ScanNotFoundError
        If there is none.
    ScanFormatError
        If it is something else, damaged, or of a version that is not known.
    UnreachableError
        If a URL cannot be reached.

    Parameters
    ----------
    group : zarr.Group, str, Path or Remote
        An OME-Zarr image from `kpt_dask.convert` or `kpt_dask.segment`, or its folder or URL.

    Returns
    -------
    Volume
        Levels (z, y, x) in HU, read only where they are accessed.

    Examples
    --------
    >>> import kpt_dask
    >>> volume = kpt_dask.open_volume("body_4.zarr")
    >>> volume.levels[0].shape
    (110, 65, 80)
    """
    where = str(group.store_path if isinstance(group, zarr.Group) else group)
    if not isinstance(group, zarr.Group):
        try:
            group = open_group(where)
        except (FileNotFoundError, NotADirectoryError, zarr.errors.BaseZarrError) as error:
            raise ScanNotFoundError(
                f"{where} does not exist or is no Zarr group; make a volume with kpt convert."
            ) from error
    attributes: dict[str, Any] = group.attrs.asdict()
    encoding = (attributes.get("encoding-type"), attributes.get("encoding-version"))
    if encoding != (ENCODING_TYPE, ENCODING_VERSION):
        kind, revision = encoding
        raise ScanFormatError(
            f"{where} is {kind or 'something unknown'} version {revision}, not {ENCODING_TYPE}"
            f" version {ENCODING_VERSION}; make a volume with kpt convert."
        )
    try:
        image = attributes["ome"]["multiscales"][0]
        levels = tuple(open_array(group, dataset["path"]) for dataset in image["datasets"])
        z, y, x = levels[0].shape
        source = attributes["kpt"]["source"]
        k, j, i = source["shape"]
        source_grid = Grid((k, j, i), np.array(source["affine"], np.float64))
        return Volume(group, multiscale_grid(image, (z, y, x)), source_grid, levels)
    except AtlasStoreError:
        # What became of an atlas's arrays, and what to do, is said by the store.
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ScanFormatError(
            f"{where} has damaged metadata ({error}); convert it anew."
        ) from error
