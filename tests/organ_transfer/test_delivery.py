"""The label map on the scan's grid: the same file whoever decides it, counted as it is."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import zarr
from distributed import Client

from atlas_store import load_organs
from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.delivery import DTYPE, Decision, fill, planes_per_task
from kpt_dask.organ_transfer.measures import OrganMeasures, as_delivered
from kpt_dask.resampling.labels_on_scan import labels_onto
from kpt_dask.scans import nifti_writer
from kpt_dask.scans.label_header import header_like
from kpt_dask.scans.nifti_writer import NiftiWriter, pack, planes_at_once

_nib: Any = nibabel
ORGANS = load_organs("openkbp")
GRID = Grid((20, 22, 24), np.diag([2.0, 2.0, 2.0, 1]))
TARGET = Grid(
    (31, 40, 44), np.array([[1.25, 0, 0, 1], [0, 1.1, 0, -2], [0, 0, 1.05, 0.5], [0, 0, 0, 1]])
)


@pytest.fixture(scope="module")
def decision(tmp_path_factory: pytest.TempPathFactory) -> Decision:
    path = tmp_path_factory.mktemp("delivery") / "p"
    places = np.moveaxis(np.indices(GRID.shape), 0, -1).astype(np.float32)
    centres = np.random.default_rng(3).uniform(4, 18, (len(ORGANS), 3)).astype(np.float32)
    shares = [1 - np.linalg.norm(places - centre, axis=-1) / 9 for centre in centres]
    values = np.maximum(np.stack(shares), 0).astype(np.float32)
    array = zarr.create_array(str(path), data=values, chunks=(1, 16, 16, 16), zarr_format=3)
    return Decision(array, ORGANS, 0.4, GRID, TARGET)


def header() -> Any:
    made = _nib.Nifti1Header()
    made.set_data_shape(TARGET.shape[::-1])
    return header_like(made, TARGET.shape, DTYPE)


def test_the_file_is_the_same_whoever_decides(
    decision: Decision,
    one_process: Client,
    two_processes: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nifti_writer, "PIECE_BYTES", 3 * 40 * 44 * 2)
    slabs = labels_onto(decision.probability, ORGANS.values, 0.4, GRID, TARGET)
    expected = np.concatenate(list(slabs))
    with NiftiWriter(tmp_path / "whole.nii.gz", header()) as file:
        for z in range(0, len(expected), 3):
            file.write(pack(expected[z : z + 3]))
    whole = (tmp_path / "whole.nii.gz").read_bytes()
    counts = [int((expected == value).sum()) for value in ORGANS.values]
    assert min(counts) > 0
    # Workers of other processes cut pieces of the usual size, which here is the whole map.
    for client, memory, same in (
        (one_process, 1 << 30, True),
        (one_process, 1, True),
        (two_processes, 1 << 30, False),
    ):
        path = tmp_path / "labels.nii.gz"
        with NiftiWriter(path, header()) as file:
            counted = fill(file, decision, memory=memory, client=client)
        assert counted.tolist() == counts
        np.testing.assert_array_equal(np.asarray(_nib.load(path).dataobj).T, expected)
        assert not same or path.read_bytes() == whole


@pytest.mark.parametrize("memory", [1, 64 << 20, 1 << 30])
@pytest.mark.parametrize("threads", [[1], [2], [16], [4, 4]])
def test_tasks_are_whole_pieces_within_memory(threads: list[int], memory: int) -> None:
    shape = (600, 512, 512)
    piece = planes_at_once(shape, DTYPE)
    planes = planes_per_task(shape, threads, memory)
    assert planes % piece == 0
    assert planes == piece or planes * 512 * 512 * 16 * max(threads) <= memory


def measured(volume: float, interval: tuple[float, float]) -> OrganMeasures:
    return OrganMeasures(volume, interval, 50.0, None, None, 3, 1.0, False, 0.5)


def test_volumes_are_those_of_the_label_map_that_is_delivered() -> None:
    organs = {
        "a": measured(10.0, (8.0, 10.0)),
        "b": measured(0.0, (0.0, 0.0)),
        "c": measured(0.02, (0.0, 0.5)),
    }
    counts = np.array([7000, 3, 0])
    told = as_delivered(organs, counts, TARGET)
    voxel = 1.25 * 1.1 * 1.05 / 1000
    for organ, count in zip(told.values(), counts, strict=True):
        assert organ.volume_ml == pytest.approx(count * voxel, rel=1e-12)
        assert organ.interval_ml[0] <= organ.volume_ml <= organ.interval_ml[1]
    assert told["a"].interval_ml[0] == pytest.approx(0.8 * 7000 * voxel)
    assert told["c"].mean_hu is None
