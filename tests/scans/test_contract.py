"""What holds for a scan in every format; the formats are listed in formats.py."""

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kpt_dask.errors import KptError, ScanFormatError
from kpt_dask.grid import Grid
from kpt_dask.scans import voxel_stream
from kpt_dask.scans.scan import open_scan
from tests.helpers import write_labels
from tests.scans.formats import FORMATS, LPS, REVERSED, Array, Format

pytestmark = pytest.mark.parametrize("form", FORMATS, ids=str)

SHAPE = 7, 6, 5
VALUES = np.random.default_rng(5).integers(-1000, 2000, SHAPE).astype(np.int16)
AFFINE = np.array([[0.8, 0, 0, -30], [0, 0.9, 0, 20], [0, 0, 2.5, -100], [0, 0, 0, 1.0]])

quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def made(form: Format, folder: Path, values: Array = VALUES, affine: Array = AFFINE) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / f"scan{form.ending}"
    form.write(path, values, affine)
    return path


def read(path: Path) -> Array:
    return np.concatenate(list(open_scan(path).slabs()))


def lps(grid: Grid) -> Array:
    """Affine from (i, j, k) to (x, y, z)."""
    return REVERSED @ grid.affine @ REVERSED


def voxels_at(values: Array, affine: Array) -> dict[tuple[float, ...], float]:
    """Values by their place in the world, in tenths of mm."""
    indices = np.indices(values.shape).reshape(3, -1)[::-1]
    places = np.rint((affine[:3, :3] @ indices).T * 10 + affine[:3, 3] * 10)
    return dict(zip(map(tuple, places.tolist()), values.ravel().tolist(), strict=True))


@st.composite
def affines(draw: Any, sheared: bool, oblique: bool) -> Array:
    """Any order and direction of axes, oblique or not, any spacing."""
    axes = np.eye(3)[draw(st.permutations([0, 1, 2]))]
    axes = axes * draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    angle, tilt = draw(st.sampled_from([0.0, 0.3 * oblique])), draw(st.sampled_from([0.0, 0.2]))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    shear = np.array([[1, 0, 0], [0, 1, tilt if sheared else 0], [0, 0, 1.0]])
    spacing = draw(st.tuples(*[st.sampled_from([0.5, 0.9765625, 3.0])] * 3))
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ shear * spacing
    affine[:3, 3] = draw(st.tuples(*[st.integers(-500, 500)] * 3))
    return affine


@quick
@given(data=st.data())
def test_voxels_lie_where_another_program_sees_them(
    form: Format, data: st.DataObject, tmp_path: Path
) -> None:
    shape = data.draw(st.tuples(*[st.integers(2, 5)] * 3))
    affine = data.draw(affines(form.sheared, form.oblique))
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) * 7 - 1000
    path = made(form, tmp_path / "scan", values, affine)
    scan = open_scan(path)
    got = voxels_at(np.concatenate(list(scan.slabs())), lps(scan.grid))
    assert got == pytest.approx(voxels_at(values, affine))
    assert got == pytest.approx(voxels_at(*form.judge(path)))


def test_it_can_be_read_again(form: Format, tmp_path: Path) -> None:
    scan = open_scan(made(form, tmp_path / "scan"))
    first, second = (np.concatenate(list(scan.slabs())) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == scan.grid.shape
    np.testing.assert_array_equal(first, second)


def test_only_a_few_slabs_are_in_memory(
    form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voxel_stream, "SLAB_BYTES", 64 << 10)
    values = np.random.default_rng(1).integers(0, 9, (128, 128, 128)).astype(np.int16)
    scan = open_scan(made(form, tmp_path / "scan", values))
    next(scan.slabs())  # decoders that are compiled or imported are no memory of the scan
    largest = 0
    tracemalloc.start()
    for slab in scan.slabs():
        largest = max(largest, slab.size)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest <= 3 * 128 * 128
    assert peak < values.nbytes / 2


def test_labels_go_back_onto_its_grid(form: Format, tmp_path: Path) -> None:
    turned = AFFINE[:, [1, 2, 0, 3]]
    scan = open_scan(made(form, tmp_path / "scan", affine=turned))
    labels = np.arange(VALUES.size, dtype=np.uint8).reshape(scan.grid.shape)
    write_labels(tmp_path / "out.nii.gz", scan, labels)
    image = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(LPS @ image.affine, lps(scan.grid), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, labels)
    assert open_scan(tmp_path / "out.nii.gz").grid.same_as(scan.grid, 1e-3)


def parts_of(path: Path) -> list[Path]:
    """Files that make up a scan."""
    if path.is_dir():
        return sorted(part for part in path.rglob("*") if part.is_file())
    if path.suffix in (".hdr", ".img", ".nhdr", ".mhd"):
        return sorted(path.parent.iterdir())
    return [path]


def refused(path: Path) -> str:
    """Read a scan that cannot be read, and give the sentence."""
    with pytest.raises(ScanFormatError) as caught:
        read(path)
    text = str(caught.value)
    assert any(str(part) in text for part in (path.parent, *parts_of(path)))
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("part", [0.0, 0.05, 0.3, 0.7, 0.98])
def test_what_is_truncated_is_refused(form: Format, part: float, tmp_path: Path) -> None:
    path = made(form, tmp_path / "scan")
    for file in parts_of(path):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * part)])
        refused(path)
        file.write_bytes(whole)
    read(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"\x1f\x8b" + b"x" * 700, b"<html>" * 99])
def test_what_is_something_else_is_refused(form: Format, content: bytes, tmp_path: Path) -> None:
    path = made(form, tmp_path / "scan")
    for file in parts_of(path):
        file.write_bytes(content)
    refused(path)


@settings(quick, max_examples=12)
@given(data=st.data())
def test_damaged_bytes_end_in_a_sentence_or_in_voxels(
    form: Format, data: st.DataObject, tmp_path: Path
) -> None:
    path = made(form, tmp_path / "scan", VALUES[:3])
    file = data.draw(st.sampled_from(parts_of(path)))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    said = ""
    tracemalloc.start()
    try:
        read(path)
    except KptError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in said
    assert peak < 64 << 20
