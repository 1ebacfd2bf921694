"""NRRD and MetaImage: what their headers can say, and how they can lie."""

import bz2
import gzip
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from kpt_dask.errors import KptWarning, ScanFormatError
from kpt_dask.scans.scan import open_scan

VALUES = np.random.default_rng(4).integers(-1000, 2000, (3, 4, 5)).astype("<i2")
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 4 3",
    "space directions": "(0.5,0,0) (0,0.6,0) (0,0,2)",
    "space origin": "(-10,20,-30)",
    "endian": "little",
    "encoding": "raw",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-10 20 -30",
    "ElementSpacing": "0.5 0.6 2",
    "DimSize": "5 4 3",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def nrrd(path: Path, data: bytes = VALUES.tobytes(), **changes: str | None) -> Path:
    fields = NRRD | {name.replace("_", " "): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    text = "\n".join(["NRRD0004", "# a remark", "a key:=a value", *lines, "", ""])
    path.write_bytes(text.encode() + data)
    return path


def meta(path: Path, data: bytes = VALUES.tobytes(), **changes: str | None) -> Path:
    fields = META | changes
    # The last line ends the header.
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    path.write_bytes(("\n".join(lines) + "\n").encode() + data)
    return path


def read(path: Path) -> np.ndarray:
    return np.concatenate(list(open_scan(path).slabs()))


def agrees(path: Path) -> None:
    """Compare with SimpleITK: voxels, spacing, origin, directions of axes."""
    scan, image = open_scan(path), SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(
        np.concatenate(list(scan.slabs())), SimpleITK.GetArrayFromImage(image)
    )
    for i, j, k in [(0, 0, 0), (4, 0, 0), (0, 3, 0), (0, 0, 2), (1, 2, 1)]:
        np.testing.assert_allclose(
            scan.grid.to_mm([k, j, i])[::-1],
            image.TransformIndexToPhysicalPoint((i, j, k)),
            atol=1e-5,
        )


@pytest.mark.parametrize("space", ["LPS", "RAS", "right-anterior-superior", "LAS"])
def test_every_space_of_nrrd_is_turned_to_lps(tmp_path: Path, space: str) -> None:
    agrees(nrrd(tmp_path / "a.nrrd", space=space))


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("raw", bytes)]
)
def test_every_encoding_of_nrrd_is_read(tmp_path: Path, encoding: str, pack: object) -> None:
    path = nrrd(tmp_path / "a.nrrd", pack(VALUES.tobytes()), encoding=encoding)  # type: ignore[operator]
    np.testing.assert_array_equal(read(path), VALUES)


@pytest.mark.parametrize("kind", ["u1", "i1", ">i2", "<u2", "<i4", ">u4", "<f4", ">f8"])
def test_every_type_is_read_in_both_byte_orders(tmp_path: Path, kind: str) -> None:
    values = (np.abs(VALUES) % 100).astype(kind)
    big = kind.startswith(">")
    names = {
        "u1": ("uchar", "MET_UCHAR"),
        "i1": ("int8", "MET_CHAR"),
        "i2": ("short", "MET_SHORT"),
        "u2": ("uint16", "MET_USHORT"),
        "i4": ("int", "MET_INT"),
        "u4": ("uint", "MET_UINT"),
        "f4": ("float", "MET_FLOAT"),
        "f8": ("double", "MET_DOUBLE"),
    }[kind[-2:]]
    data = values.tobytes()
    agrees(nrrd(tmp_path / "a.nrrd", data, type=names[0], endian="big" if big else "little"))
    agrees(meta(tmp_path / "a.mha", data, ElementType=names[1], BinaryDataByteOrderMSB=str(big)))


def test_voxels_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "v.raw").write_bytes(b"some header" + VALUES.tobytes())
    (tmp_path / "v.zraw").write_bytes(zlib.compress(VALUES.tobytes()))
    for path in (
        nrrd(tmp_path / "a.nhdr", b"", byte_skip="11", data_file="v.raw"),
        nrrd(tmp_path / "b.nhdr", b"", byte_skip="-1", data_file="v.raw"),
        meta(tmp_path / "a.mhd", b"", HeaderSize="11", ElementDataFile="v.raw"),
        meta(tmp_path / "b.mhd", b"", HeaderSize="-1", ElementDataFile="v.raw"),
        meta(tmp_path / "c.mhd", b"", CompressedData="True", ElementDataFile="v.zraw"),
    ):
        np.testing.assert_array_equal(read(path), VALUES)


def test_one_volume_of_four_axes_is_a_volume(tmp_path: Path) -> None:
    agrees_with = VALUES
    path = nrrd(
        tmp_path / "a.nrrd",
        dimension="4",
        sizes="1 5 4 3",
        space_directions="none (0.5,0,0) (0,0.6,0) (0,0,2)",
    )
    np.testing.assert_array_equal(read(path), agrees_with)
    path = meta(
        tmp_path / "a.mha",
        NDims="4",
        DimSize="5 4 3 1",
        TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
        Offset="-10 20 -30 0",
        ElementSpacing="0.5 0.6 2 1",
    )
    np.testing.assert_array_equal(read(path), agrees_with)
    np.testing.assert_allclose(open_scan(path).grid.spacing, (2, 0.6, 0.5))


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("mm", 1), ("cm", 10), ("um", 1e-3), ("centimeters", 10), ("???", 1), ("m", 1e3)],
)
def test_lengths_are_in_the_unit_that_the_header_states(
    tmp_path: Path, unit: str, factor: float
) -> None:
    """As in NIfTI, and with a warning where it makes a scan that is no patient's."""
    space = " ".join(3 * [f'"{unit}"'])
    spacings = "0.5 0.6 2"
    paths = [
        nrrd(tmp_path / "a.nrrd", space_units=space),
        meta(tmp_path / "a.mha", DistanceUnits=unit),
        nrrd(
            tmp_path / "b.nrrd",
            space_directions=None,
            space_origin=None,
            spacings=spacings,
            units=space,
        ),
    ]
    for path in paths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KptWarning)
            scan = open_scan(path)
        np.testing.assert_allclose(scan.grid.spacing, np.array([2, 0.6, 0.5]) * factor)
        if path.name.startswith("a"):
            np.testing.assert_allclose(scan.grid.origin, np.array([-30, 20, -10]) * factor)
        size = 6 * factor
        doubts = [one for one in caught if "gives its lengths in" in str(one.message)]
        assert len(doubts) == (factor != 1 and not 10 <= size <= 3000)
        assert all(str(path) in str(one.message) for one in doubts)


@pytest.mark.parametrize("units", ['"cm" "cm" "mm"', '"furlong" "furlong" "furlong"'])
def test_units_that_contradict_or_are_unknown_are_refused(tmp_path: Path, units: str) -> None:
    with pytest.raises(ScanFormatError, match=r"a\.nrrd gives its lengths in .*; save it in mm"):
        open_scan(nrrd(tmp_path / "a.nrrd", space_units=units))


def test_an_absent_spacing_is_called_absent(tmp_path: Path) -> None:
    with pytest.raises(ScanFormatError, match=r"a\.mha has no ElementSpacing"):
        open_scan(meta(tmp_path / "a.mha", ElementSpacing=None, ElementSize="1 1 1"))


def test_a_header_that_leaves_the_orientation_open_is_warned_of(tmp_path: Path) -> None:
    for path in (
        nrrd(tmp_path / "a.nrrd", space=None, space_dimension="3"),
        nrrd(
            tmp_path / "b.nrrd",
            space=None,
            space_directions=None,
            space_origin=None,
            spacings="0.5 0.6 2",
        ),
        meta(tmp_path / "a.mha", TransformMatrix=None),
    ):
        with pytest.warns(KptWarning, match="its orientation is a guess"):
            scan = open_scan(path)
        np.testing.assert_allclose(scan.grid.spacing, (2, 0.6, 0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": "5 4"},
        {"sizes": "5 4 0"},
        {"sizes": "5 4 -3"},
        {"sizes": "5 4 30"},
        {"sizes": "5 4 2"},
        {"sizes": "65536 65536 65536"},
        {"sizes": "4294967296 4294967296 4294967296"},
        {"sizes": "9" * 400 + " 4 3"},
        {"sizes": "5 4 drei"},
        {"sizes": None},
        {"dimension": "2"},
        {"dimension": None},
        {"type": "block"},
        {"type": "complex float"},
        {"type": "double"},
        {"endian": None},
        {"endian": "middle"},
        {"encoding": "text"},
        {"encoding": "gzip"},
        {"encoding": "bzip2"},
        {"space": "scanner-xyz"},
        {"space_directions": "(0.5,0,0) (0,0.6,0) (0,0,0)"},
        {"space_directions": "(0.5,0,0) (0,0.6,0) (0.5,0,0)"},
        {"space_directions": "(0.5,0,0) (0,0.6,0) (0,0,nan)"},
        {"space_directions": "(0.5,0,0) (0,0.6,0) (0,0,1e30)"},
        {"space_directions": "(0.5,0,0) (0,0.6,0)"},
        {"space_directions": "none (0,0.6,0) (0,0,2)"},
        {"space_directions": "garbage"},
        {"space_directions": None},
        {"space_origin": "(inf,0,0)"},
        {"space_origin": "(0,0)"},
        {"space_origin": "(1e9,0,0)"},
        {"byte_skip": "-2"},
        {"byte_skip": "99999999999"},
        {"line_skip": "3"},
        {"data_file": "gone.raw"},
        {"data_file": "LIST"},
        {"data_file": "v%03d.raw 1 3 1"},
        {"data_file": "."},
        {"data_file": "/dev/zero"},
        {"data_file": "itself"},
        {"data_file": "a\0b"},
    ],
    ids=str,
)
def test_an_nrrd_that_lies_is_refused(tmp_path: Path, changes: dict[str, str | None]) -> None:
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    path = nrrd(tmp_path / "a.nrrd", **changes)
    with pytest.raises(ScanFormatError, match=str(tmp_path)) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"NDims": "2"},
        {"NDims": "0"},
        {"NDims": None},
        {"DimSize": "5 4 0"},
        {"DimSize": "5 4 -3"},
        {"DimSize": "5 4 30"},
        {"DimSize": "5 4 2"},
        {"DimSize": "4294967296 4294967296 4294967296"},
        {"DimSize": "5 4 3.5"},
        {"DimSize": None},
        {"ElementType": "MET_NONE"},
        {"ElementType": "MET_DOUBLE"},
        {"ElementType": None},
        {"ElementSpacing": "0.5 0.6 0"},
        {"ElementSpacing": "0.5 0.6 nan"},
        {"ElementSpacing": "0.5 0.6 1e30"},
        {"ElementSpacing": "0.5 0.6"},
        {"ElementSpacing": None},
        {"TransformMatrix": "1 0 0 0 1 0 0 0 0"},
        {"TransformMatrix": "1 0 0 0 1 0 1 0 0"},
        {"TransformMatrix": "1 0 0 0 1 0 0 0 inf"},
        {"TransformMatrix": "1 0 0 0 1 0"},
        {"Offset": "nan 0 0"},
        {"Offset": "1e9 0 0"},
        {"ElementNumberOfChannels": "3"},
        {"BinaryData": "False"},
        {"CompressedData": "True"},
        {"HeaderSize": "-2"},
        {"HeaderSize": "99999999999"},
        {"ElementDataFile": "gone.raw"},
        {"ElementDataFile": "LIST"},
        {"ElementDataFile": "v%03d.raw 1 3 1"},
        {"ElementDataFile": "/dev/zero"},
        {"ElementDataFile": "itself"},
    ],
    ids=str,
)
def test_a_metaimage_that_lies_is_refused(tmp_path: Path, changes: dict[str, str | None]) -> None:
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    path = meta(tmp_path / "a.mha", **changes)
    with pytest.raises(ScanFormatError, match=str(tmp_path)) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("encoding", ["gzip", "bzip2"])
def test_a_bomb_is_refused(tmp_path: Path, encoding: str) -> None:
    packed = (gzip if encoding == "gzip" else bz2).compress(b"\0" * (1 << 20))
    path = nrrd(tmp_path / "a.nrrd", packed, encoding=encoding, sizes="60000 60000 3")
    with pytest.raises(ScanFormatError, match=r"truncated|larger than any scanner's"):
        read(path)
