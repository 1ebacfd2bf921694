"""Keypoints on disk: a Zarr group with one array of one chunk per variable.

What is read is distrusted: it comes from a store that somebody else may have written.
The description of every array is checked before its bytes are unpacked, so that no file
can make the reader allocate more than the keypoints it announces, and every value is
checked afterwards.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec

from atlas_store.arrays.chunk_rows import describe_mismatch, unpack_into
from atlas_store.errors import KeypointsFormatError
from atlas_store.storage.objects import Objects

ENCODING_TYPE = "kpt-keypoints"
ENCODING_VERSION = "2"

MAX_KEYPOINTS = 4_000_000
"""More than this is no scan: a whole body at 1 mm has a tenth of it."""

DESCRIPTOR_BINS = 64
"""Length of a descriptor, a permutation of the ranks 0 to 63."""

SIZES = {"axis": 3, "bin": DESCRIPTOR_BINS, "direction": 3}
"""Sizes of the dimensions other than ``keypoint``; ``axis`` is (z, y, x)."""


@dataclass(frozen=True)
class Variable:
    """What a variable must be: its dimensions, its type, its units (``1``: none)."""

    dims: tuple[str, ...]
    dtype: np.dtype[Any]
    units: str

    def shape(self, count: int) -> tuple[int, ...]:
        """Shape for `count` keypoints."""
        return (count, *(SIZES[dim] for dim in self.dims[1:]))


def _variable(dims: str, dtype: DTypeLike, units: str) -> Variable:
    return Variable(tuple(dims.split()), np.dtype(dtype), units)


VARIABLES: Mapping[str, Variable] = {
    "position": _variable("keypoint axis", np.float32, "mm"),
    "scale": _variable("keypoint", np.float32, "mm"),
    "sign": _variable("keypoint", np.int8, "1"),
    "response": _variable("keypoint", np.float32, "HU"),
    "descriptor": _variable("keypoint bin", np.uint8, "1"),
    "frame": _variable("keypoint direction axis", np.float32, "1"),
    "octave": _variable("keypoint", np.uint8, "1"),
    "label": _variable("keypoint", np.uint16, "1"),
}
"""The variables of keypoints; ``label`` only where a label map is known."""

OPTIONAL = frozenset({"label"})


def first_frames(position: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int64]:
    """Where keypoints begin: in several frames, they are neighbours that agree in all else.

    Parameters
    ----------
    position, scale : float32 arrays (n, 3) and (n)
        Position and scale of keypoints as they are stored.

    Returns
    -------
    int64 array (m)
        Indices of each keypoint's first frame, rising.
    """
    same = (position[1:] == position[:-1]).all(axis=1) & (scale[1:] == scale[:-1])
    return np.flatnonzero(np.concatenate([[True], ~same])[: len(scale)])


def first_labels(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint16]:
    """Label of each keypoint, once whatever its number of frames; for counting them."""
    labels: NDArray[np.uint16] = arrays["label"][first_frames(arrays["position"], arrays["scale"])]
    return labels


def write_keypoints(group: zarr.Group, keypoints: xr.Dataset) -> None:
    """Write keypoints into an empty Zarr group.

    Parameters
    ----------
    group : zarr.Group
        Group to write to; its attributes get ``encoding-type`` and ``encoding-version``.
    keypoints : xarray.Dataset
        The variables of `VARIABLES`, ``label`` if known. Attributes are not kept.

    Raises
    ------
    KeypointsFormatError
        If a variable is missing, unknown, or not what `VARIABLES` says; nothing is written.

    Examples
    --------
    >>> import zarr
    >>> from atlas_store import read_keypoints, write_keypoints
    >>> keypoints = read_keypoints(zarr.open_group("body_4.zarr/keypoints", mode="r"))
    >>> write_keypoints(zarr.create_group("keypoints.zarr"), keypoints)
    """
    arrays = check_keypoints(keypoints)
    for name, values in arrays.items():
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=(max(values.shape[0], 1), *values.shape[1:]),
            dtype=values.dtype,
            compressors=BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
            fill_value=0,
            dimension_names=VARIABLES[name].dims,
            attributes={"units": VARIABLES[name].units},
            # A chunk of zeros is written as well: to the reader a missing chunk is damage.
            config={"write_empty_chunks": True},
        )
        array[...] = values
    group.attrs.update(
        {"encoding-type": ENCODING_TYPE, "encoding-version": ENCODING_VERSION}
        | {"variables": list(arrays)}
    )


def read_keypoints(group: zarr.Group, labels: Collection[int] | None = None) -> xr.Dataset:
    """Read keypoints from a Zarr group.

    Parameters
    ----------
    group : zarr.Group
        Group that `write_keypoints` wrote to.
    labels : collection of int, optional
        The label values that may occur besides 0. If given, ``label`` must be there.

    Returns
    -------
    xarray.Dataset
        The variables of `VARIABLES` with their units, in memory.

    Raises
    ------
    KeypointsFormatError
        If the group holds no keypoints, a newer version of them, or is damaged.

    Examples
    --------
    >>> import zarr
    >>> from atlas_store import read_keypoints
    >>> keypoints = read_keypoints(zarr.open_group("body_4.zarr/keypoints", mode="r"))
    >>> keypoints.descriptor.dims, keypoints.position.attrs["units"]
    (('keypoint', 'bin'), 'mm')
    """
    objects = Objects(group.store, str(group.store_path))
    return as_dataset(read_arrays(objects, group.path, labels))


def as_dataset(arrays: Mapping[str, NDArray[Any]]) -> xr.Dataset:
    """Give the arrays of `read_arrays` their dimensions and units."""
    return xr.Dataset(
        {
            name: (VARIABLES[name].dims, values, {"units": VARIABLES[name].units})
            for name, values in arrays.items()
        }
    )


def check_keypoints(
    keypoints: xr.Dataset, labels: Collection[int] | None = None
) -> dict[str, NDArray[Any]]:
    """Get the variables as arrays; `KeypointsFormatError` if one is not what it must be."""
    names = {str(name) for name in keypoints.data_vars}
    for name in sorted(VARIABLES.keys() - OPTIONAL - names):
        raise KeypointsFormatError(f"keypoints lack the variable {name!r}: add it.")
    for name in sorted(names - VARIABLES.keys()):
        raise KeypointsFormatError(f"keypoints have the unknown variable {name!r}: drop it.")
    arrays = {}
    for name, variable in VARIABLES.items():
        if name not in names:
            continue
        values = keypoints[name]
        if values.dims != variable.dims or values.dtype != variable.dtype:
            raise KeypointsFormatError(
                f"the variable {name!r} of keypoints is {values.dtype} {values.dims}: "
                f"make it {variable.dtype} {variable.dims}."
            )
        arrays[name] = values.to_numpy()
    _check_values(arrays, labels, "keypoints")
    return arrays


def read_arrays(
    objects: Objects, path: str, labels: Collection[int] | None = None
) -> dict[str, NDArray[Any]]:
    """Read keypoints as plain arrays: `read_keypoints` without xarray, ≈ 1 ms locally."""
    where = f"{objects.url}: the keypoints in {path!r}" if path else f"keypoints in {objects.url}"
    prefix = f"{path}/" if path else ""
    root = _document(objects.read(f"{prefix}zarr.json"), where)
    names = _variable_names(root, where)
    documents = objects.read_many(f"{prefix}{name}/zarr.json" for name in names)
    count = _count(_document(documents[0], where), where)
    for name, document in zip(names, documents, strict=True):
        _check_description(name, _document(document, where), count, where)
    chunks = objects.read_many(
        f"{prefix}{name}/c" + "/0" * len(VARIABLES[name].dims) for name in names
    )
    arrays = {
        name: _unpack(name, chunk, count, where) for name, chunk in zip(names, chunks, strict=True)
    }
    _check_values(arrays, labels, where)
    return arrays


def _document(data: bytes | None, where: str) -> dict[str, Any]:
    if data is None:
        raise KeypointsFormatError(f"{where} are incomplete: extract them again.")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"their description is no JSON, {error}") from error
    if not isinstance(document, dict):
        raise _damaged(where, "their description is no JSON object")
    return document


def _variable_names(root: dict[str, Any], where: str) -> list[str]:
    """Names of the variables that a group announces, in the order of `VARIABLES`."""
    attributes = root.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("encoding-type") != ENCODING_TYPE:
        raise KeypointsFormatError(f"{where} are no {ENCODING_TYPE}: extract them again.")
    version = attributes.get("encoding-version")
    if version != ENCODING_VERSION:
        raise KeypointsFormatError(
            f"{where} have encoding-version {version!r}, but this program reads "
            f"{ENCODING_VERSION!r}: update the program or extract them again."
        )
    announced = attributes.get("variables")
    known = [name for name in VARIABLES if isinstance(announced, list) and name in announced]
    if not isinstance(announced, list) or len(known) != len(announced):
        raise _damaged(where, f"they announce the variables {announced!r}")
    for name in VARIABLES.keys() - OPTIONAL - set(known):
        raise _damaged(where, f"they lack the variable {name!r}")
    return known


def _count(document: dict[str, Any], where: str) -> int:
    """Get the number of keypoints that the first variable announces."""
    shape = document.get("shape")
    if isinstance(shape, list) and shape and type(shape[0]) is int:
        if 0 <= shape[0] <= MAX_KEYPOINTS:
            return shape[0]
        raise _damaged(where, f"they announce {shape[0]} keypoints of at most {MAX_KEYPOINTS}")
    raise _damaged(where, f"they have the shape {shape!r}")


def _check_description(name: str, document: dict[str, Any], count: int, where: str) -> None:
    """Refuse an array whose description differs from what `write_keypoints` writes."""
    variable = VARIABLES[name]
    shape = variable.shape(count)
    what = describe_mismatch(document, shape, (max(count, 1), *shape[1:]), variable.dtype)
    if what is not None:
        raise _damaged(where, f"{name!r} has {what}")


def _unpack(name: str, chunk: bytes | None, count: int, where: str) -> NDArray[Any]:
    variable = VARIABLES[name]
    values = np.zeros(variable.shape(count), variable.dtype.newbyteorder("<"))
    if count == 0:
        return values.astype(variable.dtype)
    if chunk is None:
        raise _damaged(where, f"the values of {name!r} are missing")
    try:
        unpack_into(chunk, values)
    except ValueError as error:
        raise _damaged(where, f"the values of {name!r} have another size, {error}") from error
    return values.astype(variable.dtype, copy=False)


def _check_values(
    arrays: Mapping[str, NDArray[Any]], labels: Collection[int] | None, where: str
) -> None:
    counts = {len(values) for values in arrays.values()}
    if len(counts) > 1:
        raise _damaged(where, f"their variables have different lengths {sorted(counts)}")
    for name, values in arrays.items():
        if values.shape != VARIABLES[name].shape(len(values)):
            raise _damaged(where, f"{name!r} has the shape {values.shape}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise _damaged(where, f"{name!r} has values that are not finite")
    if (arrays["scale"] <= 0).any():
        raise _damaged(where, "'scale' has values that are not positive")
    if (np.abs(arrays["sign"]) != 1).any():
        raise _damaged(where, "'sign' has values other than -1 and 1")
    if (arrays["descriptor"] >= DESCRIPTOR_BINS).any():
        raise _damaged(where, f"'descriptor' has ranks of {DESCRIPTOR_BINS} or more")
    frame = arrays["frame"].astype(np.float64)
    if np.abs(frame @ frame.transpose(0, 2, 1) - np.eye(3)).max(initial=0) > 1e-3:
        raise _damaged(where, "'frame' has values that are no rotations")
    if labels is not None:
        if "label" not in arrays:
            raise _damaged(where, "they lack the variable 'label'")
        unknown = set(np.unique(arrays["label"]).tolist()) - set(labels) - {0}
        if unknown:
            raise _damaged(where, f"'label' has the unknown organ {min(unknown)}")


def _damaged(where: str, what: str) -> KeypointsFormatError:
    return KeypointsFormatError(f"{where} cannot be used, {what}: extract them again.")
