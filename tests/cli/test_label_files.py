"""Label files on the command line: several at once, of some organs, all refused before any work."""

import json
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from click.testing import CliRunner, Result

from atlas_store import AtlasStore
from kpt_dask.cli.common import names, numbers
from kpt_dask.cli.main import kpt
from tests.scans.formats import by_nibabel, by_simpleitk

FORMATS = ("nii.gz", "seg.nrrd", "mha", "dcm", "label")


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_one_run_writes_all_that_is_asked_for(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    paths = [tmp_path / "files" / f"organs.{ending}" for ending in FORMATS]
    files = [argument for name in paths for argument in ("--labels", name)]
    command = ["segment", bodies / "body_4_ct.nii.gz", body_store.url, tmp_path / "out.zarr"]
    command += ["--mode", "affine", *files, "--labels", f"rtstruct:{tmp_path / 'rt.dcm'}"]
    command += ["--split", tmp_path / "masks", "--organs", "spleen,liver", "--largest", "--json"]
    answer = json.loads(run(*command).stdout)
    assert list(answer["organs"]) == ["liver", "spleen"]
    assert answer["volume_grid"] == "scan"
    values, affine = by_nibabel(paths[0])
    assert set(np.unique(values)) == {0, 1, 2}
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    for value, name in ((1, "liver"), (2, "spleen")):
        mask = nib.load(tmp_path / "masks" / f"{name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(mask.dataobj).T == 1, values == value)
        volume = answer["organs"][name]["volume_ml"]
        assert volume == pytest.approx((values == value).sum() * voxel_ml)
    assert len(list((tmp_path / "masks").iterdir())) == 2
    for name in paths[1:3]:
        np.testing.assert_array_equal(by_simpleitk(name)[0], values)
    segments = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(paths[3])))
    assert np.count_nonzero(segments) == np.count_nonzero(values)
    # Again, of all organs: what is there is kept unless it is asked for.
    run(*command, code=1)
    run("segment", *command[1:5], command[5], "--labels", paths[0], "--overwrite")
    everything, _ = by_nibabel(paths[0])
    assert len(np.unique(everything)) > 5
    assert (everything == values)[values > 0].mean() > 0.95


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--labels", "organs.jpg"], "organs.jpg has an unknown extension"),
        (["--labels", "rtstruct:organs.nii"], "must end in .dcm"),
        (["--labels", "a.nrrd", "--labels", "a.nrrd"], "a.nrrd is a.nrrd, which is written too"),
        (["--labels", "out.zarr/a.nrrd"], "lies in out.zarr"),
        (["--split", "masks", "--labels", "masks/liver.nii.gz"], "which is written too"),
        (["--split", "masks", "--organs", "liver,heart"], "know no organ heart"),
        (["--organs", "liver,heart"], "know no organ heart"),
        (["--largest"], "add --labels FILE or --split DIR"),
        (["--labels", "scan.nii.gz"], "which is read"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    asked: list[str],
    told: str,
    bodies: Path,
    body_store: AtlasStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.nii.gz").symlink_to(bodies / "body_4_ct.nii.gz")
    result = run("segment", "scan.nii.gz", body_store.url, "out.zarr", *asked, code=1)
    [sentence] = result.stderr.splitlines()
    assert told in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_names_add_up_where_an_option_is_repeated() -> None:
    none: Any = None
    assert names(none, none, ("liver, spleen", "aorta")) == ("liver", "spleen", "aorta")
    assert numbers(none, none, ("5,10", "20")) == (5, 10, 20)
    assert names(none, none, ()) is None
    with pytest.raises(click.BadParameter, match="separated by commas"):
        names(none, none, ("liver,",))
