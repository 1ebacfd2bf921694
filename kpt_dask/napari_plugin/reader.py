"""Layers of an OME-Zarr of this program for napari: scan, organs and keypoints, in mm (z, y, x)."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from atlas_store.arrays.regions import open_array
from kpt_dask.errors import KptError
from kpt_dask.output.contents import OWN, encoding_of
from kpt_dask.remote import open_group, scheme_of
from kpt_dask.volumes.lazy import lazy_array

Layer = tuple[Any, dict[str, Any], str]
"""Data, keywords of the layer, and its type."""

COARSEST = 4.0
"""Spacing, mm, beyond which levels are left out: napari shows the last level in 3-D."""

KEYPOINT_SIZE = 4.0
"""Diameter of a keypoint on the screen, mm."""

NO_VOTE = (255, 255, 255)
"""Colour of keypoints that voted for no organ."""


def get_reader(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
) -> Callable[[Any], list[Layer]] | None:
    """Give the function that reads a path; None if it is no output of this program.

    Parameters
    ----------
    path : str, Path or a sequence of these
        As napari hands it over, or a URL; several must all be such outputs.
    """
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    if not paths or not all(_encoding(fspath(one)) in OWN for one in paths):
        return None
    return read


def _encoding(place: str) -> str | None:
    if scheme_of(place) is None:
        return encoding_of(Path(place))
    try:
        return str(open_group(place).attrs.get("encoding-type"))
    except (KptError, OSError, zarr.errors.BaseZarrError):
        # Another reader may know what it is.
        return None


def read(path: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[Layer]:
    """Make the layers of an output: the scan, and what else it holds.

    Returns
    -------
    list of (data, keywords, type)
        Levels are read where they are looked at, which is refused if the output was deleted or
        replaced since.
    """
    paths = [path] if isinstance(path, str | PathLike) else list(path)
    return [layer for one in paths for layer in _layers(fspath(one))]


def _layers(path: str) -> list[Layer]:
    group = open_group(path)
    file = path.rstrip("/").rpartition("/")[2]
    about: Any = group.attrs["ome"]
    window = about["omero"]["channels"][0]["window"] if "omero" in about else {}
    image = _Image(group, group, about["multiscales"][0])
    layers: list[Layer] = [
        (
            image.levels,
            {
                **image.placed,
                "name": file,
                "colormap": "gray",
                "contrast_limits": (window.get("start", -160.0), window.get("end", 240.0)),
                "metadata": {"kpt": group.attrs.get("kpt")},
            },
            "image",
        )
    ]
    organs: dict[int, tuple[str, tuple[int, int, int]]] = {}
    for name in _label_images(group):
        found = group[f"labels/{name}"]
        assert isinstance(found, zarr.Group)
        described: Any = found.attrs["ome"]
        organs = _organs(described["image-label"])
        labels = _Image(group, found, described["multiscales"][0])
        layers.append(
            (
                labels.levels,
                {
                    **labels.placed,
                    "name": f"{file} {name}",
                    "features": {
                        "index": [0, *organs],
                        "name": ["background", *(one for one, _ in organs.values())],
                    },
                    "colormap": _colours({value: rgb for value, (_, rgb) in organs.items()}),
                },
                "labels",
            )
        )
    if "keypoints" in group:
        layers.append(_keypoints(group, organs, file))
    return layers


class _Image:
    """Levels of a multiscale image that are not too coarse, and where they lie."""

    def __init__(self, root: zarr.Group, group: zarr.Group, multiscale: Mapping[str, Any]) -> None:
        datasets = multiscale["datasets"]
        scales = [one["coordinateTransformations"][0]["scale"] for one in datasets]
        kept = [one for one, scale in zip(datasets, scales, strict=True) if max(scale) <= COARSEST]
        arrays = (open_array(group, one["path"]) for one in kept or datasets[:1])
        self.levels = [lazy_array(root, array) for array in arrays]
        self.placed = {
            "scale": scales[0],
            "translate": datasets[0]["coordinateTransformations"][1]["translation"],
            "multiscale": True,
            "axis_labels": ("z", "y", "x"),
            "units": ("mm", "mm", "mm"),
        }


def _label_images(group: zarr.Group) -> list[str]:
    if "labels" not in group:
        return []
    about: Any = group["labels"].attrs.get("ome", {})
    return list(about.get("labels", ()))


def _organs(about: Mapping[str, Any]) -> dict[int, tuple[str, tuple[int, int, int]]]:
    names = {one["label-value"]: one["name"] for one in about["properties"]}
    colours = {one["label-value"]: tuple(one["rgba"][:3]) for one in about["colors"]}
    return {value: (name, colours[value]) for value, name in names.items()}


def _colours(colours: Mapping[int, tuple[int, int, int]]) -> dict[int | None, Any]:
    """Colours by label, 0 to 1; what has none, and the background, is not seen."""
    unseen = np.zeros(4, np.float32)
    return {None: unseen, 0: unseen} | {
        value: np.array([*rgb, 255], np.float32) / 255 for value, rgb in colours.items()
    }


def _keypoints(
    group: zarr.Group, organs: Mapping[int, tuple[str, tuple[int, int, int]]], name: str
) -> Layer:
    """Points at keypoints, in the colour of the organ that they voted for."""
    position, scale = (np.asarray(group[f"keypoints/{what}"]) for what in ("position", "scale"))
    voted = np.zeros(len(position), np.uint16)
    if "votes" in group:
        voted = np.asarray(group["votes/label"])
    told = [organs.get(value, ("", NO_VOTE)) for value in voted.tolist()]
    return (
        position,
        {
            "name": f"{name} keypoints",
            "size": KEYPOINT_SIZE,
            "face_color": np.array([rgb for _, rgb in told], np.float32).reshape(-1, 3) / 255,
            "border_width": 0,
            "features": {"organ": [named for named, _ in told], "scale_mm": scale},
            "axis_labels": ("z", "y", "x"),
            "units": ("mm", "mm", "mm"),
        },
        "points",
    )
