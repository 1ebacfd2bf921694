"""Annotated scans become atlases: what is stored is what the files say, or nothing is."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import pytest
import zarr
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from atlas_store import (
    AtlasExistsError,
    AtlasIdError,
    AtlasKeypoints,
    AtlasStore,
    OrganTableError,
    ParameterMismatchError,
    load_organs,
    read_keypoints,
)
from atlas_store.keypoints import first_frames
from kpt_dask.atlases import add
from kpt_dask.atlases.add import (
    AddOutcome,
    add_atlas,
    add_folder,
    labels_at,
    store_parameters,
    survey,
)
from kpt_dask.demo.phantom import make_phantom, write_phantom
from kpt_dask.errors import (
    GridMismatchError,
    KptWarning,
    LabelError,
    ParameterError,
    ScanFormatError,
)
from kpt_dask.grid import Grid
from kpt_dask.runtime import notices
from kpt_dask.scans.scan import scan_name
from kpt_dask.segmentation import segment
from kpt_dask.volumes.conversion import AIR_HU
from kpt_dask.volumes.volume import open_volume
from tests.helpers import BODY, BODY_SPACING

ORGANS = load_organs("visceral")
SMALL = (56, 33, 40)
"""At 8 mm."""


@pytest.fixture
def store(tmp_path: Path) -> AtlasStore:
    return AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(8.0))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed in (1, 2):
        scan, labels = (folder / f"s{seed}_{what}.nii.gz" for what in ("ct", "seg"))
        write_phantom(scan, labels, seed, SMALL, 8.0)
    return folder


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def shown(labels: np.ndarray) -> list[str]:
    return [organ.name for organ in ORGANS if (labels == organ.value).any()]


def test_an_atlas_is_what_the_files_say(body_store: AtlasStore) -> None:
    image, labels, grid = make_phantom(2, BODY, BODY_SPACING)
    atlas = body_store["body_2"]
    volume = open_volume(atlas.image)
    assert volume.grid.same_as(grid)
    np.testing.assert_array_equal(volume.levels[0][...], np.maximum(image, AIR_HU))
    np.testing.assert_array_equal(atlas.labels[...], labels)
    assert list(atlas.annotated) == shown(labels)
    assert set(atlas.organs) == set(atlas.annotated)
    assert atlas.info.source == ("body_2_ct.nii.gz", "body_2_seg.nii.gz")
    assert body_store.verify() == []


def test_organs_are_measured(body_store: AtlasStore) -> None:
    _, labels, grid = make_phantom(2, BODY, BODY_SPACING)
    boxes = ndimage.find_objects(labels)
    for name, info in body_store["body_2"].organs.items():
        value = ORGANS.by_name(name).value
        assert info.voxels == np.count_nonzero(labels == value)
        assert info.slices == boxes[value - 1]
        centre = ndimage.center_of_mass(labels == value)
        np.testing.assert_allclose(info.centroid, grid.to_mm(centre), atol=1e-6)


def test_keypoints_carry_the_organ_they_lie_in(body_store: AtlasStore) -> None:
    _, labels, grid = make_phantom(2, BODY, BODY_SPACING)
    atlas = body_store["body_2"]
    keypoints = atlas.keypoints()
    voxel = np.rint(grid.to_index(keypoints.position.values)).astype(int)
    z, y, x = np.clip(voxel, 0, np.array(labels.shape) - 1).T
    np.testing.assert_array_equal(keypoints.label.values, labels[z, y, x])
    assert sum(info.keypoints for info in atlas.organs.values()) > 10


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    chunks=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 2**16),
)
def test_survey_and_labels_do_not_mind_chunks(
    shape: tuple[int, int, int], chunks: tuple[int, int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 0, 1, 2, 10], shape).astype(np.uint8)
    grid = Grid.isotropic(shape, 1.5, (3.0, -7.0, 100.0))
    array = zarr.create_array({}, data=labels, chunks=chunks)
    found = survey(array, grid, ORGANS)
    assert list(found) == shown(labels)
    for name, info in found.items():
        inside = np.argwhere(labels == ORGANS.by_name(name).value)
        assert info.voxels == len(inside)
        assert info.bounding_box == tuple(
            zip(inside.min(axis=0).tolist(), (inside.max(axis=0) + 1).tolist(), strict=True)
        )
        np.testing.assert_allclose(info.centroid, grid.to_mm(inside.mean(axis=0)))
    points = grid.to_mm(rng.uniform(-2, max(shape) + 2, (20, 3))).astype(np.float32)
    voxels = np.argwhere(np.ones(shape, bool))
    nearest = voxels[cdist(points, grid.to_mm(voxels)).argmin(axis=1)]
    np.testing.assert_array_equal(labels_at(points, array, grid), labels[tuple(nearest.T)])


def test_no_keypoint_is_no_label() -> None:
    array = zarr.create_array({}, data=np.ones((3, 3, 3), np.uint8))
    labels = labels_at(np.zeros((0, 3), np.float32), array, Grid.isotropic((3, 3, 3), 1, (0, 0, 0)))
    assert labels.shape == (0,)


def test_annotated_leaves_out_other_organs(store: AtlasStore, small: Path) -> None:
    scan, labels = small / "s1_ct.nii.gz", small / "s1_seg.nii.gz"
    annotated = ["trachea", "liver", "spleen"]
    only_liver = nibabel.load(labels)
    values = np.asarray(only_liver.dataobj)
    values = np.where(values == ORGANS.by_name("spleen").value, 0, values)
    nibabel.save(nibabel.Nifti1Image(values, only_liver.affine), small / "no_spleen.nii.gz")
    info = add_atlas(store, scan, small / "no_spleen.nii.gz", annotated=annotated, atlas_id="a")
    assert info.annotated == ("liver", "spleen", "trachea")
    assert "spleen" not in info.organs
    expected = np.where(
        np.isin(values.T, [ORGANS.by_name(n).value for n in annotated]), values.T, 0
    )
    np.testing.assert_array_equal(store["a"].labels[...], expected)
    assert set(np.unique(store["a"].keypoints().label)) <= set(np.unique(expected))


def test_annotated_must_make_sense(store: AtlasStore, small: Path) -> None:
    scan, labels = small / "s1_ct.nii.gz", small / "s1_seg.nii.gz"
    before = files_of(small.parent)
    with pytest.raises(OrganTableError, match="livr"):
        add_atlas(store, scan, labels, annotated=["livr"])
    nothing = nibabel.load(labels)
    values = (np.asarray(nothing.dataobj) == 1).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(values, nothing.affine), small / "one.nii.gz")
    with pytest.raises(LabelError, match=f"none of the organs.*{ORGANS.by_value(1).name}"):
        add_atlas(store, scan, small / "one.nii.gz", annotated=[ORGANS.by_value(2).name])
    assert files_of(small.parent) == before | {small / "one.nii.gz"}


def test_labels_that_vanish_at_the_stores_spacing_are_refused(
    tmp_path: Path, store: AtlasStore
) -> None:
    values = np.zeros((40, 40, 40), np.uint8)
    values[20, 20, 20] = 1
    hu = np.random.default_rng(0).integers(-1000, 1000, values.shape, np.int16)
    for name, data in (("ct", hu), ("seg", values)):
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")
    with pytest.raises(LabelError, match="left at 8 mm"):
        add_atlas(store, tmp_path / "ct.nii.gz", tmp_path / "seg.nii.gz")
    assert store.ids() == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_add_leaves_nothing(
    store: AtlasStore, small: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    before = files_of(small.parent)

    def interrupted(*_: object) -> None:
        raise failure

    monkeypatch.setattr(add, "write_crop", interrupted)
    with pytest.raises(failure):
        add_atlas(store, small / "s1_ct.nii.gz", small / "s1_seg.nii.gz")
    assert files_of(small.parent) == before
    assert store.ids() == store.verify() == []


def test_an_id_is_taken_once_unless_replaced(store: AtlasStore, small: Path) -> None:
    first, second = (small / "s1_ct.nii.gz", small / "s1_seg.nii.gz"), None
    add_atlas(store, *first)
    assert store.ids() == ["s1_ct"]
    second = (small / "s2_ct.nii.gz", small / "s2_seg.nii.gz")
    with pytest.raises(AtlasExistsError, match="s1_ct"):
        add_atlas(store, *second, atlas_id="s1_ct")
    info = add_atlas(store, *second, atlas_id="s1_ct", replace=True)
    assert info.source == ("s2_ct.nii.gz", "s2_seg.nii.gz")
    assert store["s1_ct"].info.uuid == info.uuid
    assert [one.info.source[0] for one in store.removed()] == ["s1_ct.nii.gz"]
    with pytest.raises(AtlasIdError, match="my scan"):
        add_atlas(store, *first, atlas_id="my scan")


def test_a_store_of_other_parameters_is_refused(tmp_path: Path, small: Path) -> None:
    other = AtlasStore.create(tmp_path / "other", ORGANS, {"spacing": 8.0, "sigma0": 3.0})
    with pytest.raises(ParameterMismatchError, match="sigma0"):
        add_atlas(other, small / "s1_ct.nii.gz", small / "s1_seg.nii.gz")
    with pytest.raises(ParameterMismatchError, match="sigma0"):
        add_folder(other, small)


def test_the_store_decides_how_keypoints_are_described(
    tmp_path: Path, small: Path, one_process: Client
) -> None:
    """Of its add, and of the scans that are segmented from it."""
    made_with = store_parameters(8.0, descriptor="invariant", finer=True)
    other = AtlasStore.create(tmp_path / "other", ORGANS, made_with)
    info = add_atlas(
        other, small / "s1_ct.nii.gz", small / "s1_seg.nii.gz", atlas_id="s1", client=one_process
    )
    assert (info.parameters["descriptor"], info.parameters["finer"]) == ("invariant", True)
    keypoints = AtlasKeypoints.load(other)
    # A keypoint may have several frames, and counts once.
    assert first_frames(keypoints.position, keypoints.scale).size == info.keypoints
    assert keypoints.frame.shape[0] >= info.keypoints
    assert not (keypoints.frame == np.eye(3)).all(axis=(1, 2)).any()
    assert keypoints.scale.min() < 8 * 1.6
    found = segment(small / "s2_ct.nii.gz", other, tmp_path / "o.zarr", client=one_process)
    scan = read_keypoints(zarr.open_group(found.path / "keypoints", mode="r"))
    # Every keypoint counts once, in however many frames.
    assert found.n_keypoints < scan.sizes["keypoint"]
    assert not (scan.frame.values == np.eye(3)).all(axis=(1, 2)).any()


def test_a_store_needs_a_descriptor_that_is_known() -> None:
    with pytest.raises(ParameterError, match="'round' is unknown; use upright or invariant"):
        store_parameters(descriptor="round")


@pytest.mark.parametrize("spacing", [0.0, -1.0, np.nan, np.inf])
def test_a_store_needs_a_spacing(spacing: float) -> None:
    with pytest.raises(ParameterError, match="spacing"):
        store_parameters(spacing)


def test_an_atlas_is_named_after_its_scan() -> None:
    names = {"pt_3.nii.gz": "pt_3", "a.b.NII": "a.b", "x.nii.nii.gz": "x.nii", "y.mha": "y"}
    assert {name: scan_name(Path("folder") / name) for name in names} == names


def test_a_folder_is_added_as_far_as_possible(
    store: AtlasStore, small: Path, one_process: Client
) -> None:
    labels = nibabel.load(small / "s2_seg.nii.gz")
    values = np.asarray(labels.dataobj)
    # s3 has labels that nobody knows, s4 none at all, s5 those of another grid; s10 is good.
    for name, seg in (
        ("s3", np.where(values == 1, 99, values)),
        ("s5", values[1:]),
        ("s10", values),
    ):
        nibabel.save(nibabel.Nifti1Image(seg, labels.affine), small / f"{name}_seg.nii.gz")
    for name in ("s3", "s4", "s5", "s10"):
        (small / f"{name}_ct.nii.gz").write_bytes((small / "s2_ct.nii.gz").read_bytes())
    add_atlas(store, small / "s1_ct.nii.gz", small / "s1_seg.nii.gz", atlas_id="s1")
    told: list[AddOutcome] = []
    outcomes = add_folder(store, small, client=one_process, told=told.append)
    assert told == outcomes
    assert [outcome.id for outcome in outcomes] == ["s1", "s2", "s3", "s4", "s5", "s10"]
    by_id = {outcome.id: outcome for outcome in outcomes}
    assert by_id["s1"] == AddOutcome("s1")
    assert by_id["s2"].info == store["s2"].info
    assert "99" in str(by_id["s3"].problem)
    assert "s4_seg.nii.gz does not exist" in str(by_id["s4"].problem)
    assert "s5_seg.nii.gz does not lie on the grid of" in str(by_id["s5"].problem)
    assert store.ids() == ["s1", "s2", "s10"]
    assert store.verify() == []
    again = add_folder(store, small, client=one_process)
    assert [outcome.info for outcome in again] == [None] * 6


@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.booleans())
@settings(max_examples=4, deadline=None)
def test_labels_may_be_stored_in_another_order_of_axes(
    axes: list[int], flipped: tuple[bool, ...], oblique: bool
) -> None:
    """As a converter of DICOM stores them, which reorders the planes of a series."""
    image, labels, _ = make_phantom(1, SMALL, 8.0)
    ct, seg = image.astype(np.int16).T, labels.astype(np.uint8).T
    affine = np.diag([-8.0, -8, 8, 1])
    if oblique:
        affine[:3, :3] = Rotation.from_euler("xz", [15, 5], degrees=True).as_matrix() * 8
    other = nibabel.Nifti1Image(seg, affine).as_reoriented(
        [(axis, -1 if flip else 1) for axis, flip in zip(axes, flipped, strict=True)]
    )
    with TemporaryDirectory() as folder:
        store = AtlasStore.create(Path(folder, "store"), ORGANS, store_parameters(8.0))
        found = []
        for name, drawn in (("same", nibabel.Nifti1Image(seg, affine)), ("other", other)):
            files = [Path(folder, f"{name}_{what}.nii") for what in ("ct", "seg")]
            nibabel.save(nibabel.Nifti1Image(ct, affine), files[0])
            nibabel.save(drawn, files[1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KptWarning)
                add_atlas(store, *files, atlas_id=name)
            found.append(store[name].labels[...])
        np.testing.assert_array_equal(*found)
        assert found[0].any()


def test_another_file_of_an_id_that_is_there_is_doubted(
    store: AtlasStore, small: Path, one_process: Client
) -> None:
    add_folder(store, small, client=one_process)
    (small / "s1_ct.nii.gz").write_bytes((small / "s2_ct.nii.gz").read_bytes())
    with notices.shown(lambda _: None), notices.recorded() as told:
        outcomes = add_folder(store, small, client=one_process)
    assert outcomes == [AddOutcome("s1"), AddOutcome("s2")]
    [doubt] = told
    assert doubt.startswith(f"{small / 's1_ct.nii.gz'} is not the file that s1 in {store.url} was")


def test_the_grid_error_names_both_files(store: AtlasStore, small: Path) -> None:
    labels = nibabel.load(small / "s1_seg.nii.gz")
    moved = labels.affine.copy()
    moved[0, 3] += 3
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels.dataobj), moved), small / "moved.nii")
    with pytest.raises(GridMismatchError, match=r"moved\.nii does .*/s1_ct\.nii\.gz .*affines"):
        add_atlas(store, small / "s1_ct.nii.gz", small / "moved.nii")


def test_a_ct_is_no_label_map(store: AtlasStore, small: Path) -> None:
    with pytest.raises(ScanFormatError, match="no label map"):
        add_atlas(store, small / "s1_ct.nii.gz", small / "s1_ct.nii.gz")


def test_a_stray_voxel_is_not_annotated(small: Path, tmp_path: Path, one_process: Client) -> None:
    """What is lost on the working grid would vote against the organ everywhere."""
    store = AtlasStore.create(tmp_path / "coarse", ORGANS, store_parameters(16.0))
    image = nibabel.load(small / "s1_seg.nii.gz")
    values = np.asarray(image.dataobj).copy()
    spleen = ORGANS.by_name("spleen").value
    values[values == spleen] = 0
    values[0, 0, 0] = spleen
    stray = tmp_path / "stray.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, image.affine), stray)
    scan = small / "s1_ct.nii.gz"
    with notices.shown(lambda _: None), notices.recorded() as told:
        info = add_atlas(store, scan, stray, client=one_process)
    assert "liver" in info.annotated
    assert "spleen" not in info.annotated
    [sentence] = told
    assert f"{stray} shows spleen in so few voxels that none is left at 16 mm" in sentence
    wanted = ["liver", "spleen"]
    with notices.shown(lambda _: None), notices.recorded() as told:
        info = add_atlas(store, scan, stray, annotated=wanted, replace=True, client=one_process)
    assert info.annotated == ("liver", "spleen")
    assert "spleen" not in info.organs
    assert "kept as annotated" in told[0]


def test_nothing_left_is_no_atlas(small: Path, tmp_path: Path) -> None:
    store = AtlasStore.create(tmp_path / "coarse", ORGANS, store_parameters(16.0))
    image = nibabel.load(small / "s1_seg.nii.gz")
    values = np.zeros(image.shape, np.uint8)
    values[0, 0, 0] = 1
    nibabel.save(nibabel.Nifti1Image(values, image.affine), tmp_path / "stray.nii.gz")
    with pytest.raises(LabelError, match="no organ that is left at 16 mm"):
        add_atlas(store, small / "s1_ct.nii.gz", tmp_path / "stray.nii.gz")


@pytest.mark.parametrize("spacing", [0.05, 150.0, 0.0, float("nan")])
def test_no_store_is_made_that_no_scan_can_be_segmented_from(spacing: float) -> None:
    with pytest.raises(ParameterError, match=r"from 0\.1 to 100 mm"):
        store_parameters(spacing)
