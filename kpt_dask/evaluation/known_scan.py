"""Scans whose labels are known: atlases of a store, and files with a reference beside them.

Each gives a volume, which is segmented, and then its reference, with which results are compared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable
from atlas_store.arrays.regions import open_array
from kpt_dask.annotations.opening import open_pair
from kpt_dask.atlases.add import survey
from kpt_dask.grid import Grid
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.measures.comparison import compare_labels
from kpt_dask.measures.surfaces import Agreement
from kpt_dask.organ_transfer.measures import OrganMeasures, as_delivered
from kpt_dask.resampling.labels_on_scan import Shares, labels_onto
from kpt_dask.runtime import notices
from kpt_dask.scans.pairs import Pair, labelled_organs
from kpt_dask.scans.scan import Scan
from kpt_dask.segmentation import StationResults
from kpt_dask.volumes.conversion import convert_into, label_blocks
from kpt_dask.volumes.omezarr import write_label_image
from kpt_dask.volumes.volume import Volume, open_volume

Planes = Iterator[NDArray[Any]]


class Compared(NamedTuple):
    """A segmentation beside a reference, on the reference's grid.

    Attributes
    ----------
    agreements : dict of str to Agreement
        By annotated organ.
    organs : mapping of str to OrganMeasures
        What the segmentation says of each organ, volumes on that grid.
    """

    agreements: dict[str, Agreement]
    organs: Mapping[str, OrganMeasures]


class Reference(NamedTuple):
    """Known labels of a scan.

    Attributes
    ----------
    annotated : tuple of str
        Organs that they show; the others are not judged.
    organs : OrganTable
        Label values by name.
    labels : zarr.Array (z, y, x)
        The labels on the working grid.
    volumes_ml : dict of str to float
        Volumes of annotated organs, mL.
    compare : callable
        Puts a segmentation beside them.
    """

    annotated: tuple[str, ...]
    organs: OrganTable
    labels: "zarr.Array[Any]"
    volumes_ml: Mapping[str, float]
    compare: Callable[[StationResults], Compared]


class KnownScan(Protocol):
    """A scan whose labels are known."""

    def open_volume(self, group: zarr.Group) -> Volume:
        """Open the scan as a volume; the empty group is prepared for its label map."""
        ...

    def reference(self, volume: Volume, group: zarr.Group) -> Reference:
        """Read the labels; the group may receive them on the working grid."""
        ...


@dataclass(frozen=True, eq=False)
class KnownAtlas:
    """An atlas, judged on its working grid."""

    atlas: Atlas

    def open_volume(self, group: zarr.Group) -> Volume:
        """Open the stored image."""
        group.update_attributes({"ome": self.atlas.image.attrs["ome"]})
        return open_volume(self.atlas.image)

    def reference(self, volume: Volume, group: zarr.Group) -> Reference:
        """Open the stored labels."""
        labels, organs, annotated = (
            self.atlas.labels,
            self.atlas.organ_table,
            self.atlas.annotated,
        )
        expected = _Known.of(planes(labels), volume.grid)

        def compare(found: StationResults) -> Compared:
            agreements, _ = expected.compare(planes(found.labels), annotated, organs)
            self.atlas.ensure_present()
            return Compared(agreements, found.organs)

        return Reference(tuple(annotated), organs, labels, expected.volumes_ml(organs), compare)


@dataclass(frozen=True, eq=False)
class KnownFiles:
    """A scan and a label map in files, judged on the scan's own grid."""

    scan: Scan
    labels: Scan
    annotated: tuple[str, ...]
    store: AtlasStore
    threshold: float
    memory: int | None
    client: Client

    @classmethod
    def of(
        cls, pair: Pair, store: AtlasStore, threshold: float, memory: int | None, client: Client
    ) -> "KnownFiles":
        """Open the files, and read which organs the labels show."""
        scan, labels = open_files(pair, store)
        annotated = labelled_organs(labels, store.organs)
        return cls(scan, labels, annotated, store, threshold, memory, client)

    def open_volume(self, group: zarr.Group) -> Volume:
        """Convert the scan into the group."""
        spacing: float = self.store.parameters["spacing"]
        return convert_into(
            self.scan, group, spacing=spacing, memory=self.memory, client=self.client
        )

    def reference(self, volume: Volume, group: zarr.Group) -> Reference:
        """Read the label map; what is lost on the working grid does not count as annotated."""
        organs = self.store.organs
        blocks = label_blocks(self.labels, volume)
        level = open_array(write_label_image(group, "reference", blocks, volume.grid, organs), "0")
        remaining = survey(level, volume.grid, organs)
        if lost := [name for name in self.annotated if name not in remaining]:
            notices.warn(
                f"{self.labels.path} shows {', '.join(lost)} in so few voxels that none is left at"
                f" {volume.grid.spacing[0]:g} mm: not counted as annotated."
            )
        annotated = tuple(name for name in self.annotated if name in remaining)
        # The scan's voxels, in the order in which the labels are stored.
        grid = self.scan.grid.stored_as(self.labels.grid) or self.scan.grid
        expected = _Known.of(_each_plane(self.labels.label_slabs()), grid)

        def compare(found: StationResults) -> Compared:
            shares = Shares(found.probability, organs.values, self.threshold, volume.grid)
            actual = _each_plane(labels_onto(shares, grid))
            agreements, counts = expected.compare(actual, annotated, organs)
            return Compared(agreements, as_delivered(found.organs, counts, grid))

        return Reference(annotated, organs, level, expected.volumes_ml(organs), compare)


@dataclass(frozen=True, eq=False)
class _Known:
    """A reference on the grid on which it is judged, deflated, with the boxes of its labels."""

    labels: LabelMap
    extents: Mapping[int, tuple[slice, slice, slice]]

    @classmethod
    def of(cls, slices: Planes, grid: Grid) -> "_Known":
        labels = _label_map(slices, grid)
        return cls(labels, labels.extents())

    def volumes_ml(self, organs: OrganTable) -> dict[str, float]:
        """Volume of each organ, mL."""
        volumes = _counts(self.labels, organs) * (self.labels.grid.voxel_volume / 1000)
        return dict(zip(organs.names, volumes.tolist(), strict=True))

    def compare(
        self, slices: Planes, annotated: Iterable[str], organs: OrganTable
    ) -> tuple[dict[str, Agreement], NDArray[np.int64]]:
        """Compare with a segmentation; also count its voxels of each organ."""
        actual = _label_map(slices, self.labels.grid)
        wanted = set(annotated)
        values = [organ.value for organ in organs if organ.name in wanted]
        both = self.extents, actual.extents()
        agreements = compare_labels((self.labels, actual), both, values)
        named = {organ.name: agreements[organ.value] for organ in organs if organ.name in wanted}
        return named, _counts(actual, organs)


def open_files(pair: Pair, store: AtlasStore) -> tuple[Scan, Scan]:
    """Open a scan and its labels, with the values of the store's organs."""
    return open_pair(pair.scan, pair.labels, store.organs, values=pair.values, series=pair.series)


def planes(array: "zarr.Array[Any]", first: int = 0, last: int | None = None) -> Planes:
    """Read planes of a label map, chunk by chunk: all, or those from `first` to before `last`."""
    depth = (array.shards or array.chunks)[0]
    last = array.shape[0] if last is None else last
    return _each_plane(array[z : min(z + depth, last)] for z in range(first, last, depth))


def _each_plane(slabs: Iterable[Any]) -> Planes:
    for slab in slabs:
        yield from np.asarray(slab)


def _counts(labels: LabelMap, organs: OrganTable) -> NDArray[np.int64]:
    """Count the voxels of each organ."""
    return labels.voxels.counts(max(organs.values) + 1)[list(organs.values)]


def _label_map(slices: Planes, grid: Grid) -> LabelMap:
    slabs = (plane[None].astype(np.uint16, copy=False) for plane in slices)
    return LabelMap(PackedLabels.of(grid.shape, np.dtype(np.uint16), slabs), grid, ())
