"""Label files made later are those of the run; an atlas that is exported is the same again."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result
from distributed import Client

import kpt_dask
from atlas_store import AtlasStore, load_organs
from kpt_dask.cli.main import kpt
from kpt_dask.errors import GridMismatchError, KptError, ParameterError, ScanFormatError
from kpt_dask.scans.label_header import RUN
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.volume import open_volume
from tests.scans.dicom_writer import SERIES, write_folder
from tests.scans.formats import by_nibabel, by_simpleitk
from tests.scans.test_contract import lps


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def segmented(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Give the folder of a segmentation out.zarr, with the label map of its run and the scan."""
    folder = tmp_path_factory.mktemp("segmented")
    kpt_dask.segment(
        bodies / "body_4_ct.nii.gz",
        body_store,
        folder / "out.zarr",
        mode="affine",
        labels=folder / "run.nii.gz",
        client=one_process,
    )
    shutil.copy(bodies / "body_4_ct.nii.gz", folder / "ct.nii.gz")
    return folder


def test_files_made_later_are_those_of_the_run(segmented: Path, tmp_path: Path) -> None:
    out = segmented / "out.zarr"
    same, slicer = tmp_path / "same.nii.gz", tmp_path / "later.seg.nrrd"
    run("export", out, same, slicer, "--scan", segmented / "ct.nii.gz")
    assert same.read_bytes() == (segmented / "run.nii.gz").read_bytes()
    expected, affine = by_nibabel(segmented / "run.nii.gz")
    values, where = by_simpleitk(slicer)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(where, affine, atol=1e-4)
    # Without the scan, it lies in the same place.
    volumes = kpt_dask.export(out, tmp_path / "liver.nii", organs=["liver"])
    values, where = by_nibabel(tmp_path / "liver.nii")
    np.testing.assert_array_equal(values, np.where(expected == 1, 1, 0))
    np.testing.assert_allclose(where, affine, atol=1e-4)
    assert volumes == {"liver": pytest.approx((expected == 1).sum() * 64 / 1000)}
    assert run("export", out, same, code=1).stderr.count("exists already") == 1


def test_dicom_made_later_refers_to_the_scan_that_is_given(segmented: Path, tmp_path: Path) -> None:
    scan = open_scan(segmented / "ct.nii.gz")
    values = np.concatenate(list(scan.slabs())).astype(np.int16)
    write_folder(tmp_path / "ct", values, lps(scan.grid))
    out = segmented / "out.zarr"
    kpt_dask.export(out, tmp_path / "l.dcm", scan=tmp_path / "ct", organs=["liver"])
    [series] = pydicom.dcmread(tmp_path / "l.dcm").ReferencedSeriesSequence
    assert series.SeriesInstanceUID == SERIES
    write_folder(tmp_path / "other", np.zeros((9, 9, 9), np.int16), lps(scan.grid))
    with pytest.raises(GridMismatchError, match="does not lie on the grid of the scan"):
        kpt_dask.export(out, tmp_path / "m.dcm", scan=tmp_path / "other")
    # Another patient on the same grid.
    write_folder(tmp_path / "patient", np.roll(values, 1, axis=0), lps(scan.grid))
    with pytest.raises(ScanFormatError, match="patient has other voxels than the scan that"):
        kpt_dask.export(out, tmp_path / "m.dcm", scan=tmp_path / "patient")
    assert not (tmp_path / "m.dcm").exists()


def test_what_is_no_segmentation_is_refused(segmented: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="nothing to write"):
        kpt_dask.export(segmented / "out.zarr")
    with pytest.raises(KptError, match="does not exist"):
        kpt_dask.export(tmp_path / "none.zarr", tmp_path / "l.nii")
    run("convert", segmented / "ct.nii.gz", tmp_path / "scan.zarr", "--spacing", 8)
    with pytest.raises(KptError, match="is no segmentation"):
        kpt_dask.export(tmp_path / "scan.zarr", tmp_path / "l.nii")
    with pytest.raises(ParameterError, match="lies in"):
        kpt_dask.export(segmented / "out.zarr", segmented / "out.zarr" / "l.nii")


def test_an_atlas_comes_back_and_is_the_same_when_added_again(
    body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    run("atlas", "export", body_store.url, "body_2", tmp_path / "back")
    assert len(list((tmp_path / "back").iterdir())) == 2
    run("atlas", "export", body_store.url, "body_2", tmp_path / "back", code=1)
    store = AtlasStore.create(tmp_path / "again", load_organs(), body_store.parameters)
    [added] = kpt_dask.add_folder(store, tmp_path / "back", client=one_process)
    assert added.problem is None
    one, other = body_store["body_2"], store["body_2"]
    assert one.info.scan_digest == other.info.scan_digest
    assert one.organs == other.organs
    np.testing.assert_array_equal(one.labels[...], other.labels[...])
    assert open_volume(one.image).grid.same_as(open_volume(other.image).grid, 1e-6)


def test_masks_of_another_run_are_told(segmented: Path, tmp_path: Path) -> None:
    out, folder = segmented / "out.zarr", tmp_path / "masks"
    assert run("export", out, "--split", folder, "--organs", "liver,spleen").stderr == ""
    # Of the same run, masks may be made one after the other.
    assert run("export", out, "--split", folder, "--organs", "aorta").stderr == ""
    older = nibabel.load(folder / "spleen.nii.gz")
    older.header["descrip"] = f"{RUN}of another day"
    nibabel.save(
        nibabel.Nifti1Image(older.get_fdata(), None, older.header), folder / "spleen.nii.gz"
    )
    nibabel.save(nibabel.Nifti1Image(older.get_fdata(), older.affine), folder / "mine.nii.gz")
    told = run("export", out, "--split", folder, "--organs", "liver", "--overwrite").stderr
    assert "masks of another run (spleen.nii.gz)" in told
    assert (folder / "spleen.nii.gz").exists()
