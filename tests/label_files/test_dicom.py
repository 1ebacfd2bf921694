"""Label maps as DICOM: segmentations and structure sets, as other programs read and check them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom import uid

from kpt_dask.errors import ScanFormatError
from kpt_dask.label_files.formats import LabelFile
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.label_files.rtstruct import outlines
from kpt_dask.runtime import notices
from kpt_dask.scans.scan import open_scan
from tests.conftest import DATA
from tests.label_files.maps import ORGANS, affine, label_map, labels, of_series, places
from tests.scans.dicom_writer import SERIES, STUDY, WORLD, write_enhanced
from tests.scans.formats import Array
from tests.scans.test_contract import lps

LOWEST_DICE = 0.95


def write(asked: str, made: LabelMap) -> Path:
    file = LabelFile.parse(asked)
    file.check(made.grid)
    file.format.write(Path(file.path), made)
    return Path(file.path)


def where_highdicom_sees(path: Path) -> dict[tuple[float, ...], str]:
    """Names of segments by the places of their voxels, in tenths of mm."""
    found: Any = highdicom.seg.segread(path)
    names = {n: found.get_segment_description(n).segment_label for n in found.segment_numbers}
    volume = found.get_volume(combine_segments=True)
    k, j, i = np.nonzero(volume.array)
    at = np.stack([k, j, i, np.ones(len(k))])
    points = np.rint((volume.affine @ at)[:3].T * 10)
    values = volume.array[k, j, i].tolist()
    return {tuple(p): names[v] for p, v in zip(points.tolist(), values, strict=True)}


def named(values: Array, of: Array) -> dict[tuple[float, ...], str]:
    names = {organ.value: organ.name for organ in ORGANS}
    return {place: names[value] for place, value in places(values, of).items()}


def errors_of_dciodvfy(path: Path) -> list[str]:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is missing (Debian: dicom3tools)")
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("turned", [False, True])
def test_a_segmentation_of_a_series_lies_on_it(turned: bool, tmp_path: Path) -> None:
    made = of_series(tmp_path / "ct", turned=turned)
    path = write(str(tmp_path / "l.dcm"), made)
    assert where_highdicom_sees(path) == named(labels(), affine(turned))
    assert errors_of_dciodvfy(path) == []
    found = pydicom.dcmread(path)
    assert found.StudyInstanceUID == STUDY
    assert found.FrameOfReferenceUID == WORLD
    assert found.PatientID == "test"
    [series] = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES
    slices = {one.header.instance: one for one in made.scan.frames}  # type: ignore[union-attr]
    for group in found.PerFrameFunctionalGroupsSequence:
        [source] = group.DerivationImageSequence[0].SourceImageSequence
        at = slices[source.ReferencedSOPInstanceUID].position
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert position == pytest.approx(at.tolist(), abs=1e-3)


def test_segments_have_names_colours_and_codes_with_a_side(tmp_path: Path) -> None:
    found = pydicom.dcmread(write(str(tmp_path / "l.dcm"), label_map()))
    liver, kidney, own = found.SegmentSequence
    assert [one.SegmentLabel for one in found.SegmentSequence] == [o.name for o in ORGANS[:3]]
    [code] = kidney.SegmentedPropertyTypeCodeSequence
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("64033007", "SCT")
    assert code.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert (
        "SegmentedPropertyTypeModifierCodeSequence"
        not in (liver.SegmentedPropertyTypeCodeSequence[0])
    )
    assert own.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99KPT"
    colour = highdicom.color.CIELabColor.from_dicom_value(kidney.RecommendedDisplayCIELabValue)
    assert colour.to_rgb(clip=True) == pytest.approx((0, 128, 255), abs=2)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 2, 0, 3], [1, 0, 2, 3]])
def test_a_segmentation_of_a_scan_that_was_no_dicom_refers_to_nothing(
    order: list[int], tmp_path: Path
) -> None:
    of = affine(turned=True)[:, order]
    path = write(str(tmp_path / "l.dcm"), label_map(of=of))
    assert where_highdicom_sees(path) == named(labels(), of)
    assert errors_of_dciodvfy(path) == []
    found = pydicom.dcmread(path)
    assert "ReferencedSeriesSequence" not in found
    assert all("DerivationImageSequence" not in g for g in found.PerFrameFunctionalGroupsSequence)


def test_a_tilted_gantry_is_kept(tmp_path: Path) -> None:
    tilted = affine()
    tilted[1, 2] = 0.5
    path = write(str(tmp_path / "l.dcm"), label_map(of=tilted))
    found = pydicom.dcmread(path)
    seen = {
        tuple(np.rint(np.array(group.PlanePositionSequence[0].ImagePositionPatient) * 10).tolist())
        for group in found.PerFrameFunctionalGroupsSequence
    }
    expected = {
        tuple(np.rint((tilted @ [0, 0, k, 1])[:3] * 10).tolist())
        for k in range(len(labels()))
        if labels()[k].any()
    }
    assert seen == expected


def test_frames_of_one_file_are_referred_to(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "ct.dcm", np.zeros(labels().shape, np.int16), affine())
    scan = open_scan(tmp_path / "ct.dcm")
    made = LabelMap(label_map().voxels, scan.grid, ORGANS, scan.file)
    path = write(str(tmp_path / "l.dcm"), made)
    assert where_highdicom_sees(path) == named(labels(), affine())
    assert errors_of_dciodvfy(path) == []
    found = pydicom.dcmread(path)
    [instance] = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert instance.ReferencedSOPClassUID == uid.EnhancedCTImageStorage
    group = found.PerFrameFunctionalGroupsSequence[0]
    frame = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
    source = pydicom.dcmread(tmp_path / "ct.dcm").PerFrameFunctionalGroupsSequence[frame - 1]
    assert group.PlanePositionSequence[0].ImagePositionPatient == pytest.approx(
        source.PlanePositionSequence[0].ImagePositionPatient, abs=1e-3
    )


def test_nothing_found_is_a_segmentation_all_the_same(tmp_path: Path) -> None:
    path = write(str(tmp_path / "l.dcm"), label_map(np.zeros((9, 40, 36), np.uint8)))
    found: Any = highdicom.seg.segread(path)
    assert not found.pixel_array.any()
    assert found.number_of_segments == len(ORGANS)


def dice(one: Array, other: Array) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.mark.parametrize("series", [False, True])
def test_contours_are_the_organs_again_for_plastimatch(series: bool, tmp_path: Path) -> None:
    made = of_series(tmp_path / "ct") if series else label_map()
    path = write(f"rtstruct:{tmp_path / 'l.dcm'}", made)
    # Structure sets are none that dciodvfy knows more of than their attributes.
    assert errors_of_dciodvfy(path) == []
    if shutil.which("plastimatch") is None:
        pytest.skip("plastimatch is missing")
    write(str(tmp_path / "fixed.mha"), made)
    command = ["plastimatch", "convert", "--input", path, "--fixed", tmp_path / "fixed.mha"]
    command += ["--output-prefix", tmp_path / "masks", "--prefix-format", "nrrd"]
    subprocess.run(command, check=True, capture_output=True)
    for organ in ORGANS[:2]:
        mask = SimpleITK.ReadImage(str(tmp_path / "masks" / f"{organ.name}.nrrd"))
        got = SimpleITK.GetArrayFromImage(mask) > 0
        assert dice(got, labels() == organ.value) >= LOWEST_DICE


def test_contours_refer_to_the_slices_that_they_lie_in(tmp_path: Path) -> None:
    made = of_series(tmp_path / "ct")
    found = pydicom.dcmread(write(f"rtstruct:{tmp_path / 'l.dcm'}", made))
    assert [one.ROIName for one in found.StructureSetROISequence] == [o.name for o in ORGANS]
    slices = {one.header.instance: one for one in made.scan.frames}  # type: ignore[union-attr]
    assert found.ROIContourSequence[1].ROIDisplayColor == [0, 128, 255]
    assert "ContourSequence" not in found.ROIContourSequence[3]
    for outline in found.ROIContourSequence[:3]:
        for contour in outline.ContourSequence:
            [image] = contour.ContourImageSequence
            z = np.reshape(contour.ContourData, (-1, 3))[:, 2]
            assert z == pytest.approx(slices[image.ReferencedSOPInstanceUID].position[2], abs=1e-3)


def test_planes_that_are_not_axial_have_no_contours() -> None:
    made = label_map(of=affine()[:, [1, 2, 0, 3]])
    with pytest.raises(ScanFormatError, match="axial planes"):
        LabelFile.parse("rtstruct:l.dcm").check(made.grid)


@pytest.mark.parametrize("seed", range(8))
def test_centres_inside_an_outline_are_the_mask(seed: int) -> None:
    """By the rule of even and odd crossings, counted by matplotlib's points in polygons."""
    from matplotlib.path import Path as Polygon

    mask = np.random.default_rng(seed).random((14, 11)) < 0.6
    mask[3:9, 2:9] = True
    mask[5:7, 4:6] = mask[5, 7] = False
    whole = slice(0, 1), slice(0, 14), slice(0, 11)
    centres = np.indices(mask.shape).reshape(2, -1).T
    inside = np.zeros(mask.shape, bool)
    for outline in outlines(mask, whole):
        crossings = Polygon(np.concatenate([outline, outline[:1]])).contains_points(centres)
        inside ^= crossings.reshape(mask.shape)
    np.testing.assert_array_equal(inside, mask)


def test_a_real_series_without_uids_in_its_data_sets(tmp_path: Path) -> None:
    folder = DATA / "ct_dicom"
    if not folder.is_dir():
        pytest.skip(f"real CT is missing: {folder} does not exist (set KPT_DATA)")
    scan = open_scan(folder)
    values = np.zeros(scan.grid.shape, np.uint8)
    values[2:5, 100:200, 150:250], values[3, 120:150, 160:170] = 1, 5
    voxels = PackedLabels.of(scan.grid.shape, values.dtype, [values])
    made = LabelMap(voxels, scan.grid, ORGANS, scan.file)
    told: list[str] = []
    with notices.shown(told.append):
        path = write(str(tmp_path / "l.dcm"), made)
        write(f"rtstruct:{tmp_path / 'rt.dcm'}", made)
    assert where_highdicom_sees(path) == named(values, lps(scan.grid))
    assert errors_of_dciodvfy(path) == []
    found = pydicom.dcmread(path)
    assert len(told) == ("ReferencedSeriesSequence" not in found)
    if "ReferencedSeriesSequence" in found:
        slices = {
            one.ReferencedSOPInstanceUID
            for one in found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        }
        files = [pydicom.dcmread(file, stop_before_pixels=True) for file in folder.glob("*.dcm")]
        assert slices <= {file.file_meta.MediaStorageSOPInstanceUID for file in files}


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SeriesInstanceUID"])
def test_slices_that_cannot_be_referred_to_are_doubted(keyword: str, tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    of_series(folder)
    for file in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        del dataset[keyword], dataset.file_meta["MediaStorageSOPInstanceUID"]
        dataset.save_as(file, enforce_file_format=False)
    scan = open_scan(folder)
    made = LabelMap(label_map().voxels, scan.grid, ORGANS, scan.file)
    with notices.recorded() as told, notices.shown(lambda _: None):
        found = pydicom.dcmread(write(str(tmp_path / "l.dcm"), made))
        write(f"rtstruct:{tmp_path / 'rt.dcm'}", made)
    assert "ReferencedSeriesSequence" not in found
    [sentence] = told
    assert sentence.startswith(f"{folder} has slices without SeriesInstanceUID or SOPInstanceUID,")


def test_what_the_scan_says_of_the_patient_is_kept_whatever_its_form(tmp_path: Path) -> None:
    folder = tmp_path / "ct"
    of_series(folder)
    for file in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        with pydicom.config.disable_value_validation():
            dataset.SpecificCharacterSet = "ISO_IR 100"
            dataset.PatientName, dataset.PatientSex = "Müller^Ä", "female"
            dataset.AccessionNumber, dataset.StudyDate = "7" * 40, "2022.01.01"
            dataset.save_as(file)
    scan = open_scan(folder)
    made = LabelMap(label_map().voxels, scan.grid, ORGANS, scan.file)
    for asked in (f"{tmp_path / 'l.dcm'}", f"rtstruct:{tmp_path / 'rt.dcm'}"):
        found = pydicom.dcmread(write(asked, made))
        assert str(found.PatientName) == "Müller^Ä"
        assert (found.PatientSex, found.StudyInstanceUID) == ("female", STUDY)
