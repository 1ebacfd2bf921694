"""What tests of several rooms build: volumes, stores, and where the pieces of an atlas lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from atlas_store import AtlasStore, Organ, OrganInfo, OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import write_region
from atlas_store.crop import write_crop
from atlas_store.organ_strips import write_strips
from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.probability import TILING, Tiling
from kpt_dask.scans.label_header import header_like
from kpt_dask.scans.nifti_writer import NiftiWriter, pack
from kpt_dask.scans.scan import Scan
from kpt_dask.volumes.blur import blur_planes, blur_scratch
from kpt_dask.volumes.omezarr import write_label_image
from kpt_dask.volumes.volume import Volume, create_volume
from tests.naive.stations import AnnotatedImage, Points

Array = NDArray[Any]

BODY = (110, 65, 80)
BODY_SPACING = 4.0
"""The phantoms of the tests: quick, and still with most organs."""

SPACING = 2.0
ORGANS = OrganTable(
    (
        Organ(5, "liver", 50.0, (9, 9, 9)),
        Organ(2, "lung_left", 300.0, (9, 9, 9)),
        Organ(300, "spleen", 80.0, (9, 9, 9)),
    )
)


def integer_noise(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Whole numbers of HU, float32."""
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.float32)


def blurred(volume: np.ndarray, taps: np.ndarray, batch: int = 1) -> np.ndarray:
    """All planes through `blur_planes`, from a ring as small as may be."""
    n, r = volume.shape[0], taps.size - 1
    ring = np.full((min(2 * r + batch, n), *volume.shape[1:]), np.nan, np.float32)
    scratch = blur_scratch(batch, volume.shape[2], r)
    out = np.empty_like(volume)
    filled = 0
    for first in range(0, n, batch):
        last = min(first + batch, n)
        for plane in range(filled, min(last + r, n)):
            ring[plane % len(ring)] = volume[plane]
        filled = min(last + r, n)
        blur_planes(ring, first, last - first, n, taps, scratch, out)
    return out


def random_points(rng: np.random.Generator, n: int, spread: float = 40.0) -> Points:
    """Positions on a grid of 1/4 mm, so that float32 holds every distance squared exactly."""
    return Points(
        position=np.rint(rng.uniform(-spread, spread, (n, 3)) * 4).astype(np.float32) / 4,
        scale=rng.choice(np.float32([1.5, 3, 4.2, 6, 12, 12.1]), n),
        sign=rng.choice(np.int8([-1, 1]), n),
        descriptor=rng.permuted(np.tile(np.arange(64, dtype=np.uint8), (n, 1)), axis=1),
        label=rng.choice(np.uint16([0, 1, 7]), n),
    )


def random_image(seed: int, shape: tuple[int, ...], origin: Any, labels: Sequence[int]) -> Any:
    """Noisy soft tissue with one box with a hole for each label."""
    rng = np.random.default_rng(seed)
    image = rng.normal(40, 60, shape).round()
    label = np.zeros(shape, np.uint16)
    for value in labels:
        low = [int(rng.integers(0, n // 2)) for n in shape]
        box = tuple(slice(a, a + n // 3) for a, n in zip(low, shape, strict=True))
        label[box] = value
        label[tuple(slice(s.start, s.start + 1) for s in box)] = 0
    return AnnotatedImage(image, label, origin)


SCAN = random_image(0, (21, 18, 26), (10.0, -4.0, 7.0), ())
ATLASES = [
    random_image(1, (19, 20, 22), (-100.0, 3.0, 0.0), (5, 2)),
    # Of the second, the first organ is not annotated.
    random_image(2, (16, 17, 25), (55.5, -40.0, 20.25), (2, 300)),
    random_image(3, (20, 12, 20), (0.0, 0.0, 0.0), (5, 300, 2)),
]


def extents(labels: Array) -> dict[str, OrganInfo]:
    found = {}
    for organ in ORGANS:
        voxels = np.argwhere(labels == organ.value)
        if len(voxels):
            z, y, x = zip(voxels.min(0).tolist(), (voxels.max(0) + 1).tolist(), strict=True)
            found[organ.name] = OrganInfo(len(voxels), (z, y, x), (0.0, 0.0, 0.0))
    return found


def no_keypoints() -> xr.Dataset:
    return xr.Dataset(
        {
            "position": (("keypoint", "axis"), np.zeros((0, 3), np.float32)),
            "scale": ("keypoint", np.zeros(0, np.float32)),
            "sign": ("keypoint", np.zeros(0, np.int8)),
            "response": ("keypoint", np.zeros(0, np.float32)),
            "descriptor": (("keypoint", "bin"), np.zeros((0, 64), np.uint8)),
            "frame": (("keypoint", "direction", "axis"), np.zeros((0, 3, 3), np.float32)),
            "octave": ("keypoint", np.zeros(0, np.uint8)),
            "label": ("keypoint", np.zeros(0, np.uint16)),
        }
    )


def volume_of(group: zarr.Group | Path, image: AnnotatedImage) -> Volume:
    z, y, x = image.image.shape
    grid = Grid.isotropic((z, y, x), SPACING, image.origin)
    volume = create_volume(group, grid, grid, name="ct.nii.gz")
    for level in volume.levels:
        chunk_io.write_empty(level)
    write_region(volume.levels[0], (slice(0, z), slice(0, y), slice(0, x)), image.image)
    return volume


def make_store(path: Path, atlases: Sequence[AnnotatedImage]) -> AtlasStore:
    """What adding atlases leaves in a store, but for keypoints."""
    made = AtlasStore.create(path, ORGANS, {})
    for i, atlas in enumerate(atlases):
        with made.draft(f"a{i}", {}) as draft:
            image = draft.group.create_group("image")
            volume = volume_of(image, atlas)
            write_label_image(image, "organs", atlas.labels, volume.grid, ORGANS)
            found = extents(atlas.labels)
            labels = image["labels/organs/0"]
            assert isinstance(labels, zarr.Array)
            what = found, ORGANS
            stored = write_crop(draft.group, volume.levels[0], labels, *what, SPACING, -1000)
            write_strips(draft.group, *stored, *what)
            draft.commit(
                no_keypoints(),
                annotated=list(found),
                organs=found,
                shape=volume.grid.shape,
                spacing=(SPACING,) * 3,
                origin=(atlas.origin[0], atlas.origin[1], atlas.origin[2]),
                source=["ct.nii.gz"],
            )
    return made


SMALL = Tiling((8, 8, 16), (8, 8, 8))
"""Many small shards, so that there are many blocks."""


def create_labels(group: zarr.Group, shape: tuple[int, ...], tiling: Tiling = TILING) -> Any:
    """A label map of which a slab has several chunks, however these are cut."""
    sizes = [min(n, size) for n, size in zip(shape, tiling.shard, strict=True)]
    chunks = (sizes[0], *(size // 2 if size % 2 == 0 else size for size in sizes[1:]))
    return group.create_array("labels", shape=shape, dtype=np.uint16, chunks=chunks, fill_value=0)


def write_labels(path: Path, scan: Scan, labels: Array) -> None:
    """Write a label map on a scan's own grid."""
    with NiftiWriter(path, header_like(scan.file.header, labels.shape, labels.dtype)) as file:
        file.write(pack(labels))


def data_of(store: Path) -> Path:
    """Folder of the only atlas of a store."""
    [data] = (path for path in (store / "atlases").iterdir() if path.is_dir())
    return data


def files(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def clear(shares: Array, within: float = 1e-5) -> Array:
    """Voxels whose label does not hang on a rounding: far from a tie and from the threshold."""
    ordered = np.sort(shares, axis=0)
    return (np.abs(ordered[-1] - 0.15) > within) & (
        (ordered[-1] - ordered[-2] > within) | (ordered[-1] < 0.1)
    )


def onto(atlas: int, shift: Sequence[int]) -> tuple[float, float, float]:
    """Translation that moves an atlas's voxel 0 to this voxel of the scan."""
    z, y, x = (
        s + SPACING * d - a
        for s, d, a in zip(SCAN.origin, shift, ATLASES[atlas].origin, strict=True)
    )
    return z, y, x


def stored(values: np.ndarray, chunks: tuple[int, int, int] = (32, 32, 32)) -> "zarr.Array":
    """Values as a float32 array in memory, in chunks."""
    array = zarr.create_array(
        zarr.storage.MemoryStore(),
        shape=values.shape,
        chunks=tuple(min(n, chunk) for n, chunk in zip(values.shape, chunks, strict=True)),
        dtype=np.float32,
    )
    array[:] = values
    return array
