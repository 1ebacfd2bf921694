"""OME-Zarr images 0.4 and 0.5 as scans: the finest level of the first image, read chunk by chunk.

Directions of axes are those of RFC-4 (anatomical orientation), which this program writes too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsArrayError

from atlas_store.arrays import chunk_io
from atlas_store.errors import DamagedChunkError
from atlas_store.layout import ROOT
from atlas_store.storage.bounded import Bounded
from atlas_store.storage.objects import MAX_DOCUMENT, Objects
from kpt_dask.errors import ScanFormatError, ScanNotFoundError, UnreachableError
from kpt_dask.grid import Grid
from kpt_dask.remote import Remote, reaching
from kpt_dask.scans import voxel_stream
from kpt_dask.scans.placement import check_grid, header_of, listed

UNITS = {"meter": 1e3, "centimeter": 10.0, "millimeter": 1.0, "micrometer": 1e-3}
"""Length of each unit, mm."""

DIRECTIONS = {
    "inferior-to-superior": (1, 0, 0),
    "superior-to-inferior": (-1, 0, 0),
    "anterior-to-posterior": (0, 1, 0),
    "posterior-to-anterior": (0, -1, 0),
    "right-to-left": (0, 0, 1),
    "left-to-right": (0, 0, -1),
}
"""Directions (z, y, x), LPS, by their names in RFC-4."""

MOST_CHUNKS = 1 << 22
"""Chunks of a scan; a whole body at half a millimetre in chunks of 64³ has 20 000."""

USUAL = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}
"""Directions assumed for axes without an orientation."""


@dataclass(frozen=True, eq=False)
class OmeZarrFile:
    """An OME-Zarr image; see `kpt_dask.scans.contract.ScanFile`.

    Attributes
    ----------
    path : Path or Remote
        Folder or URL of the image.
    grid : Grid
        Grid of the finest level.
    array : zarr.Array
        Its voxels.
    axes : tuple of int
        Indices of the array's axes (k, j, i); the other axes have length 1.
    doubts : tuple of str
        Doubts about the metadata, one sentence each.
    """

    path: Path | Remote
    grid: Grid
    array: "zarr.Array[Any]"
    axes: tuple[int, ...]
    doubts: tuple[str, ...]
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a stored voxel."""
        return np.dtype(self.array.dtype)

    @property
    def header(self) -> Any:
        """NIfTI header for label maps on this grid."""
        return header_of(self.grid)

    def _check_complete(self) -> None:
        """Refuse an image of this program that lacks chunks, which would be read as 0."""
        if isinstance(self.path, Path):
            chunk_io.check_complete(self.array)
        elif self.array.attrs.get(chunk_io.COMPLETE):
            objects = Objects.at(str(self.path))
            for key in self._chunk_keys:
                if not objects.exists(key):
                    raise ScanFormatError(f"{self.path} lacks {key}; copy it again.")

    @property
    def _chunk_keys(self) -> Iterator[str]:
        """Names of the objects that hold the chunks."""
        metadata = self.array.metadata
        ends = (
            range(-(-n // chunk))
            for n, chunk in zip(
                self.array.shape, self.array.shards or self.array.chunks, strict=True
            )
        )
        for index in product(*ends):
            yield f"{self.array.path}/{metadata.encode_chunk_key(index)}"

    def _bounded(self) -> "zarr.Array[Any]":
        """Open the array so that no chunk takes more memory than its voxels."""
        array = self.array
        most = math.prod(array.shards or array.chunks) * self.dtype.itemsize
        try:
            return zarr.open_array(
                Bounded(array.store, most),
                path=array.path,
                mode="r",
                zarr_format=array.metadata.zarr_format,
            )
        except Exception as error:
            raise _damaged(self.path, "metadata", error) from error

    def slabs(self) -> Iterator[NDArray[Any]]:
        """Stream the stored voxels; see `kpt_dask.scans.contract.ScanFile`."""
        planes, rows, columns = self.grid.shape
        depth = min(self.array.chunks[self.axes[0]], planes)
        few = max(1, voxel_stream.SLAB_BYTES // (rows * columns * self.dtype.itemsize))
        checked = False
        voxels = self._bounded()
        for begin in range(0, planes, depth):
            where: list[Any] = [0] * self.array.ndim
            for axis in self.axes:
                where[axis] = slice(None)
            where[self.axes[0]] = slice(begin, min(begin + depth, planes))
            try:
                # What lies on a disk may be deleted while it is read.
                if not checked or isinstance(self.path, Path):
                    self._check_complete()
                checked = True
                values = np.asarray(voxels[tuple(where)])
            except ScanFormatError:
                raise
            except DamagedChunkError as error:
                raise ScanFormatError(f"{self.path}: {error}") from error
            except Exception as error:  # codecs and stores raise many kinds
                raise _damaged(self.path, "chunk", error) from error
            for first in range(0, len(values), few):
                yield values[first : first + few]


def open_omezarr(path: Path | Remote) -> OmeZarrFile:
    """Read the metadata of an OME-Zarr image.

    Raises
    ------
    ScanFormatError
        If the folder is no OME-Zarr image, or not one 3-D volume of real numbers on a usable grid.
    UnreachableError
        If its server or bucket cannot be reached, or does not allow it.
    """
    try:
        with reaching(path):
            objects = Objects.at(str(path))
            # By itself first: zarr asks for several objects at once, and if none can be reached,
            # Python prints a traceback for each that nobody waits for any more.
            latest = objects.read(ROOT, MAX_DOCUMENT) is not None
            group = zarr.open_group(objects.store, mode="r", zarr_format=3 if latest else None)
            about: Any = group.attrs.asdict()
        images = about.get("ome", about).get("multiscales")
    except FileNotFoundError as error:
        raise ScanNotFoundError(
            f"{path} does not exist, cannot be reached, or is no Zarr group; give the URL or folder"
            " of an OME-Zarr image."
        ) from error
    except UnreachableError:
        raise
    except ContainsArrayError as error:
        raise ScanFormatError(
            f"{path} is a single array, which has no place in space; give the folder of the"
            " OME-Zarr image around it."
        ) from error
    except Exception as error:
        raise _damaged(path, "metadata", error) from error
    if not images:
        raise ScanFormatError(
            f"{path} is a Zarr group, but no OME-Zarr image; give the folder of the image in it."
        )
    try:
        image = images[0]
        level = image["datasets"][0]
        array = group[level["path"]]
        axes = [dict(axis) for axis in image["axes"]]
        steps = [*level["coordinateTransformations"], *image.get("coordinateTransformations", [])]
        scale, translation = np.ones(len(axes)), np.zeros(len(axes))
        for step in steps:
            if step["type"] == "scale":
                factor = np.array(step["scale"], np.float64).reshape(len(axes))
                scale, translation = scale * factor, translation * factor
            elif step["type"] == "translation":
                translation = translation + np.array(step["translation"], np.float64)
            elif step["type"] != "identity":
                raise ValueError(f"coordinate transformation {step['type']!r}")
        names = [str(axis["name"]).lower() for axis in axes]
        space = tuple(i for i, axis in enumerate(axes) if axis.get("type", "space") == "space")
        units = [None if axes[i].get("unit") is None else str(axes[i]["unit"]) for i in space]
        given = [axes[i].get("orientation") for i in space]
        directions = [str(d["value"]) if isinstance(d, dict) else str(d) for d in given]
    except Exception as error:
        raise _damaged(path, "metadata", error) from error
    if not isinstance(array, zarr.Array) or array.ndim != len(axes):
        raise _damaged(path, "metadata", f"level {level['path']!r} is no array of its axes")
    if sorted(names[i] for i in space) != ["x", "y", "z"]:
        raise ScanFormatError(f"{path} has the axes {', '.join(names)}; give one 3-D volume.")
    shape = array.shape[space[0]], array.shape[space[1]], array.shape[space[2]]
    if any(n != 1 for i, n in enumerate(array.shape) if i not in space) or min(shape) < 1:
        raise ScanFormatError(f"{path} has shape {listed(array.shape)}; give one 3-D volume.")
    if array.dtype.kind not in "iuf":
        raise ScanFormatError(f"{path} holds {array.dtype} voxels, not real numbers.")
    if min(array.chunks) < 1:
        raise _damaged(path, "metadata", f"chunks of {listed(array.chunks)} voxels")
    if math.prod(array.chunks) * array.dtype.itemsize > voxel_stream.LARGEST_PLANE:
        raise ScanFormatError(
            f"{path} has chunks of {listed(array.chunks)} voxels; store it with smaller ones."
        )
    if array.nchunks > MOST_CHUNKS:
        raise ScanFormatError(
            f"{path} has {array.nchunks} chunks, more than any scan; store it with larger ones."
        )
    plane = shape[1] * shape[2] * array.dtype.itemsize
    if plane * min(array.chunks[space[0]], shape[0]) > voxel_stream.LARGEST_PLANE:
        raise ScanFormatError(
            f"{path} has chunks of {array.chunks[space[0]]} planes of {plane / 2**20:.0f} MiB;"
            " store it with smaller ones."
        )
    doubts = []
    unknown = [unit for unit in units if unit is not None and unit not in UNITS]
    if unknown:
        raise ScanFormatError(f"{path} gives its lengths in {unknown[0][:40]!r}, not in mm.")
    if None in units:
        doubts.append(f"{path} gives no unit of length; it is taken for mm.")
    if any(direction not in DIRECTIONS for direction in directions):
        doubts.append(
            f"{path} does not say how its axes lie in the body, so its orientation is a guess (LPS)"
            " and left and right may be exchanged; make it anew from the DICOM series."
        )
        directions = [USUAL[names[i]] for i in space]
    affine = np.eye(4)
    for column, i in enumerate(space):
        step_mm = UNITS.get(units[column] or "", 1.0)
        towards = np.array(DIRECTIONS[directions[column]], np.float64)
        affine[:3, column] = towards * scale[i] * step_mm
        affine[:3, 3] += towards * translation[i] * step_mm
    grid = Grid(shape, affine)
    check_grid(path, grid)
    # Web servers do not list what they hold.
    listed_there = array.store.supports_listing and not str(path).startswith("http")
    missing = array.nchunks - array.nchunks_initialized if listed_there else 0
    if missing > 0 and not array.attrs.get(chunk_io.COMPLETE):
        doubts.append(
            f"{path} lacks {missing} of {array.nchunks} chunks, which count as"
            f" {array.fill_value}; copy it again if its parts are missing."
        )
    return OmeZarrFile(path, grid, array, space, tuple(doubts))


def _damaged(path: Path | Remote, what: str, error: object) -> ScanFormatError:
    said = " ".join(str(error).split())[:200]
    return ScanFormatError(f"{path} has a damaged {what} ({said}); get a new copy.")
