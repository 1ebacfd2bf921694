import errno
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05.image import Image
from scipy.spatial.transform import Rotation

from atlas_store.arrays.regions import blocks_of, write_region
from kpt_dask.errors import (
    GridMismatchError,
    OutputExistsError,
    ParameterError,
    ScanFormatError,
    ScanNotFoundError,
)
from kpt_dask.grid import Grid
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert, convert_into, label_blocks
from kpt_dask.volumes.omezarr import write_label_image
from kpt_dask.volumes.scale_space import octave_shapes
from kpt_dask.volumes.volume import Volume, create_volume, open_volume

AFFINE = np.array([[-2, 0, 0, 30], [0, -2, 0, 20], [0, 0, 2, -50], [0, 0, 0, 1.0]])
"""RAS; in LPS all axes run with the world's."""


@dataclass(frozen=True)
class Organ:
    value: int
    name: str
    colour: tuple[int, int, int]


ORGANS = [Organ(3, "liver", (200, 100, 0)), Organ(40, "spleen", (0, 0, 255))]


def save(path: Path, values: Any, affine: Any = AFFINE) -> Path:
    """Write (k, j, i) values."""
    nib.save(nib.Nifti1Image(np.asarray(values).T, affine), path)
    return path


def ct(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(-1000, 2000, shape).astype(np.int16)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    path = save(tmp_path / "ct.nii.gz", ct((70, 30, 33)))
    return convert(open_scan(path), tmp_path / "ct.zarr")


def test_a_scan_on_the_working_grid_is_stored_as_it_is(volume: Volume) -> None:
    level = volume.levels[0]
    assert level.dtype == np.float32
    np.testing.assert_array_equal(level[:], ct((70, 30, 33)))
    np.testing.assert_allclose(volume.grid.origin, (-50, -20, -30))
    assert volume.grid.same_as(volume.source_grid, tolerance=1e-9)


def test_levels_are_the_octaves(volume: Volume) -> None:
    assert [level.shape for level in volume.levels] == octave_shapes((70, 30, 33))


def test_level_0_holds_whole_hu(tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[:3, :3] *= 0.7
    path = save(tmp_path / "ct.nii", ct((40, 30, 33)), affine)
    values = convert(open_scan(path), tmp_path / "ct.zarr").levels[0][:]
    np.testing.assert_array_equal(values, np.rint(values))
    assert not np.signbit(values[values == 0]).any()


def test_absurd_values_are_clipped(tmp_path: Path) -> None:
    values = np.full((4, 4, 4), 1e9, np.float32)
    values[0] = -1e9
    level = convert(open_scan(save(tmp_path / "a.nii", values)), tmp_path / "a.zarr").levels[0]
    np.testing.assert_array_equal(np.unique(level[:]), (-1000, 32000))


@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
@settings(max_examples=8, deadline=None)
def test_any_stored_order_gives_the_same_volume(
    tmp_path_factory: pytest.TempPathFactory, axes: list[int], flipped: tuple[bool, ...]
) -> None:
    folder = tmp_path_factory.mktemp("volume")
    image = nib.Nifti1Image(ct((9, 11, 14)).T, AFFINE @ np.diag([0.5, 0.75, 1.5, 1]))
    turns = np.stack([axes, [-1 if f else 1 for f in flipped]], axis=1)
    nib.save(image, folder / "plain.nii.gz")
    nib.save(image.as_reoriented(turns), folder / "turned.nii.gz")
    plain = convert(open_scan(folder / "plain.nii.gz"), folder / "plain.zarr")
    turned = convert(open_scan(folder / "turned.nii.gz"), folder / "turned.zarr")
    assert turned.grid.same_as(plain.grid, tolerance=1e-5)
    np.testing.assert_array_equal(turned.levels[0][:], plain.levels[0][:])


def oblique() -> np.ndarray:
    affine = np.eye(4)
    turn = Rotation.from_euler("zyx", [20, -10, 15], degrees=True)
    affine[:3, :3] = turn.as_matrix() * (1.0, 1.2, 2.5)
    affine[:3, 3] = (4, 5, 6)
    return affine


def test_an_oblique_scan_shows_the_world_where_it_is(tmp_path: Path) -> None:
    index = np.moveaxis(np.indices((50, 45, 20)), 0, -1)
    place = index @ oblique()[:3, :3].T + oblique()[:3, 3]
    ramp = (place @ (5, -7, 11)).astype(np.float32)
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(ramp, oblique()), path)
    scan = open_scan(path)
    volume = convert(scan, tmp_path / "ct.zarr")
    mm = volume.grid.to_mm(np.moveaxis(np.indices(volume.grid.shape), 0, -1))
    expected = mm @ (11, 7, -5)
    index = scan.grid.to_index(mm)
    inside = ((index > 4) & (index < np.array(scan.grid.shape) - 5)).all(axis=-1)
    assert inside.sum() > 1000
    assert np.abs(volume.levels[0][:] - expected)[inside].max() <= 0.7
    assert [level.path for level in volume.levels] == ["0", "1"]


def test_a_real_scan_converts(openkbp: Path, tmp_path: Path) -> None:
    scan = open_scan(openkbp / "pt_100_ct.nii.gz")
    volume = convert(scan, tmp_path / "ct.zarr")
    index = np.array([80, 160, 150])
    stored = np.rint(scan.grid.to_index(volume.grid.to_mm(index))).astype(int)
    values = np.concatenate(list(scan.slabs()))
    around = values[tuple(slice(n - 2, n + 3) for n in stored)]
    got = volume.levels[0][80, 160, 150]
    assert around.min() <= got <= around.max()
    assert volume.levels[0].shape == volume.grid.shape == (160, 325, 325)


def test_the_image_is_valid_ome_zarr(volume: Volume) -> None:
    image = Image.from_zarr(volume.group)
    (multiscale,) = image.ome_attributes.multiscales
    assert [axis.name for axis in multiscale.axes] == ["z", "y", "x"]
    assert {axis.unit for axis in multiscale.axes} == {"millimeter"}
    assert [axis.orientation["value"] for axis in multiscale.axes] == [  # type: ignore[attr-defined]
        "inferior-to-superior",
        "anterior-to-posterior",
        "right-to-left",
    ]
    for level, dataset in enumerate(multiscale.datasets):
        scale, translation = dataset.coordinateTransformations
        assert scale.scale == [2.0 * 2**level] * 3
        np.testing.assert_allclose(translation.translation, (-50, -20, -30))


def test_levels_may_lie_elsewhere(volume: Volume, tmp_path: Path) -> None:
    """In some outputs and stores all levels but the first lie in a group."""
    path = tmp_path / "ct.zarr"
    volume.group.create_group("coarse")
    (path / "1").rename(path / "coarse" / "1")
    ome: Any = volume.group.attrs["ome"]
    ome["multiscales"][0]["datasets"][1]["path"] = "coarse/1"
    volume.group.update_attributes({"ome": ome})
    again = open_volume(path)
    assert again.levels[1].path == "coarse/1"
    assert again.levels[1].shape == volume.levels[1].shape


def test_xarray_opens_a_level(volume: Volume, tmp_path: Path) -> None:
    others = [level.basename for level in volume.levels[1:]]
    data = xr.open_zarr(tmp_path / "ct.zarr", consolidated=False, drop_variables=others)
    assert data["0"].dims == ("z", "y", "x")
    np.testing.assert_array_equal(data["0"], volume.levels[0][:])


def test_attributes_say_where_the_volume_comes_from(volume: Volume) -> None:
    attributes: Any = volume.group.attrs.asdict()
    assert attributes["encoding-type"] == "kpt-volume"
    assert attributes["encoding-version"] == "1"
    assert attributes["kpt"]["source"]["file"] == "ct.nii.gz"
    assert attributes["kpt"]["source"]["shape"] == [70, 30, 33]
    assert attributes["kpt"]["spacing"] == 2.0
    assert attributes["kpt"]["software"].startswith("kpt-dask ")


def test_a_volume_opens_as_it_was_made(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(ct((20, 21, 22)), oblique()), tmp_path / "ct.nii")
    scan = open_scan(tmp_path / "ct.nii")
    made = convert(scan, tmp_path / "ct.zarr", spacing=3.0)
    again = open_volume(tmp_path / "ct.zarr")
    assert again.grid.same_as(scan.grid.working(3.0), tolerance=1e-9)
    assert again.source_grid.same_as(scan.grid, tolerance=1e-9)
    assert [level.shape for level in again.levels] == [level.shape for level in made.levels]
    with pytest.raises(ValueError, match="read-only"):
        again.levels[0][:] = 0


def test_a_scan_converts_into_a_group_of_a_store(tmp_path: Path) -> None:
    scan = open_scan(save(tmp_path / "ct.nii", ct((10, 11, 12))))
    store = zarr.create_group(str(tmp_path / "store"), zarr_format=3)
    convert_into(scan, store.create_group("atlases/a/image"), spacing=2.0)
    volume = open_volume(store["atlases/a/image"])  # type: ignore[arg-type]
    np.testing.assert_array_equal(volume.levels[0][:], ct((10, 11, 12)))


def test_memory_that_tasks_cannot_share_is_refused(tmp_path: Path) -> None:
    scan = open_scan(save(tmp_path / "ct.nii", ct((10, 11, 12))))
    with pytest.raises(ParameterError, match="MemoryStore"):
        convert_into(scan, zarr.create_group(zarr.storage.MemoryStore()), spacing=2.0)


def test_an_existing_output_is_kept_until_the_new_one_is_complete(tmp_path: Path) -> None:
    good = open_scan(save(tmp_path / "good.nii", ct((10, 11, 12))))
    values = ct((10, 11, 12)).astype(np.float32)
    out = tmp_path / "out.zarr"
    convert(good, out)
    values[9, 9, 9] = np.nan
    bad = open_scan(save(tmp_path / "bad.nii", values))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputExistsError, match=r"out\.zarr exists"):
        convert(good, out)
    with pytest.raises(ScanFormatError):
        convert(bad, out, overwrite=True)
    with pytest.raises(ScanFormatError):
        convert(bad, tmp_path / "new.zarr")
    assert sorted(os.listdir(tmp_path)) == before
    np.testing.assert_array_equal(open_volume(out).levels[0][:], ct((10, 11, 12)))
    convert(good, out, spacing=4.0, overwrite=True)
    assert open_volume(out).grid.spacing[0] == 4.0
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("spacing", [0.0, -1.0, np.nan, np.inf])
def test_a_useless_spacing_is_refused(tmp_path: Path, spacing: float) -> None:
    scan = open_scan(save(tmp_path / "ct.nii", ct((10, 11, 12))))
    with pytest.raises(ParameterError, match="spacing"):
        convert(scan, tmp_path / "ct.zarr", spacing=spacing)
    assert os.listdir(tmp_path) == ["ct.nii"]


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanNotFoundError, match=r"a\.zarr does not exist"):
        open_volume(tmp_path / "a.zarr")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ScanNotFoundError, match=r"a\.txt"):
        open_volume(tmp_path / "a.txt")
    group = zarr.create_group(str(tmp_path / "b.zarr"))
    with pytest.raises(ScanFormatError, match=r"b\.zarr is something unknown"):
        open_volume(tmp_path / "b.zarr")
    group.update_attributes({"encoding-type": "kpt-volume", "encoding-version": "9"})
    with pytest.raises(ScanFormatError, match="kpt-volume version 9"):
        open_volume(group)
    group.update_attributes({"encoding-version": "1"})
    with pytest.raises(ScanFormatError, match="damaged"):
        open_volume(group)


@pytest.mark.parametrize(("largest", "dtype"), [(40, np.uint8), (300, np.uint16)])
def test_a_label_image_is_valid_and_complete(volume: Volume, largest: int, dtype: Any) -> None:
    organs = [ORGANS[0], Organ(largest, "spleen", (0, 0, 255))]
    labels = np.random.default_rng(0).choice([0, 3, largest], volume.grid.shape).astype(np.uint16)
    write_label_image(volume.group, "organs", labels, volume.grid, organs)
    image = Image.from_zarr(volume.group)
    assert image.labels is not None
    assert image.labels.label_paths == ["organs"]
    metadata = image.labels.get_image_labels_group("organs").ome_attributes.image_label
    assert metadata is not None
    assert [p.name for p in metadata.properties or ()] == ["liver", "spleen"]  # type: ignore[attr-defined]
    assert [c.rgba for c in metadata.colors or ()] == [(200, 100, 0, 255), (0, 0, 255, 255)]
    assert metadata.source is not None
    assert metadata.source.image == "../../"
    for level in range(len(volume.levels)):
        stored = volume.group[f"labels/organs/{level}"]
        assert isinstance(stored, zarr.Array)
        assert stored.dtype == dtype
        step = 2**level
        np.testing.assert_array_equal(stored[:], labels[::step, ::step, ::step])


def test_label_images_stand_side_by_side(volume: Volume) -> None:
    labels = np.zeros(volume.grid.shape, np.uint8)
    write_label_image(volume.group, "b", labels, volume.grid, ORGANS)
    write_label_image(volume.group, "a", labels, volume.grid, ORGANS)
    image = Image.from_zarr(volume.group)
    assert image.labels is not None
    assert image.labels.label_paths == ["a", "b"]


def test_a_scans_labels_come_onto_its_volume(volume: Volume, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice([0, 3, 40], (70, 30, 33)).astype(np.uint8)
    scan = open_scan(save(tmp_path / "seg.nii.gz", labels))
    blocks = label_blocks(scan, volume)
    group = write_label_image(volume.group, "organs", blocks, volume.grid, ORGANS)
    np.testing.assert_array_equal(group["0"][:], labels)  # type: ignore[index]


def test_oblique_labels_come_onto_the_volume(tmp_path: Path) -> None:
    image = np.zeros((50, 45, 20), np.int16)
    image[15:35, 10:30, 5:15] = 3
    for name in ("ct.nii", "seg.nii"):
        nib.save(nib.Nifti1Image(image, oblique()), tmp_path / name)
    scan = open_scan(tmp_path / "ct.nii")
    group = zarr.create_group(str(tmp_path / "volume"), zarr_format=3)
    volume = convert_into(scan, group, spacing=1.0)
    blocks = label_blocks(open_scan(tmp_path / "seg.nii"), volume)
    labels = write_label_image(group, "organs", blocks, volume.grid, ORGANS)["0"][:]  # type: ignore[index]
    assert set(np.unique(labels)) == {0, 3}
    index = scan.grid.to_index(volume.grid.to_mm(np.argwhere(labels == 3)))
    assert (index > (4, 9, 14)).all()
    assert (index < (15, 30, 35)).all()
    assert (labels == 3).sum() == pytest.approx(20 * 20 * 10 * scan.grid.voxel_volume, rel=0.05)
    assert "own_axes" not in group


def test_labels_on_another_grid_are_refused(volume: Volume, tmp_path: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 1
    scan = open_scan(save(tmp_path / "seg.nii.gz", np.zeros((70, 30, 33), np.uint8), moved))
    with pytest.raises(GridMismatchError, match=r"seg\.nii\.gz"):
        next(label_blocks(scan, volume))


def array(shape: tuple[int, ...], chunks: Any, shards: Any = None) -> zarr.Array[Any]:
    return zarr.create_array(
        zarr.storage.MemoryStore(), shape=shape, dtype="u1", chunks=chunks, shards=shards
    )


def test_misaligned_writes_are_refused() -> None:
    """Two writers of one chunk each write back the other's old voxels."""
    target = array((10, 10), (4, 5))
    write_region(target, (slice(4, 8), slice(0, 5)), np.ones((4, 5), np.uint8))
    write_region(target, (slice(8, 10), slice(5, 10)), np.ones((2, 5), np.uint8))
    for bad in [
        (slice(0, 3), slice(0, 5)),
        (slice(2, 8), slice(0, 5)),
        (slice(8, 12), slice(0, 5)),
        (slice(0, 0), slice(0, 5)),
        (slice(0, 4, 2), slice(0, 5)),
        (slice(0, 4),),
    ]:
        with pytest.raises(ValueError, match="region"):
            write_region(target, bad, np.ones((4, 5), np.uint8))
    with pytest.raises(ValueError, match="fill"):
        write_region(target, (slice(0, 4), slice(0, 5)), np.ones((4, 1), np.uint8))


def test_writes_are_aligned_with_shards_where_there_are_any() -> None:
    target = array((12,), (2,), (6,))
    with pytest.raises(ValueError, match="multiples of 6"):
        write_region(target, (slice(0, 2),), np.ones(2, np.uint8))
    write_region(target, (slice(6, 12),), np.ones(6, np.uint8))


@given(
    st.integers(1, 30), st.integers(1, 8), st.integers(1, 3), st.integers(0, 30), st.integers(1, 30)
)
@settings(deadline=None)
def test_a_write_touches_no_unit_in_part(
    n: int, chunk: int, per: int, start: int, size: int
) -> None:
    unit = chunk * per
    target = array((n,), (chunk,), (unit,))
    stop = start + size
    owners = {voxel // unit for voxel in range(start, min(stop, n))}
    owned = {v for v in range(n) if v // unit in owners}
    region = (slice(start, stop),)
    if stop <= n and owned == set(range(start, stop)):
        write_region(target, region, np.full(size, 7, np.uint8))
        np.testing.assert_array_equal(np.flatnonzero(target[:] == 7), np.arange(start, stop))
    else:
        with pytest.raises(ValueError, match="region"):
            write_region(target, region, np.full(size, 7, np.uint8))


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 5)] * 3))
@settings(deadline=None)
def test_blocks_cover_an_array_once(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    seen = np.zeros(shape, int)
    for region in blocks_of(shape, block):
        seen[region] += 1
    assert (seen == 1).all()


def test_a_volume_can_be_made_empty(tmp_path: Path) -> None:
    grid = Grid.isotropic((30, 31, 32), 2.0, (1, 2, 3))
    made = create_volume(tmp_path / "a.zarr", grid, grid, name="phantom")
    assert open_volume(tmp_path / "a.zarr").grid.same_as(grid)
    assert [level.shape for level in made.levels] == octave_shapes(grid.shape)


def test_what_a_full_disk_stopped_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (70, 60, 66)).astype(np.int16)
    scan = open_scan(save(tmp_path / "ct.nii", noise))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path))) as failed:
            convert(scan, tmp_path / "o.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.errno == errno.EFBIG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ct.nii"]


def test_little_memory_gives_the_same_levels_and_too_little_is_refused(tmp_path: Path) -> None:
    scan = open_scan(save(tmp_path / "ct.nii.gz", ct((70, 60, 66))))
    plain = convert(scan, tmp_path / "plain.zarr")
    little = convert(scan, tmp_path / "little.zarr", memory=2 << 20)
    for one, other in zip(plain.levels, little.levels, strict=True):
        np.testing.assert_array_equal(np.asarray(one[...]), np.asarray(other[...]))
    with pytest.raises(ParameterError, match="--memory"):
        convert(scan, tmp_path / "none.zarr", memory=1000)
    assert not (tmp_path / "none.zarr").exists()
