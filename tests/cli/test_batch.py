"""Batches for real, on a laptop and in the processes of a cluster: a store, good and bad scans."""

import csv
import io
import json
import os
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from distributed import Client

from atlas_store import AtlasStore
from kpt_dask.batches import outputs, segment_batch
from kpt_dask.cli.main import kpt
from kpt_dask.errors import KptWarning, ParameterError
from kpt_dask.segmentation import segment


def test_a_batch_segments_as_a_laptop_does(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    two_processes: Client,
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not a scan")
    scans = [bad, Path(shutil.copy(bodies / "body_4_ct.nii.gz", tmp_path))]
    scans.append(bodies / "body_1_ct.nii.gz")  # an atlas itself
    with pytest.warns(KptWarning, match="itself, as body_1"):
        outcomes = list(segment_batch(scans, body_store.url, tmp_path / "out", two_processes))
    assert [one.scan for one in outcomes] == scans
    assert [one.error is None for one in outcomes] == [False, True, True]
    assert "bad.nii.gz" in str(outcomes[0])
    done = outputs(scans, tmp_path / "out")
    assert [output.complete for output in done.values()] == [False, True, True]

    again = list(segment_batch(scans[1:], body_store.url, tmp_path / "out", two_processes))
    # What was segmented before is told as it was then.
    for before, after in zip(outcomes[1:], again, strict=True):
        assert after.seconds == 0
        assert (after.organs, after.warnings) == (before.organs, before.warnings)

    alone = segment(
        scans[1],
        body_store,
        tmp_path / "alone.zarr",
        labels=tmp_path / "alone.nii.gz",
        client=one_process,
    )
    batched = done[scans[1]]
    found, expected = (
        np.asarray(nib.load(path).dataobj) for path in (batched.labels, tmp_path / "alone.nii.gz")
    )
    np.testing.assert_array_equal(found, expected)
    assert expected.any()
    for name in ("probability", "labels/organs/0", "keypoints/descriptor"):
        a, b = (
            np.asarray(zarr.open_group(str(path), mode="r")[name])
            for path in (batched.segmentation, alone.path)
        )
        np.testing.assert_array_equal(a, b)


def test_the_command_tells_every_organ_of_every_scan(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    scans = [tmp_path / "s1" / "ct.nii.gz", tmp_path / "s2" / "ct.nii.gz", tmp_path / "bad.nii.gz"]
    for scan in scans:
        scan.parent.mkdir(exist_ok=True)
    shutil.copy(bodies / "body_4_ct.nii.gz", scans[0])
    shutil.copy(bodies / "body_4_ct.nii.gz", scans[1])
    scans[2].write_bytes(b"not a scan")
    out = tmp_path / "out"
    arguments = ["batch", *map(str, scans), body_store.url, str(out), "--mode", "organ"]
    arguments += ["--organs", "liver,spleen"]
    first = CliRunner().invoke(kpt, [*arguments, "--json"])
    assert first.exit_code == 1
    assert f"1 of 3 scans failed:\n  {scans[2]}: " in first.stderr
    told = json.loads(first.stdout)
    assert [one["error"] is None for one in told] == [True, True, False]
    for one in told[:2]:
        labels = nib.load(one["labels"])
        values = dict(zip(body_store.organs.names, body_store.organs.values, strict=True))
        voxel = np.prod(labels.header.get_zooms()) / 1000
        for name, organ in one["organs"].items():
            voxels = int((np.asarray(labels.dataobj) == values[name]).sum())
            assert organ["volume_ml"] == pytest.approx(voxels * voxel, rel=1e-5)

    again = CliRunner().invoke(kpt, [*arguments, "--csv"])
    assert "s1-ct.zarr: is there already" in again.stderr
    *rows, bad = csv.DictReader(io.StringIO(again.stdout))
    assert [(row["scan"], row["organ"]) for row in rows] == [
        (str(scan), organ) for scan in scans[:2] for organ in ("liver", "spleen")
    ]
    assert "bad.nii.gz" in bad["error"]
    for row in rows:
        [before] = [one for one in told if one["scan"] == row["scan"]]
        assert float(row["volume_ml"]) == before["organs"][row["organ"]]["volume_ml"]


def test_an_answer_is_that_of_the_scan_or_none(
    bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    """Another patient's scan of the same name, as by rsync: with the times of the old one."""
    scan, out = tmp_path / "ct.nii.gz", tmp_path / "out"
    run = partial(segment_batch, [scan], body_store, out, one_process, mode="organ")
    shutil.copy(bodies / "body_4_ct.nii.gz", scan)
    [first] = run()
    assert first.error is None
    times = os.stat(scan).st_mtime
    like = nib.load(bodies / "body_4_ct.nii.gz")
    other = np.roll(np.asarray(like.dataobj), 1, axis=0)
    nib.save(nib.Nifti1Image(other, None, like.header), scan)
    os.utime(scan, (times, times))
    [second] = run()
    assert not second.organs
    assert second.error is not None
    assert "has other voxels than the scan that" in second.error

    # As after a kill between the two outputs, and as by who wants the other scan segmented.
    first.output.labels.rename(tmp_path / "aside.nii.gz")
    [third] = run()
    assert third.error is not None
    assert not first.output.labels.exists()
    shutil.copy(bodies / "body_4_ct.nii.gz", scan)
    [fourth] = run()
    assert fourth.error is None
    assert first.output.labels.read_bytes() == (tmp_path / "aside.nii.gz").read_bytes()


def test_no_label_map_is_replaced(
    bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    """Other programs keep the header of a label map that is edited in them."""
    scan, out = bodies / "body_4_ct.nii.gz", tmp_path / "out"
    run = partial(segment_batch, [scan], body_store, out, one_process, mode="organ")
    [first] = run()
    edited = first.output.labels.read_bytes()
    shutil.rmtree(first.output.segmentation)
    [second] = run()
    assert second.error is not None
    assert "body_4_ct.nii.gz exists without" in second.error
    assert first.output.labels.read_bytes() == edited
    assert not first.output.segmentation.exists()


def test_other_options_are_told_and_damage_too(
    bodies: Path, body_store: AtlasStore, one_process: Client, tmp_path: Path
) -> None:
    scan, out = bodies / "body_4_ct.nii.gz", tmp_path / "out"
    run = partial(segment_batch, [scan], body_store, out, one_process)
    [first] = run(mode="organ", organs=("liver",))
    with pytest.warns(KptWarning, match="made with other options, and is kept"):
        [second] = run(mode="organ")
    assert second.organs == first.organs
    shutil.rmtree(first.output.segmentation / "votes")
    [third] = run(mode="organ", organs=("liver",))
    assert third.error is not None
    assert third.error.endswith("away to segment the scan again.")


def test_a_batch_names_its_outputs_itself(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="has no option labels; use exclude"):
        segment_batch(["scan.nii.gz"], "store", tmp_path, labels="organs.nii.gz")


def test_the_command_refuses_wrong_options_before_any_scan(
    bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    arguments = ["batch", str(bodies / "body_4_ct.nii.gz"), body_store.url, str(tmp_path / "out")]
    for wrong in (["--organs", "livr"], ["--mode", "locl"], ["--select", "0"], ["--exclude", "x"]):
        refused = CliRunner().invoke(kpt, [*arguments, *wrong])
        assert refused.exit_code != 0
        assert wrong[1] in refused.stderr
    assert not (tmp_path / "out").exists()
