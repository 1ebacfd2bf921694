"""Labels in every format that has names come onto the scan's grid with the store's values."""

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas_store import Organ, OrganTable
from kpt_dask.annotations.contours import count_crossings, united
from kpt_dask.annotations.opening import open_pair
from kpt_dask.errors import (
    GridMismatchError,
    KptError,
    KptWarning,
    LabelError,
    ScanFormatError,
    ScanNotFoundError,
)
from kpt_dask.label_files.formats import LabelFile
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.label_files.request import LabelRequest
from kpt_dask.scans import voxel_stream
from kpt_dask.scans.scan import open_scan
from tests.label_files.maps import affine, label_map, labels, of_series
from tests.scans.dicom_writer import write_folder
from tests.scans.formats import LPS, Array

STORE = OrganTable(
    (
        Organ(40, "liver", 50.0, (1, 2, 3)),
        Organ(2, "kidney_left", 50.0, (1, 2, 3)),
        Organ(300, "spleen", 50.0, (1, 2, 3)),
    )
)
EXPECTED = np.select([labels() == 1, labels() == 5], [40, 2], 0)
"""Of the organs that are drawn, the store does not know the long one."""


def scan_at(path: Path, of: Array | None = None) -> Path:
    of = affine() if of is None else of
    nib.save(nib.Nifti1Image(np.zeros(labels().shape, np.int16).T, LPS @ of), path)
    return path


def masks(folder: Path, made: LabelMap) -> Path:
    folder.mkdir()
    request = LabelRequest(split=str(folder))
    request.write([folder / f"{organ.name}.nii.gz" for organ in made.organs], made)
    return folder


def written(asked: str, made: LabelMap) -> Path:
    file = LabelFile.parse(asked)
    file.format.write(Path(file.path), made)
    return Path(file.path)


WRITERS: dict[str, Callable[[Path, LabelMap], Path]] = {
    "nifti": lambda folder, made: written(str(folder / "l.nii.gz"), made),
    "masks": lambda folder, made: masks(folder / "segmentations", made),
    "slicer": lambda folder, made: written(str(folder / "l.seg.nrrd"), made),
    "seg": lambda folder, made: written(str(folder / "l.dcm"), made),
    "rtstruct": lambda folder, made: written(f"rtstruct:{folder / 'rt.dcm'}", made),
}


def read(scan: Path, path: Path, **others: Any) -> tuple[Array, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KptWarning)
        _, found = open_pair(scan, path, STORE, **others)
        values = np.concatenate(list(found.label_slabs()))
        np.testing.assert_array_equal(values, np.concatenate(list(found.label_slabs())))
    return values, [str(one.message) for one in caught]


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_written_is_read_by_name(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path, label_map())
    values, told = read(scan_at(tmp_path / "ct.nii.gz"), path)
    np.testing.assert_array_equal(values, EXPECTED)
    assert len(told) == 1
    assert "my_organ_with_a_long_name" in told[0]
    assert str(path) in told[0]


@pytest.mark.parametrize("name", ["slicer", "seg", "rtstruct"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3]])
def test_the_scan_may_be_stored_in_another_order(
    name: str, order: list[int], tmp_path: Path
) -> None:
    """Drawn on a DICOM series, read onto the NIfTI that was made of it."""
    path = WRITERS[name](tmp_path, label_map())
    image = nib.Nifti1Image(np.zeros(labels().shape, np.int16).T, LPS @ affine())
    turns = np.stack([order[:3], [-1, 1, -1]], axis=1)
    nib.save(image.as_reoriented(turns), tmp_path / "ct.nii.gz")
    values, _ = read(tmp_path / "ct.nii.gz", path)
    expected = nib.Nifti1Image(EXPECTED.astype(np.int16).T, LPS @ affine()).as_reoriented(turns)
    np.testing.assert_array_equal(values, np.asarray(expected.dataobj).T)


def test_masks_may_have_their_axes_in_another_order(tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "ct.nii.gz")
    folder = masks(tmp_path / "m", label_map())
    expected, before = read(scan, folder)
    for n, path in enumerate(sorted(folder.iterdir())):
        image = nib.load(path)
        turned = image.as_reoriented([[(axis + n) % 3, -1] for axis in range(3)])
        turned.to_filename(path)
    values, told = read(scan, folder)
    np.testing.assert_array_equal(values, expected)
    assert told == before


def test_masks_in_other_formats_and_overlaps_are_told(tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "ct.nii.gz")
    folder = tmp_path / "masks"
    folder.mkdir()
    whole = SimpleITK.ReadImage(str(scan))
    for name, mask in (("liver", labels() > 0), ("Spleen", labels() == 5)):
        image = SimpleITK.GetImageFromArray(mask.astype(np.uint8) * 255)
        image.CopyInformation(whole)
        SimpleITK.WriteImage(image, str(folder / f"{name}.nrrd"))
    (folder / "notes.txt").write_text("x")
    values, told = read(scan, folder)
    np.testing.assert_array_equal(values > 0, labels() > 0)
    assert {int(v) for v in np.unique(values)} <= {0, 40, 300}
    assert "organs overlap" in told[0]
    assert f"{(labels() == 5).sum()} voxels" in told[0]


def test_lobes_are_one_lung_and_no_overlap(tmp_path: Path) -> None:
    lungs = OrganTable((Organ(6, "lung_left", 300.0, (1, 2, 3)),))
    organs = tuple(
        Organ(value, f"lung_{part}_lobe_left", 300.0, (1, 2, 3))
        for value, part in ((1, "upper"), (5, "lower"))
    )
    path = masks(
        tmp_path / "m", label_map(organs=organs, values=np.where(labels() < 7, labels(), 0))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", KptWarning)
        _, found = open_pair(scan_at(tmp_path / "ct.nii.gz"), path, lungs)
        values = np.concatenate(list(found.label_slabs()))
    np.testing.assert_array_equal(values == 6, np.isin(labels(), (1, 5)))


@pytest.mark.parametrize("name", WRITERS)
def test_two_names_of_one_organ_are_refused(name: str, tmp_path: Path) -> None:
    organs = (Organ(1, "kidney_left", 5.0, (1, 2, 3)), Organ(5, "Kidney_L", 5.0, (1, 2, 3)))
    path = WRITERS[name](tmp_path, label_map(organs=organs))
    with pytest.raises(LabelError, match="both mean kidney_left") as caught:
        read(scan_at(tmp_path / "ct.nii.gz"), path)
    for part in (str(path), "kidney_left", "Kidney_L"):
        assert part in str(caught.value)


def test_3d_slicers_layers_and_crops_are_put_in_their_place(tmp_path: Path) -> None:
    """As 3D Slicer writes segments that overlap, cropped to their box."""
    whole = labels()
    box = (slice(2, 8), slice(3, 38), slice(1, 35))
    layers = np.stack([(whole == 1)[box], (whole == 5)[box]], axis=-1).astype(np.uint8)
    k, j, i = layers.shape[:3]
    origin = affine() @ [box[2].start, box[1].start, box[0].start, 1]
    steps = " ".join("(" + ",".join(map(str, affine()[:3, a])) + ")" for a in range(3))
    header = [
        "NRRD0004",
        "type: unsigned char",
        "dimension: 4",
        "space: left-posterior-superior",
        f"sizes: 2 {i} {j} {k}",
        f"space directions: none {steps}",
        "kinds: list domain domain domain",
        "encoding: raw",
        f"space origin: ({','.join(map(str, origin[:3]))})",
        *("Segment0_ID:=Segment_1", "Segment0_Name:=Liver", "Segment0_LabelValue:=1"),
        *("Segment0_Layer:=0", "Segment1_ID:=Segment_2", "Segment1_Name:=Kidney L"),
        *("Segment1_LabelValue:=1", "Segment1_Layer:=1"),
    ]
    path = tmp_path / "s.seg.nrrd"
    path.write_bytes("\n".join(header).encode() + b"\n\n" + layers.tobytes())
    values, told = read(scan_at(tmp_path / "ct.nii.gz"), path)
    expected = np.zeros_like(EXPECTED)
    expected[box] = EXPECTED[box]
    np.testing.assert_array_equal(values, expected)
    assert told == []


def test_values_are_named_by_a_layout(tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "ct.nii.gz")
    path = tmp_path / "l.nii.gz"
    nib.save(nib.Nifti1Image(labels().T, LPS @ affine()), path)
    names = {1: "Liver", 5: "left kidney", 7: "moon"}
    values, told = read(scan, path, values=names)
    np.testing.assert_array_equal(values, EXPECTED)
    assert told == [f"{path}: no organ of the store is called moon, left out."]
    values, told = read(scan, path, values={**names, 9: "Background", 7: "background"})
    np.testing.assert_array_equal(values, EXPECTED)
    assert told == []
    with pytest.raises(LabelError, match="labels without a name: 7"):
        read(scan, path, values={1: "Liver", 5: "left kidney"})
    with pytest.raises(LabelError, match="of which the store knows none"):
        read(scan, path, values={1: "sun", 5: "moon", 7: "stars"})


@pytest.mark.parametrize("name", WRITERS)
def test_labels_beside_the_scan_are_refused(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path, label_map())
    moved = affine()
    moved[:3, 3] += (0.4, 0.0, 1.2)
    with pytest.raises(GridMismatchError) as caught:
        read(scan_at(tmp_path / "ct.nii.gz", moved), path)
    assert str(path if name != "masks" else path / "kidney_left.nii.gz") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "axes"),
    [("slicer", (1, 1, 2)), ("slicer", (2, 2, 1)), ("seg", (2, 1, 1)), ("seg", (2, 2, 1))],
)
def test_labels_on_a_coarser_grid_are_refused(
    name: str, axes: tuple[int, int, int], tmp_path: Path
) -> None:
    """Their voxels lie on every second one of the scan, so that organs would be combs."""
    i, j, k = axes
    path = WRITERS[name](tmp_path, label_map(labels()[::k, ::j, ::i], affine() * [*axes, 1]))
    with pytest.raises(GridMismatchError, match=r"another size .* the scan; resample it"):
        read(scan_at(tmp_path / "ct.nii.gz"), path)


@pytest.mark.parametrize(
    ("name", "order"),
    [("masks", (0, 1, 2)), ("slicer", (0, 1, 2)), ("seg", (2, 0, 1)), ("rtstruct", (1, 2, 0))],
)
def test_skipped_planes_are_told(name: str, order: tuple[int, ...], tmp_path: Path) -> None:
    """Planners draw every second plane; two pieces of an organ are no reason to warn."""
    drawn = np.zeros((16, 20, 24), np.uint8)
    drawn[1:15:2, 2:8, 2:22] = 1
    drawn[1:5, 10:18, 2:22] = drawn[10:14, 10:18, 2:22] = 5
    path = WRITERS[name](tmp_path, label_map(drawn))
    image = nib.Nifti1Image(np.zeros(drawn.T.shape, np.int16), LPS @ affine())
    turns = np.stack([order, [1, 1, 1]], axis=1)
    nib.save(image.as_reoriented(turns), tmp_path / "ct.nii.gz")
    _, told = read(tmp_path / "ct.nii.gz", path)
    [warned] = [one for one in told if "first to its last" in one]
    assert str(path) in warned
    assert "(drawn: liver on 7 of 13)" in warned


@pytest.mark.parametrize("name", WRITERS)
def test_what_no_organ_is_called_is_an_error(name: str, tmp_path: Path) -> None:
    made = label_map(organs=(Organ(1, "moon", 5.0, (1, 2, 3)), Organ(5, "sun", 5.0, (1, 2, 3))))
    path = WRITERS[name](tmp_path, made)
    with pytest.raises(LabelError, match="moon, sun, of which the store knows none"):
        read(scan_at(tmp_path / "ct.nii.gz"), path)


def test_nothing_is_an_error(tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "ct.nii.gz")
    with pytest.raises(ScanNotFoundError):
        read(scan, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanFormatError):
        read(scan, tmp_path / "empty")


def test_label_maps_and_frac_segments_are_read_as_well(tmp_path: Path) -> None:
    """Another program's objects: a SEG of kind LABELMAP, and one of shares."""
    import highdicom

    write_folder(tmp_path / "ct", np.zeros(labels().shape, np.int16), affine())
    scan: Any = open_scan(tmp_path / "ct").file
    sources = []
    for frame in scan.frames:
        dataset = pydicom.dcmread(tmp_path / "ct" / frame.header.name)
        for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"):
            setattr(dataset, keyword, "")
        dataset.StudyID = dataset.StudyDate = dataset.StudyTime = ""
        sources.append(dataset)
    code = highdicom.sr.CodedConcept("10200004", "SCT", "Liver")
    for kind in ("LABELMAP", "FRACTIONAL"):
        mask = (labels() == 1).astype(np.uint8 if kind == "LABELMAP" else np.float32)
        made = highdicom.seg.Segmentation(
            sources,
            mask,
            kind,
            [highdicom.seg.SegmentDescription(1, "Liver", code, code, "MANUAL")],
            *(pydicom.uid.generate_uid(), 1, pydicom.uid.generate_uid(), 1),
            *("maker", "model", "1", "2"),
        )
        made.save_as(tmp_path / f"{kind}.dcm")
        values, _ = read(tmp_path / "ct", tmp_path / f"{kind}.dcm")
        np.testing.assert_array_equal(values, np.where(labels() == 1, 40, 0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), corners=st.integers(3, 12))
def test_contours_are_filled_by_even_and_odd(seed: int, corners: int) -> None:
    from matplotlib.path import Path as Polygon

    contour = np.random.default_rng(seed).uniform(-3, 14, (corners, 2))
    crossings = np.zeros((12, 11), np.int32)
    count_crossings(contour, crossings)
    mask = crossings.cumsum(axis=1)[:, :10] % 2 == 1
    centres = np.indices((12, 10)).reshape(2, -1).T
    # A simple polygon for matplotlib, which fills others by winding: count triangles of a fan.
    inside = np.zeros(len(centres), int)
    for a, b in pairwise(contour[1:]):
        inside += Polygon(np.array([contour[0], a, b, contour[0]])).contains_points(centres)
    np.testing.assert_array_equal(mask, (inside % 2 == 1).reshape(12, 10))


def circle(row: float, column: float, radius: float) -> Array:
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return np.stack([row + radius * np.cos(turn), column + radius * np.sin(turn)], axis=1)


def disc(row: float, column: float, radius: float) -> Array:
    from matplotlib.path import Path as Polygon

    centres = np.indices((50, 60)).reshape(2, -1).T
    return Polygon(circle(row, column, radius)).contains_points(centres).reshape(50, 60)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(8)), turn=st.integers(0, 59))
def test_each_contour_counts_once_however_they_are_listed(order: list[int], turn: int) -> None:
    """An organ with a hole and an island in it, a part that overlaps it, and all but that twice."""
    organ, hole, island, part = (
        (20.2, 20.3, 15.1),
        (20.4, 20.1, 9.3),
        (19.6, 20.2, 4.2),
        (33.3, 35.2, 9.1),
    )
    listed = [circle(*one) for one in (organ, hole, island, part, organ, hole, island, (2, 50, 0))]
    listed[4:7] = [np.roll(one, turn, axis=0)[::-1] for one in listed[4:7]]
    found = united([listed[n] for n in order], (50, 60))
    expected = (disc(*organ) & ~disc(*hole)) | disc(*island) | disc(*part)
    np.testing.assert_array_equal(found.mask, expected)
    assert found[1:] == (3, 1)


def contoured(path: Path, change: Callable[[Any], object]) -> Path:
    """Write the organs as contours, and change those of the kidney, which has holes."""
    dataset = pydicom.dcmread(WRITERS["rtstruct"](path.parent, label_map()))
    change(dataset.ROIContourSequence[1])
    dataset.save_as(path)
    return path


def test_contours_that_are_listed_twice_are_told_and_drawn_once(tmp_path: Path) -> None:
    def twice(roi: Any) -> None:
        roi.ContourSequence = [*roi.ContourSequence, *roi.ContourSequence[2:5]]

    path = contoured(tmp_path / "twice.dcm", twice)
    values, told = read(scan_at(tmp_path / "ct.nii.gz"), path)
    np.testing.assert_array_equal(values, EXPECTED)
    assert told[1] == (f"{path}: contours are listed twice (3 of kidney_left); each is drawn once.")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_contours_outside_of_the_scan_are_told(axis: int, tmp_path: Path) -> None:
    """Drawn on a scan that shows more: in its planes, or in further planes."""
    path = WRITERS["rtstruct"](tmp_path, label_map())
    part = nib.Nifti1Image(labels().T, LPS @ affine()).slicer[
        tuple(slice(4, None) if a == axis else slice(None) for a in range(3))
    ]
    nib.save(nib.Nifti1Image(part.dataobj, part.affine), tmp_path / "ct.nii.gz")
    values, told = read(tmp_path / "ct.nii.gz", path)
    whole = np.moveaxis(EXPECTED.T, axis, 0)
    np.testing.assert_array_equal(np.moveaxis(values.T, axis, 0), whole[4:])
    cut = {name: (whole[:4] == value).any() for name, value in (("liver", 40), ("kidney", 2))}
    said = [one for one in told if "outside of the scan" in one]
    assert len(said) == any(cut.values())
    for name, is_cut in cut.items():
        assert any(f"of {name}" in one for one in said) == is_cut


def test_open_contours_are_told(tmp_path: Path) -> None:
    def opened(roi: Any) -> None:
        for one in roi.ContourSequence[:4]:
            one.ContourGeometricType = "OPEN_PLANAR"
        roi.ContourSequence[-1].ContourGeometricType = "POINT"

    path = contoured(tmp_path / "open.dcm", opened)
    _, told = read(scan_at(tmp_path / "ct.nii.gz"), path)
    assert told[1].startswith(f"{path}: contours are open and enclose nothing (4 of kidney_left);")
    assert len(told) == 2


def test_points_and_slivers_among_contours_do_not_turn_the_planes(tmp_path: Path) -> None:
    """The first contours are as short along an axis of the scan as across its planes."""

    def begun(roi: Any) -> None:
        x, y, z = roi.ContourSequence[0].ContourData[:3]
        point, line, sliver = (copy.deepcopy(roi.ContourSequence[0]) for _ in range(3))
        point.ContourData = [x, y, z]
        line.ContourData = [x, y, z, x, y + 3, z]
        sliver.ContourData = [x, y, z, x, y + 3, z, x, y + 5, z]
        roi.ContourSequence = [point, line, sliver, *roi.ContourSequence]

    path = contoured(tmp_path / "points.dcm", begun)
    image = nib.Nifti1Image(EXPECTED.astype(np.int16).T, LPS @ affine())
    turned = image.as_reoriented(np.array([[2, 1], [0, 1], [1, 1]]))
    nib.save(turned, tmp_path / "ct.nii.gz")
    values, _ = read(tmp_path / "ct.nii.gz", path)
    np.testing.assert_array_equal(values, np.asarray(turned.dataobj).T)


def test_of_segments_that_overlap_the_first_is_kept_in_every_plane(tmp_path: Path) -> None:
    """Frames may come in any order: here planes have theirs in turn."""
    path = WRITERS["seg"](tmp_path, label_map())
    dataset = pydicom.dcmread(path)
    size = dataset.Rows * dataset.Columns
    groups = list(dataset.PerFrameFunctionalGroupsSequence)
    frames = np.zeros((len(groups), size), np.uint8)
    frames[:, 100:500] = 1
    order = np.random.default_rng(2).permutation(len(groups))
    dataset.PerFrameFunctionalGroupsSequence = [groups[n] for n in order]
    dataset.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
    dataset.save_as(path)
    values, told = read(scan_at(tmp_path / "ct.nii.gz"), path)
    planes = [(labels() == value).any(axis=(1, 2)) for value in (1, 5)]
    assert (planes[0] & planes[1]).sum() > 3
    expected = np.zeros_like(EXPECTED).reshape(len(values), -1)
    expected[:, 100:500] = np.select(planes, [40, 2])[:, None]
    np.testing.assert_array_equal(values.reshape(len(values), -1), expected)
    assert any("liver and kidney_left in" in one for one in told)


@pytest.mark.parametrize("name", ["seg", "rtstruct"])
def test_labels_in_another_frame_of_reference_are_told(name: str, tmp_path: Path) -> None:
    """Drawn on another scan whose voxels happen to lie in the same places."""
    made = of_series(tmp_path / "ct")
    path = WRITERS[name](tmp_path, made)
    _, told = read(tmp_path / "ct", path)
    assert not any("frame of reference" in one for one in told)
    world = pydicom.dcmread(next((tmp_path / "ct").iterdir())).FrameOfReferenceUID
    content = path.read_bytes()
    assert world.encode() in content
    path.write_bytes(content.replace(world.encode(), world[:-1].encode() + b"0"))
    values, told = read(tmp_path / "ct", path)
    np.testing.assert_array_equal(values, EXPECTED)
    [said] = [one for one in told if "frame of reference" in one]
    assert said.startswith(f"{path} was drawn in another frame of reference")
    assert f"{tmp_path / 'ct'} (liver, kidney_left" in said


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_region_may_be_called_as_a_full_one(first: bool, tmp_path: Path) -> None:
    path = WRITERS["rtstruct"](tmp_path, label_map())
    dataset = pydicom.dcmread(path)
    empty = copy.deepcopy(dataset.StructureSetROISequence[0])
    empty.ROINumber, empty.ROIName = 77, "Left Kidney"
    about = copy.deepcopy(dataset.ROIContourSequence[0])
    about.ReferencedROINumber, about.ContourSequence = 77, []
    dataset.StructureSetROISequence.insert(0 if first else 9, empty)
    dataset.ROIContourSequence.insert(0 if first else 9, about)
    dataset.save_as(path)
    scan = scan_at(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(read(scan, path)[0], EXPECTED)
    about.ContourSequence = dataset.ROIContourSequence[1].ContourSequence
    dataset.save_as(path)
    with pytest.raises(LabelError, match="both mean kidney_left"):
        read(scan, path)


def test_contours_that_exclude_each_other_are_counted(tmp_path: Path) -> None:
    """DICOM's CLOSEDPLANAR_XOR: what an even number of contours encloses is none."""

    def exclude(roi: Any) -> None:
        for one in roi.ContourSequence:
            one.ContourGeometricType = "CLOSEDPLANAR_XOR"
        roi.ContourSequence = [*roi.ContourSequence, *roi.ContourSequence]

    path = contoured(tmp_path / "xor.dcm", exclude)
    values, _ = read(scan_at(tmp_path / "ct.nii.gz"), path)
    np.testing.assert_array_equal(values, np.where(EXPECTED == 40, 40, 0))


@pytest.mark.parametrize("name", ["slicer", "seg", "rtstruct"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_end_in_a_sentence_or_in_labels(
    name: str, data: st.DataObject, tmp_path: Path
) -> None:
    scan, whole = tmp_path / "ct.nii.gz", tmp_path / "whole"
    if not whole.exists():
        # Once: UIDs differ from time to time, also in length.
        scan_at(scan)
        WRITERS[name](tmp_path, label_map()).rename(whole)
    path = tmp_path / f"l{'.seg.nrrd' if name == 'slicer' else '.dcm'}"
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(len(content), 6000) - 1))
            content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    said = str(path)
    try:
        read(scan, path)
    except KptError as error:
        said = str(error)
    assert "\n" not in said
    assert str(path) in said


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files_are_refused(name: str, tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "ct.nii.gz")
    path = WRITERS[name](tmp_path, label_map())
    file = path / "liver.nii.gz" if path.is_dir() else path
    whole = file.read_bytes()
    for part in np.linspace(0, 0.99, 32):
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises((ScanFormatError, LabelError)) as caught:
            read(scan, path)
        assert str(file) in str(caught.value)


def test_values_of_the_store_need_no_names(tmp_path: Path) -> None:
    scan, path = scan_at(tmp_path / "ct.nii.gz"), tmp_path / "l.nii.gz"
    nib.save(nib.Nifti1Image(EXPECTED.astype(np.int16).T, LPS @ affine()), path)
    values, told = read(scan, path)
    np.testing.assert_array_equal(values, EXPECTED)
    assert told == []


def test_totalsegmentators_label_table_is_read(tmp_path: Path) -> None:
    """As its `save_multilabel_nifti` writes it: nibabel pads the extension, names in CDATA."""
    scan, path = scan_at(tmp_path / "ct.nii.gz"), tmp_path / "l.nii"
    image = nib.Nifti1Image(labels().T, LPS @ affine())
    table = "".join(
        f'<Label Key="{value}" Red="1" Green="0.5" Blue="0" Alpha="1"><![CDATA[{name}]]></Label>\n'
        for value, name in ((1, "liver"), (5, "kidney_left"), (7, "urinary_bladder"))
    )
    text = f'<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  {table} </CaretExtension>'
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, text.encode()))
    nib.save(image, path)
    values, told = read(scan, path)
    np.testing.assert_array_equal(values, EXPECTED)
    assert told == [f"{path}: no organ of the store is called urinary_bladder, left out."]


@pytest.mark.parametrize("name", ["seg", "rtstruct"])
def test_a_folder_with_one_segmentation_is_that_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "1.000000-NA").mkdir()
    path = WRITERS[name](tmp_path / "1.000000-NA", label_map())
    values, [told] = read(scan_at(tmp_path / "ct.nii.gz"), path.parent)
    np.testing.assert_array_equal(values, EXPECTED)
    assert "my_organ_with_a_long_name" in told


@pytest.mark.parametrize("name", ["seg", "rtstruct"])
def test_a_segmentation_lies_beside_the_slices_and_one_of_two_is_to_be_given(
    name: str, tmp_path: Path
) -> None:
    made = of_series(tmp_path / "ct")
    path = WRITERS[name](tmp_path, made)
    path.rename(tmp_path / "ct" / "labels.dcm")
    np.testing.assert_array_equal(read(tmp_path / "ct", tmp_path / "ct")[0], EXPECTED)
    (tmp_path / "both").mkdir()
    for other in ("b.dcm", "a.dcm"):
        WRITERS[name](tmp_path, made).rename(tmp_path / "both" / other)
    told = r"both holds 2 segmentations or structure sets \(a\.dcm, b\.dcm\); give one of them"
    with pytest.raises(ScanFormatError, match=told):
        read(tmp_path / "ct", tmp_path / "both")


def test_masks_that_lead_nowhere_or_have_one_name_are_refused(tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "ct.nii.gz")
    folder = masks(tmp_path / "m", label_map())
    (folder / "spleen.nii").symlink_to(folder / "spleen.nii")
    with pytest.raises(ScanFormatError, match=r"spleen\.nii is a link that leads nowhere"):
        read(scan, folder)
    (folder / "spleen.nii").unlink()
    nib.save(nib.load(folder / "liver.nii.gz"), folder / "liver.img")
    with pytest.raises(ScanFormatError, match="masks of one name"):
        read(scan, folder)
    (folder / "liver.nii.gz").unlink()
    np.testing.assert_array_equal(read(scan, folder)[0], EXPECTED)


def test_a_mask_has_one_label_in_all_of_its_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of two organs may lie in planes that are not read together."""
    monkeypatch.setattr(voxel_stream, "SLAB_BYTES", 1)
    scan = scan_at(tmp_path / "ct.nii.gz")
    (tmp_path / "m").mkdir()
    mask = np.zeros(labels().shape, np.uint8)
    mask[1:3, 5:9, 5:9] = 255
    for other, refused in ((255, False), (254, True), (1, True)):
        mask[6:8, 5:9, 5:9] = other
        nib.save(nib.Nifti1Image(mask.T, LPS @ affine()), tmp_path / "m" / "liver.nii.gz")
        if refused:
            with pytest.raises(ScanFormatError, match=r"liver\.nii\.gz holds several labels"):
                read(scan, tmp_path / "m")
        else:
            np.testing.assert_array_equal(read(scan, tmp_path / "m")[0] > 0, mask > 0)
