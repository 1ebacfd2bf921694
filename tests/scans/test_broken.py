"""Broken scans of every format: sizes that lie, bombs, links in a circle, headers of noise.

Each ends in one sentence, within a bound of memory. What is truncated or something else altogether
is in `test_contract`; what else the headers of a format can say, in the test of that format.
"""

import gzip
import json
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import zarr
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset

from kpt_dask.annotations.dicom_objects import kind_of, read_object
from kpt_dask.cli.main import kpt
from kpt_dask.errors import KptError, ScanFormatError
from kpt_dask.scans.dicom_files import open_bounded
from kpt_dask.scans.dicom_header import read_header
from kpt_dask.scans.scan import open_scan
from tests.scans.dicom_writer import enhanced, save, slices
from tests.scans.formats import FORMATS, Array, Format
from tests.scans.test_contract import AFFINE, VALUES, made, parts_of
from tests.scans.test_plain import meta, nrrd

MOST = 64 << 20
"""Bytes that may be taken for a file of a few kilobytes."""


def read(path: Path) -> list[Array]:
    return list(open_scan(path).slabs())


def sentence(path: Path, *, must: bool = True) -> str | None:
    """Read a broken scan within the bound of memory; give the sentence."""
    said = None
    tracemalloc.start()
    try:
        read(path)
    except KptError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST
    if must:
        assert said is not None
    if said is not None:
        assert str(path.parent) in said
        assert "\n" not in said
        assert said.endswith(".")
        assert len(said) < 600
    return said


def patched(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def nifti_1(path: Path, sizes: tuple[int, int, int]) -> Path:
    nib.save(nib.Nifti1Image(VALUES, AFFINE), path / "a.nii")
    short = [max(min(n, 2**15 - 1), -(2**15)) for n in sizes]
    patched(path / "a.nii", 42, struct.pack("<3h", *short))
    return path / "a.nii"


def nifti_2(path: Path, sizes: tuple[int, int, int]) -> Path:
    nib.save(nib.Nifti2Image(VALUES, AFFINE), path / "a.nii")
    patched(path / "a.nii", 24, struct.pack("<3q", *sizes))
    return path / "a.nii"


def gzipped(path: Path, sizes: tuple[int, int, int]) -> Path:
    plain = nifti_2(path, sizes)
    (path / "a.nii.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return path / "a.nii.gz"


def pair(path: Path, sizes: tuple[int, int, int]) -> Path:
    nib.save(nib.Nifti1Pair(VALUES, AFFINE), path / "a.img")
    short = [max(min(n, 2**15 - 1), -(2**15)) for n in sizes]
    patched(path / "a.hdr", 42, struct.pack("<3h", *short))
    return path / "a.img"


def in_nrrd(path: Path, sizes: tuple[int, int, int]) -> Path:
    return nrrd(path / "a.nrrd", sizes=" ".join(map(str, sizes)))


def in_meta(path: Path, sizes: tuple[int, int, int]) -> Path:
    return meta(path / "a.mha", DimSize=" ".join(map(str, sizes)))


def sized(dataset: Dataset, sizes: tuple[int, int, int]) -> None:
    dataset.Columns, dataset.Rows = (max(min(n, 2**16 - 1), 0) for n in sizes[:2])
    dataset.NumberOfFrames = str(max(min(sizes[2], 2**31 - 1), -(2**31)))


def dicom_file(path: Path, sizes: tuple[int, int, int]) -> Path:
    dataset = enhanced(VALUES, AFFINE)
    sized(dataset, sizes)
    return save(dataset, path / "a.dcm")


def dicom_slices(path: Path, sizes: tuple[int, int, int]) -> Path:
    for k, dataset in enumerate(slices(VALUES, AFFINE)):
        sized(dataset, sizes)
        save(dataset, path / "ct" / f"{k}.dcm")
    return path / "ct"


def dicom_zip(path: Path, sizes: tuple[int, int, int]) -> Path:
    folder = dicom_slices(path, sizes)
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path / "a.zip"


def described(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def ome_4(path: Path, sizes: tuple[int, int, int]) -> Path:
    form = next(form for form in FORMATS if form.name == "OME-Zarr 0.4")
    image = made(form, path / "ome")
    described(image / "0" / ".zarray", lambda about: about.update(shape=sizes))
    return image


def ome_5(path: Path, sizes: tuple[int, int, int]) -> Path:
    form = next(form for form in FORMATS if form.name == "OME-Zarr 0.5")
    image = made(form, path / "ome")
    described(image / "0" / "zarr.json", lambda about: about.update(shape=sizes))
    return image


def ome_chunks(path: Path, sizes: tuple[int, int, int]) -> Path:
    image = ome_5(path, VALUES.shape)

    def change(about: Any) -> None:
        about["chunk_grid"]["configuration"]["chunk_shape"] = sizes

    described(image / "0" / "zarr.json", change)
    return image


SIZED = (
    *(nifti_1, nifti_2, gzipped, pair, in_nrrd, in_meta),
    *(dicom_file, dicom_slices, dicom_zip, ome_4, ome_5, ome_chunks),
)
SIZES = {
    "zero": (0, 6, 7),
    "negative": (5, -6, 7),
    "a plane too large": (60000, 60000, 2),
    "too many planes": (5, 6, 2**31 - 1),
    "large everywhere": (32767, 32767, 32767),
    "beyond 64 bits": (2**21, 2**21, 2**22),
    "largest": (2**63 - 1, 2**63 - 1, 2**63 - 1),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("write", SIZED, ids=lambda write: write.__name__)
def test_sizes_that_lie_take_no_memory(
    write: Callable[[Path, tuple[int, int, int]], Path],
    sizes: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    sentence(write(tmp_path, sizes))


@pytest.mark.timeout(60)
def test_chunks_beyond_counting_are_refused(tmp_path: Path) -> None:
    """Planes so thin that there may be half a billion: to look for each chunk would take hours."""
    image = ome_5(tmp_path, (2**29, 6, 5))

    def change(about: Any) -> None:
        level = about["attributes"]["ome"]["multiscales"][0]["datasets"][0]
        level["coordinateTransformations"][0]["scale"][0] = 1.5e-4

    described(image / "zarr.json", change)
    assert "chunks, more than any scan" in str(sentence(image))


ZEROS = 256 << 20
"""Bytes that a bomb unpacks to; packed, they are a few hundred kilobytes."""


def nifti_bomb(path: Path) -> Path:
    nib.save(nib.Nifti1Image(VALUES, AFFINE), path / "plain.nii")
    whole = (path / "plain.nii").read_bytes()
    (path / "a.nii.gz").write_bytes(gzip.compress(whole[:-10] + bytes(ZEROS), 1))
    patched(path / "plain.nii", 42, struct.pack("<3h", 8000, 8000, 2))
    return path / "a.nii.gz"


def header_bomb(path: Path) -> Path:
    (path / "a.hdr.gz").write_bytes(gzip.compress(bytes(ZEROS), 1))
    (path / "a.img.gz").write_bytes(gzip.compress(bytes(ZEROS), 1))
    return path / "a.hdr.gz"


def nrrd_bomb(path: Path) -> Path:
    return nrrd(path / "a.nrrd", gzip.compress(bytes(ZEROS), 1), encoding="gzip")


def meta_bomb(path: Path) -> Path:
    return meta(path / "a.mha", zlib.compress(bytes(ZEROS), 1), CompressedData="True")


def zip_bomb(path: Path) -> Path:
    with zipfile.ZipFile(path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(128) + b"DICM" + bytes(ZEROS))
    return path / "a.zip"


def chunk_bomb(codec: Any, packed: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        image = ome_5(path, VALUES.shape)
        array = zarr.open_array(str(image / "0"), mode="r")
        about = zarr.create_array(
            str(path / "like"),
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            compressors=codec,
        )
        codecs = json.loads((path / "like" / "zarr.json").read_text())["codecs"]
        assert about.ndim == 3
        described(image / "0" / "zarr.json", lambda one: one.update(codecs=codecs))
        for chunk in (image / "0" / "c").rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(packed)
        return image

    return write


def blosc_header() -> bytes:
    """A chunk that says it is 2 GiB large."""
    return struct.pack("<4B3I", 2, 1, 0x21, 2, 2**31 - 1, 1 << 18, 64) + bytes(48)


BOMBS: Mapping[str, Callable[[Path], Path]] = {
    "nifti gz": nifti_bomb,
    "pair gz": header_bomb,
    "nrrd gzip": nrrd_bomb,
    "metaimage zlib": meta_bomb,
    "zip": zip_bomb,
    "ome-zarr gzip": chunk_bomb(zarr.codecs.GzipCodec(), gzip.compress(bytes(ZEROS), 1)),
    "ome-zarr blosc": chunk_bomb(zarr.codecs.BloscCodec(typesize=2), blosc_header()),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_unpacks_to_far_more_takes_no_memory(bomb: str, tmp_path: Path) -> None:
    sentence(BOMBS[bomb](tmp_path))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_links_in_a_circle_are_refused(form: Format, tmp_path: Path) -> None:
    path = made(form, tmp_path / "scan")
    for file in parts_of(path):
        whole = file.read_bytes()
        file.unlink()
        file.symlink_to(file.name)
        sentence(path)
        file.unlink()
        file.write_bytes(whole)
    path = path.rename(path.with_name("moved"))
    path.with_name("a.nii").symlink_to("b.nii")
    path.with_name("b.nii").symlink_to("a.nii")
    sentence(path.with_name("a.nii"))


NUMBERS = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
}


@pytest.mark.parametrize("number", ["nan", "inf", "1e300", "1e-300"])
@pytest.mark.parametrize("keyword", NUMBERS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_numbers_that_are_none_are_refused(
    keyword: str, number: str, everywhere: bool, tmp_path: Path
) -> None:
    datasets = slices(VALUES, AFFINE)
    with warnings.catch_warnings():
        # pydicom says that such values are none.
        warnings.simplefilter("ignore", UserWarning)
        for dataset in datasets if everywhere else datasets[2:3]:
            setattr(dataset, keyword, [number] * NUMBERS[keyword])
        for k, dataset in enumerate(datasets):
            save(dataset, tmp_path / "ct" / f"{k}.dcm")
    # A number all the same: it makes no difference, or puts a slice elsewhere.
    usable = number == "1e-300" and keyword in ("RescaleIntercept", "ImagePositionPatient")
    said = sentence(tmp_path / "ct", must=not usable)
    assert usable or everywhere or "2.dcm" in str(said)


fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["", "-0", "1e308", "0x10", "١", "none", "()", "(1,2", "%d", "LIST", ".."]),
)
words = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=20)
values = st.one_of(words, st.lists(numbers, max_size=5).map(" ".join))


@fuzz
@given(data=st.data())
def test_an_nrrd_header_of_noise(tmp_path: Path, data: st.DataObject) -> None:
    names = ["type", "dimension", "space", "sizes", "space_directions", "space_origin", "endian"]
    names += ["encoding", "byte_skip", "line_skip", "data_file", "kinds", "spacings", "content"]
    some = data.draw(st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=3))
    sentence(nrrd(tmp_path / "a.nrrd", **some), must=False)


@fuzz
@given(data=st.data())
def test_a_metaimage_header_of_noise(tmp_path: Path, data: st.DataObject) -> None:
    names = ["NDims", "DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "Offset"]
    names += ["BinaryData", "CompressedData", "HeaderSize", "ElementNumberOfChannels"]
    names += ["CompressedDataSize", "ElementDataFile", "BinaryDataByteOrderMSB"]
    some = data.draw(st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=3))
    sentence(meta(tmp_path / "a.mha", **some), must=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Give the keys that lead to every value of a document."""
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in inner:
        found.append((*at, key))
        if isinstance(value, dict | list):
            found += places(value, (*at, key))
    return found


@settings(fuzz, max_examples=40)
@pytest.mark.parametrize("name", ["OME-Zarr 0.4", "OME-Zarr 0.5"])
@given(data=st.data())
def test_ome_metadata_of_noise(name: str, tmp_path: Path, data: st.DataObject) -> None:
    form = next(form for form in FORMATS if form.name == name)
    image = made(form, tmp_path / "scan")
    metadata = [part for part in parts_of(image) if part.name.startswith((".z", "zarr"))]
    file = data.draw(
        st.sampled_from([part for part in metadata if places(json.loads(part.read_text()))])
    )
    document = json.loads(file.read_text())
    *to, last = data.draw(st.sampled_from(places(document)))
    inner = document
    for key in to:
        inner = inner[key]
    inner[last] = data.draw(json_values)
    file.write_text(json.dumps(document))
    sentence(image, must=False)


@settings(fuzz, max_examples=40)
@pytest.mark.parametrize("name", ["DICOM folder", "DICOM enhanced"])
@given(data=st.data())
def test_dicom_elements_of_noise(name: str, tmp_path: Path, data: st.DataObject) -> None:
    """Values that an element may hold, but not there."""
    form = next(form for form in FORMATS if form.name == name)
    path = made(form, tmp_path / "scan")
    file = data.draw(st.sampled_from(parts_of(path)))
    dataset = dcmread(file)
    element = data.draw(st.sampled_from(list(dataset)))
    if element.VR in ("US", "SS"):
        element.value = data.draw(st.integers(0, 2**15 - 1))
    elif element.VR == "SQ":
        element.value = data.draw(st.sampled_from([[], [Dataset()], [Dataset()] * 99]))
    elif element.VR in ("DS", "IS"):
        low = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=7))
        element.value = [str(n) for n in low]
    elif element.VR in ("OW", "OB"):
        element.value = data.draw(st.binary(max_size=40).map(lambda raw: raw[: len(raw) // 2 * 2]))
    else:
        element.value = data.draw(st.from_regex(r"\A[A-Z0-9 _.]{0,16}\Z"))
    dataset.save_as(file)
    sentence(path, must=False)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_command_line_says_it_in_one_sentence(form: Format, tmp_path: Path) -> None:
    path = made(form, tmp_path / "scan")
    for file in (parts_of(path)[0], parts_of(path)[-1]):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 3])
        before = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(kpt, ["convert", str(path), str(tmp_path / "out.zarr")])
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        said = [line for line in result.stderr.splitlines() if "warning: " not in line]
        assert len(said) == 1
        assert said[0].startswith("kpt: ")
        assert sorted(tmp_path.rglob("*")) == before
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["DICOM folder", "DICOM enhanced"])
def test_no_length_of_dicom_asks_for_memory(name: str, tmp_path: Path) -> None:
    (form,) = (form for form in FORMATS if form.name == name)
    path = parts_of(made(form, tmp_path / "scan", VALUES[:1]))[0]
    whole = path.read_bytes()
    tracemalloc.start()
    # The highest byte of a length is 0, wherever it is.
    for at in (at for at in range(128, len(whole)) if whole[at] == 0):
        path.write_bytes(whole[:at] + b"\x7e" + whole[at + 1 :])
        with suppress(ScanFormatError), open_bounded(path) as file:
            read_header(file, "", str(path), must=True)
        with suppress(ScanFormatError):
            read_object(path)
        kind_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
