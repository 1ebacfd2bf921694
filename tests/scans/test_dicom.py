"""DICOM series: what is right in any order and syntax, and what is refused with the slice named."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from pydicom import dcmread, uid
from pydicom.dataset import Dataset

from kpt_dask.errors import KptWarning, ScanFormatError
from kpt_dask.runtime import notices
from kpt_dask.scans import dicom_files
from kpt_dask.scans.scan import open_scan, scan_name
from tests.conftest import DATA
from tests.scans.dicom_writer import SERIES, enhanced, save, slices, write_folder

AFFINE = np.array([[0.8, 0, 0, -30], [0, 0.9, 0, 20], [0, 0, 2.5, -100], [0, 0, 0, 1.0]])
VALUES = np.random.default_rng(2).integers(-1000, 2000, (5, 36, 40)).astype(np.int16)
OTHER = uid.generate_uid(entropy_srcs=["other"])


def read(path: Path, series: str | None = None) -> np.ndarray:
    return np.concatenate(list(open_scan(path, series=series).slabs()))


def folder_of(path: Path, datasets: list[Dataset]) -> Path:
    for k, dataset in enumerate(datasets):
        save(dataset, path / f"{k}.dcm")
    return path


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.RLELossless,
        uid.JPEGLossless,
        uid.JPEGLosslessSV1,
        uid.JPEGLSLossless,
        uid.JPEG2000Lossless,
    ],
    ids=lambda syntax: syntax.name,
)
def test_every_syntax_gives_the_same_voxels(tmp_path: Path, syntax: uid.UID) -> None:
    write_folder(tmp_path / "ct", VALUES, AFFINE, syntax)
    np.testing.assert_array_equal(read(tmp_path / "ct"), VALUES)


def test_a_real_series_equals_simpleitk() -> None:
    folder = DATA / "ct_dicom"
    if not folder.is_dir():
        pytest.skip(f"real DICOM is missing: {folder} does not exist (set KPT_DATA)")
    scan = open_scan(folder)
    reader = SimpleITK.ImageSeriesReader()
    # GDCM sorts nothing whose data set lacks UIDs: names are in order here.
    reader.SetFileNames(sorted(str(file) for file in folder.glob("*.dcm")))
    image = reader.Execute()
    values = SimpleITK.GetArrayFromImage(image)
    if image.GetDirection()[8] * image.GetSpacing()[2] < 0 or not np.allclose(
        image.GetOrigin(), scan.grid.origin[::-1], atol=1e-3
    ):
        values = values[::-1]
    np.testing.assert_array_equal(np.concatenate(list(scan.slabs())), values)
    np.testing.assert_allclose(scan.grid.spacing, image.GetSpacing()[::-1], rtol=1e-5)


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    datasets = slices(VALUES, AFFINE)
    for k, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + k, -1024 - k
    stored = VALUES.astype(float) + 1024
    factor = np.arange(5)[:, None, None]
    np.testing.assert_array_equal(
        read(folder_of(tmp_path / "ct", datasets)), stored * (1 + factor) - 1024 - factor
    )


@pytest.mark.parametrize("empty", [False, True])
def test_slices_with_and_without_an_intercept_are_not_mixed(tmp_path: Path, empty: bool) -> None:
    datasets = slices(VALUES, AFFINE)
    for dataset in datasets[2:]:
        if empty:
            dataset.RescaleIntercept = None
        else:
            del dataset.RescaleIntercept
    with pytest.raises(ScanFormatError, match=r"has no RescaleIntercept, which .* has"):
        open_scan(folder_of(tmp_path / "ct", datasets))
    for dataset in datasets:
        dataset.RescaleIntercept = None
    with pytest.warns(KptWarning, match="has no RescaleIntercept"):
        open_scan(folder_of(tmp_path / "none", datasets))


def test_slices_of_two_patients_are_not_one_scan(tmp_path: Path) -> None:
    datasets = slices(VALUES, AFFINE)
    for dataset in datasets[2:]:
        dataset.FrameOfReferenceUID = OTHER
    with pytest.warns(KptWarning, match="several frames of reference"):
        open_scan(folder_of(tmp_path / "frames", datasets))
    for dataset in datasets[2:]:
        dataset.PatientID = "other"
    with pytest.raises(ScanFormatError, match="another PatientID than"):
        open_scan(folder_of(tmp_path / "patients", datasets))


def test_a_tilted_gantry_shears_the_grid(tmp_path: Path) -> None:
    tilted = AFFINE.copy()
    tilted[1, 2] = 0.7
    scan = open_scan(folder_of(tmp_path / "ct", slices(VALUES, tilted)))
    for k, j, i in [(0, 0, 0), (4, 35, 39), (2, 3, 7)]:
        np.testing.assert_allclose(scan.grid.to_mm([k, j, i])[::-1], (tilted @ [i, j, k, 1])[:3])


def test_monochrome1_changes_no_value_and_padding_is_air(tmp_path: Path) -> None:
    datasets = slices(VALUES, AFFINE)
    for dataset in datasets:
        dataset.PhotometricInterpretation = "MONOCHROME1"
        stored = np.frombuffer(dataset.PixelData, "<u2").copy()
        stored[:3] = 63536
        dataset.PixelData = stored.tobytes()
        # Written with the wrong sign, as it happens.
        dataset.add_new("PixelPaddingValue", "SS", -2000)
    expected = VALUES.copy()
    expected[:, 0, :3] = -1000
    np.testing.assert_array_equal(read(folder_of(tmp_path / "ct", datasets)), expected)


def test_bits_that_are_not_stored_do_not_count(tmp_path: Path) -> None:
    datasets = slices(np.clip(VALUES, -1000, 1000), AFFINE)
    for dataset in datasets:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 1
        dataset.RescaleIntercept = 0
        stored = (np.frombuffer(dataset.PixelData, "<u2").astype(np.int32) - 1024) & 0xFFF
        dataset.PixelData = (stored | 0x3000).astype("<u2").tobytes()
    got = read(folder_of(tmp_path / "ct", datasets))
    np.testing.assert_array_equal(got, np.clip(VALUES, -1000, 1000))


def test_uids_may_be_in_the_file_meta_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct", slices(VALUES, AFFINE))
    for file in folder.iterdir():
        dataset = dcmread(file)
        dataset.SOPClassUID = dataset.SOPInstanceUID = ""
        dataset.save_as(file)
    np.testing.assert_array_equal(read(folder), VALUES)


def test_of_several_series_one_is_chosen_by_its_uid(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct" / "a", slices(VALUES, AFFINE)).parent
    folder_of(folder / "b", slices(VALUES[::-1], AFFINE, OTHER))
    with pytest.raises(ScanFormatError, match=r"holds 2 CT series: .*5 images.*--series") as caught:
        open_scan(folder)
    assert SERIES in str(caught.value)
    assert "thorax 1.0" in str(caught.value)
    np.testing.assert_array_equal(read(folder, OTHER), VALUES[::-1])
    with pytest.raises(ScanFormatError, match=r"no series 1\.2; it holds"):
        open_scan(folder, series="1.2")


def test_pictures_of_a_scan_and_other_files_are_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct", slices(VALUES, AFFINE))
    [localizer] = slices(VALUES[:1], AFFINE[:, [2, 1, 0, 3]])
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(localizer, folder / "overview.dcm")
    [dose] = slices(VALUES[:1], AFFINE, OTHER)
    dose.SOPClassUID = uid.SecondaryCaptureImageStorage
    save(dose, folder / "dose.dcm")
    (folder / "DICOMDIR").write_bytes(b"\0" * 200)
    (folder / "notes.txt").write_text("nothing")
    (folder / "._0.dcm").write_bytes(b"\0" * 200)
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    os.mkfifo(folder / "pipe.dcm")
    with pytest.warns(KptWarning, match=r"1 images of the series .*overview\.dcm"):
        scan = open_scan(folder)
    np.testing.assert_array_equal(np.concatenate(list(scan.slabs())), VALUES)


def test_a_copy_of_a_slice_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct", slices(VALUES, AFFINE))
    shutil.copy(folder / "2.dcm", folder / "copy.dcm")
    with pytest.warns(KptWarning, match="1 copies of slices"):
        scan = open_scan(folder)
    assert scan.grid.shape == VALUES.shape


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless])
def test_slices_of_one_uid_and_place_with_other_pixels_are_refused(
    tmp_path: Path, syntax: uid.UID
) -> None:
    folder = tmp_path / "ct"
    write_folder(folder, VALUES, AFFINE, syntax)
    shutil.copy(folder / "0017.dcm", folder / "same.dcm")
    with pytest.warns(KptWarning, match="1 copies of slices"):
        np.testing.assert_array_equal(read(folder), VALUES)
    other = VALUES[2].copy()
    other[30, 20] += 1
    changed = slices(VALUES, AFFINE)[2]
    changed.PixelData = (other + 1024).astype("<u2").tobytes()
    save(changed, folder / "other.dcm", syntax)
    with pytest.raises(ScanFormatError, match=r"0017\.dcm and .*other\.dcm have one SOPInstance"):
        open_scan(folder)
    changed = slices(VALUES, AFFINE)[2]
    changed.RescaleIntercept = 0
    save(changed, folder / "other.dcm", syntax)
    with pytest.raises(ScanFormatError, match="not the same pixels"):
        open_scan(folder)


def test_copies_of_an_enhanced_file_or_in_a_zip_are_compared(tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    save(enhanced(VALUES, AFFINE), folder / "a.dcm")
    shutil.copy(folder / "a.dcm", folder / "b.dcm")
    with pytest.warns(KptWarning, match="5 copies of slices"):
        np.testing.assert_array_equal(read(folder), VALUES)
    other = VALUES.copy()
    other[1, 2, 3] += 1
    save(enhanced(other, AFFINE), folder / "b.dcm")
    archive = Path(shutil.make_archive(str(tmp_path / "both"), "zip", folder))
    with pytest.raises(ScanFormatError, match=r"frame 4 of .*a\.dcm and frame 4 of .*b\.dcm"):
        open_scan(archive)


@pytest.mark.parametrize(
    ("keyword", "values", "doubted"),
    [
        ("AcquisitionNumber", [1, 2, 1, 2, 1], True),
        ("KVP", ["120", "80", "80", "120", "80"], True),
        ("ConvolutionKernel", ["B30f", "B70f", "B30f", "B70f", "B30f"], True),
        ("KVP", ["120", None, "120", None, "120"], True),
        ("AcquisitionNumber", [1, 2, 3, 4, 5], False),
        ("AcquisitionNumber", [2, 2, 1, 1, 2], False),
    ],
)
def test_two_scans_between_each_other_are_doubted(
    tmp_path: Path, keyword: str, values: list[object], doubted: bool
) -> None:
    datasets = slices(VALUES, AFFINE)
    for dataset, value in zip(datasets, values, strict=True):
        setattr(dataset, keyword, value)
    folder = folder_of(tmp_path / "ct", datasets)
    with notices.recorded() as told, notices.shown(lambda _: None):
        open_scan(folder)
    assert [f"two scans in one series: {keyword}" in sentence for sentence in told] == [
        True for _ in range(doubted)
    ]
    assert all("0.dcm and" in sentence and "1.dcm" in sentence for sentence in told)


def test_slices_far_apart_for_their_thickness_are_doubted(tmp_path: Path) -> None:
    datasets = slices(VALUES, AFFINE)[::2]
    with pytest.warns(KptWarning, match=r"slices of 2\.5 mm lie 5 mm apart; see whether"):
        open_scan(folder_of(tmp_path / "gaps", datasets))
    for dataset in datasets:
        dataset.SpacingBetweenSlices = 5
    np.testing.assert_array_equal(read(folder_of(tmp_path / "said", datasets)), VALUES[::2])


def test_a_single_slice_is_a_plane_with_a_warning(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct", slices(VALUES, AFFINE))
    with pytest.warns(KptWarning, match="single slice; give the folder"):
        scan = open_scan(folder / "2.dcm")
    assert scan.grid.shape == (1, *VALUES.shape[1:])
    np.testing.assert_allclose(scan.grid.spacing, (2.5, 0.9, 0.8))


def test_names_are_those_of_folder_or_zip() -> None:
    assert scan_name(Path("a/CT 1.5")) == "CT 1.5"
    assert scan_name(Path("a/b.zip")) == "b"
    assert scan_name(Path("a/b.dcm")) == "b"


def _shift(k: int, mm: float, axis: int = 2) -> Callable[[list[Dataset]], None]:
    def change(datasets: list[Dataset]) -> None:
        position = [float(p) for p in datasets[k].ImagePositionPatient]
        position[axis] += mm
        datasets[k].ImagePositionPatient = position

    return change


def _set(keyword: str, value: object, k: int = 3) -> Callable[[list[Dataset]], None]:
    def change(datasets: list[Dataset]) -> None:
        if value is None:
            delattr(datasets[k], keyword)
        else:
            setattr(datasets[k], keyword, value)

    return change


def _drop(datasets: list[Dataset]) -> None:
    del datasets[2]


def _duplicate(datasets: list[Dataset]) -> None:
    datasets[3].ImagePositionPatient = datasets[2].ImagePositionPatient


def _everywhere(keyword: str, value: object) -> Callable[[list[Dataset]], None]:
    def change(datasets: list[Dataset]) -> None:
        for dataset in datasets:
            setattr(dataset, keyword, value)

    return change


def _shrink(datasets: list[Dataset]) -> None:
    datasets[3].Rows = 18
    datasets[3].PixelData = datasets[3].PixelData[: len(datasets[3].PixelData) // 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, r"2\.dcm lies 5 mm from .*1\.dcm.*missing between them"),
        (_shift(3, 0.8), r"3\.dcm.*unevenly spaced|missing between"),
        (_shift(3, 9.0, axis=0), r"3\.dcm lies 9 mm beside its place"),
        (_duplicate, r"3\.dcm lies at the same place as .*2\.dcm"),
        (_set("ImageOrientationPatient", [0, 1, 0, -1, 0, 0]), r"3\.dcm has another orientation"),
        (_set("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), r"3\.dcm .*right angles"),
        (_set("PixelSpacing", [0.9, 0.7]), r"3\.dcm has another PixelSpacing"),
        (_set("PixelSpacing", [0.9, 0]), r"3\.dcm has a PixelSpacing that is not positive"),
        (_set("ImagePositionPatient", None), r"3\.dcm has no ImagePositionPatient"),
        (_set("ImagePositionPatient", [1, 2]), r"3\.dcm has a damaged ImagePositionPatient"),
        (_set("RescaleSlope", 0), r"3\.dcm has the RescaleSlope 0"),
        (_set("Rows", 60000), r"3\.dcm has 60000 × 40 pixels, .*0\.dcm 36 × 40"),
        (_everywhere("Rows", 60000), r"0\.dcm holds 2880 bytes of pixels"),
        (_everywhere("Columns", 0), r"0\.dcm has 36 × 0 pixels"),
        (_shrink, r"3\.dcm has 18 × 40 pixels"),
        (_set("SamplesPerPixel", 3), r"3\.dcm is a colour picture"),
        (_set("BitsAllocated", 12), r"3\.dcm has pixels of 16 bits in 12"),
        (_set("NumberOfFrames", 4), r"3\.dcm has 4 frames"),
        (_set("PixelData", None), r"3\.dcm is truncated"),
        (_everywhere("Modality", "MR"), r"no slices of a CT, but .*MR, thorax.*only CT has HU"),
        (_everywhere("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), r"no slices of a CT"),
    ],
    ids=str,
)
def test_what_is_no_regular_scan_is_refused_with_the_slice_named(
    tmp_path: Path, change: Callable[[list[Dataset]], None], said: str
) -> None:
    datasets = slices(VALUES, AFFINE)
    change(datasets)
    with pytest.raises(ScanFormatError, match=said):
        read(folder_of(tmp_path / "ct", datasets))


def test_damaged_numbers_are_refused_with_the_slice_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ct", slices(VALUES, AFFINE))
    file = folder / "3.dcm"
    whole = file.read_bytes()
    for bad in (b"nan", b"inf", b"1,5", b"1e999"):
        at = whole.index(b"2.5 ")
        file.write_bytes(whole[:at] + bad[:4].ljust(4) + whole[at + 4 :])
        if bad != b"1e999":
            with pytest.raises(ScanFormatError, match=r"3\.dcm has a damaged SliceThickness"):
                open_scan(folder)


def test_a_compressed_slice_of_another_size_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "ct", VALUES, AFFINE, uid.JPEG2000Lossless)
    file = sorted((tmp_path / "ct").iterdir())[0]
    content = file.read_bytes()
    at = content.index(b"\xff\x4f\xff\x51") + 8
    file.write_bytes(content[:at] + b"\x00\x01\x00\x00" * 2 + content[at + 8 :])
    with pytest.raises(
        ScanFormatError, match=rf"{file.name} holds a compressed image that is 65536"
    ):
        read(tmp_path / "ct")


@pytest.mark.parametrize(
    "syntax",
    [uid.RLELossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless],
    ids=lambda syntax: syntax.name,
)
def test_a_truncated_compressed_slice_is_refused(tmp_path: Path, syntax: uid.UID) -> None:
    write_folder(tmp_path / "ct", VALUES, AFFINE, syntax)
    file = sorted((tmp_path / "ct").iterdir())[0]
    content = file.read_bytes()
    for lost in (30, 200, 1000):
        file.write_bytes(content[:-lost])
        with pytest.raises(ScanFormatError, match=file.name):
            read(tmp_path / "ct")


def test_an_enhanced_file_must_say_where_all_frames_lie(tmp_path: Path) -> None:
    dataset = enhanced(VALUES, AFFINE)
    del dataset.PerFrameFunctionalGroupsSequence[0]
    with pytest.raises(ScanFormatError, match="5 frames, but gives the places of 4"):
        open_scan(save(dataset, tmp_path / "ct.dcm"))


def test_a_deflated_file_is_refused_unread(tmp_path: Path) -> None:
    [dataset] = slices(VALUES[:1], AFFINE)
    path = save(dataset, tmp_path / "a.dcm", uid.DeflatedExplicitVRLittleEndian)
    with pytest.raises(ScanFormatError, match=r"a\.dcm is deflated"):
        open_scan(path)


def test_an_empty_folder_or_one_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanFormatError, match="is a folder that holds no file"):
        open_scan(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ScanFormatError, match="holds no DICOM image"):
        open_scan(tmp_path)
    (tmp_path / "lost.dcm").symlink_to(tmp_path / "gone")
    with pytest.raises(ScanFormatError, match=r"lost\.dcm cannot be read"):
        open_scan(tmp_path)


def test_a_zip_that_lies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", b"\0" * (3 << 20))
    monkeypatch.setattr(dicom_files, "LARGEST_MEMBER", 2 << 20)
    with pytest.raises(ScanFormatError, match=r"bomb\.zip/a\.dcm is larger than 2 MiB"):
        open_scan(bomb)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ScanFormatError, match=r"broken\.zip is no zip"):
        open_scan(broken)
