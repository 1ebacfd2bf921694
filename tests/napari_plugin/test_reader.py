"""Layers for napari, as plain tuples; napari itself is none of the dependencies."""

import shutil
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr

from kpt_dask.errors import ScanNotFoundError
from kpt_dask.grid import Grid
from kpt_dask.napari_plugin.reader import get_reader
from kpt_dask.volumes.omezarr import write_label_image
from kpt_dask.volumes.volume import create_volume
from tests.helpers import ORGANS

SHAPE = 40, 36, 70


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Make a volume at 2 mm with a label image, keypoints and votes."""
    path = tmp_path / "out.zarr"
    grid = Grid.isotropic(SHAPE, 2.0, (-100.0, 5.0, 30.0))
    volume = create_volume(path, grid, grid, name="ct.nii.gz")
    volume.levels[0][...] = np.full(SHAPE, 40, np.float32)
    labels = np.zeros(SHAPE, np.uint16)
    labels[:, 5, 6] = 300
    write_label_image(volume.group, "organs", labels, grid, ORGANS)
    keypoints, votes = (volume.group.create_group(name) for name in ("keypoints", "votes"))
    keypoints.create_array("position", data=np.float32([[-90, 9, 40], [-80, 9, 40]]))
    keypoints.create_array("scale", data=np.float32([3, 6]))
    votes.create_array("label", data=np.uint16([300, 0]))
    return path


def layers(path: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    read = get_reader(str(path))
    assert read is not None
    return {kind: (data, keywords) for data, keywords, kind in read(str(path))}


def test_the_scan_has_its_window_and_its_place(out: Path) -> None:
    data, keywords = layers(out)["image"]
    assert keywords["contrast_limits"] == (-160, 240)
    assert keywords["scale"] == [2, 2, 2]
    assert keywords["translate"] == [-100, 5, 30]
    assert data[0].shape == SHAPE
    assert float(data[0][3, 4, 5]) == 40


def test_3d_is_not_coarser_than_4_mm(out: Path) -> None:
    """The last level is what napari shows in 3-D."""
    for kind in ("image", "labels"):
        data, _ = layers(out)[kind]
        assert len(data) == 2
        np.testing.assert_allclose(2 * np.array(SHAPE) / data[-1].shape, 4, rtol=0.05)


def test_labels_are_named_and_coloured(out: Path) -> None:
    data, keywords = layers(out)["labels"]
    features = dict(zip(keywords["features"]["index"], keywords["features"]["name"], strict=True))
    assert features == {0: "background", 5: "liver", 2: "lung_left", 300: "spleen"}
    assert keywords["colormap"][300].tolist() == pytest.approx([9 / 255, 9 / 255, 9 / 255, 1])
    assert keywords["colormap"][0].tolist() == [0, 0, 0, 0]
    assert int(data[0][0, 5, 6]) == 300


def test_keypoints_are_points_that_tell_their_organ(out: Path) -> None:
    data, keywords = layers(out)["points"]
    assert data.tolist() == [[-90, 9, 40], [-80, 9, 40]]
    assert keywords["features"]["organ"] == ["spleen", ""]
    np.testing.assert_allclose(keywords["face_color"], [[9 / 255] * 3, [1, 1, 1]])


def test_layers_of_what_is_gone_are_not_empty(out: Path) -> None:
    images = [layers(out)[kind][0][0] for kind in ("image", "labels")]
    shutil.rmtree(out)
    for image in images:
        with pytest.raises(ScanNotFoundError, match="was deleted or replaced"):
            image[0].compute()


def test_others_are_left_to_other_readers(out: Path, tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path / "other.zarr"))
    (tmp_path / "file.zarr").write_text("x")
    for path in ("other.zarr", "file.zarr", "none.zarr"):
        assert get_reader(str(tmp_path / path)) is None
    assert get_reader([str(out), str(tmp_path / "other.zarr")]) is None
    assert get_reader([]) is None
    several = get_reader([str(out), str(out)])
    assert several is not None
    assert len(several([str(out), str(out)])) == 6


def test_a_volume_alone_is_an_image_alone(tmp_path: Path) -> None:
    grid = Grid.isotropic(SHAPE, 5.0, (0.0, 0.0, 0.0))
    create_volume(tmp_path / "ct.zarr", grid, grid, name="ct")
    [(kind, (data, _))] = layers(tmp_path / "ct.zarr").items()
    assert (kind, len(data)) == ("image", 1)


def test_napari_finds_the_plugin_by_its_manifest() -> None:
    [entry] = entry_points(group="napari.manifest", name="kpt-dask")
    module, _, name = entry.value.partition(":")
    manifest = yaml.safe_load((files(module) / name).read_text("utf-8"))
    assert manifest["name"] == "kpt-dask"
    [command] = manifest["contributions"]["commands"]
    [reader] = manifest["contributions"]["readers"]
    assert reader["command"] == command["id"]
    assert reader["accepts_directories"] is True
    module, _, name = command["python_name"].partition(":")
    assert getattr(import_module(module), name) is get_reader
