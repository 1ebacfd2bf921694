"""What a file leaves open is said, what is only rounded is taken, contradictions are refused."""

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from kpt_dask.annotations.opening import open_pair
from kpt_dask.errors import GridMismatchError, KptWarning, ScanFormatError
from kpt_dask.runtime import notices
from kpt_dask.scans.scan import Scan, open_labels, open_scan
from tests.helpers import ORGANS, write_labels

SHAPE = (14, 12, 10)
AFFINE = np.array([[-4.0, 0, 0, 30], [0, -4, 0, 20], [0, 0, 4, 100], [0, 0, 0, 1]])

Values = NDArray[Any]


def body(shape: tuple[int, int, int] = (40, 40, 30), seed: int = 0) -> Values:
    """A block of soft tissue with bone in air, HU."""
    values = np.random.default_rng(seed).normal(-990, 8, shape)
    inner = tuple(slice(n // 4, -(n // 4)) for n in shape)
    values[inner] = np.random.default_rng(seed + 1).normal(40, 30, values[inner].shape)
    bone = tuple(slice(n // 2, n // 2 + 3) for n in shape)
    values[bone] = 900
    return np.rint(values)


def save(path: Path, values: Values, affine: Values | None = AFFINE, **header: Any) -> Path:
    """Write (i, j, k) values under both forms; fields of the header as given."""
    image: Any = nibabel.Nifti1Image(values, affine)
    if affine is not None:
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def patch(path: Path, offset: int, data: bytes) -> Path:
    """Overwrite bytes of the header, which nibabel would not write so."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


def doubts(path: Path) -> list[str]:
    """Open a scan and read it all; give what is doubted."""
    with notices.recorded() as told, notices.shown(lambda _: None):
        for _ in open_scan(path).slabs():
            pass
    return told


def labels_of(scan: Scan) -> Values:
    return np.concatenate(list(scan.label_slabs()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ct.nii.gz"


def test_a_plain_scan_is_not_doubted(path: Path) -> None:
    assert doubts(save(path, body().astype(np.int16))) == []


def test_a_doubt_is_a_warning_of_python(path: Path) -> None:
    image: Any = nibabel.Nifti1Image(body(), None)
    nibabel.save(image, path)
    with pytest.warns(KptWarning, match="left and right may be exchanged"):
        open_scan(path)


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1e3), ("mm", 1.0), ("micron", 1e-3)])
def test_units_scale_the_grid(path: Path, tmp_path: Path, unit: str, mm: float) -> None:
    """As ITK reads them: 4 mm."""
    small = np.diag([1 / mm, 1 / mm, 1 / mm, 1]) @ AFFINE
    image: Any = nibabel.Nifti1Image(body().astype(np.int16), small)
    image.set_qform(small, 1)
    image.set_sform(small, 1)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    scan = open_scan(path)
    np.testing.assert_allclose(scan.grid.spacing, 4, rtol=1e-5)
    np.testing.assert_allclose(scan.grid.origin, [100, -20, -30], rtol=1e-4)
    assert doubts(path) == []
    write_labels(tmp_path / "l.nii.gz", scan, np.zeros(scan.grid.shape, np.uint8))
    assert open_labels(tmp_path / "l.nii.gz").grid.same_as(scan.grid, tolerance=1e-9)


def test_a_unit_that_fits_no_patient_is_doubted(path: Path) -> None:
    [doubt] = doubts(save(path, body().astype(np.int16), xyzt_units=3))
    assert "gives its lengths in microns" in doubt
    small = np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE
    [doubt] = doubts(save(path, body().astype(np.int16), small))
    assert "gives its lengths in mm, which makes it 0.16 mm large" in doubt
    with pytest.raises(ScanFormatError, match="its unit of length is given as metres"):
        open_scan(save(path, body((40, 40, 30)), xyzt_units=1))


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (1, 1), (4, 1)])
def test_one_placement_is_enough(path: Path, sform: int, qform: int) -> None:
    patch(save(path, body().astype(np.int16)), 252, struct.pack("<hh", qform, sform))
    assert doubts(path) == []
    np.testing.assert_allclose(open_scan(path).grid.spacing, 4)


def test_no_placement_is_doubted(path: Path) -> None:
    [doubt] = doubts(patch(save(path, body().astype(np.int16)), 252, bytes(4)))
    assert "neither sform nor qform" in doubt
    assert str(path) in doubt


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (np.diag([-1.0, 1, 1, 1]), "mirror each other"),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 9], [0, 0, 0, 1]]), "voxels apart"),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.4], [0, 0, 0, 1]]), None),
    ],
    ids=["mirrored", "moved", "rounded"],
)
def test_contradicting_placements_are_doubted(path: Path, change: Values, told: str | None) -> None:
    image: Any = nibabel.Nifti1Image(body().astype(np.int16), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(change @ AFFINE, 1)
    nibabel.save(image, path)
    found = doubts(path)
    assert len(found) == (told is not None)
    assert told is None or (told in found[0] and "the sform is used" in found[0])


def test_pixdim_that_contradicts_the_only_sform_is_doubted(path: Path) -> None:
    save(path, body().astype(np.int16))
    patch(patch(path, 252, bytes(2)), 80, struct.pack("<3f", 1, 1, 1))
    [doubt] = doubts(path)
    assert "1 × 1 × 1 in pixdim" in doubt


def test_a_qfac_of_0_is_1(path: Path, tmp_path: Path) -> None:
    straight = np.abs(AFFINE)
    patch(save(path, body().astype(np.int16), straight), 254, bytes(2))
    expected = open_scan(path).grid
    patch(path, 76, struct.pack("<f", 0))
    scan = open_scan(path)
    assert scan.grid.same_as(expected, tolerance=1e-9)
    write_labels(tmp_path / "l.nii.gz", scan, np.zeros(scan.grid.shape, np.uint8))
    written: Any = nibabel.load(tmp_path / "l.nii.gz")
    np.testing.assert_allclose(written.affine, straight)


CLIPPED = body().clip(-160, 240)
NOT_HU = {
    "1024 added": (body() + 1024, "as if about 1024 had been added"),
    "1024 added, padded": (np.where(body() > 5000, 0, body() + 1024), "as if about 1024"),
    "normalised": ((body() + 1024) / 2000, "normalised"),
    "picture": (np.rint((CLIPPED + 160) / 400 * 255), "grey values"),
    "clipped": (CLIPPED, "no air"),
    "clipped at 0": (body().clip(0), "hardly any below 0 HU"),
    "MR": ((600 - 2 * np.abs(body())).clip(5), "MR, PET, or clipped at 0"),
    "no bone": (body().clip(-1024, 150), "no bone"),
    "water": (np.zeros((40, 40, 30)), "nothing but the value 0"),
    "1024 subtracted": (body() * 2 - 1500, "where soft tissue is"),
}
NOT_HU["1024 added, padded"][0][:3] = -2000


@pytest.mark.parametrize("name", NOT_HU)
def test_what_can_hardly_be_hu_is_doubted(path: Path, name: str) -> None:
    values, told = NOT_HU[name]
    [doubt] = doubts(save(path, values.astype(np.float32)))
    assert told in doubt
    assert "HU" in doubt
    assert str(path) in doubt


def test_an_intercept_explains_an_offset(path: Path) -> None:
    save(path, (body() + 1024).clip(0).astype(np.uint16))
    assert doubts(patch(path, 112, struct.pack("<ff", 1, -1024))) == []


def test_real_scans_are_not_doubted(openkbp: Path, tmp_path: Path) -> None:
    for scan in sorted(openkbp.glob("*_ct.nii.gz"))[:3]:
        assert doubts(scan) == []
        image: Any = nibabel.load(scan)
        values = np.asarray(image.dataobj)
        middle = tuple(slice(n // 4, -(n // 4)) for n in values.shape)
        assert doubts(save(tmp_path / "cropped.nii.gz", values[middle], image.affine)) == []
        clipped = values[middle].clip(-125, 275)
        [doubt] = doubts(save(tmp_path / "clipped.nii.gz", clipped, image.affine))
        assert "it may be clipped" in doubt


def test_labels_may_be_rounded(tmp_path: Path) -> None:
    """As nibabel writes numbers with decimals under an integer header: scaled to its range."""
    labels = np.random.default_rng(0).integers(0, 11, SHAPE)
    for dtype in (np.uint8, np.int16):
        image: Any = nibabel.Nifti1Image(labels.astype(np.float64), AFFINE)
        image.set_data_dtype(dtype)
        nibabel.save(image, tmp_path / "l.nii.gz")
        stored = np.asarray(nibabel.load(tmp_path / "l.nii.gz").dataobj)  # type: ignore[attr-defined]
        assert not np.array_equal(stored, labels)
        np.testing.assert_array_equal(labels_of(open_labels(tmp_path / "l.nii.gz")), labels.T)
    save(tmp_path / "l.nii.gz", (labels + 0.02 * (-1) ** labels).clip(-0.02).astype(np.float32))
    np.testing.assert_array_equal(labels_of(open_labels(tmp_path / "l.nii.gz")), labels.T)


@pytest.mark.parametrize("value", [0.5, 0.9, 3.2, np.nan, np.inf, -0.6, 65535.6])
def test_what_is_no_label_is_refused(tmp_path: Path, value: float) -> None:
    values = np.ones(SHAPE, np.float32)
    values[3, 4, 5] = value
    with pytest.raises(ScanFormatError, match="no label map"):
        labels_of(open_labels(save(tmp_path / "l.nii.gz", values)))


def test_probabilities_are_no_labels(tmp_path: Path) -> None:
    image: Any = nibabel.Nifti1Image(np.random.default_rng(0).random(SHAPE), AFFINE)
    image.set_data_dtype(np.uint8)
    nibabel.save(image, tmp_path / "l.nii.gz")
    with pytest.raises(ScanFormatError, match="no label map"):
        labels_of(open_labels(tmp_path / "l.nii.gz"))


@pytest.mark.parametrize(("voxels", "taken"), [(0.04, True), (0.5, False), (1.0, False)])
def test_grids_may_differ_by_rounding(tmp_path: Path, voxels: float, taken: bool) -> None:
    moved = AFFINE.copy()
    moved[2, 3] += 4 * voxels
    scan = save(tmp_path / "ct.nii.gz", np.zeros(SHAPE, np.int16))
    labels = save(tmp_path / "l.nii.gz", np.zeros(SHAPE, np.uint8), moved)
    if taken:
        open_pair(scan, labels, ORGANS)
    else:
        with pytest.raises(GridMismatchError):
            open_pair(scan, labels, ORGANS)


def test_labels_come_onto_the_grid_of_the_scan(tmp_path: Path) -> None:
    """An affine that is turned by rounding must not be taken for an oblique one."""
    from kpt_dask.volumes.conversion import convert, label_blocks

    labels = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    turned = AFFINE.copy()
    turned[0, 1] = 0.02
    scan, labelled = open_pair(
        save(tmp_path / "ct.nii.gz", labels.astype(np.int16)),
        save(tmp_path / "l.nii.gz", labels, turned),
        ORGANS,
    )
    volume = convert(scan, tmp_path / "v.zarr", spacing=4.0)
    [(_, found)] = label_blocks(labelled, volume)
    np.testing.assert_array_equal(found, np.asarray(volume.levels[0][...]))


def bgzf(data: bytes) -> bytes:
    """One block as bgzip writes it."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    size = struct.pack("<HH", 2, len(body) + 25)
    head = b"\x1f\x8b\x08\x04" + bytes(4) + b"\x00\xff\x06\x00BC" + size
    return head + body + struct.pack("<II", zlib.crc32(data), len(data))


WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda raw: gzip.compress(raw) + b"trailing garbage" * 20,
    "one byte": lambda raw: gzip.compress(raw) + b"x",
    "like a member": lambda raw: gzip.compress(raw) + b"\x1f\x8b" + b"xyz" * 10,
    "zeros": lambda raw: gzip.compress(raw) + bytes(300_000),
    "zeros and garbage": lambda raw: gzip.compress(raw) + bytes(20) + b"xyz",
    "members": lambda raw: gzip.compress(raw[:50]) + gzip.compress(raw[50:]),
    "zeros between": lambda raw: gzip.compress(raw[:500]) + bytes(9) + gzip.compress(raw[500:]),
    "bgzip": lambda raw: bgzf(raw[:9000]) + bgzf(raw[9000:]) + bgzf(b""),
    "empty member": lambda raw: gzip.compress(b"") + gzip.compress(raw),
    "a few bytes more": lambda raw: gzip.compress(raw + b"\1" * 100),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_gzip_is_read_as_it_occurs(path: Path, name: str) -> None:
    values = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
    raw = gzip.decompress(save(path, values).read_bytes())
    path.write_bytes(WRAPPED[name](raw))
    found = np.concatenate(list(open_scan(path).slabs()))
    np.testing.assert_array_equal(found, values.T)


@pytest.mark.parametrize("behind", [b"", b"garbage" * 9])
def test_damage_is_found_with_garbage_behind_it(path: Path, behind: bytes) -> None:
    save(path, np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum
    path.write_bytes(bytes(data) + behind)
    with pytest.raises(ScanFormatError, match="damaged"):
        list(open_scan(path).slabs())


def test_bits_must_fit_the_type(path: Path) -> None:
    save(path, body().astype(np.int16))
    assert len(list(open_scan(patch(path, 72, struct.pack("<h", 0))).slabs())) > 0
    with pytest.raises(ScanFormatError, match=r"int16 \(datatype 4\) and have 32 bits"):
        open_scan(patch(path, 72, struct.pack("<h", 32)))


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii"])
def test_a_file_longer_than_its_header_says_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    image: Any = nibabel.Nifti1Image(body().astype(np.int16), AFFINE)
    nibabel.save(image, path)
    data = path.read_bytes()
    raw = bytearray(gzip.decompress(data) if name.endswith(".gz") else data)
    raw[40:48] = struct.pack("<4h", 3, 40, 40, 29)
    path.write_bytes(gzip.compress(bytes(raw)) if name.endswith(".gz") else bytes(raw))
    with pytest.raises(ScanFormatError, match=r"longer than its header says \(40 × 40 × 29"):
        list(open_scan(path).slabs())


@pytest.mark.parametrize("name", ["pair.hdr", "pair.img", "scan.xyz", "IM0001", "folder"])
def test_what_to_do_with_other_formats_is_said(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    if name == "folder":
        other.mkdir()
    else:
        other.write_bytes(bytes(400))
    with pytest.raises(ScanFormatError, match=r"known are|give a DICOM series|must lie beside it"):
        open_scan(other)
