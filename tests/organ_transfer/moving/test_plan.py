"""Modes `affine` and `across`, and organs that others move, against the naive equations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import AtlasStore
from atlas_store.arrays.boxes import Box
from kpt_dask.options import MODES, TransferOptions
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.moving.distances import organ_distances
from kpt_dask.organ_transfer.moving.plan import OrganMoves
from kpt_dask.organ_transfer.moving.schedule import move_organs
from kpt_dask.organ_transfer.probability import TILING, Tiling, create_probability
from kpt_dask.runtime import cluster
from kpt_dask.volumes.volume import Volume
from tests.helpers import ATLASES, ORGANS, SCAN, SMALL, SPACING, clear, create_labels, files, onto
from tests.naive import moving as naive
from tests.naive.moving import Match
from tests.naive.stations import decide

Array = NDArray[Any]

RHO = 6.0
ACROSS = {"spleen": ("spleen", "lung_left"), "lung_left": ("liver",)}
"""Who moves whom where that is said; of the second atlas the liver is not annotated."""


def several(seed: int, n: int = 40) -> list[Match]:
    """Matches of any label whose translations differ, some far from everything."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        a = int(rng.integers(3))
        label = int(rng.choice(np.unique(ATLASES[a].labels)))
        voted = int(rng.choice([0, *ORGANS.values])) if rng.random() < 0.2 else label
        before = ATLASES[a].origin + SPACING * rng.uniform(-4, 24, 3)
        translation = np.array(onto(a, rng.integers(-4, 4, 3))) + rng.uniform(-0.9, 0.9, 3)
        found.append(match(a, label, voted, before, before + translation, rng.uniform(0.1, 1, 2)))
    return found


def match(a: int, label: int, voted: int, before: Array, after: Array, p: Any) -> Match:
    position = np.float32(after)
    translation = (position - before).astype(np.float32)
    p_label, p_match = np.float32(p).tolist()
    return Match(
        a, label, voted, position.astype(float), translation.astype(float), p_label, p_match
    )


def bent(seed: int, turn: float, wrong: int = 2, n: int = 11) -> list[Match]:
    """Matches of the liver in the first atlas that agree on an affine, but for a few."""
    rng = np.random.default_rng(seed)
    linear = np.eye(3) + turn * rng.normal(0, 1, (3, 3))
    found = []
    for i in range(n):
        local = SPACING * rng.uniform(2, 18, 3)
        after = SCAN.origin + linear @ (local - 18) + 20 + rng.normal(0, 0.3, 3)
        after += rng.uniform(20, 30, 3) if i < wrong else 0
        found.append(match(0, 5, 5, ATLASES[0].origin + local, after, rng.uniform(0.2, 1, 2)))
    return found


def tables(matches: Sequence[Match]) -> Evidence:
    """The keypoints, matches and votes that the stations before would give."""
    matches = sorted(matches, key=lambda m: m.atlas)
    n, values = len(matches), list(ORGANS.values)
    posterior = np.zeros((n, len(values)), np.float32)
    for k, m in enumerate(matches):
        if m.voted:
            posterior[k, values.index(m.voted)] = m.p_label
    vectors = ("keypoint", "axis"), ("match", "axis")
    position, translation = (
        np.array([getattr(m, name) for m in matches], np.float32).reshape(n, 3)
        for name in ("position", "translation")
    )
    keypoints = xr.Dataset({"position": (vectors[0], position)})
    found = xr.Dataset(
        {
            "keypoint": ("match", np.arange(n, dtype=np.int32)),
            "atlas": ("match", np.array([m.atlas for m in matches], np.int32)),
            "label": ("match", np.array([m.label for m in matches], np.uint16)),
            "translation": (vectors[1], translation),
            "probability": ("match", np.array([m.p_match for m in matches], np.float32)),
        }
    )
    voted = np.array([m.voted for m in matches], np.uint16)
    votes = xr.Dataset(
        {"posterior": (("keypoint", "organ"), posterior), "label": ("keypoint", voted)}
    )
    return Evidence(keypoints, found, votes)


def run(
    volume: Volume,
    store: AtlasStore,
    matches: Sequence[Match],
    path: Path,
    client: Client,
    mode: str,
    across: Mapping[str, Sequence[str]] | None = None,
    memory: int = 1 << 30,
    tiling: Tiling = TILING,
) -> tuple[Array, Array]:
    """Probabilities and label map."""
    group = zarr.create_group(str(path))
    probability = create_probability(group, volume.grid, store.organs, mode, tiling)
    labels = create_labels(group, volume.grid.shape, tiling)
    options = TransferOptions(rho=RHO, across=across or {})
    job = TransferJob(volume, store.organs, probability, labels, mode, options, memory, tiling)
    move_organs(job, store.atlases(store.ids()), tables(matches), client)
    return np.asarray(probability[...]), labels[...]


def expected(
    matches: Sequence[Match], mode: str, across: Mapping[str, Sequence[str]] | None = None
) -> tuple[Array, Array]:
    movers = {
        ORGANS.by_name(name).value: [ORGANS.by_name(other).value for other in others]
        for name, others in (across or {}).items()
    }
    rho = RHO if mode == "across" else None
    weight = naive.weights(matches, ATLASES, ORGANS.values, SPACING, movers, rho)
    if mode == "across":
        moves = [
            (m.atlas, *naive.shift_of(m, SCAN, ATLASES[m.atlas], SPACING).tolist()) for m in matches
        ]
        weight = np.array([naive.without_lightest(w, moves, 0.05) for w in weight])
    nus = [max(organ.nu, MODES[mode].least_nu) for organ in ORGANS]
    return naive.shares(
        SCAN, ATLASES, matches, weight, ORGANS.values, nus, SPACING, affines=mode == "affine"
    )


def others(matches: Sequence[Match]) -> list[Match]:
    """All but those that `bent` has to itself."""
    return [m for m in matches if (m.atlas, m.label) != (0, 5)]


CASES: dict[str, tuple[str, list[Match], dict[str, tuple[str, ...]]]] = {
    "across": ("across", several(1), {}),
    "across, some named": ("across", several(2), ACROSS),
    "organ, some named": ("organ", several(3), ACROSS),
    "affine": ("affine", others(several(4)) + bent(0, 0.08), {}),
    "affine, some named": ("affine", others(several(5)) + bent(1, 0.05), ACROSS),
    "implausible affine": ("affine", others(several(6, 20)) + bent(2, 0.6), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_shares_are_what_the_equations_say_in_any_blocks(
    tmp_path: Path, volume: Volume, store: AtlasStore, one_process: Client, case: str
) -> None:
    mode, matches, across = CASES[case]
    whole, labels = run(volume, store, matches, tmp_path / "whole", one_process, mode, across)
    shares, sure = expected(matches, mode, across)
    assert (shares > 0).sum() > 1000
    assert sure.mean() > 0.99
    np.testing.assert_allclose(whole[:, sure], shares[:, sure], atol=3e-6)
    sure &= clear(shares)
    np.testing.assert_array_equal(labels[sure], decide(shares, ORGANS.values)[sure])
    tilings = Tiling((8, 12, 10), (4, 6, 5)), Tiling((1, 128, 9), (1, 64, 9))
    for i, tiling in enumerate(tilings):
        what = volume, store, matches, tmp_path / f"blocks{i}", one_process, mode, across
        found, cut = run(*what, tiling=tiling)
        np.testing.assert_array_equal(found.view(np.uint32), whole.view(np.uint32))
        np.testing.assert_array_equal(cut, labels)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1 << 30, 1])
@pytest.mark.parametrize("case", ["across", "affine"])
def test_any_team_gives_the_same_bytes(
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    case: str,
    memory: int,
    threads: int,
) -> None:
    """Atlases are divided among its threads, or read one after the other."""
    mode, matches, across = CASES[case]
    expected, decided = run(volume, store, matches, tmp_path / "two", one_process, mode, across)
    with cluster.local(threads) as client:
        what = volume, store, matches, tmp_path / "own", client, mode, across, memory
        found, labels = run(*what)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(labels, decided)


@pytest.mark.parametrize("case", ["across", "affine"])
def test_processes_give_the_same_bytes_as_threads(
    tmp_path: Path,
    volume: Volume,
    store: AtlasStore,
    one_process: Client,
    two_processes: Client,
    case: str,
) -> None:
    mode, matches, across = CASES[case]
    run(volume, store, matches, tmp_path / "threads", one_process, mode, across, tiling=SMALL)
    run(volume, store, matches, tmp_path / "processes", two_processes, mode, across, tiling=SMALL)
    threads, processes = (files(tmp_path / name) for name in ("threads", "processes"))
    assert threads == processes
    assert len(threads) > 5


def test_slabs_share_the_voxels_of_an_organ() -> None:
    rng = np.random.default_rng(0)
    low = rng.integers(-20, 40, (50, 3))
    one, no_affines = np.ones(50, np.int64), np.empty((0, 3, 4))
    high = low + rng.integers(1, 30, (50, 3))
    moves = OrganMoves(one, one, one * 1.0, low, high, rng.integers(1, 999, 50), -one, no_affines)
    slabs: list[Box] = [((z, z + 16), (-100, 100), (-100, 100)) for z in range(-32, 80, 16)]
    found = np.array([moves.visited_in(slab) for slab in slabs])
    np.testing.assert_allclose(found.sum(axis=0), moves.voxels)
    np.testing.assert_array_equal(found > 0, [moves.reach(slab) for slab in slabs])
    # A ball has more in its middle, and as much below it as above.
    one, low = one[:1], 0 * low[:1]
    ball = OrganMoves(one, one, one, low, low + 30, one * 100, -one, no_affines)
    thirds = [ball.visited_in(((z, z + 10), (0, 30), (0, 30)))[0] for z in (0, 10, 20)]
    np.testing.assert_allclose(thirds, [26, 48, 26], rtol=0.01)


def test_distances_are_to_the_nearest_voxel(store: AtlasStore) -> None:
    rng = np.random.default_rng(0)
    for a, atlas in enumerate(ATLASES):
        inside = np.argwhere(atlas.labels)[::20] + rng.uniform(-0.7, 0.7, (1, 3))
        voxels = np.concatenate([inside, rng.uniform(-5, 25, (40, 3))])
        points = np.float32(atlas.origin + SPACING * voxels)
        found = organ_distances(store[f"a{a}"], points, ORGANS, 20.0)
        for i, point in enumerate(points.astype(float)):
            for o, value in enumerate(ORGANS.values):
                d = naive.distance(atlas, value, point, SPACING)
                assert found[i, o] == pytest.approx(d if d < 20 else np.inf, abs=1e-5)
        assert (found == 0).any()
        assert np.isinf(found).any()
