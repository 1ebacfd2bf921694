"""Formats of scans on the command line: DICOM in, its series chosen, the volume that of NIfTI."""

from pathlib import Path

import nibabel as nib
import numpy as np
import zarr
from click.testing import CliRunner, Result
from pydicom import uid

from kpt_dask.cli.main import kpt
from tests.scans.dicom_writer import SERIES, save, slices, write_folder
from tests.scans.formats import LPS

AFFINE = np.array([[2.0, 0, 0, -30], [0, 2.0, 0, 20], [0, 0, 3.0, -100], [0, 0, 0, 1.0]])
VALUES = np.random.default_rng(2).integers(-1000, 2000, (9, 36, 40)).astype(np.int16)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_compressed_series_makes_the_volume_of_its_nifti(tmp_path: Path) -> None:
    write_folder(tmp_path / "ct", VALUES, AFFINE, uid.JPEG2000Lossless)
    nib.save(nib.Nifti1Image(VALUES.T, LPS @ AFFINE), tmp_path / "ct.nii.gz")
    run("convert", tmp_path / "ct", tmp_path / "a.zarr")
    run("convert", tmp_path / "ct.nii.gz", tmp_path / "b.zarr")
    one, two = (np.asarray(zarr.open_group(tmp_path / name)["0"]) for name in ("a.zarr", "b.zarr"))
    np.testing.assert_array_equal(one, two)


def test_of_several_series_the_user_chooses(tmp_path: Path) -> None:
    for name, series in (("a", SERIES), ("b", uid.generate_uid(entropy_srcs=["b"]))):
        for k, dataset in enumerate(slices(VALUES, AFFINE, series)):
            save(dataset, tmp_path / "ct" / name / f"{k}.dcm")
    [sentence] = run("convert", tmp_path / "ct", tmp_path / "a.zarr", code=1).stderr.splitlines()
    assert f"{SERIES} (CT, thorax 1.0, 9 images)" in sentence
    assert sentence.endswith("choose one with --series UID.")
    assert not (tmp_path / "a.zarr").exists()
    run("convert", tmp_path / "ct", tmp_path / "a.zarr", "--series", SERIES)
