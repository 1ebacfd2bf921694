from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.probability import TILING, Tiling, create_probability
from kpt_dask.organ_transfer.refinement import agreement
from kpt_dask.organ_transfer.refinement.atlas import PER_MM, WEIGHT
from kpt_dask.organ_transfer.warping import block as module
from kpt_dask.organ_transfer.warping import border, schedule
from kpt_dask.organ_transfer.warping.kernels import BorderWeights, relax
from kpt_dask.organ_transfer.warping.schedule import of_scattered, warp_atlases
from kpt_dask.runtime import cluster
from kpt_dask.segmentation import segment
from kpt_dask.volumes.volume import Volume
from tests.helpers import (
    ATLASES,
    ORGANS,
    SCAN,
    SPACING,
    create_labels,
    extents,
    make_store,
    volume_of,
)
from tests.naive import warping
from tests.naive.stations import AnnotatedImage

Array = NDArray[Any]

Matches = tuple[Array, Array]
"""Positions in the scan (m, 3) and translations from the atlas to the scan (m, 3), mm."""


def matches_of(atlas: AnnotatedImage, seed: int, n: int = 25) -> Matches:
    """A smooth field that brings an atlas onto the scan, and wrong matches."""
    rng = np.random.default_rng(seed)
    size = SPACING * np.array(SCAN.image.shape)
    position = SCAN.origin + rng.uniform(0, 1, (n, 3)) * size
    translation = np.array(SCAN.origin) - atlas.origin + rng.uniform(-4, 4, 3)
    bent = 0.15 * (position - SCAN.origin - size / 2)[:, [1, 2, 0]]
    moved = translation + bent + rng.normal(0, 1, (n, 3))
    moved[: n // 5] += rng.normal(0, 40, (n // 5, 3))
    return position.astype(np.float32), moved.astype(np.float32)


def tables(found: Sequence[Matches]) -> tuple[xr.Dataset, xr.Dataset]:
    """The keypoints and matches that the stations before would give."""
    counts = [len(p) for p, _ in found]
    keypoints = xr.Dataset(
        {"position": (("keypoint", "axis"), np.concatenate([p for p, _ in found]))}
    )
    matches = xr.Dataset(
        {
            "keypoint": ("match", np.arange(sum(counts), dtype=np.int32)),
            "atlas": ("match", np.repeat(np.arange(len(found), dtype=np.int32), counts)),
            "translation": (("match", "axis"), np.concatenate([t for _, t in found])),
        }
    )
    return keypoints, matches


def run(
    volume: Volume,
    store: AtlasStore,
    found: Sequence[Matches],
    path: Path,
    client: Client,
    memory: int = 1 << 30,
    tiling: Tiling = TILING,
    options: TransferOptions = DEFAULTS,
) -> tuple[Array, Array]:
    """Probabilities and label map."""
    group = zarr.create_group(str(path))
    probability = create_probability(group, volume.grid, store.organs, "local", tiling)
    labels = create_labels(group, volume.grid.shape, tiling)
    job = TransferJob(volume, store.organs, probability, labels, "local", options, memory, tiling)
    evidence = Evidence(*tables(found), votes=xr.Dataset())
    warp_atlases(job, store.atlases(store.ids()), evidence, client)
    return np.asarray(probability[...]), labels[...]


MATCHES = [matches_of(atlas, i) for i, atlas in enumerate(ATLASES)]
NONE = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
) -> tuple[Array, Array]:
    return run(volume, store, MATCHES, tmp_path_factory.mktemp("w") / "whole", one_process)


@pytest.mark.parametrize(("size", "expected"), [(10, 0.5), (60, 0.5), (90, 0.75), (300, 1)])
def test_neighbours_count_more_in_large_organs(size: float, expected: float) -> None:
    assert border.size_weight(size) == pytest.approx(expected)


def test_neighbours_of_like_intensity_agree() -> None:
    rng = np.random.default_rng(7)
    shares = rng.dirichlet((1, 1, 2), (5, 6, 9)).transpose(3, 0, 1, 2)[:2].astype(np.float32)
    shares[1, :, :3] = 0
    hu = rng.normal(0, 20, (5, 6, 9)).astype(np.float32)
    scale = np.float32(np.log2(np.e) / (2 * border.ALIKE**2))
    weights = BorderWeights(np.float32(0.4), np.float32(0.8 * np.log2(np.e)), scale)
    out = np.empty((2, 3, 5, 6, 9), np.float32)
    relax(shares, hu, weights, 5, out)
    q = out[1]
    found = 0.4 * q[:2] / (0.4 * q[:2] + 0.6 * q[2])
    np.testing.assert_allclose(found, warping.agreed(shares, hu, 0.4, 0.8), atol=1e-5)


def test_shares_are_what_the_equations_say(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    whole: tuple[Array, Array],
) -> None:
    maps = []

    def refine(scan: Any, atlases: Any, fields: Any, out: Any, *others: Any) -> Any:
        """Note what the fields have become."""
        found = schedule_refine(scan, atlases, fields, out, *others)
        lattice = scan.levels[-1].lattice
        said = [np.any([one.labels == o + 1 for one in found], axis=0) for o in range(3)]
        for stored, one in zip(np.asarray(out[...]).astype(float), found, strict=True):
            means = [one.correlation[where].mean() / 255 for where in said]
            values = stored / np.array([PER_MM] * 3 + [WEIGHT])[:, None, None, None]
            values[:3] += np.array(one.base)[:, None, None, None]
            maps.append(warping.Map(values, lattice.step, lattice.first, means))
        return found

    schedule_refine = schedule.refine
    monkeypatch.setattr(schedule, "refine", refine)
    found, labels = run(volume, store, MATCHES, tmp_path / "noted", one_process)
    np.testing.assert_array_equal(found, whole[0])
    boxes = [
        {ORGANS.by_name(n).value: info.bounding_box for n, info in extents(a.labels).items()}
        for a in ATLASES
    ]
    nus = [organ.nu for organ in ORGANS]
    where = warping.inside(SCAN, ATLASES, boxes, MATCHES, ORGANS.values, SPACING)
    voted = warping.shares(SCAN, ATLASES, maps, where, ORGANS.values, nus, SPACING)
    # Its organs are small.
    gamma = 0.5
    expected = warping.by_hu(voted, SCAN.image, 0.3 * gamma)
    expected = warping.agreed(expected, SCAN.image, 0.4, gamma**2)
    expected = np.where(where, expected, 0)
    assert (expected > 0).sum() > 1000
    # A voxel between two of an atlas may fall to either, and neighbours ask one another.
    close = abs(found - expected) < 2e-3
    assert close.mean() > 0.99
    ordered = np.sort(expected, axis=0)
    sure = close.all(axis=0) & (abs(ordered[-1] - 0.4) > 4e-3)
    sure &= (ordered[-1] - ordered[-2] > 4e-3) | (ordered[-1] < 0.4)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(labels[sure], warping.decide(expected, ORGANS.values)[sure])
    assert set(np.unique(labels)) == {0, *ORGANS.values}


def test_organs_of_scattered_atlases_grow_unless_a_threshold_is_given(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    whole: tuple[Array, Array],
) -> None:
    share = of_scattered(np.array([np.nan, 0.5, 0.35, 0.25]))
    np.testing.assert_allclose(share, [0, 0, 0, 2 * np.log(0.35 / 0.65 * 3)], rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(agreement, "best_shares", lambda _: np.array([0.25, np.nan, 0.4]))
    own = TransferOptions(threshold=0.4)
    found, labels = run(volume, store, MATCHES, tmp_path / "own", one_process, options=own)
    np.testing.assert_array_equal(found, whole[0])
    np.testing.assert_array_equal(labels, whole[1])
    _, labels = run(volume, store, MATCHES, tmp_path / "scattered", one_process)
    grown, *others = ((labels == v).sum() / (whole[1] == v).sum() for v in ORGANS.values)
    assert grown > 1.1
    assert all(0.9 < one < 1.01 for one in others)


@pytest.mark.parametrize(
    ("tiling", "pieces"),
    [
        (Tiling((8, 8, 8), (8, 8, 8)), 50),
        (Tiling((8, 12, 10), (4, 6, 5)), 7),
        (Tiling((1, 128, 128), (1, 64, 64)), 1000),
        (Tiling((128, 9, 128), (64, 3, 64)), 3),
    ],
)
def test_blocks_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    whole: tuple[Array, Array],
    tiling: Tiling,
    pieces: int,
) -> None:
    monkeypatch.setattr(border, "TILE", tiling.chunk)
    monkeypatch.setattr(schedule, "BLOCKS_PER_TEAM", pieces)
    monkeypatch.setattr(module, "ATLASES_PER_THREAD", 2)
    monkeypatch.setattr(module, "CELLS_PER_JOB", 3)
    for memory in (1 << 30, 1):
        path = tmp_path / f"{memory}"
        found, labels = run(volume, store, MATCHES, path, one_process, memory, tiling)
        np.testing.assert_array_equal(found.view(np.uint32), whole[0].view(np.uint32))
        np.testing.assert_array_equal(labels, whole[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_team_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    whole: tuple[Array, Array],
    threads: int,
) -> None:
    """So few cells and atlases are done together that threads wait for one another."""
    monkeypatch.setattr(module, "ATLASES_PER_THREAD", 1)
    monkeypatch.setattr(module, "CELLS_PER_JOB", 2)
    with cluster.local(threads) as client:
        found, labels = run(volume, store, MATCHES, tmp_path / "own", client)
    np.testing.assert_array_equal(found.view(np.uint32), whole[0].view(np.uint32))
    np.testing.assert_array_equal(labels, whole[1])


def test_an_atlas_that_cannot_be_read_ends_the_transfer(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
) -> None:
    def gone(*_: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr(module, "read_planes", gone)
    with pytest.raises(OSError, match="gone"):
        run(volume, store, MATCHES, tmp_path / "p", one_process)


def test_without_matches_everything_is_background(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client
) -> None:
    found, labels = run(volume, store, [NONE] * 3, tmp_path / "p", one_process)
    assert not found.any()
    assert not labels.any()


def test_atlases_that_lie_elsewhere_have_no_say(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client
) -> None:
    position, translation = MATCHES[2]
    far = position, translation + np.float32(500)
    found, _ = run(volume, store, [MATCHES[0], MATCHES[1], far], tmp_path / "far", one_process)
    none, _ = run(volume, store, [MATCHES[0], MATCHES[1], NONE], tmp_path / "none", one_process)
    np.testing.assert_array_equal(found, none)


def test_left_and_right_never_swap(tmp_path: Path, one_process: Client) -> None:
    """The body is its own mirror image, and 40 % of the matches take one side for the other."""
    shape = (24, 24, 60)
    image, labels = np.full(shape, -100.0), np.zeros(shape, np.uint16)
    for value, x in ((5, slice(6, 18)), (2, slice(42, 54))):
        labels[6:18, 6:18, x] = value
        image[6:18, 6:18, x] = 40
    body = AnnotatedImage(image, labels, (0.0, 0.0, 0.0))
    made = make_store(tmp_path / "s", [body] * 3)
    scan = volume_of(tmp_path / "v.zarr", body)
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        position = rng.uniform(0, 1, (80, 3)) * SPACING * (np.array(shape) - 1)
        translation = rng.normal(0, 2, (80, 3))
        wrong = rng.random(80) < 0.4
        translation[wrong, 2] += 2 * position[wrong, 2] - SPACING * (shape[2] - 1)
        found.append((position.astype(np.float32), translation.astype(np.float32)))
    probability, decided = run(scan, made, found, tmp_path / "p", one_process)
    assert not (decided[..., 30:] == 5).any()
    assert not (decided[..., :30] == 2).any()
    for value in (5, 2):
        both = ((decided == value) & (labels == value)).sum()
        assert 2 * both / ((decided == value).sum() + (labels == value).sum()) > 0.9
    assert probability.max() <= 1


def middle(path: Path, folder: Path) -> Path:
    """Write what a scan shows of the 56 voxels in the middle across the body."""
    image: Any = nib.load(path)
    across = image.header.get_zooms() > np.min(image.header.get_zooms())
    window = tuple(slice(36, 92) if wide else slice(None) for wide in across)
    nib.save(image.slicer[window], folder / path.name)
    return folder / path.name


def test_real_heads_are_segmented(openkbp: Path, tmp_path: Path, one_process: Client) -> None:
    made = AtlasStore.create(tmp_path / "s", load_organs("openkbp"), store_parameters())
    for name in ("pt_3", "pt_13", "pt_15", "pt_20", "pt_24", "pt_26"):
        scan, labels = (
            middle(openkbp / f"{name}_{what}.nii.gz", tmp_path) for what in ("ct", "seg")
        )
        add_atlas(made, scan, labels, atlas_id=name, client=one_process)
    out = tmp_path / "out.zarr"
    result = segment(
        tmp_path / "pt_3_ct.nii.gz", made, out, mode="local", exclude=["pt_3"], client=one_process
    )
    reference = np.asarray(made["pt_3"].labels[...])
    found = np.asarray(zarr.open_group(str(out), mode="r")["labels/organs/0"][...])  # type: ignore[index]
    dice = []
    for name in made["pt_3"].annotated:
        value = made.organs.by_name(name).value
        both = ((found == value) & (reference == value)).sum()
        total = (found == value).sum() + (reference == value).sum()
        dice.append(2 * both / total)
    assert np.mean(dice) > 0.5
    assert min(dice) > 0.3
    assert "among the atlases" in result.open_probability().attrs["description"]
    group = zarr.open_group(str(out), mode="r")
    assert group.attrs["kpt"]["segmentation"]["mode"] == "local"  # type: ignore[index, call-overload]
