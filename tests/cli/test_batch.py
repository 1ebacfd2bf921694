"""The batch that a cluster job runs, for real: two processes, a store, good and bad scans."""

import os
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zarr
from distributed import Client

from atlas_store import AtlasStore
from kpt_dask.cli.batch import outputs, segment_batch
from kpt_dask.segmentation import segment


def test_a_batch_segments_as_a_laptop_does(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    two_processes: Client,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not a scan")
    scans = [bad, Path(shutil.copy(bodies / "body_4_ct.nii.gz", tmp_path))]
    scans.append(bodies / "body_1_ct.nii.gz")  # an atlas itself
    failed = segment_batch(scans, body_store.url, tmp_path / "out", two_processes)
    assert any("itself, as body_1" in line for line in caplog.messages)
    assert list(failed) == [bad]
    assert "bad.nii.gz" in failed[bad]
    done = outputs(scans, tmp_path / "out")
    assert [output.complete for output in done.values()] == [False, True, True]

    # A scan that was changed since is named, and its answer is kept.
    os.utime(scans[1], (time.time() + 60,) * 2)
    caplog.clear()
    segment_batch(scans[1:], body_store.url, tmp_path / "out", two_processes)
    [told] = [line for line in caplog.messages if "was changed after" in line]
    assert told.startswith(str(scans[1]))

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
