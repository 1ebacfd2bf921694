"""Broken labels of every format: one sentence, a bound of memory, and no atlas."""

import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.dataset import Dataset

from atlas_store import AtlasStore
from kpt_dask.atlases.add import store_parameters
from kpt_dask.cli.main import kpt
from kpt_dask.errors import KptError
from tests.annotations.test_opening import STORE, WRITERS, read, scan_at
from tests.label_files.maps import label_map, labels

MOST = 64 << 20
"""Bytes that may be taken for labels of a few kilobytes."""


def in_dicom(change: Callable[[Dataset], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        dataset = pydicom.dcmread(path)
        with warnings.catch_warnings():
            # pydicom says that such values are none.
            warnings.simplefilter("ignore", UserWarning)
            change(dataset)
            dataset.save_as(path)

    return spoil


def frame(change: Callable[[Dataset], object]) -> Callable[[Path], None]:
    return in_dicom(lambda seg: change(seg.PerFrameFunctionalGroupsSequence[0]))


def shared(change: Callable[[Dataset], object]) -> Callable[[Path], None]:
    return in_dicom(lambda seg: change(seg.SharedFunctionalGroupsSequence[0]))


def put(name: str, value: Any) -> Callable[[Dataset], None]:
    return lambda dataset: setattr(dataset, name, value)


def contour(change: Callable[[Dataset], object]) -> Callable[[Path], None]:
    return in_dicom(lambda rt: change(rt.ROIContourSequence[0].ContourSequence[0]))


def line(begins: bytes, becomes: bytes) -> Callable[[Path], None]:
    """Change a line of a header of text."""

    def spoil(path: Path) -> None:
        header, _, data = path.read_bytes().partition(b"\n\n")
        lines = header.split(b"\n")
        assert any(one.startswith(begins) for one in lines)
        changed = [becomes if one.startswith(begins) else one for one in lines]
        path.write_bytes(b"\n".join(changed) + b"\n\n" + data)

    return spoil


def directions(axes: bytes) -> Callable[[Path], None]:
    return line(b"space directions", b"space directions: " + axes)


def voxels(values: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        file = path / "liver.nii.gz" if path.is_dir() else path
        nib.save(nib.Nifti1Image(values, nib.load(file).affine), file)

    return spoil


def looped(path: Path) -> None:
    file = path / "liver.nii.gz" if path.is_dir() else path
    file.unlink()
    file.symlink_to(file.name)


HALVES = np.full(labels().T.shape, 0.5, np.float32)
NAN = np.full(labels().T.shape, np.nan, np.float32)
MANY = np.arange(labels().size, dtype=np.int32).reshape(labels().T.shape)

BROKEN: dict[str, dict[str, Callable[[Path], None]]] = {
    "seg": {
        "no segment": in_dicom(put("SegmentSequence", [])),
        "no frame": in_dicom(put("NumberOfFrames", 0)),
        "more frames than are described": in_dicom(put("NumberOfFrames", 2**31 - 1)),
        "a negative number of frames": in_dicom(put("NumberOfFrames", -5)),
        "more rows than pixels": in_dicom(put("Rows", 65535)),
        "no columns": in_dicom(put("Columns", 0)),
        "more bits than pixels": in_dicom(put("BitsAllocated", 64)),
        "no pixels": in_dicom(lambda seg: delattr(seg, "PixelData")),
        "half of the pixels": in_dicom(lambda seg: put("PixelData", seg.PixelData[:100])(seg)),
        "a position at NaN": frame(
            lambda one: put("ImagePositionPatient", ["nan", "nan", "nan"])(
                one.PlanePositionSequence[0]
            )
        ),
        "a position of two numbers": frame(
            lambda one: put("ImagePositionPatient", [1, 2])(one.PlanePositionSequence[0])
        ),
        "a position beyond the moon": frame(
            lambda one: put("ImagePositionPatient", [0, 0, "1e300"])(one.PlanePositionSequence[0])
        ),
        "no position": frame(lambda one: delattr(one, "PlanePositionSequence")),
        "no spacing": shared(lambda one: delattr(one, "PixelMeasuresSequence")),
        "a spacing of zero": shared(
            lambda one: put("PixelSpacing", [0, 0])(one.PixelMeasuresSequence[0])
        ),
        "an orientation of zero": shared(
            lambda one: put("ImageOrientationPatient", [0] * 6)(one.PlaneOrientationSequence[0])
        ),
        "another kind": in_dicom(put("SOPClassUID", "1.2.840.10008.5.1.4.1.1.7")),
        "a link in a circle": looped,
    },
    "rtstruct": {
        "no region": in_dicom(put("StructureSetROISequence", [])),
        "no contours": in_dicom(lambda rt: delattr(rt, "ROIContourSequence")),
        "numbers that are no points": contour(put("ContourData", [1, 2, 3, 4])),
        "a point at NaN": contour(put("ContourData", ["nan"] * 9)),
        "a point beyond the moon": contour(put("ContourData", ["1e300"] * 9)),
        "a tilted contour": contour(put("ContourData", [0, 0, 0, 10, 0, 90, 0, 10, 40])),
        "no data": contour(lambda one: delattr(one, "ContourData")),
        "a number that is none": in_dicom(
            lambda rt: rt.StructureSetROISequence[0].add_new("ROINumber", "LO", "one")
        ),
        "a link in a circle": looped,
    },
    "slicer": {
        "no sizes": line(b"sizes", b"# gone"),
        "sizes too large": line(b"sizes", b"sizes: 60000 60000 60000"),
        "negative sizes": line(b"sizes", b"sizes: 36 -40 9"),
        "sizes beyond 64 bits": line(b"sizes", b"sizes: 4294967296 4294967296 4294967296"),
        "a singular affine": directions(b"(1,0,0) (1,0,0) (0,0,1)"),
        "NaN in the affine": directions(b"(nan,0,0) (0,1,0) (0,0,1)"),
        "NaN in the origin": line(b"space origin", b"space origin: (nan,0,0)"),
        "another type": line(b"type", b"type: block"),
        "another encoding": line(b"encoding", b"encoding: text"),
        "a layer that it has not": line(b"Segment0_Layer", b"Segment0_Layer:=7"),
        "a negative layer": line(b"Segment0_Layer", b"Segment0_Layer:=-1"),
        "a value that is none": line(b"Segment0_LabelValue", b"Segment0_LabelValue:=one"),
        "a link in a circle": looped,
    },
    "nifti": {
        "halves": voxels(HALVES),
        "NaN": voxels(NAN),
        "labels beyond 65535": voxels(MANY * 100),
        "a negative label": voxels(-np.ones(labels().T.shape, np.int16)),
        "a plane less": voxels(labels().T[:, :, 1:]),
        "two dimensions": voxels(labels().T[:, :, 0]),
        "a link in a circle": looped,
    },
    "masks": {
        "halves": voxels(HALVES),
        "NaN": voxels(NAN),
        "several labels": voxels(MANY % 3),
        "a plane less": voxels((labels().T[:, :, 1:] == 1).astype(np.uint8)),
        "two dimensions": voxels((labels().T[:, :, 0] == 1).astype(np.uint8)),
        "a link in a circle": looped,
    },
}
CASES = [(name, case) for name, cases in BROKEN.items() for case in cases]


def broken(name: str, case: str, folder: Path) -> tuple[Path, Path]:
    scan = scan_at(folder / "ct.nii.gz")
    path = WRITERS[name](folder, label_map())
    BROKEN[name][case](path)
    return scan, path


@pytest.mark.parametrize(("name", "case"), CASES)
def test_broken_labels_are_refused_in_a_sentence(name: str, case: str, tmp_path: Path) -> None:
    scan, path = broken(name, case, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(KptError) as caught:
            read(scan, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    assert said.endswith(".")
    assert peak < MOST


@pytest.mark.parametrize("name", BROKEN)
def test_no_atlas_is_made_of_broken_labels(name: str, tmp_path: Path) -> None:
    store = AtlasStore.create(tmp_path / "store", STORE, store_parameters(4.0))
    for n, case in enumerate(BROKEN[name]):
        (tmp_path / str(n)).mkdir()
        scan, path = broken(name, case, tmp_path / str(n))
        before = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(kpt, ["atlas", "add", store.url, str(scan), str(path)])
        assert result.exit_code == 1, (case, result.output)
        assert result.stdout == ""
        said = [one for one in result.stderr.splitlines() if not one.startswith("kpt: warning: ")]
        assert len(said) == 1, said
        assert str(path) in said[0]
        assert sorted(tmp_path.rglob("*")) == before
        assert store.ids() == []
