import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dask.array
import nibabel as nib
import numpy as np
import pytest
import zarr
from distributed import Client
from numpy.typing import NDArray
from ome_zarr_models.v05.image import Image
from ome_zarr_models.v05.image_label import ImageLabel

from atlas_store import (
    AtlasNotFoundError,
    AtlasStore,
    AtlasStoreError,
    EmptyStoreError,
    load_organs,
    read_keypoints,
)
from kpt_dask import segmentation
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import make_phantom
from kpt_dask.errors import (
    KptError,
    KptWarning,
    OutputExistsError,
    ParameterError,
    ScanFormatError,
    ScanNotFoundError,
)
from kpt_dask.exports import export
from kpt_dask.matching.first_pass import match
from kpt_dask.options import MODES, TransferOptions
from kpt_dask.scans.scan import open_scan
from kpt_dask.segmentation import Segmentation, open_probability, segment

Array = NDArray[Any]

SPACING = 4.0
SHAPE = (110, 65, 80)
ORGANS = load_organs("visceral")
SEED = 4
"""Of the scan; those of the atlases come before it."""
ATLASES = ("body_1", "body_2", "body_3")


def affine_of(spacing: Any) -> Array:
    """RAS affine of (x, y, z) whose voxel corner lies where the phantoms' does."""
    x, y, z = np.broadcast_to(spacing, 3)
    corner = np.array([160.0, 130.0, 0.0])
    affine = np.diag([-x, -y, z, 1.0])
    affine[:3, 3] = corner + np.array([-x, -y, z]) / 2
    return affine


def save(path: Path, values: Array, affine: Array) -> Path:
    """Write (z, y, x) values."""
    nib.save(nib.Nifti1Image(values.T, affine), path)
    return path


def load(path: Path) -> Array:
    """(z, y, x) values of a file as it is stored."""
    return np.asarray(nib.load(path).dataobj).T


def dice(a: Array, b: Array) -> float:
    return float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def label_map(out: Path) -> Array:
    array = zarr.open_group(str(out), mode="r")["labels/organs/0"]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


@pytest.fixture(scope="module")
def store(body_store: AtlasStore) -> AtlasStore:
    return body_store


@pytest.fixture(scope="module")
def ct(bodies: Path) -> Path:
    return bodies / f"body_{SEED}_ct.nii.gz"


@pytest.fixture(scope="module")
def truth(bodies: Path) -> Array:
    return load(bodies / f"body_{SEED}_seg.nii.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("segmentation")


@pytest.fixture(scope="module")
def plain(folder: Path, ct: Path, store: AtlasStore, one_process: Client) -> Segmentation:
    out, labels = folder / "plain.zarr", folder / "plain.nii.gz"
    return segment(ct, store, out, labels=labels, client=one_process)


def test_organs_are_found(plain: Segmentation, truth: Array) -> None:
    labels = label_map(plain.path)
    for name in ("lung_left", "lung_right", "liver"):
        value = ORGANS.by_name(name).value
        assert dice(labels == value, truth == value) > 0.8, name


def test_what_is_told_is_what_is_there(plain: Segmentation) -> None:
    labels = label_map(plain.path)
    assert plain.atlases == ATLASES
    assert list(plain.organs) == list(ORGANS.names)
    for organ in ORGANS:
        expected = (labels == organ.value).sum() * SPACING**3 / 1000
        assert plain.organs[organ.name].volume_ml == pytest.approx(expected)
    group = zarr.open_group(str(plain.path), mode="r")
    keypoints = read_keypoints(group["keypoints"])  # type: ignore[arg-type]
    assert keypoints.sizes["keypoint"] == plain.n_keypoints > 20
    assert group["matches/keypoint"].shape == (plain.n_matches,)  # type: ignore[union-attr]
    votes = np.asarray(group["votes/label"][...])  # type: ignore[index]
    for organ in ORGANS:
        assert plain.organs[organ.name].votes == (votes == organ.value).sum()
    assert plain.seconds > 0


def test_the_labels_lie_on_the_grid_of_the_scan(
    folder: Path, ct: Path, plain: Segmentation
) -> None:
    image: Any = nib.load(folder / "plain.nii.gz")
    scan: Any = nib.load(ct)
    assert image.shape == scan.shape
    np.testing.assert_allclose(image.affine, scan.affine)
    # The scan's grid is the working grid, so nothing was resampled.
    np.testing.assert_array_equal(load(folder / "plain.nii.gz"), label_map(plain.path))


def test_the_output_is_valid_ome_zarr(plain: Segmentation) -> None:
    group = zarr.open_group(str(plain.path), mode="r")
    image = Image.from_zarr(group)
    assert image.labels is not None
    assert image.labels.attributes.ome.labels == ["organs"]
    label = ImageLabel.from_zarr(group["labels/organs"])  # type: ignore[arg-type]
    properties = label.ome_attributes.image_label.properties
    assert properties is not None
    assert [p.label_value for p in properties] == list(ORGANS.values)
    assert len(label.ome_attributes.multiscales[0].datasets) == len(
        image.ome_attributes.multiscales[0].datasets
    )
    assert {"probability", "keypoints", "matches", "votes"} <= set(group)


def test_provenance(plain: Segmentation) -> None:
    group = zarr.open_group(str(plain.path), mode="r")
    kpt: Any = group.attrs["kpt"]
    assert kpt["source"]["file"] == f"body_{SEED}_ct.nii.gz"
    assert kpt["spacing"] == SPACING
    said = kpt["segmentation"]
    assert (said["encoding-type"], said["encoding-version"]) == ("kpt-segmentation", "1")
    assert said["mode"] == "local"
    assert said["transfer"]["threshold"] == MODES["local"].threshold
    assert said["transfer"]["threshold_given"] is False
    assert set(said["transfer"]["nu"]) == set(ORGANS.names)
    assert said["atlases"] == list(ATLASES)
    told = {name: asdict(organ) for name, organ in plain.organs.items()}
    assert said["organs"] == json.loads(json.dumps(told))
    assert said["parameters"]["sigma0"] == 1.6
    assert {"dask", "numba", "numpy", "zarr"} <= set(said["versions"])
    for name, revision in (("keypoints", "2"), ("matches", "1"), ("votes", "1")):
        attributes = dict(group[name].attrs)
        assert attributes["encoding-type"] == f"kpt-{name}"
        assert attributes["encoding-version"] == revision
    assert group["votes"].attrs["organs"] == list(ORGANS.names)
    # Neither where the files lay nor who ran it is anybody else's business.
    assert str(plain.path.parent) not in json.dumps(kpt)


def test_probabilities_are_read_only_where_they_are_looked_at(
    ct: Path, plain: Segmentation
) -> None:
    probability = plain.open_probability()
    assert isinstance(probability.data, dask.array.Array)
    assert probability.dims == ("organ", "z", "y", "x")
    assert probability.shape == (len(ORGANS), *SHAPE)
    assert probability.dtype == np.float32
    assert probability.organ.values.tolist() == list(ORGANS.names)
    grid = open_scan(ct).grid
    corner = [float(probability[axis][0]) for axis in "zyx"]
    opposite = [float(probability[axis][-1]) for axis in "zyx"]
    np.testing.assert_allclose(corner, grid.to_mm((0, 0, 0)))
    np.testing.assert_allclose(opposite, grid.to_mm(np.array(SHAPE) - 1))
    values = probability.values
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-5
    decided = np.array(ORGANS.values)[values.argmax(axis=0)]
    decided[values.max(axis=0) < np.float32(MODES["local"].threshold)] = 0
    np.testing.assert_array_equal(decided, label_map(plain.path))
    # In millimetres: the middle of the liver's labels is likely liver.
    z, y, x = np.argwhere(label_map(plain.path) == ORGANS.by_name("liver").value).mean(axis=0)
    at = grid.to_mm((z, y, x))
    near = (
        open_probability(plain.path)
        .sel(organ="liver")
        .sel(z=at[0], y=at[1], x=at[2], method="nearest")
    )
    assert float(near) > MODES["local"].threshold


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"select": 2.0}, r"select must be a whole number of at least 1, not 2\.0\.$"),
        ({"memory": "2GiB"}, r"memory in bytes must be a whole number of at least 1, not '2GiB'"),
        ({"client": "tcp://head:8786"}, "'tcp://head:8786' is no Dask client"),
    ],
)
def test_options_of_a_wrong_type_are_refused(
    ct: Path, store: AtlasStore, tmp_path: Path, wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ParameterError, match=sentence):
        segment(ct, store, tmp_path / "out.zarr", **wrong)
    assert not list(tmp_path.iterdir())


def test_probabilities_that_are_gone_are_not_zero(plain: Segmentation, tmp_path: Path) -> None:
    shutil.copytree(plain.path, tmp_path / "moved.zarr")
    probability = open_probability(tmp_path / "moved.zarr")
    shutil.rmtree(tmp_path / "moved.zarr")
    with pytest.raises(ScanNotFoundError, match="was deleted or replaced since it was opened"):
        probability.sum().compute()


@pytest.mark.parametrize(
    ("axes", "flips"), [((0, 1, 2), (0, 1, 2)), ((2, 0, 1), (1,)), ((1, 2, 0), ())]
)
def test_any_order_of_the_axes_gives_the_same_labels(
    tmp_path: Path,
    ct: Path,
    plain: Segmentation,
    store: AtlasStore,
    one_process: Client,
    axes: tuple[int, ...],
    flips: tuple[int, ...],
) -> None:
    turns = np.array([(axis, -1 if a in flips else 1) for a, axis in enumerate(axes)])
    image: Any = nib.load(ct)
    nib.save(image.as_reoriented(turns), tmp_path / "ct.nii.gz")
    labels = tmp_path / "labels.nii.gz"
    found = segment(
        tmp_path / "ct.nii.gz", store, tmp_path / "o.zarr", labels=labels, client=one_process
    )
    np.testing.assert_array_equal(label_map(found.path), label_map(plain.path))
    expected: Any = nib.load(plain.path.parent / "plain.nii.gz")
    turned: Any = nib.load(labels)
    np.testing.assert_array_equal(
        np.asarray(turned.dataobj), np.asarray(expected.as_reoriented(turns).dataobj)
    )
    np.testing.assert_allclose(turned.affine, expected.as_reoriented(turns).affine, atol=1e-4)


@pytest.mark.parametrize("fine", [0, 2])
def test_anisotropic_voxels_give_the_same_labels_up_to_resampling(
    tmp_path: Path, ct: Path, store: AtlasStore, one_process: Client, fine: int
) -> None:
    # In mode organ: a hundred keypoints are too few for fields that hardly change.
    plain = segment(ct, store, tmp_path / "plain.zarr", mode="organ", client=one_process)
    image, _, _ = make_phantom(SEED, (220, 130, 160), SPACING / 2)
    # Fine along one axis only: average pairs along the others.
    for axis in {0, 1, 2} - {fine}:
        even, odd = (np.take(image, range(k, image.shape[axis], 2), axis) for k in (0, 1))
        image = ((even.astype(np.float32) + odd) / 2).round().astype(np.int16)
    spacing = [SPACING / 2 if a == fine else SPACING for a in (2, 1, 0)]
    path = save(tmp_path / "ct.nii.gz", image, affine_of(spacing))
    labels = tmp_path / "labels.nii.gz"
    found = segment(
        path, store, tmp_path / "o.zarr", mode="organ", labels=labels, client=one_process
    )
    expected = label_map(plain.path)
    assert label_map(found.path).shape == expected.shape
    own = load(labels)
    assert own.shape == image.shape
    np.testing.assert_allclose(nib.load(labels).affine, affine_of(spacing))  # type: ignore[attr-defined]
    for name in ("lung_left", "lung_right", "liver"):
        value = ORGANS.by_name(name).value
        assert dice(label_map(found.path) == value, expected == value) > 0.9, name
        assert dice(own == value, np.repeat(expected, 2, axis=fine) == value) > 0.9, name
    # Whoever measures the file gets the volumes that were told.
    assert (plain.volume_grid, found.volume_grid) == ("working", "scan")
    zooms = nib.load(labels).header.get_zooms()  # type: ignore[attr-defined]
    kpt: Any = zarr.open_group(str(found.path), mode="r").attrs["kpt"]
    said = kpt["segmentation"]
    assert said["volume_grid"] == "working"
    for name, organ in found.organs.items():
        value = ORGANS.by_name(name).value
        voxels = (own == value).sum()
        assert organ.volume_ml == pytest.approx(voxels * np.prod(zooms) / 1000, rel=1e-6), name
        assert organ.interval_ml[0] <= organ.volume_ml <= organ.interval_ml[1]
        working = (label_map(found.path) == value).sum() * SPACING**3 / 1000
        assert said["organs"][name]["volume_ml"] == pytest.approx(working), name


def test_a_third_of_the_scan_shows_its_organs(
    tmp_path: Path,
    ct: Path,
    truth: Array,
    plain: Segmentation,
    store: AtlasStore,
    one_process: Client,
) -> None:
    first = 48
    part = slice(first, first + SHAPE[0] // 3)
    affine = affine_of(SPACING)
    affine[2, 3] += first * SPACING
    path = save(tmp_path / "ct.nii.gz", load(ct)[part], affine)
    found = segment(path, store, tmp_path / "o.zarr", client=one_process)
    labels = label_map(found.path)
    assert labels.shape == truth[part].shape
    whole = []
    for organ in ORGANS:
        planes = np.flatnonzero((truth == organ.value).any(axis=(1, 2)))
        if planes.size and part.start < planes[0] and planes[-1] < part.stop - 1:
            whole.append(organ.name)
            reached = dice(labels == organ.value, truth[part] == organ.value)
            # At 4 mm phantoms have few keypoints: what counts is what the whole scan reaches.
            before = dice(label_map(plain.path) == organ.value, truth == organ.value)
            assert reached > max(0.75 * before, 0.25), organ.name
    assert set(whole) >= {"kidney_left", "kidney_right"}


def test_processes_and_a_second_run_give_the_same_bytes(
    tmp_path: Path, ct: Path, plain: Segmentation, store: AtlasStore, two_processes: Client
) -> None:
    labels = tmp_path / "labels.nii.gz"
    found = segment(ct, store, tmp_path / "o.zarr", labels=labels, client=two_processes)
    expected, actual = files(plain.path), files(found.path)
    assert sorted(actual) == sorted(expected)
    assert [name for name in expected if actual[name] != expected[name]] == []
    assert labels.read_bytes() == (plain.path.parent / "plain.nii.gz").read_bytes()


def test_scans_are_mapped_over_a_cluster(
    tmp_path: Path, ct: Path, plain: Segmentation, store: AtlasStore, two_processes: Client
) -> None:
    """Each task segments with its own thread alone."""
    outs = [tmp_path / f"{n}.zarr" for n in range(3)]
    found = two_processes.gather(
        two_processes.map(segment, [ct] * 3, [store.url] * 3, outs, pure=False)
    )
    assert [one.path for one in found] == outs
    for out in outs:
        assert files(out) == files(plain.path)


def test_a_second_run_on_threads_gives_the_same_bytes(
    tmp_path: Path, ct: Path, plain: Segmentation, store: AtlasStore, one_process: Client
) -> None:
    # Little memory: other blocks.
    found = segment(ct, store, tmp_path / "o.zarr", memory=1 << 25, client=one_process)
    assert files(found.path) == files(plain.path)


def test_atlases_can_be_left_out(
    tmp_path: Path, ct: Path, store: AtlasStore, one_process: Client
) -> None:
    found = segment(
        ct, store, tmp_path / "o.zarr", exclude=["body_1", "body_3"], client=one_process
    )
    assert found.atlases == ("body_2",)


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """Content of outputs that are there already."""
    zarr.create_group(tmp_path / "o.zarr", attributes={"encoding-type": "kpt-volume"})
    (tmp_path / "o.zarr" / "0").write_text("precious")
    (tmp_path / "o.nii.gz").write_text("precious")
    return files(tmp_path)


def test_overwriting_replaces_the_old(
    tmp_path: Path,
    ct: Path,
    store: AtlasStore,
    one_process: Client,
    old: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = segment(
        ct,
        store,
        "o.zarr",
        labels="o.nii.gz",
        overwrite=True,
        client=one_process,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.nii.gz", "o.zarr"]
    # Found again from any folder.
    monkeypatch.chdir("/")
    assert found.open_probability().shape == (len(ORGANS), *SHAPE)
    np.testing.assert_array_equal(load(tmp_path / "o.nii.gz"), label_map(tmp_path / "o.zarr"))


def test_outputs_of_one_run_name_it(folder: Path, plain: Segmentation) -> None:
    header: Any = nib.load(folder / "plain.nii.gz").header
    kpt: Any = zarr.open_group(str(plain.path), mode="r").attrs["kpt"]
    assert header["descrip"].item().decode() == f"kpt-dask run {kpt['run']}"


def broken(store: AtlasStore, folder: Path, what: str) -> AtlasStore:
    """A copy of the store in which an array of the atlases cannot be read."""
    shutil.copytree(store.url, folder / what)
    chunks = [p for p in (folder / what).glob(f"atlases/*/{what}/**/c/**/*") if p.is_file()]
    assert chunks
    for chunk in chunks:
        chunk.write_bytes(b"no chunk")
    return AtlasStore.open(folder / what)


def test_a_scan_that_ends_early_leaves_the_old(
    tmp_path: Path,
    ct: Path,
    store: AtlasStore,
    one_process: Client,
    old: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("truncated") / "ct.nii.gz"
    data = ct.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3])
    with pytest.raises(ScanFormatError):
        segment(
            path,
            store,
            tmp_path / "o.zarr",
            labels=tmp_path / "o.nii.gz",
            overwrite=True,
            client=one_process,
        )
    assert files(tmp_path) == old


@pytest.mark.parametrize(("mode", "what"), [("organ", "strips"), ("local", "surroundings")])
def test_an_atlas_that_cannot_be_read_leaves_the_old(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    ct: Path,
    store: AtlasStore,
    one_process: Client,
    old: dict[str, bytes],
    mode: str,
    what: str,
) -> None:
    with pytest.raises((AtlasStoreError, RuntimeError)):
        segment(
            ct,
            broken(store, tmp_path_factory.mktemp("broken"), what),
            tmp_path / "o.zarr",
            mode=mode,
            labels=tmp_path / "o.nii.gz",
            overwrite=True,
            client=one_process,
        )
    assert files(tmp_path) == old


@pytest.mark.parametrize("there", ["o.zarr", "o.nii.gz"])
def test_an_output_that_exists_is_refused_before_the_work(
    tmp_path: Path, ct: Path, store: AtlasStore, one_process: Client, there: str
) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(OutputExistsError, match=there):
        segment(ct, store, tmp_path / "o.zarr", labels=tmp_path / "o.nii.gz", client=one_process)
    assert files(tmp_path) == {there: b"precious"}


def refusals(
    folder: Path, ct: Path, store: AtlasStore
) -> dict[str, tuple[Callable[[Path], Any], type[Exception], str]]:
    empty = folder / "empty"
    if not empty.exists():
        AtlasStore.create(empty, ORGANS, store_parameters(SPACING))
        parameters = store_parameters(SPACING)
        AtlasStore.create(folder / "other", ORGANS, parameters | {"sigma0": 9})
        AtlasStore.create(folder / "round", ORGANS, parameters | {"descriptor": "round"})
    return {
        "mode": (lambda out: segment(ct, store, out, mode="magic"), ParameterError, "'magic'"),
        "exclude": (lambda out: segment(ct, store, out, exclude=["x"]), ParameterError, "x"),
        "all": (
            lambda out: segment(ct, store, out, exclude=list(ATLASES)),
            EmptyStoreError,
            "no atlas",
        ),
        "empty": (lambda out: segment(ct, empty, out), EmptyStoreError, "no atlas"),
        "other": (lambda out: segment(ct, folder / "other", out), ParameterError, "sigma0"),
        "round": (lambda out: segment(ct, folder / "round", out), ParameterError, "descriptor"),
        "scan": (lambda out: segment(folder / "x.nii", store, out), ScanNotFoundError, "x.nii"),
    }


@pytest.mark.parametrize("what", ["mode", "exclude", "all", "empty", "other", "round", "scan"])
def test_what_cannot_be_done_is_refused_in_one_sentence(
    folder: Path, tmp_path: Path, ct: Path, store: AtlasStore, what: str
) -> None:
    call, kind, message = refusals(folder, ct, store)[what]
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path / "o.zarr")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_a_scan_without_any_keypoint_is_background(
    tmp_path: Path, store: AtlasStore, one_process: Client
) -> None:
    path = save(tmp_path / "ct.nii.gz", np.full((20, 18, 16), -1000, np.int16), affine_of(SPACING))
    found = segment(path, store, tmp_path / "o.zarr", client=one_process)
    assert (found.n_keypoints, found.n_matches) == (0, 0)
    assert not label_map(found.path).any()
    assert not found.open_probability().values.any()
    assert {organ.volume_ml for organ in found.organs.values()} == {0}


def test_what_is_doubtful_stays_with_the_output(
    tmp_path: Path, bodies: Path, store: AtlasStore, plain: Segmentation, one_process: Client
) -> None:
    group = zarr.open_group(str(plain.path), mode="r")
    assert plain.warnings == ()
    assert group.attrs["kpt"]["warnings"] == []  # type: ignore[call-overload, index]
    image: Any = nib.load(bodies / "body_1_ct.nii.gz")
    raw = nib.Nifti1Image((np.asarray(image.dataobj) + 1024).clip(0), image.affine)
    nib.save(raw, tmp_path / "raw.nii.gz")
    with pytest.warns(KptWarning):
        found = segment(tmp_path / "raw.nii.gz", store, tmp_path / "o.zarr", client=one_process)
    assert "as if about 1024 had been added" in found.warnings[0]
    attributes: Any = zarr.open_group(str(found.path), mode="r").attrs["kpt"]
    assert attributes["warnings"] == list(found.warnings)


def test_nothing_found_is_no_plain_success(
    tmp_path: Path, store: AtlasStore, one_process: Client
) -> None:
    air = np.random.default_rng(0).normal(-990, 5, (30, 30, 30)).astype(np.int16)
    air[:6, :6, :6] = 100
    air[:3, :3, :3] = 300
    scan = save(tmp_path / "air.nii.gz", air, affine_of(SPACING))
    with pytest.warns(KptWarning, match="no organ found"):
        found = segment(scan, store, tmp_path / "o.zarr", client=one_process)
    [sentence] = found.warnings
    assert str(scan) in sentence
    assert f"{found.n_keypoints} keypoints" in sentence


def test_a_scan_that_is_an_atlas_is_told_so(
    tmp_path: Path, bodies: Path, store: AtlasStore, one_process: Client
) -> None:
    scan = bodies / "body_2_ct.nii.gz"
    with pytest.warns(KptWarning, match="itself, as body_2, whose labels vote.*--exclude body_2"):
        segment(scan, store, tmp_path / "o.zarr", mode="organ", client=one_process)
    without = segment(
        scan, store, tmp_path / "p.zarr", mode="organ", exclude=["body_2"], client=one_process
    )
    assert not any("itself" in warning for warning in without.warnings)


def test_a_scan_that_would_fill_the_disk_is_refused(
    tmp_path: Path, store: AtlasStore, one_process: Client
) -> None:
    for edge in (1600.0, 600.0):
        scan = save(tmp_path / "few.nii.gz", np.zeros((10, 10, 10), np.int16), affine_of(edge))
        with pytest.raises(ScanFormatError, match=r"1000 voxels.*--spacing"):
            segment(scan, store, tmp_path / "o.zarr", client=one_process)
    assert list(tmp_path.iterdir()) == [scan]


@pytest.mark.parametrize("mode", ["local", "organ"])
@pytest.mark.parametrize("when", ["propose_atlases", "match", "transfer"])
def test_an_atlas_removed_meanwhile_is_left_out_and_this_is_said(
    tmp_path: Path,
    ct: Path,
    store: AtlasStore,
    one_process: Client,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    mode: str,
) -> None:
    if when != "transfer" and mode != "local":
        pytest.skip("the same for all modes")
    moving = AtlasStore.open(shutil.copytree(store.url, tmp_path / "s"))
    options: dict[str, Any] = {"mode": mode, "client": one_process}
    if when == "propose_atlases":
        options |= {"select": 2}
    expected = segment(ct, moving, tmp_path / "expected.zarr", exclude=["body_2"], **options)
    station = getattr(segmentation, when)

    def removing(*args: Any, **more: Any) -> Any:
        if "body_2" in moving:
            moving.remove("body_2")
            moving.prune()
        return station(*args, **more)

    monkeypatch.setattr(segmentation, when, removing)
    with pytest.warns(KptWarning, match="body_2 removed or replaced while .* the 2 other atlases"):
        found = segment(ct, moving, tmp_path / "found.zarr", **options)
    assert found.atlases == expected.atlases == ("body_1", "body_3")
    there, here = files(expected.path), files(found.path)
    assert there.keys() == here.keys()
    assert {name for name in there if there[name] != here[name]} <= {"zarr.json"}


def test_a_store_of_which_nothing_is_left_is_refused(
    tmp_path: Path,
    ct: Path,
    store: AtlasStore,
    one_process: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moving = AtlasStore.open(shutil.copytree(store.url, tmp_path / "s"))

    def emptied(*args: Any, **more: Any) -> Any:
        for atlas_id in moving:
            moving.remove(atlas_id)
        moving.prune()
        return match(*args, **more)

    monkeypatch.setattr(segmentation, "match", emptied)
    with pytest.raises(AtlasNotFoundError, match="was removed or replaced while it was read"):
        segment(ct, moving, tmp_path / "o.zarr", client=one_process)
    assert not (tmp_path / "o.zarr").exists()


@pytest.mark.parametrize(
    ("station", "what"),
    [
        ("vote", "0/c/0"),
        ("vote", "."),
        ("transfer", "probability/c.*"),
        ("transfer", "labels/organs/0/c"),
        ("_keep", "1/c/*/0"),
        ("_keep", "labels"),
        ("_keep", "0"),
    ],
)
def test_what_is_deleted_during_a_run_is_never_read_as_zeros(
    tmp_path: Path,
    ct: Path,
    store: AtlasStore,
    one_process: Client,
    monkeypatch: pytest.MonkeyPatch,
    station: str,
    what: str,
) -> None:
    """By those who clean scratch folders: at whichever station, the run ends with a sentence."""
    before = getattr(segmentation, station)

    def deleting(*args: Any, **options: Any) -> Any:
        found = before(*args, **options)
        [partial] = tmp_path.glob(".kpt-*.partial.zarr")
        there = list(partial.glob(what)) if what != "." else [partial]
        assert there
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return found

    monkeypatch.setattr(segmentation, station, deleting)
    with pytest.raises((AtlasStoreError, KptError), match="something deleted it"):
        segment(ct, store, tmp_path / "o.zarr", labels=tmp_path / "o.nii.gz", client=one_process)
    assert list(tmp_path.iterdir()) == []


def test_levels_of_scan_and_labels_lie_at_the_same_paths(plain: Segmentation) -> None:
    """So that a reader of one finds the other."""
    scan: Any = zarr.open_group(str(plain.path), mode="r")
    labels: Any = scan["labels/organs"]
    [image], [of_labels] = (group.attrs["ome"]["multiscales"] for group in (scan, labels))
    assert image["datasets"] == of_labels["datasets"]
    assert len(image["datasets"]) > 1
    for level in image["datasets"]:
        assert scan[level["path"]].shape == labels[level["path"]].shape


def test_every_chunk_that_may_be_read_is_there(plain: Segmentation) -> None:
    group = zarr.open_group(str(plain.path), mode="r")
    for name in ("0", "1", "labels/organs/0", "labels/organs/1", "probability"):
        array: Any = group[name]
        units = zip(array.shape, array.shards or array.chunks, strict=True)
        expected = np.prod([-(-n // unit) for n, unit in units])
        chunks = [p for p in (plain.path / name).rglob("*") if p.is_file()]
        assert len(chunks) == expected + 1, name


@pytest.mark.parametrize("mode", MODES)
def test_some_organs_alone(
    mode: str, bodies: Path, store: AtlasStore, tmp_path: Path, one_process: Client
) -> None:
    """Only these are made; all vote, and their labels are nearly those beside all others."""
    scan, page = bodies / f"body_{SEED}_ct.nii.gz", tmp_path / "some.html"
    options: Any = {"mode": mode, "client": one_process}
    everything = segment(scan, store, tmp_path / "all.zarr", **options)
    out = tmp_path / "some.zarr"
    some = segment(scan, store, out, organs=["spleen", "liver"], report=page, **options)
    assert list(some.organs) == ["liver", "spleen"]
    assert open_probability(out).organ.values.tolist() == ["liver", "spleen"]
    labels, beside = label_map(out), label_map(tmp_path / "all.zarr")
    assert set(np.unique(labels)) == {0, 1, 2}
    for value, name in ((1, "liver"), (2, "spleen")):
        assert dice(labels == value, beside == value) > 0.9
        assert some.organs[name].votes == everything.organs[name].votes > 0
    votes = zarr.open_group(str(out), mode="r")["votes/label"]
    assert set(np.unique(votes[...])) <= {0, 1, 2}
    text = page.read_text()
    assert "spleen" in text
    assert "kidney" not in text
    export(out, tmp_path / "again.nii.gz")
    assert set(np.unique(load(tmp_path / "again.nii.gz"))) == {0, 1, 2}


def test_an_organ_that_no_atlas_shows_is_told(
    bodies: Path, tmp_path: Path, one_process: Client
) -> None:
    """It is not "not found": that would say something of the scan."""
    store = AtlasStore.create(tmp_path / "store", ORGANS, store_parameters(SPACING))
    for seed, annotated in enumerate((["liver"], ["liver", "spleen"], ["liver"]), start=1):
        scan, labels = (bodies / f"body_{seed}_{what}.nii.gz" for what in ("ct", "seg"))
        named = f"body_{seed}"
        add_atlas(store, scan, labels, atlas_id=named, annotated=annotated, client=one_process)
    scan, out = bodies / "body_4_ct.nii.gz", tmp_path / "out.zarr"

    def told(**options: Any) -> Segmentation:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KptWarning)
            return segment(scan, store, out, overwrite=True, client=one_process, **options)

    everything = told()
    assert {"aorta", "lung_left"} <= {*everything.unshown}
    assert not {"liver", "spleen"} & {*everything.unshown}
    assert everything.organs["spleen"].volume_ml > 0
    for mode in MODES:
        [alone] = told(mode=mode).warnings
        assert "a single atlas decided" in alone
        assert "spleen by body_2" in alone
    [nowhere] = told(organs=["aorta"]).warnings
    assert "no atlas shows aorta" in nowhere
    # Whichever agrees best, this one knows what is asked for.
    asked = told(select=1, organs=["spleen"])
    assert asked.atlases == ("body_2",)
    assert asked.organs["spleen"].volume_ml > 0
    passed = told(mode="organ", exclude=["body_2"], organs=["spleen"])
    assert "no atlas shows spleen" in passed.warnings[-1]


def test_what_has_no_effect_on_the_organs_asked_for_is_refused(
    bodies: Path, store: AtlasStore, tmp_path: Path
) -> None:
    scan = bodies / f"body_{SEED}_ct.nii.gz"
    for mode, options in (
        ("local", TransferOptions(nu={"spleen": 60.0})),
        ("organ", TransferOptions(across={"spleen": ["liver"]})),
    ):
        with pytest.raises(ParameterError, match="spleen, which is not segmented"):
            segment(scan, store, tmp_path / "o.zarr", mode=mode, options=options, organs=["liver"])
    assert list(tmp_path.iterdir()) == []
