"""Sweeps of blocks: those keypoints of the plain reference, however a volume is cut.

Comparisons that may meet float32 ties print how many they met; ``pytest -rP`` shows it.
"""

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kpt_dask.keypoints import extraction as keypoints_module
from kpt_dask.keypoints.blocks import plan_blocks
from kpt_dask.keypoints.extraction import (
    sweep_blocks,
)
from kpt_dask.keypoints.octaves import Octave
from kpt_dask.keypoints.sweep import OctaveKeypoints
from kpt_dask.keypoints.sweep_plan import halo
from kpt_dask.volumes.scale_space import octave_shapes
from tests.helpers import stored
from tests.keypoints.common import AIR, Shape, assert_same_bytes, found_in, noise, texture
from tests.naive import keypoints


def with_structures(shape: Shape, block: Shape, seed: int) -> np.ndarray:
    """Bright and dark cubes across faces, edges and corners of the blocks, little noise around."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-40, 40, shape).astype(np.float32)
    for corner in product(*(range(0, n + 1, step) for n, step in zip(shape, block, strict=True))):
        for _ in range(3):
            at = np.where(rng.random(3) < 0.6, corner, rng.integers(0, shape))
            half = rng.integers(2, 7)
            box = tuple(slice(max(c - half, 0), c + half) for c in at.tolist())
            values[box] = rng.choice((-1000, 300, 1500))
    return values


def test_real_keypoints_are_those_of_the_reference(crop: np.ndarray) -> None:
    """All octaves of a real scan; a keypoint may differ, or its ranks, only by a float32 tie."""
    level, ties, total, swaps = crop, 0, 0, 0
    for octave in range(len(octave_shapes(crop.shape))):
        found, naive = found_in(level, octave), keypoints.find(level, octave == 0)
        index = {tuple(v): i for i, v in enumerate(naive.voxel.tolist())}
        for n, (k, voxel) in enumerate(zip(found.level, found.voxel, strict=True)):
            key = (int(k), *voxel.tolist())
            i = index.get(key)
            if i is None:
                above, below = keypoints.margins(naive.dogs)
                at = (key[0] - 1, *key[1:])
                assert max(above[at], below[at]) > -1e-3
                ties += 1
                continue
            assert naive.edge[i] < 1.001
            assert np.sign(found.response[n]) == naive.sign[i]
            assert found.response[n] == pytest.approx(naive.response[i], abs=2e-3)
            np.testing.assert_allclose(found.offset[n], naive.offset[i], atol=2e-3)
            sums = naive.sums[i][np.argsort(found.descriptor[n])]
            # A sum in which not even float32 sees anything may rank anywhere below.
            assert np.diff(sums).min() > -1e-4 * sums.max()
            swaps += bool((found.descriptor[n] != naive.ranks[i]).any())
        own = {(int(k), *v) for k, v in zip(found.level, found.voxel.tolist(), strict=True)}
        for i in np.flatnonzero(naive.accepted):
            if tuple(naive.voxel[i].tolist()) not in own:
                above, below = keypoints.margins(naive.dogs)
                at = (naive.voxel[i, 0] - 1, *naive.voxel[i, 1:])
                assert naive.edge[i] > 0.999 or max(above[at], below[at]) < 1e-3
                ties += 1
        total += found.level.size
        level = keypoints.next_octave(level, octave == 0).astype(np.float32)
    print(f"{total} keypoints; by a tie, {ties} differ in being one and {swaps} in their ranks")
    assert total > 60
    assert ties <= 0.01 * total
    assert swaps <= 0.15 * total


@pytest.mark.parametrize("octave", [0, 1])
def test_texture_is_that_of_the_reference(octave: int) -> None:
    values = texture((40, 90, 100), 5)
    found, naive = found_in(values, octave), keypoints.find(values, octave == 0)
    own = {(int(k), *v) for k, v in zip(found.level, found.voxel.tolist(), strict=True)}
    assert len(own) == found.level.size > 150
    clear = np.abs(naive.edge - 1) > 1e-3
    reference = {tuple(v) for v in naive.voxel[naive.accepted].tolist()}
    unclear = {tuple(v) for v in naive.voxel[~clear].tolist()}
    assert len((own ^ reference) - unclear) <= 1


def test_real_frames_are_those_of_the_reference(crop: np.ndarray) -> None:
    """And the keypoints are those of upright descriptors."""
    upright, found = found_in(crop), found_in(crop, invariant=True)
    voxels = np.column_stack([found.level, found.voxel])
    first = np.flatnonzero(np.concatenate([[True], (voxels[1:] != voxels[:-1]).any(axis=1)]))
    for name in ("voxel", "offset", "level", "response"):
        np.testing.assert_array_equal(getattr(found, name)[first], getattr(upright, name))
    naive = keypoints.find(crop, True)
    patch_of = dict(zip(map(tuple, naive.voxel.tolist()), naive.patch, strict=True))
    others, swaps = 0, 0
    for begin, end in pairwise([*first.tolist(), len(voxels)]):
        expected = keypoints.frames_of(patch_of[tuple(voxels[begin].tolist())])
        axes = np.stack([frame.axes for frame in expected])
        if len(axes) != end - begin or np.abs(axes - found.frame[begin:end]).max() > 0.02:
            others += 1
            continue
        for frame, ranks in zip(expected, found.descriptor[begin:end], strict=True):
            sums = frame.sums[np.argsort(ranks)]
            swaps += bool(np.diff(sums).min() < -2e-3 * sums.max())
    print(
        f"{first.size} keypoints, {len(voxels)} frames; rounding gives {others} other frames, and"
        f" changes the ranks of {swaps} by more than ties"
    )
    assert first.size > 40
    assert others <= 0.05 * first.size
    # A gradient next to the border of two octants takes its whole magnitude along.
    assert swaps <= 0.1 * len(voxels)


def test_the_finer_octave_is_that_of_the_reference(crop: np.ndarray) -> None:
    values = crop[20:60, 20:62, 20:65]
    found = found_in(values, finer=True)
    naive = keypoints.find(keypoints.halfway(values), True, 1.0)
    own = {(int(k), *v) for k, v in zip(found.level, found.voxel.tolist(), strict=True)}
    assert len(own) == found.level.size > 40
    clear = np.abs(naive.edge - 1) > 1e-3
    reference = {tuple(v) for v in naive.voxel[naive.accepted].tolist()}
    unclear = {tuple(v) for v in naive.voxel[~clear].tolist()}
    lost = (own ^ reference) - unclear
    print(f"{len(own)} keypoints; {len(lost)} differ by ties")
    assert len(lost) <= 0.01 * len(own)


@given(st.data(), st.sampled_from([-1, 0, 1]), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_chunking_gives_the_same_bytes(
    data: st.DataObject, octave: int, busy: bool, invariant: bool, seed: int
) -> None:
    long = data.draw(st.sampled_from([0, 1, 2]))
    sizes = [data.draw(st.integers(3, 26)) for _ in range(3)]
    sizes[long] = data.draw(st.integers(50, 130))
    shape = sizes[0], sizes[1], sizes[2]
    z, y, x = (data.draw(st.integers(max(2, n // 3), n)) for n in shape)
    assume((z, y, x) != shape)
    values = texture(shape, seed) if busy else with_structures(shape, (z, y, x), seed)
    finer = octave < 0
    block = (2 * z - finer, 2 * y, 2 * x - finer) if finer else (z, y, x)
    kind = {"finer": finer, "invariant": invariant}
    octave = max(octave, 0)
    sides = data.draw(st.tuples(*3 * [st.integers(5, 70)]))
    cut = found_in(values, octave, block, chunks=sides, **kind)
    assert_same_bytes(cut, found_in(values, octave, **kind))


def test_how_many_keypoints_a_block_holds_changes_none() -> None:
    """More than a sweep makes room for at first, within one slab."""
    values = texture((130, 190, 190), 5, 3.0)
    whole = found_in(values, 1)
    assert whole.level.size > 2000
    for block in ((130, 95, 190), (50, 190, 190)):
        assert_same_bytes(found_in(values, 1, block), whole)


@given(
    st.tuples(*3 * [st.integers(3, 40)]), st.integers(0, 2**32), st.integers(2, 5), st.booleans()
)
@settings(max_examples=12, deadline=None)
def test_threads_that_share_a_sweep_change_nothing(
    shape: Shape, seed: int, threads: int, invariant: bool
) -> None:
    """Not even the order; of volumes so small that threads wait for one another all the time."""
    octave = Octave(stored(noise(shape, seed)), True, False)
    parts = [(octave, block) for block in plan_blocks(shape, (17, 40, 40), halo(True))]
    alone = sweep_blocks(parts, invariant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keypoints_module, "MIN_SHARED_PLANE", 0)
        shared = sweep_blocks(parts, invariant, threads)
    for one, other in zip(alone, shared, strict=True):
        assert_same_bytes(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_slab_that_cannot_be_read_ends_the_sweep(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (200, 100, 100)
    octave = Octave(stored(noise(shape, 1)), True, False)
    real, reads = Octave._read, iter(range(100))

    def read(self: Octave, *args: Any) -> np.ndarray:
        if next(reads) == 3:
            raise OSError("gone")
        return real(self, *args)

    monkeypatch.setattr(Octave, "_read", read)
    with pytest.raises(OSError, match="gone"):
        sweep_blocks([(octave, plan_blocks(shape, shape, halo(True))[0])], threads=threads)


def test_a_batch_that_fails_ends_the_threads_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (200, 100, 100)
    octave = Octave(stored(noise(shape, 1)), True, False)
    real, rooms = OctaveKeypoints.empty, iter(range(1000))

    def empty(n: int) -> OctaveKeypoints:
        if next(rooms) == 9:
            raise MemoryError("no room")
        return real(n)

    monkeypatch.setattr(OctaveKeypoints, "empty", empty)
    with pytest.raises(MemoryError, match="no room"):
        sweep_blocks([(octave, plan_blocks(shape, shape, halo(True))[0])], threads=2)


@pytest.mark.parametrize("value", [0.0, AIR, 3071.0])
def test_constant_volume_has_no_keypoints(value: float) -> None:
    for octave in (0, 1):
        assert found_in(np.full((50, 44, 61), value), octave).level.size == 0


def test_padding_makes_no_keypoints() -> None:
    """Air around the middle of a body: what is found lies within the blur's reach of the body."""
    values = np.full((130, 60, 60), AIR, np.float32)
    values[:20] = texture((20, 60, 60), 3)
    found = found_in(values)
    assert found.level.size > 0
    assert found.voxel[:, 0].max() < 20 + halo(True)
    assert np.abs(found.response).min() > 1e-2


@given(
    st.sampled_from([(1, 1, 1), (1, 40, 40), (40, 1, 40), (40, 40, 1), (2, 3, 50), (3, 3, 3)]),
    st.integers(0, 9),
)
@settings(max_examples=20, deadline=None)
def test_thin_volumes_do_not_crash(shape: Shape, seed: int) -> None:
    found = found_in(noise(shape, seed))
    assert (found.voxel > 0).all()
    assert (found.voxel < np.array(shape) - 1).all()
    if min(shape) < 3:
        assert found.level.size == 0
