from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints, AtlasStore
from kpt_dask.organ_transfer.decision import BoxLabels
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.moving.plan import plan_moves, propose
from kpt_dask.organ_transfer.moving.schedule import move_organs
from kpt_dask.organ_transfer.probability import TILING, Tiling, create_probability
from kpt_dask.volumes.volume import Volume
from tests.helpers import (
    ATLASES,
    ORGANS,
    SCAN,
    SMALL,
    SPACING,
    clear,
    create_labels,
    files,
    onto,
    volume_of,
)
from tests.naive import stations
from tests.naive.stations import AnnotatedImage, Proposal

Array = NDArray[Any]

NUS = [organ.nu for organ in ORGANS]


def tables(proposals: Sequence[Proposal]) -> tuple[xr.Dataset, xr.Dataset]:
    """Matches and votes that amount to the proposals, with a test keypoint for each."""
    n = len(proposals)
    values = list(ORGANS.values)
    posterior = np.zeros((n, len(values)), np.float32)
    for k, p in enumerate(proposals):
        if p.keypoint_label:
            posterior[k, values.index(p.keypoint_label)] = p.p_label
    translation = np.array([p.translation for p in proposals], np.float32).reshape(n, 3)
    matches = xr.Dataset(
        {
            "keypoint": ("match", np.arange(n, dtype=np.int32)),
            "atlas": ("match", np.array([p.atlas for p in proposals], np.int32)),
            "label": ("match", np.array([p.label for p in proposals], np.uint16)),
            "translation": (("match", "axis"), translation),
            "probability": ("match", np.array([p.p_match for p in proposals], np.float32)),
        }
    )
    labels = np.array([p.keypoint_label for p in proposals], np.uint16)
    votes = xr.Dataset(
        {"posterior": (("keypoint", "organ"), posterior), "label": ("keypoint", labels)}
    )
    return matches, votes


def run(
    volume: Volume,
    store: AtlasStore,
    proposals: Sequence[Proposal],
    path: Path,
    client: Client,
    memory: int = 1 << 30,
    tiling: Tiling = TILING,
) -> tuple[Array, Array]:
    """Probabilities and label map."""
    matches, votes = tables(proposals)
    group = zarr.create_group(str(path), overwrite=True)
    probability = create_probability(group, volume.grid, store.organs, "organ", tiling)
    labels = create_labels(group, volume.grid.shape, tiling)
    job = TransferJob(
        volume, store.organs, probability, labels, "organ", memory=memory, tiling=tiling
    )
    # Where keypoints lie plays no part in mode organ.
    evidence = Evidence(xr.Dataset(), matches, votes)
    move_organs(job, store.atlases(store.ids()), evidence, client)
    return probability[...], labels[...]


def expected(proposals: Sequence[Proposal]) -> tuple[Array, Array]:
    shares = stations.transfer(SCAN, ATLASES, proposals, ORGANS.values, NUS, SPACING)
    return shares, stations.decide(shares, ORGANS.values)


def proposal(
    atlas: int, label: int, shift: Sequence[int], p: float = 1.0, q: float = 1.0, got: int = -1
) -> Proposal:
    """One whose test keypoint got the atlas keypoint's label, unless told otherwise."""
    return Proposal(atlas, label, label if got < 0 else got, onto(atlas, shift), p, q)


def several(seed: int, n: int = 24, reach: int = 7) -> list[Proposal]:
    """Moves by fractions of voxels, out of the volume on all sides, some with other labels."""
    rng = np.random.default_rng(seed)
    proposals = []
    for _ in range(n):
        atlas = int(rng.integers(3))
        label = int(rng.choice(np.unique(ATLASES[atlas].labels)))
        got = int(rng.choice([0, *ORGANS.values])) if rng.random() < 0.2 else label
        at = np.array(onto(atlas, rng.integers(-reach, reach, 3))) + rng.uniform(-0.9, 0.9, 3)
        z, y, x = np.rint(at * 64).tolist()
        weights = np.float32(rng.uniform(0.1, 1, 2)).tolist()
        proposals.append(Proposal(atlas, label, got, (z / 64, y / 64, x / 64), *weights))
    return proposals


TILINGS = [
    Tiling((128, 128, 128), (64, 64, 64)),
    Tiling((8, 8, 8), (8, 8, 8)),
    Tiling((8, 12, 10), (4, 6, 5)),
    Tiling((1, 128, 128), (1, 64, 64)),
    Tiling((128, 9, 128), (64, 3, 64)),
]


@pytest.mark.parametrize("tiling", TILINGS)
def test_blocks_give_what_the_equations_give(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client, tiling: Tiling
) -> None:
    proposals = several(7)
    whole = run(volume, store, proposals, tmp_path / "whole", one_process)
    how: Any = {"tiling": tiling}
    found, labels = run(volume, store, proposals, tmp_path / "blocks", one_process, **how)
    np.testing.assert_array_equal(found.view(np.uint32), whole[0].view(np.uint32))
    np.testing.assert_array_equal(labels, whole[1])
    # Each atlas's organs are read again for each slab.
    scarce, labels = run(volume, store, proposals, tmp_path / "scarce", one_process, 1, **how)
    np.testing.assert_array_equal(scarce.view(np.uint32), whole[0].view(np.uint32))
    np.testing.assert_array_equal(labels, whole[1])
    shares, decided = expected(proposals)
    assert (shares > 0).sum() > 1000
    np.testing.assert_allclose(found, shares, atol=3e-6)
    sure = clear(shares)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(labels[sure], decided[sure])
    assert set(np.unique(labels)) == {0, *ORGANS.values}


@given(st.integers(0, 2**32 - 1), st.integers(0, 10))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_moves(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client, seed: int, n: int
) -> None:
    proposals = several(seed, n, reach=25)
    found, labels = run(volume, store, proposals, tmp_path / "p", one_process)
    shares, decided = expected(proposals)
    np.testing.assert_allclose(found, shares, atol=3e-6)
    sure = clear(shares)
    np.testing.assert_array_equal(labels[sure], decided[sure])


def test_slabs_that_would_share_a_chunk_of_labels_are_refused(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client
) -> None:
    labels = zarr.create_array(
        store=str(tmp_path / "labels"), shape=volume.grid.shape, dtype=np.uint16, chunks=(12, 8, 8)
    )
    group = zarr.create_group(str(tmp_path / "p"))
    probability = create_probability(group, volume.grid, store.organs, "organ", SMALL)
    job = TransferJob(volume, store.organs, probability, labels, "organ", tiling=SMALL)
    evidence = Evidence(xr.Dataset(), *tables(several(8)))
    with pytest.raises(ValueError, match="destroy a neighbour"):
        move_organs(job, store.atlases(store.ids()), evidence, one_process)


def test_processes_give_the_same_bytes_as_threads(
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    two_processes: Client,
) -> None:
    run(volume, store, several(8), tmp_path / "threads", one_process, tiling=SMALL)
    run(volume, store, several(8), tmp_path / "processes", two_processes, tiling=SMALL)
    threads, processes = (files(tmp_path / name) for name in ("threads", "processes"))
    assert threads == processes
    assert len(threads) > 10


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("far", [False, True])
def test_organs_that_leave_the_volume(
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    axis: int,
    side: int,
    far: bool,
) -> None:
    start, stop = store["a2"].organs["spleen"].bounding_box[axis]
    # One plane of the organ stays inside, or none does.
    inside = 0 if far else 1
    shift = [0, 0, 0]
    shift[axis] = SCAN.image.shape[axis] - inside - start if side > 0 else inside - stop
    leaving = [proposal(2, 300, shift)]
    assert expected(leaving)[0].any() != far
    proposals = [*leaving, proposal(2, 300, (0, 0, 0))]
    found, _ = run(volume, store, proposals, tmp_path / "p", one_process)
    shares, _ = expected(proposals)
    np.testing.assert_allclose(found, shares, atol=1e-6)
    # What is moved out of sight keeps its part of the organ's vote weight.
    assert found[2].max() <= (0.5 if far else 1)


def test_without_matches_everything_is_background(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client
) -> None:
    found, labels = run(volume, store, [], tmp_path / "p", one_process)
    assert found.shape == (3, *volume.grid.shape)
    assert not found.any()
    assert not labels.any()
    others = [proposal(0, 5, (0, 0, 0), got=2), proposal(0, 0, (0, 0, 0))]
    found, labels = run(volume, store, others, tmp_path / "p", one_process)
    assert not found.any()


def test_an_atlas_without_the_organ_abstains(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client
) -> None:
    liver = [proposal(0, 5, (1, 2, 3), 0.5), proposal(2, 5, (0, 1, 0), 0.25)]
    # The second atlas does not annotate the liver; it agrees loudly on other organs.
    others = [proposal(1, 2, (0, 0, 0)), proposal(1, 300, (2, 0, 0))] * 5
    alone, _ = run(volume, store, liver, tmp_path / "p", one_process)
    beside, _ = run(volume, store, liver + others, tmp_path / "p", one_process)
    np.testing.assert_array_equal(beside[0], alone[0])
    assert beside[1:].any()


def test_the_weight_of_a_move_is_p_label_times_p_match(
    tmp_path: Path, volume: Volume, store: AtlasStore
) -> None:
    proposals = [
        proposal(0, 5, (1, 2, 3), 0.5, 0.5),
        proposal(0, 5, (1, 2, 3), 1.0, 0.25),
        proposal(0, 5, (1, 2, 4), 0.75, 1.0),
        proposal(0, 5, (1, 2, 4), 0.75, 1.0, got=2),
    ]
    matches, votes = tables(proposals)
    atlases = store.atlases(["a0", "a1", "a2"])
    found = propose(Evidence(xr.Dataset(), matches, votes), atlases, ORGANS, ORGANS, {})
    moves = plan_moves(found, matches, atlases, ORGANS, volume.grid)
    assert moves.atlas.tolist() == moves.organ.tolist() == [0, 0]
    assert moves.weight.tolist() == [0.5, 0.75]
    box = store["a0"].organs["liver"].bounding_box
    for i, shift in enumerate([(1, 2, 3), (1, 2, 4)]):
        assert moves.low[i].tolist() == [a + d for (a, _), d in zip(box, shift, strict=True)]
        assert moves.high[i].tolist() == [b + d for (_, b), d in zip(box, shift, strict=True)]


def test_a_share_is_of_the_organs_own_weight(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client
) -> None:
    quiet = [proposal(2, 300, (0, 0, 0), 0.01, 0.02)]
    loud = [proposal(0, 5, (0, 0, 0))] * 20
    alone, _ = run(volume, store, quiet, tmp_path / "p", one_process)
    beside, _ = run(volume, store, quiet + loud, tmp_path / "p", one_process)
    np.testing.assert_array_equal(alone[2], beside[2])
    assert alone[2].max() > 0.9


@pytest.mark.parametrize(("value", "nu"), [(5, 50.0), (2, 300.0)])
def test_nu_is_a_property_of_the_organ(
    tmp_path: Path, store: AtlasStore, one_process: Client, value: int, nu: float
) -> None:
    brighter = AnnotatedImage(ATLASES[0].image + 70, ATLASES[0].labels, ATLASES[0].origin)
    volume = volume_of(tmp_path / "v.zarr", brighter)
    here = [Proposal(0, value, value, (0.0, 0.0, 0.0), 1.0, 1.0)]
    found, _ = run(volume, store, here, tmp_path / "p", one_process)
    inside = ATLASES[0].labels == value
    share = found[ORGANS.values.index(value)]
    np.testing.assert_allclose(share[inside], np.exp(-(70**2) / (2 * nu**2)), rtol=5e-6)
    assert not share[~inside].any()


def decided(shares: Sequence[Any], values: Sequence[int]) -> Array:
    array = np.array(shares, np.float32).reshape(len(values), 1, 1, -1)
    return decided_all(array, values).ravel()


def decided_all(shares: Array, values: Sequence[int]) -> Array:
    z, y, x = shares.shape[1:]
    everywhere = ((0, z), (0, y), (0, x))
    found = BoxLabels(everywhere, 0.15, np.uint16)
    for value, share in zip(values, shares, strict=True):
        found.update(value, everywhere, share, np.zeros(4, np.int64))
    return found.labels


def test_fifteen_percent_and_ties() -> None:
    limit = np.float32(0.15)
    below = np.nextafter(limit, np.float32(0))
    shares = [
        [limit, below, 0.2, 0.3, 0.0, 0.5, 0.14],
        [0.0, 0.0, 0.2, 0.4, 0.0, 0.5, 0.15],
        [0.0, below, 0.2, 0.1, 0.0, 0.6, 0.10],
    ]
    # The values are in no order: ties go by the table.
    assert decided(shares, [5, 2, 300]).tolist() == [5, 0, 5, 2, 0, 300, 2]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_decisions_are_those_of_the_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = np.float32(rng.integers(0, 12, (3, 2, 3, 4)) / 40)
    labels = decided_all(shares, ORGANS.values)
    # 6 / 40 is 0.15, but as float32 it is larger than the double.
    np.testing.assert_array_equal(labels, stations.decide(shares, ORGANS.values))


def test_atlases_without_keypoints_load(store: AtlasStore) -> None:
    atlases = AtlasKeypoints.load(store)
    assert atlases.offsets.tolist() == [0, 0, 0, 0]
