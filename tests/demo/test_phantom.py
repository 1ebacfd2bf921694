"""Phantoms: the same bytes however they are cut, and anatomy where it belongs."""

import gzip
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from atlas_store import AtlasStore
from atlas_store.organs import load_organs
from kpt_dask.demo.phantom import (
    NOISE,
    make_phantom,
    phantom_grid,
    phantom_slab,
    write_phantom,
)
from kpt_dask.demo.phantom.subject import Subject, make_subject
from kpt_dask.demo.run import demo
from kpt_dask.errors import OutputExistsError, ParameterError
from kpt_dask.grid import Grid

ORGANS = load_organs("visceral")
WHOLE = (150, 65, 80)
"""The whole body at 4 mm."""
SMALL = (75, 33, 40)
"""At 8 mm."""
# Millilitres, generous around what adults have; the lungs are cut by the field of view.
PLAUSIBLE = {
    "liver": (800, 2000),
    "spleen": (90, 300),
    "aorta": (100, 320),
    "trachea": (10, 60),
    "lung_right": (900, 3000),
    "lung_left": (800, 3000),
    "kidney_right": (90, 250),
    "kidney_left": (90, 250),
    "psoas_right": (90, 350),
    "psoas_left": (90, 350),
}

Body = tuple[NDArray[np.int16], NDArray[np.uint8], Grid]


@pytest.fixture(scope="module")
def body() -> Body:
    return make_phantom(3, WHOLE, 4.0)


def centre(labels: NDArray[Any], name: str, grid: Grid) -> NDArray[np.float64]:
    return grid.to_mm(np.argwhere(labels == ORGANS.by_name(name).value).mean(axis=0))


def test_the_default_is_the_whole_body_at_2_mm() -> None:
    grid = phantom_grid()
    assert grid.shape == (300, 130, 160)
    np.testing.assert_allclose(grid.spacing, 2)
    np.testing.assert_allclose(grid.to_mm((-0.5, -0.5, -0.5)), (0, -130, -160))
    np.testing.assert_allclose(phantom_grid(WHOLE, 4.0).to_mm((-0.5,) * 3), (0, -130, -160))


def test_a_phantom_is_hu_and_labels_on_its_grid(body: Body) -> None:
    image, labels, grid = body
    assert image.shape == labels.shape == grid.shape == WHOLE
    assert image.dtype == np.int16
    assert labels.dtype == np.uint8
    np.testing.assert_allclose(grid.affine, phantom_grid(WHOLE, 4.0).affine)
    assert image.min() >= -1024
    assert 500 < image.max() <= 3071


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 40), max_size=4), nx=st.integers(1, 21)
)
def test_any_split_gives_the_same_bytes(seed: int, cuts: list[int], nx: int) -> None:
    shape = (40, 17, nx)
    whole = phantom_slab(seed, shape, 15.0, 0, 40)
    edges = [0, *sorted(cuts), 40]
    parts = [phantom_slab(seed, shape, 15.0, a, b) for a, b in pairwise(edges)]
    for n in range(2):
        np.testing.assert_array_equal(np.concatenate([part[n] for part in parts]), whole[n])


def test_the_same_seed_gives_the_same_bytes_after_others(body: Body) -> None:
    for seed in range(10, 15):
        phantom_slab(seed, SMALL, 8.0, 0, 1)
    again = phantom_slab(3, WHOLE, 4.0, 50, 60)
    np.testing.assert_array_equal(again[0], body[0][50:60])
    np.testing.assert_array_equal(again[1], body[1][50:60])


def test_boxes_cut_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(1, 12), (2, 85), (3, 125)]
    boxed = [phantom_slab(seed, WHOLE, 4.0, z, z + 2) for seed, z in parts]

    def unbounded(seed: int, height: float, size_spread: float) -> Subject:
        made = make_subject(seed, height, size_spread)
        far = np.full_like(made.low, 1e6)
        return made._replace(low=-far, high=far)

    monkeypatch.setattr("kpt_dask.demo.phantom.make_subject", unbounded)
    for (seed, z), (image, labels) in zip(parts, boxed, strict=True):
        whole = phantom_slab(seed, WHOLE, 4.0, z, z + 2)
        np.testing.assert_array_equal(labels, whole[1])
        np.testing.assert_array_equal(image, whole[0])


@pytest.mark.parametrize("seed", range(20, 23))
def test_every_subject_has_all_organs_in_plausible_size(seed: int) -> None:
    _, labels, grid = make_phantom(seed, WHOLE, 4.0)
    for name, (least, most) in PLAUSIBLE.items():
        ml = (labels == ORGANS.by_name(name).value).sum() * grid.voxel_volume / 1000
        assert least < ml < most, (name, ml)
    assert set(np.unique(labels)) == {0, *ORGANS.values}


def test_subjects_differ_in_form_and_contrast() -> None:
    subjects = [make_phantom(seed, SMALL, 8.0) for seed in range(5)]
    centres = np.array([centre(labels, "liver", grid) for _, labels, grid in subjects])
    assert (centres.std(axis=0) > 2).all()
    aorta = [image[labels == 3].mean() for image, labels, _ in subjects]
    assert np.std(aorta) > 20


def test_bodies_differ_in_size_as_told() -> None:
    """Extents of the liver along each axis: a spread of 12 % makes them that different."""
    extents: dict[float, list[NDArray[Any]]] = {0.0: [], 0.12: []}
    for spread, found in extents.items():
        for seed in range(20):
            _, labels, _ = make_phantom(seed, (75, 40, 50), 8.0, size_spread=spread)
            where = np.argwhere(labels == ORGANS.by_name("liver").value)
            found.append(np.ptp(where, axis=0) + 1)
    without, with_ = (np.std(np.log(extents[spread]), axis=0) for spread in extents)
    assert (np.sqrt(with_**2 - without**2) > 0.07).all()
    assert (np.sqrt(with_**2 - without**2) < 0.2).all()


def test_tissues_have_their_hu(body: Body) -> None:
    image, labels, _ = body

    def median(name: str) -> float:
        return float(np.median(image[labels == ORGANS.by_name(name).value]))

    assert median("lung_right") < -800
    assert median("lung_left") < -800
    assert median("trachea") < -900
    assert 50 < median("liver") < 140
    assert 40 < median("psoas_left") < 80
    assert median("aorta") > median("liver")


def test_the_noise_is_as_told_and_correlated_within_a_plane(body: Body) -> None:
    air = body[0][:, :6, :12].astype(float)
    air -= air.mean()
    assert air.std() == pytest.approx(NOISE, rel=0.06)
    variance = (air**2).mean()
    assert 0.4 < (air[:, :, 1:] * air[:, :, :-1]).mean() / variance < 0.9
    assert 0.4 < (air[:, 1:] * air[:, :-1]).mean() / variance < 0.9
    assert abs((air[1:] * air[:-1]).mean() / variance) < 0.1


def test_each_organ_is_one_piece(body: Body) -> None:
    for organ in ORGANS:
        pieces, n = ndimage.label(body[1] == organ.value, np.ones((3, 3, 3)))
        sizes = ndimage.sum_labels(pieces > 0, pieces, np.arange(1, n + 1))
        assert sizes.max() > 0.97 * sizes.sum(), organ.name


def test_organs_are_on_their_side_in_lps(body: Body) -> None:
    _, labels, grid = body
    at = {organ.name: centre(labels, organ.name, grid) for organ in ORGANS}
    z, y, x = range(3)
    for pair in ("lung", "kidney", "psoas"):
        assert at[f"{pair}_right"][x] < -20 < 20 < at[f"{pair}_left"][x]
    assert at["liver"][x] < -20
    assert at["spleen"][x] > 20
    assert at["trachea"][z] > at["lung_left"][z] > at["liver"][z] > at["psoas_left"][z]
    assert at["kidney_left"][y] > at["liver"][y]


def test_half_the_spacing_shows_the_same_anatomy() -> None:
    _, fine, fine_grid = make_phantom(3, (150, 66, 80), 4.0)
    _, coarse, coarse_grid = make_phantom(3, SMALL, 8.0)
    for organ in ORGANS:
        share = (fine == organ.value).reshape(75, 2, 33, 2, 40, 2).mean(axis=(1, 3, 5))
        a, b = share > 0.5, coarse == organ.value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.75, organ.name
        # A grid off by half a coarse voxel would shift everything by 4 mm.
        shift = centre(fine, organ.name, fine_grid) - centre(coarse, organ.name, coarse_grid)
        assert np.abs(shift).max() < 3, organ.name


def test_a_tall_volume_repeats_the_body_with_the_same_density() -> None:
    _, labels, _ = make_phantom(4, (350, 33, 40), 8.0)
    bodies = labels[: 4 * 87].reshape(4, 87, 33, 40)
    for organ in ORGANS:
        counts = (bodies == organ.value).sum(axis=(1, 2, 3))
        assert counts.min() > 0.4 * counts.max(), organ.name
    assert not np.array_equal(bodies[0], bodies[1])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_files_hold_the_phantom_in_its_place(tmp_path: Path, suffix: str) -> None:
    ct, seg = tmp_path / f"ct{suffix}", tmp_path / f"seg{suffix}"
    write_phantom(ct, seg, 5, SMALL, 8.0)
    image, labels, grid = make_phantom(5, SMALL, 8.0)
    for path, expected in ((ct, image), (seg, labels)):
        file: Any = nibabel.load(path)
        assert file.get_data_dtype() == expected.dtype
        np.testing.assert_array_equal(np.asarray(file.dataobj).T, expected)
        x, y, z = file.affine[:3] @ (7, 5, 3, 1)
        np.testing.assert_allclose((z, -y, -x), grid.to_mm((3, 5, 7)), atol=1e-4)
        np.testing.assert_allclose(file.get_qform(), file.affine, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in "ab":
        write_phantom(tmp_path / f"{name}.nii.gz", tmp_path / f"{name}l.nii.gz", 1, (4, 8, 9), 30.0)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert len(gzip.decompress((tmp_path / "a.nii.gz").read_bytes())) == 352 + 2 * 4 * 8 * 9


def test_an_existing_file_stays_and_nothing_is_left(tmp_path: Path) -> None:
    seg = tmp_path / "seg.nii.gz"
    seg.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"seg\.nii\.gz"):
        write_phantom(tmp_path / "ct.nii.gz", seg, 1, SMALL, 8.0)
    assert [p.name for p in tmp_path.iterdir()] == ["seg.nii.gz"]


def test_existing_files_are_replaced_where_told(tmp_path: Path) -> None:
    ct, seg = tmp_path / "ct.nii", tmp_path / "seg.nii"
    write_phantom(ct, seg, 1, (4, 8, 9), 30.0)
    once = ct.read_bytes()
    write_phantom(ct, seg, 2, (4, 8, 9), 30.0, overwrite=True)
    assert ct.read_bytes() != once
    write_phantom(ct, seg, 1, (4, 8, 9), 30.0, overwrite=True)
    assert ct.read_bytes() == once
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_made_is_refused() -> None:
    for shape, spacing in (((0, 3, 3), 2.0), ((3, 3, 3), 0.0), ((3, 3, 3), float("nan"))):
        with pytest.raises(ParameterError, match="positive"):
            phantom_grid(shape, spacing)
    with pytest.raises(ParameterError, match="planes"):
        phantom_slab(1, SMALL, 8.0, 3, 76)


def test_the_demo_leaves_a_folder_alone_that_is_not_its_own(
    body_store: AtlasStore, tmp_path: Path
) -> None:
    """As one that somebody works in, who has named things as the manual does."""
    shutil.copytree(body_store.url, tmp_path / "atlases")
    (tmp_path / "scan.nii.gz").write_text("a scan")
    with pytest.raises(OutputExistsError, match="other atlases than phantoms"):
        demo(tmp_path)
    assert (tmp_path / "scan.nii.gz").read_text() == "a scan"
