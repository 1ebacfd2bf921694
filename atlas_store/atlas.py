"""One atlas of a store: what its marker says at once, its data when asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xarray as xr
import zarr
from numpy.typing import NDArray

from atlas_store.errors import AtlasNotFoundError, StoreFormatError
from atlas_store.keypoints import as_dataset, read_arrays
from atlas_store.layout import IMAGE, KEYPOINTS, LABELS, data_folder, marker_key
from atlas_store.marker import AtlasInfo, OrganInfo
from atlas_store.organs import OrganTable
from atlas_store.storage.objects import Objects
from atlas_store.storage.sealed import Sealed


@dataclass(frozen=True, eq=False)
class Atlas:
    """An atlas of a store; `AtlasStore` makes them.

    Attributes
    ----------
    info : AtlasInfo
        Content of the marker.
    organ_table : OrganTable
        The organs of the store.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> atlas = store["body_1"]
    >>> atlas.labels.shape, atlas.info.spacing
    ((110, 65, 80), (4.0, 4.0, 4.0))
    >>> "liver" in atlas.organs
    True
    """

    info: AtlasInfo
    organ_table: OrganTable
    objects: Objects

    @property
    def id(self) -> str:
        """Its name in the store."""
        return self.info.id

    @property
    def annotated(self) -> tuple[str, ...]:
        """Names of the organs that the annotator looked for."""
        return self.info.annotated

    @property
    def organs(self) -> Mapping[str, OrganInfo]:
        """The organs its label map shows, with voxels, bounding box, centroid, keypoints."""
        return self.info.organs

    def volume_ml(self, organ: str) -> float:
        """Volume of an organ in its label map, mL; 0 if it is not shown."""
        found = self.organs.get(organ)
        return found.voxels * math.prod(self.info.spacing) / 1000 if found else 0.0

    @property
    def path(self) -> str:
        """Folder of its data in the store."""
        return data_folder(self.info.id, self.info.uuid)

    @property
    def sealed(self) -> Sealed:
        """The objects of its data, which are what was added or cannot be read."""
        return Sealed(self.objects, self.path, self.info.digest, f"the atlas {self.id!r}")

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group of its data, read-only; `StoreFormatError` if it is damaged."""
        try:
            return self.sealed.group()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise self._unreadable("data", error) from error

    @cached_property
    def image(self) -> zarr.Group:
        """The OME-Zarr image; `StoreFormatError` if it is damaged."""
        try:
            image = self.group[IMAGE]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise self._unreadable("image", error) from error
        if not isinstance(image, zarr.Group):
            raise self._unreadable("image", "it is an array")
        return image

    @cached_property
    def labels(self) -> "zarr.Array[Any]":
        """The label map, (z, y, x) of `info.shape`, unsigned.

        Raises
        ------
        StoreFormatError
            If it is damaged.
        """
        try:
            labels = self.group[LABELS]
            check_labels(labels, self.info.shape, f"{self.objects.url}: atlas {self.id!r}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            # What is being removed may look like anything.
            raise self._unreadable("label map", error) from error
        assert isinstance(labels, zarr.Array)
        return labels

    def keypoints(self) -> xr.Dataset:
        """Read its keypoints into memory.

        Returns
        -------
        xarray.Dataset
            The variables of `atlas_store.keypoints.VARIABLES`, ``label`` included.

        Raises
        ------
        AtlasNotFoundError
            If the atlas was removed or replaced meanwhile.
        StoreFormatError
            If they are damaged.
        """
        return as_dataset(self.keypoint_arrays())

    def keypoint_arrays(self) -> dict[str, NDArray[Any]]:
        """Read its keypoints as plain arrays by name; otherwise like `keypoints`."""
        path = f"{self.path}/{KEYPOINTS}"
        try:
            return read_arrays(self.sealed, path, self.organ_table.values)
        except StoreFormatError:
            self.ensure_present()
            raise

    def ensure_present(self) -> None:
        """Refuse an atlas that was removed or replaced meanwhile.

        Data is deleted only after the marker. So whoever calls this after reading, and gets
        no error, has read whole data: a chunk deleted while reading would come as zeros.

        Raises
        ------
        AtlasNotFoundError
            If the marker does not name this data any more.
        """
        key = marker_key(self.id)
        data = self.objects.read(key)
        if data is not None:
            # As markers are spelled, without reading all of it: no other data has this uuid.
            spelled = b'"uuid":"%s"' % self.info.uuid.encode() in data
            where = f"{self.objects.url}/{key}"
            if spelled or AtlasInfo.load(data, self.id, where).uuid == self.info.uuid:
                return
        raise AtlasNotFoundError(
            f"{self.objects.url}: the atlas {self.id!r} was removed or replaced while it was "
            "read: run this again."
        )

    def _unreadable(self, what: str, reason: Exception | str) -> StoreFormatError:
        self.ensure_present()
        if isinstance(reason, StoreFormatError) and f"atlas {self.id!r}" in str(reason):
            return reason
        return StoreFormatError(
            f"{self.objects.url}: the {what} of the atlas {self.id!r} cannot be read "
            f"({reason}): remove the atlas and add it again."
        )


def check_labels(labels: object, shape: tuple[int, int, int], where: str) -> None:
    """Refuse what is no label map of this shape."""
    if not isinstance(labels, zarr.Array) or labels.dtype.kind != "u" or labels.shape != shape:
        what = (
            f"{labels.dtype} {labels.shape}" if isinstance(labels, zarr.Array) else "not an array"
        )
        raise StoreFormatError(
            f"{where}: the label map is {what}, not unsigned integers {shape}: "
            "remove the atlas and add it again."
        )
