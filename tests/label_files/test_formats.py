"""Label maps in plain formats, as other programs read them."""

import gzip
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import slicerio

from atlas_store import Organ
from kpt_dask.errors import KptWarning, ScanFormatError
from kpt_dask.label_files.formats import FORMATS, LabelFile
from kpt_dask.label_files.label_map import LabelMap
from kpt_dask.scans import nifti_writer
from kpt_dask.scans.placement import header_of
from kpt_dask.scans.scan import open_labels
from tests.label_files.maps import ORGANS, WIDE, affine, label_map, labels, places
from tests.scans.formats import Array, by_nibabel, by_simpleitk
from tests.scans.test_contract import lps

VOLUMES = [".nii", ".nii.gz", ".nrrd", ".seg.nrrd", ".mha"]


def write(path: Path, made: LabelMap) -> Path:
    LabelFile.parse(path).format.write(path, made)
    return path


def axes(name: str) -> Array:
    """Affines (i, j, k) to (x, y, z) of scans as they are stored."""
    axial = affine()
    return {
        "axial": axial,
        "from the head": axial @ np.diag([1, 1, -1, 1]),
        "sagittal": axial[:, [1, 2, 0, 3]],
        "oblique": affine(turned=True)[:, [2, 0, 1, 3]],
    }[name]


@pytest.mark.parametrize("stored", ["axial", "from the head", "sagittal", "oblique"])
@pytest.mark.parametrize("organs", [ORGANS, WIDE], ids=["uint8", "uint16"])
@pytest.mark.parametrize("ending", VOLUMES)
def test_voxels_lie_where_other_programs_see_them(
    ending: str, organs: Any, stored: str, tmp_path: Path
) -> None:
    expected, of = labels(organs=organs), axes(stored)
    path = write(tmp_path / f"l{ending}", label_map(expected, of, organs))
    judge = by_nibabel if ".nii" in ending else by_simpleitk
    values, where = judge(path)
    assert values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(where, of, atol=1e-4)
    own = open_labels(path)
    np.testing.assert_array_equal(np.concatenate(list(own.label_slabs())), expected)
    assert places(expected, lps(own.grid)) == places(expected, of)


def test_nifti_names_its_labels_as_totalsegmentator_reads_them(tmp_path: Path) -> None:
    image = nib.load(write(tmp_path / "l.nii.gz", label_map()))
    [extension] = image.header.extensions
    root = ElementTree.fromstring(extension.get_content())
    assert root.tag == "CaretExtension"
    found = root.findall("VolumeInformation/LabelTable/Label")
    assert {int(one.attrib["Key"]): one.text for one in found} == {
        organ.value: organ.name for organ in ORGANS
    }
    assert float(found[1].attrib["Blue"]) == 1.0


def test_nifti_keeps_the_header_of_its_scan(tmp_path: Path) -> None:
    made = label_map(description="kpt-dask run 7")
    header = header_of(made.grid)
    header.set_sform(header.get_sform(), code=4)

    class Scan:
        pass

    scan: Any = Scan()
    scan.header = header
    path = tmp_path / "l.nii"
    write(path, LabelMap(made.voxels, made.grid, made.organs, scan, made.description))
    back = nib.load(path)
    np.testing.assert_array_equal(back.header.get_sform(), header.get_sform())
    assert int(back.header["sform_code"]) == 4
    assert back.header["descrip"].item() == b"kpt-dask run 7"
    plain = path.read_bytes()
    assert (
        gzip.decompress(
            write(
                tmp_path / "l.nii.gz",
                LabelMap(made.voxels, made.grid, made.organs, scan, made.description),
            ).read_bytes()
        )
        == plain
    )


def test_there_is_one_gzip_member_as_some_readers_stop_after_the_first(tmp_path: Path) -> None:
    reader = zlib.decompressobj(31)
    reader.decompress(write(tmp_path / "l.nii.gz", label_map()).read_bytes())
    assert reader.eof
    assert reader.unused_data == b""


def test_3d_slicers_segmentation_has_names_colours_and_codes(tmp_path: Path) -> None:
    found = slicerio.read_segmentation(write(tmp_path / "l.seg.nrrd", label_map()))
    segments = {one["name"]: one for one in found["segments"]}
    assert list(segments) == [organ.name for organ in ORGANS]
    assert found["containedRepresentationNames"] == ["Binary labelmap"]
    kidney = segments["kidney_left"]
    assert kidney["labelValue"] == 5
    assert kidney["color"] == pytest.approx([0, 128 / 255, 1], abs=1e-5)
    assert kidney["terminology"]["type"] == ["SCT", "64033007", "Kidney"]
    assert kidney["terminology"]["typeModifier"] == ["SCT", "7771000", "Left"]
    assert segments["liver"]["terminology"]["category"][1] == "123037004"
    own = segments["my_organ_with_a_long_name"]["terminology"]["type"]
    assert own == ["99KPT", "my_organ_with_a_", "my organ with a long name"]
    where = np.argwhere(labels() == 5)[:, ::-1]
    ends = np.stack([where.min(axis=0), where.max(axis=0)], axis=1).ravel()
    assert kidney["extent"] == ends.tolist()
    assert segments["spleen"]["extent"] == [0, -1, 0, -1, 0, -1]
    voxels = slicerio.extract_segments(found, [("liver", 3)])
    np.testing.assert_array_equal(voxels["voxels"].T == 3, labels() == 1)


def test_itk_snap_is_told_names_and_colours(tmp_path: Path) -> None:
    text = write(tmp_path / "l.label", label_map()).read_text()
    lines = [line.split(maxsplit=7) for line in text.splitlines() if not line.startswith("#")]
    assert [line[7] for line in lines] == ['"Clear Label"', *(f'"{o.name}"' for o in ORGANS)]
    assert lines[2][:4] == ["5", "0", "128", "255"]


def test_a_mask_shows_one_organ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti_writer, "PIECE_BYTES", 1)
    made = label_map(organs=WIDE)
    assert len(made.voxels.pieces) == len(labels())
    for organ in WIDE:
        mask = made.only(organ, made.extents().get(organ.value))
        values, _ = by_nibabel(write(tmp_path / "m.nii.gz", mask))
        assert values.dtype == np.uint8
        np.testing.assert_array_equal(values, labels(organs=WIDE) == organ.value)


def test_extents_are_those_of_the_labels() -> None:
    made = label_map(organs=WIDE)
    expected = {}
    for value in np.unique(labels(organs=WIDE))[1:]:
        at = np.argwhere(labels(organs=WIDE) == value)
        expected[value] = tuple(map(slice, at.min(axis=0), at.max(axis=0) + 1))
    assert made.extents() == expected


@pytest.mark.parametrize("name", ["l.png", "l", "rtstruct:l.nii", "l.zarr"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(ScanFormatError, match=r"extension|must end in"):
        LabelFile.parse(name)


def test_a_sheared_grid_is_refused_where_it_cannot_be_said() -> None:
    tilted = affine()
    tilted[1, 2] = 0.5
    made = label_map(of=tilted)
    with pytest.raises(ScanFormatError, match="tilted"):
        LabelFile.parse("l.mha").check(made.grid)
    LabelFile.parse("l.seg.nrrd").check(made.grid)
    LabelFile.parse("l.dcm").check(made.grid)
    # Written, but many programs do not read it.
    with pytest.warns(KptWarning, match=r"l\.nii\.gz: .*tilted.*write \.seg\.nrrd or \.dcm"):
        LabelFile.parse("l.nii.gz").check(made.grid)
    turned = tilted[:, [2, 1, 0, 3]]
    with pytest.raises(ScanFormatError, match="right angles"):
        LabelFile.parse("l.dcm").check(label_map(of=turned).grid)


def test_a_full_disk_is_an_error() -> None:
    for form in FORMATS.values():
        with pytest.raises(OSError, match="No space left"):
            form.write(Path("/dev/full"), label_map())


def test_names_of_thousands_of_labels_fit(tmp_path: Path) -> None:
    organs = tuple(Organ(value, f"organ_{value}", 50.0, (1, 2, 3)) for value in range(1, 3001))
    image = nib.load(write(tmp_path / "l.nii.gz", label_map(labels(organs=WIDE), organs=organs)))
    assert b"organ_3000" in image.header.extensions[0].get_content()
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, labels(organs=WIDE))
