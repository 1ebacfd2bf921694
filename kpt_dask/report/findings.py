"""Findings of a segmentation: what its output folder says, as the page needs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import OrganTable, OrganTableError
from atlas_store.arrays.regions import open_array
from kpt_dask.errors import ScanFormatError
from kpt_dask.organ_transfer.measures import OrganMeasures
from kpt_dask.volumes.volume import Volume, open_volume


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints of a scan, their matches with atlases, and their votes.

    Attributes
    ----------
    position : float32 array (keypoint, 3)
        (z, y, x), mm, LPS.
    scale : float32 array (keypoint)
        mm.
    vote : uint16 array (keypoint)
        Label that a keypoint voted for, 0 for none.
    keypoint, atlas, atlas_keypoint : int32 arrays (match)
        Indices of the scan's keypoint, of the atlas, and of the atlas's keypoint.
    label : uint16 array (match)
        Label of the atlas's keypoint.
    translation : float32 array (match, 3)
        mm, from the atlas to the scan.
    weight : float64 array (match)
        p(F | 𝓕, m) · p(m), the weight of its vote.
    """

    position: NDArray[np.float32]
    scale: NDArray[np.float32]
    vote: NDArray[np.uint16]
    keypoint: NDArray[np.int32]
    atlas: NDArray[np.int32]
    atlas_keypoint: NDArray[np.int32]
    label: NDArray[np.uint16]
    translation: NDArray[np.float32]
    weight: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Findings:
    """What the output of a segmentation holds.

    Attributes
    ----------
    volume : Volume
        The scan.
    labels : tuple of zarr.Array (z, y, x)
        Levels of the label map.
    table : OrganTable
        The organs of the atlases.
    organs : mapping of str to OrganMeasures
        Measures of the organs that are shown.
    volume_grid : str
        Grid that the volumes were measured on: "working" or "scan".
    atlases : tuple of str
        The atlases that were used.
    weights : float64 array (organ, atlas), optional
        Part of each atlas in an organ's votes; None for outputs of earlier versions.
    keypoints : Keypoints
    about : mapping
        Provenance, attribute ``kpt``.
    """

    volume: Volume
    labels: tuple["zarr.Array[Any]", ...]
    table: OrganTable
    organs: Mapping[str, OrganMeasures]
    volume_grid: str
    atlases: tuple[str, ...]
    weights: NDArray[np.float64] | None
    keypoints: Keypoints
    about: Mapping[str, Any]

    @property
    def scan(self) -> str:
        """File name of the scan."""
        return str(self.about["source"]["file"])

    @property
    def mode(self) -> str:
        """Mode of the transfer."""
        return str(self.about["segmentation"]["mode"])


def open_findings(path: str, group: zarr.Group | None = None) -> Findings:
    """Read what the output of a segmentation holds, but for voxels.

    Parameters
    ----------
    path : str
        Folder of the output; errors name it.
    group : zarr.Group, optional
        The output itself, where it lies elsewhere for the time being.

    Raises
    ------
    ScanNotFoundError
        If there is nothing.
    ScanFormatError
        If it is no segmentation, or a damaged one.
    """
    volume = open_volume(path if group is None else group)
    try:
        about: Any = volume.group.attrs["kpt"]
        made = about["segmentation"]
        table = OrganTable.from_json(made["organ_table"])
        atlases = tuple(map(str, made["atlases"]))
        organs = {name: OrganMeasures.from_json(said) for name, said in made["organs"].items()}
        if set(organs) - set(table.names):
            raise ValueError("organs that its table lacks")
        weights = None
        if "weights" in made:
            weights = np.array([made["weights"][name] for name in table.names], np.float64)
            weights = weights.reshape(len(table), len(atlases))
        image = volume.group["labels/organs"]
        ome: Any = image.attrs["ome"]
        if not isinstance(image, zarr.Group):
            raise TypeError("its label map is no image")
        _ = about["source"]["file"], about["software"]
        paths = [one["path"] for one in ome["multiscales"][0]["datasets"]]
        labels = tuple(open_array(image, path) for path in paths)
        if tuple(one.shape for one in labels[:1]) != (volume.grid.shape,):
            raise ValueError("a label map of another shape")
        keypoints = _keypoints(volume.group, len(atlases))
    except (KeyError, TypeError, ValueError, OrganTableError) as error:
        raise ScanFormatError(
            f"{path} is no segmentation of this version ({error}); make it with kpt segment."
        ) from error
    return Findings(volume, labels, table, organs, "working", atlases, weights, keypoints, about)


def _keypoints(group: zarr.Group, n_atlases: int) -> Keypoints:
    # Imported here: it needs xarray, which takes a while.
    from kpt_dask.matching.voting import weight

    def read(name: str) -> NDArray[Any]:
        return np.asarray(open_array(group, name)[...])

    squared, probability = read("matches/squared_distance"), read("matches/probability")
    attributes: Any = group["matches"].attrs
    found = Keypoints(
        position=read("keypoints/position"),
        scale=read("keypoints/scale"),
        vote=read("votes/label"),
        keypoint=read("matches/keypoint"),
        atlas=read("matches/atlas"),
        atlas_keypoint=read("matches/atlas_keypoint"),
        label=read("matches/label"),
        translation=read("matches/translation"),
        weight=weight(squared, float(attributes["largest_squared_distance"]), probability),
    )
    n = len(found.position)
    for index, size in ((found.keypoint, n), (found.atlas, n_atlases)):
        if index.size and not 0 <= index.min() <= index.max() < size:
            raise ValueError("matches of keypoints or atlases that are not there")
    if not len(found.scale) == len(found.vote) == n:
        raise ValueError("keypoints, scales and votes of different number")
    return found
