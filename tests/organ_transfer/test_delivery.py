"""The label map on the scan's grid: the same whoever decides it, counted as it is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import OrganTable, load_organs
from kpt_dask.grid import Grid
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.label_files.request import LabelRequest
from kpt_dask.organ_transfer.delivery import Decision, decide, decided, planes_per_task
from kpt_dask.organ_transfer.measures import OrganMeasures, as_delivered
from kpt_dask.resampling.labels_on_scan import Shares, labels_onto
from kpt_dask.scans import nifti_writer
from kpt_dask.scans.nifti_writer import planes_at_once

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
    return Decision(Shares(array, ORGANS.values, 0.4, GRID), ORGANS, ORGANS.values, TARGET)


def voxels(labels: PackedLabels) -> NDArray[Any]:
    return np.concatenate(list(labels.slabs()))


def test_labels_are_the_same_whoever_decides(
    decision: Decision,
    one_process: Client,
    two_processes: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nifti_writer, "PIECE_BYTES", 3 * 40 * 44)
    expected = np.concatenate(list(labels_onto(decision.shares, TARGET))).astype(np.uint8)
    whole = PackedLabels.of(TARGET.shape, expected.dtype, [expected])
    counts = [int((expected == value).sum()) for value in ORGANS.values]
    assert min(counts) > 0
    # Workers of other processes cut pieces of the usual size, which here is the whole map.
    for client, memory, same in (
        (one_process, 1 << 30, True),
        (one_process, 1, True),
        (two_processes, 1 << 30, False),
    ):
        labels, counted = decide(decision, memory=memory, client=client)
        assert counted[list(ORGANS.values)].tolist() == counts
        np.testing.assert_array_equal(voxels(labels), expected)
        assert not same or labels.pieces == whole.pieces


@pytest.mark.parametrize("names", [("larynx",), ("spinal_cord", "mandible"), ORGANS.names])
def test_wanted_organs_are_what_they_are_among_all(
    decision: Decision, names: tuple[str, ...], one_process: Client
) -> None:
    everything = np.concatenate(list(labels_onto(decision.shares, TARGET)))
    values = tuple(ORGANS.by_name(name).value for name in names)
    expected = np.where(np.isin(everything, values), everything, 0)
    assert np.count_nonzero(expected) > 0
    request = LabelRequest.parse("l.nii", organs=names, largest=True)
    wanted = decision._replace(wanted=values)
    label_map, counts = decided(wanted, request, memory=None, client=one_process)
    assert [organ.name for organ in label_map.organs] == list(names)
    # Of which each is one part.
    np.testing.assert_array_equal(voxels(label_map.voxels), expected)
    assert counts.tolist() == [int((expected == value).sum()) for value in values]


def test_a_label_over_255_needs_more_bits(decision: Decision, one_process: Client) -> None:
    organs = OrganTable((*ORGANS.organs[:-1], replace(ORGANS.organs[-1], value=300)))
    shares = decision.shares._replace(values=organs.values)
    wide = Decision(shares, organs, organs.values, TARGET)
    labels, counts = decide(wide, memory=None, client=one_process)
    assert labels.dtype == np.uint16
    assert counts[300] == np.count_nonzero(voxels(labels) == 300) > 0


@pytest.mark.parametrize("memory", [1, 64 << 20, 1 << 30])
@pytest.mark.parametrize("threads", [[1], [2], [16], [4, 4]])
def test_tasks_are_whole_pieces_within_memory(threads: list[int], memory: int) -> None:
    shape, dtype = (600, 512, 512), np.dtype(np.uint16)
    piece = planes_at_once(shape, dtype)
    planes = planes_per_task(shape, dtype, threads, memory)
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
