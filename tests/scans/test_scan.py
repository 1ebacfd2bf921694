import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kpt_dask.errors import (
    KptError,
    ScanFormatError,
    ScanNotFoundError,
)
from kpt_dask.scans.scan import open_scan
from tests.helpers import write_labels

SHAPE = (6, 5, 4)  # (i, j, k) as nibabel has it
AFFINE = np.array([[0, -1.5, 0, 10], [2, 0, 0, -20], [0, 0, -3, 5], [0, 0, 0, 1.0]])
LPS_ZYX = np.array([[0, 0, 1], [0, -1, 0], [-1, 0, 0]])  # of RAS (x, y, z)

VALUES = np.random.default_rng(3).integers(0, 120, SHAPE).astype(np.int16)


def save(
    path: Path, values: Any = VALUES, affine: Any = AFFINE, kind: Any = nib.Nifti1Image
) -> Path:
    nib.save(kind(np.asarray(values), affine), path)
    return path


def read(path: Path) -> np.ndarray:
    return np.concatenate(list(open_scan(path).slabs()))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_values_of_every_real_dtype_equal_nibabels(
    tmp_path: Path, dtype: str, order: str, kind: Any
) -> None:
    image = kind(VALUES.astype(order + dtype), AFFINE, kind.header_class(endianness=order))
    image.set_data_dtype(order + dtype)
    path = tmp_path / "a.nii.gz"
    nib.save(image, path)
    assert open_scan(path).dtype == np.dtype(order + dtype)
    got = read(path)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.T, nib.load(path).get_fdata())


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4"])
def test_slope_and_intercept_are_applied(tmp_path: Path, dtype: str) -> None:
    image = nib.Nifti1Image(VALUES.astype(dtype), AFFINE)
    image.header.set_slope_inter(0.1, -1024.0)
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(read(tmp_path / "a.nii").T, expected, atol=1e-3)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_without_a_slope_the_values_stand_as_stored(tmp_path: Path, slope: float) -> None:
    path = save(tmp_path / "a.nii", VALUES.astype("i2"))
    patch(path, 112, struct.pack("<ff", slope, 7.0))
    np.testing.assert_array_equal(read(path).T, VALUES)


def test_voxels_lie_where_nibabel_puts_them(tmp_path: Path) -> None:
    grid = open_scan(save(tmp_path / "a.nii")).grid
    assert grid.shape == SHAPE[::-1]
    for i, j, k in [(0, 0, 0), (5, 4, 3), (2, 0, 1)]:
        expected = LPS_ZYX @ (AFFINE @ [i, j, k, 1])[:3]
        np.testing.assert_allclose(grid.to_mm([k, j, i]), expected)


def test_sform_comes_before_qform_before_pixdim(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VALUES.astype("i2"), None)
    image.set_qform(np.diag([2, 2, 2, 1]), 1)
    image.set_sform(AFFINE, 0)
    nib.save(image, tmp_path / "q.nii")
    np.testing.assert_allclose(open_scan(tmp_path / "q.nii").grid.spacing, 2)
    image.set_sform(np.diag([3, 3, 3, 1]), 2)
    nib.save(image, tmp_path / "s.nii")
    np.testing.assert_allclose(open_scan(tmp_path / "s.nii").grid.spacing, 3)
    path = tmp_path / "s.nii"
    patch(path, 252, struct.pack("<2h", 0, 0))
    patch(path, 80, struct.pack("<3f", 1, 2, 4))
    np.testing.assert_allclose(open_scan(path).grid.spacing, (4, 2, 1))


def test_trailing_axes_of_length_one_are_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", VALUES[..., None, None].astype("i2"))
    assert open_scan(path).grid.shape == SHAPE[::-1]
    np.testing.assert_array_equal(read(path).T, VALUES)


def test_slabs_are_small_and_in_order(tmp_path: Path) -> None:
    values = np.arange(20).astype("i2")[None, None, :] + np.zeros((512, 600, 1), "i2")
    slabs = list(open_scan(save(tmp_path / "a.nii.gz", values)).slabs())
    assert max(slab.nbytes for slab in slabs) <= 16 << 20
    assert len(slabs) > 2
    np.testing.assert_array_equal(np.concatenate(slabs)[:, 0, 0], np.arange(20))


def test_leaving_the_stream_early_is_quiet(tmp_path: Path) -> None:
    values = np.zeros((512, 512, 40), "i2")
    slabs = open_scan(save(tmp_path / "a.nii.gz", values)).slabs()
    next(slabs)
    slabs.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", ">u2"])
def test_labels_of_any_dtype_come_as_uint16(tmp_path: Path, dtype: str) -> None:
    path = save(tmp_path / "a.nii.gz", VALUES.astype(dtype))
    labels = np.concatenate(list(open_scan(path).label_slabs()))
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels.T, VALUES)


@pytest.mark.parametrize("bad", [0.5, -1, 65536, np.nan, np.inf, -0.25])
def test_values_that_are_no_labels_are_refused(tmp_path: Path, bad: float) -> None:
    values = VALUES.astype("f4")
    values[1, 2, 3] = bad
    with pytest.raises(ScanFormatError, match="whole numbers"):
        list(open_scan(save(tmp_path / "a.nii", values)).label_slabs())


def patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


def _nan(path: Path) -> None:
    values = VALUES.astype("f4")
    values[0, 0, 0] = np.nan
    save(path, values)


def _infinite(path: Path) -> None:
    values = VALUES.astype("f8")
    values[-1, -1, -1] = -np.inf
    save(path, values)


def _overflow(path: Path) -> None:
    save(path, VALUES.astype("f8") * 1e300)


def _text(path: Path) -> None:
    path.write_text("This is no image.\n" * 100)


def _patched(offset: int, fmt: str, *values: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        patch(save(path, VALUES.astype("i2")), offset, struct.pack(fmt, *values))

    return make


def _as(values: Any) -> Callable[[Path], None]:
    return lambda path: save(path, values) and None


def _cut(bytes_left: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        save(path, VALUES.astype("i2"))
        path.write_bytes(path.read_bytes()[:bytes_left])

    return make


RGB = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))

BAD = {
    "a text": (_text, "not a NIfTI"),
    "an empty file": (lambda path: path.touch(), "not a NIfTI"),
    "half a header": (_cut(200), "not a NIfTI"),
    "no voxels at all": (_cut(352), "truncated"),
    "its last byte missing": (_cut(352 + 2 * VALUES.size - 1), "truncated"),
    "a pair's header": (_patched(344, "4s", b"ni1\0"), "pair"),
    "an analyze header": (_patched(344, "4s", b"\0\0\0\0"), "not a NIfTI"),
    "two dimensions": (_as(VALUES[:, :, 0].astype("i2")), "2-dimensional"),
    "four dimensions": (_as(np.zeros((3, 3, 3, 2), "i2")), "4-dimensional"),
    "complex values": (_as(VALUES.astype("c8")), "complex"),
    "colours": (_as(RGB), "RGB"),
    "an unknown type": (_patched(70, "<h", 999), "header"),
    "NaN": (_nan, "NaN or infinite"),
    "infinite values": (_infinite, "NaN or infinite"),
    "values beyond float32": (_overflow, "NaN or infinite"),
    "zero spacing": (_patched(80, "<f", 0.0), "spacing"),
    "negative spacing": (_patched(84, "<f", -2.0), "spacing"),
    "NaN spacing": (_patched(88, "<f", np.nan), "spacing"),
    "a singular affine": (_patched(280, "<4f", 0, 0, 0, 0), "affine"),
    "a NaN in the affine": (_patched(280, "<f", np.nan), "affine"),
    "a huge affine": (_patched(280, "<4f", *[3e38] * 4), "affine"),
    "voxels of a kilometre": (_patched(280, "<f", 1e6), "repair"),
    "a place beyond the moon": (_patched(292, "<f", 1e12), "which no scan is"),
    "size zero": (_patched(42, "<h", 0), "no voxels"),
    "a negative size": (_patched(44, "<h", -5), "no voxels"),
    "no dimensions": (_patched(40, "<h", 0), "NIfTI|no voxels"),
    "voxels inside the header": (_patched(108, "<f", 8.0), "header"),
    "voxels at NaN": (_patched(108, "<f", np.nan), "header"),
    "voxels beyond the end": (_patched(108, "<f", 1e9), "truncated"),
    "a size beyond the file": (_patched(42, "<3h", 32767, 32767, 32767), "truncated"),
    "an infinite intercept": (_patched(116, "<f", np.inf), "header"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path, case: str, name: str) -> None:
    make, sentence = BAD[case]
    plain = tmp_path / "a.nii"
    make(plain)
    path = tmp_path / name
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(ScanFormatError, match=sentence) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanNotFoundError, match="does not exist"):
        open_scan(tmp_path / "a.nii.gz")
    with pytest.raises(ScanFormatError, match="folder"):
        open_scan(tmp_path)


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.gz", "nii"])
def test_an_unknown_extension_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ScanFormatError, match=r"known are .*\.nii"):
        open_scan(tmp_path / name)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_gzip_is_refused(tmp_path: Path, part: float) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (40, 40, 30)).astype("i2")
    path = save(tmp_path / "a.nii.gz", values)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ScanFormatError):
        read(path)


@pytest.mark.parametrize("lost", [1, 4, 8])
def test_a_gzip_without_its_checksum_is_refused(tmp_path: Path, lost: int) -> None:
    path = save(tmp_path / "a.nii.gz", VALUES.astype("i2"))
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ScanFormatError, match="truncated"):
        read(path)


def test_a_gzip_with_a_wrong_bit_is_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (40, 40, 30)).astype("i2")
    path = save(tmp_path / "a.nii.gz", values)
    patch(path, path.stat().st_size // 2, b"\x5a\xa5")
    with pytest.raises(ScanFormatError):
        read(path)


def test_a_plain_file_called_gz_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", VALUES.astype("i2"))
    path.rename(tmp_path / "b.nii.gz")
    with pytest.raises(ScanFormatError, match="gzip"):
        open_scan(tmp_path / "b.nii.gz")


HEADER = bytes(nib.Nifti1Image(VALUES.astype("i2"), AFFINE).header.binaryblock) + bytes(4)

fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(st.lists(st.tuples(st.integers(40, 347), st.integers(0, 255)), min_size=1, max_size=12))
@fuzz
def test_a_damaged_header_is_read_or_refused(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    raw = bytearray(HEADER)
    for offset, value in damage:
        raw[offset] = value
    check_read_or_refused(tmp_path, bytes(raw))


@given(st.binary(min_size=308, max_size=308))
@fuzz
def test_an_arbitrary_header_is_read_or_refused(tmp_path: Path, noise: bytes) -> None:
    check_read_or_refused(tmp_path, HEADER[:40] + noise[:304] + HEADER[344:])


@given(st.integers(0, 7), st.lists(st.integers(-2, 40), min_size=7, max_size=7))
@fuzz
def test_arbitrary_dimensions_are_read_or_refused(
    tmp_path: Path, n: int, dimensions: list[int]
) -> None:
    check_read_or_refused(tmp_path, HEADER[:40] + struct.pack("<8h", n, *dimensions) + HEADER[56:])


def check_read_or_refused(folder: Path, header: bytes) -> None:
    path = folder / "fuzz.nii"
    path.write_bytes(header + VALUES.astype("<i2").tobytes(order="F") * 4)
    try:
        scan = open_scan(path)
        for slab in scan.slabs():
            assert np.isfinite(slab).all()
        assert min(scan.grid.working(100.0).shape) > 0
    except KptError as error:
        message = str(error)
    else:
        return
    assert str(path) in message


@pytest.mark.parametrize("name", ["labels.nii", "labels.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_labels_go_back_onto_the_scans_own_grid(
    tmp_path: Path, name: str, dtype: Any, kind: Any
) -> None:
    image = kind(VALUES.astype("i2"), AFFINE)
    tilted = AFFINE.copy()
    tilted[:3, :3] = AFFINE[:3, :3] + 0.01
    image.set_sform(tilted, 3)
    image.set_qform(AFFINE, 2)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "scan.nii.gz")
    labels = VALUES.T.astype(dtype)
    scan = open_scan(tmp_path / "scan.nii.gz")
    write_labels(tmp_path / name, scan, labels)
    source, back = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / name)
    assert back.shape == SHAPE
    assert back.get_data_dtype() == dtype
    assert back.header.get_zooms() == source.header.get_zooms()
    assert back.header.get_xyzt_units() == source.header.get_xyzt_units()
    np.testing.assert_array_equal(back.affine, source.affine)
    for form in ("get_sform", "get_qform"):
        expected, code = getattr(source, form)(coded=True)
        got, back_code = getattr(back, form)(coded=True)
        assert back_code == code
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.asarray(back.dataobj), VALUES)
    assert open_scan(tmp_path / name).grid.same_as(scan.grid, tolerance=1e-12)


def test_labels_of_a_big_endian_scan_read_back(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(VALUES.astype(">i2"), AFFINE, header), tmp_path / "scan.nii")
    scan = open_scan(tmp_path / "scan.nii")
    write_labels(tmp_path / "labels.nii.gz", scan, VALUES.T.astype("u1"))
    back = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), VALUES)
    np.testing.assert_array_equal(back.affine, AFFINE)


def test_real_scans_equal_nibabels(openkbp: Path) -> None:
    path = openkbp / "pt_100_ct.nii.gz"
    np.testing.assert_array_equal(read(path).T, nib.load(path).get_fdata())
