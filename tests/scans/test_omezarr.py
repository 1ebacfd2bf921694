"""OME-Zarr images: what their metadata can say, and how they can lie; an output goes in again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpt_dask.errors import KptWarning, ScanFormatError
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert
from tests.scans.formats import omezarr

VALUES = np.random.default_rng(6).integers(-1000, 2000, (6, 8, 9)).astype(np.int16)
AFFINE = np.array([[1.5, 0, 0, -30], [0, 1.5, 0, 20], [0, 0, 1.5, -100], [0, 0, 0, 1.0]])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    omezarr("0.5")(tmp_path / "a.zarr", VALUES, AFFINE)
    return tmp_path / "a.zarr"


def change(path: Path, change: Any) -> None:
    """Change the first image of the metadata."""
    file = path / "zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"]["ome"]["multiscales"][0])
    file.write_text(json.dumps(document))


def read(path: Path) -> np.ndarray:
    return np.concatenate(list(open_scan(path).slabs()))


def test_an_output_is_a_scan(image: Path, tmp_path: Path) -> None:
    convert(open_scan(image), tmp_path / "out.zarr", spacing=1.5)
    scan = open_scan(tmp_path / "out.zarr")
    assert scan.doubts == ()
    assert scan.grid.same_as(open_scan(image).grid, 1e-6)
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), np.maximum(VALUES, -1000))
    chunk = next(part for part in (tmp_path / "out.zarr" / "0").rglob("*") if part.name == "0")
    chunk = next(part for part in [chunk, *chunk.rglob("*")] if part.is_file())
    chunk.unlink()
    with pytest.raises(ScanFormatError, match=r"out\.zarr has a damaged chunk"):
        read(tmp_path / "out.zarr")


def test_lengths_may_be_in_other_units(image: Path) -> None:
    def to_micrometers(about: Any) -> None:
        for axis in about["axes"]:
            axis["unit"] = "micrometer"
        for step in about["datasets"][0]["coordinateTransformations"]:
            step[step["type"]] = [1e3 * length for length in step[step["type"]]]

    expected = open_scan(image).grid
    change(image, to_micrometers)
    assert open_scan(image).grid.same_as(expected, 1e-6)


def test_what_is_left_open_is_warned_of(image: Path) -> None:
    change(image, lambda about: [axis.pop("orientation") for axis in about["axes"]])
    with pytest.warns(KptWarning, match="its orientation is a guess"):
        open_scan(image)
    change(image, lambda about: [axis.pop("unit") for axis in about["axes"]])
    with pytest.warns(KptWarning, match="no unit of length"):
        open_scan(image)
    next(part for part in image.rglob("*") if part.is_file() and part.name == "0").unlink()
    with pytest.warns(KptWarning, match="lacks 1 of 3 chunks"):
        open_scan(image)


def _scale(values: list[float]) -> Any:
    def apply(about: Any) -> None:
        about["datasets"][0]["coordinateTransformations"][0]["scale"] = values

    return apply


@pytest.mark.parametrize(
    "lie",
    [
        lambda about: about.pop("axes"),
        lambda about: about.update(axes=[]),
        lambda about: about.update(axes=["z", "y", "x"]),
        lambda about: about["axes"].pop(),
        lambda about: about["axes"][0].update(name="t"),
        lambda about: about["axes"][0].update(unit="parsec"),
        lambda about: about["axes"][1].update(about["axes"][0], name="y"),
        lambda about: about.pop("datasets"),
        lambda about: about["datasets"][0].update(path="7"),
        lambda about: about["datasets"][0].update(path="../../etc"),
        lambda about: about["datasets"][0].update(coordinateTransformations=[{"type": "affine"}]),
        _scale([0.0, 1.5, 1.5]),
        _scale([float("nan"), 1.5, 1.5]),
        _scale([1e30, 1.5, 1.5]),
        _scale([1.5, 1.5]),
        _scale(["a", "b", "c"]),  # type: ignore[list-item]
    ],
)
def test_metadata_that_lie_are_refused(image: Path, lie: Any) -> None:
    change(image, lie)
    with pytest.raises(ScanFormatError, match=str(image)) as caught:
        read(image)
    assert "\n" not in str(caught.value)


def test_a_single_level_is_refused(image: Path) -> None:
    with pytest.raises(ScanFormatError, match=r"0 is a single array.*give the folder of the"):
        open_scan(image / "0")


def test_a_group_without_an_image_is_refused(image: Path) -> None:
    file = image / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attributes": {}}))
    with pytest.raises(ScanFormatError, match="no OME-Zarr image"):
        open_scan(image)
