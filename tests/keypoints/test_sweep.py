"""Keypoints: those of the plain reference, the same however a volume is cut, and where they belong.

Comparisons that may meet float32 ties print how many they met; ``pytest -rP`` shows it.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.keypoints import extraction as keypoints_module
from kpt_dask.keypoints.blocks import plan_blocks
from kpt_dask.keypoints.descriptors import BINS, STEP
from kpt_dask.keypoints.extraction import (
    extract,
    sweep_blocks,
)
from kpt_dask.keypoints.octaves import Octave
from kpt_dask.keypoints.sweep import OctaveKeypoints
from kpt_dask.keypoints.sweep_plan import halo
from kpt_dask.runtime import cluster, progress
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert_into
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.scale_space import level_sigma, octave_shapes
from kpt_dask.volumes.volume import Volume, create_volume
from tests.helpers import stored
from tests.naive import keypoints

Shape = tuple[int, int, int]

AIR = -1000.0


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster.session() as one:
        yield one


@pytest.fixture(scope="module")
def head(openkbp: Path, tmp_path_factory: pytest.TempPathFactory, client: Client) -> Volume:
    """A real scan at 3 mm."""
    group = zarr.create_group(str(tmp_path_factory.mktemp("head") / "v.zarr"), zarr_format=3)
    return convert_into(open_scan(openkbp / "pt_100_ct.nii.gz"), group, spacing=3.0, client=client)


@pytest.fixture(scope="module")
def crop(head: Volume) -> np.ndarray:
    """The middle of the body, odd along each axis so that flips map every second voxel to such."""
    values = np.asarray(head.levels[0][:])
    middle = np.argwhere(values > 0).mean(axis=0).astype(int)
    window = tuple(
        slice(max(c - 40, 0), max(c - 40, 0) + 81)
        for c in np.minimum(middle, np.array(values.shape) - 41)
    )
    return np.ascontiguousarray(values[window])


def canonical(found: OctaveKeypoints) -> OctaveKeypoints:
    """Ordered by level and voxel."""
    order = np.lexsort((*found.voxel.T[::-1], found.level))
    return OctaveKeypoints(*(a[order] for a in found))


def found_in(
    values: np.ndarray,
    octave: int = 0,
    block: Shape | None = None,
    *,
    chunks: Shape = (32, 32, 32),
    finer: bool = False,
    invariant: bool = False,
) -> OctaveKeypoints:
    source = Octave(stored(values, chunks), octave == 0, finer)
    blocks = plan_blocks(source.shape, block or source.shape, halo(octave == 0, finer))
    return canonical(
        OctaveKeypoints.join(sweep_blocks([(source, one) for one in blocks], invariant))
    )


def assert_same_bytes(one: OctaveKeypoints, other: OctaveKeypoints) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.tobytes() == b.tobytes()


def noise(shape: Shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.float32)


def texture(shape: Shape, seed: int, spread: float = 2.5) -> np.ndarray:
    """As much of a keypoint's size as possible: white noise has no extremum over scale."""
    smooth = ndimage.gaussian_filter(noise(shape, seed), spread, mode="wrap")
    return (20 * smooth).astype(np.float32)


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


def permutation(axes: tuple[int, int, int], flipped: tuple[int, ...]) -> np.ndarray:
    """Where the ranks of a volume's descriptors come from, once transposed and then flipped."""
    bins = np.arange(BINS).reshape(6 * (2,)).transpose(*axes, *(a + 3 for a in axes))
    return np.flip(bins, [a + d for a in flipped for d in (0, 3)]).ravel()


def inside(found: OctaveKeypoints, shape: Shape) -> np.ndarray:
    """Whether the patch lies in the volume, where no edge has to repeat."""
    sigma = level_sigma(0) * 2 ** ((found.level + found.offset[:, 3]) / 3)
    reach = 6 * STEP * sigma[:, None] + 1
    centre = found.voxel + found.offset[:, :3]
    return ((centre > reach) & (centre < np.array(shape) - 1 - reach)).all(axis=1)


# The plain reference


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


# However it is cut


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


@pytest.mark.parametrize("descriptor", ["upright", "invariant"])
def test_memory_and_workers_change_nothing(head: Volume, client: Client, descriptor: str) -> None:
    whole = extract(head, descriptor=descriptor, client=client)
    assert whole.sizes["keypoint"] > 150
    assert whole.identical(extract(head, descriptor=descriptor, memory=40 << 20, client=client))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as two,
        Client(two, set_as_default=False) as processes,
    ):
        distributed = extract(head, descriptor=descriptor, memory=70 << 20, client=processes)
    assert whole.identical(distributed)
    for name in whole:
        assert whole[name].values.tobytes() == distributed[name].values.tobytes()


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


def test_too_little_memory_is_refused(head: Volume, client: Client) -> None:
    with pytest.raises(ParameterError, match="--memory"):
        extract(head, memory=1 << 20, client=client)


# Where they belong


def test_dataset_says_where_and_how_large(crop: np.ndarray, tmp_path: Path, client: Client) -> None:
    grid = Grid.isotropic(crop.shape, 2.5, (-100, 20, 33))
    volume = create_volume(tmp_path / "v.zarr", grid, grid, name="crop")
    rng = np.random.default_rng(0)
    for level in volume.levels:
        level[:] = rng.integers(-1000, 1000, level.shape)
    keypoints = extract(volume, client=client)
    assert {k: (v.dims, v.dtype.str) for k, v in keypoints.data_vars.items()} == {
        "position": (("keypoint", "axis"), "<f4"),
        "scale": (("keypoint",), "<f4"),
        "sign": (("keypoint",), "|i1"),
        "response": (("keypoint",), "<f4"),
        "octave": (("keypoint",), "|u1"),
        "descriptor": (("keypoint", "bin"), "|u1"),
        "frame": (("keypoint", "direction", "axis"), "<f4"),
    }
    np.testing.assert_array_equal(np.abs(keypoints.sign), 1)
    for octave, level in enumerate(volume.levels):
        own = keypoints.isel(keypoint=keypoints.octave.values == octave)
        found = found_in(np.asarray(level[:]), octave)
        voxels = (found.voxel + found.offset[:, :3]) * 2**octave
        np.testing.assert_allclose(own.position, voxels * 2.5 + (-100, 20, 33), atol=1e-4)
        sigma = 1.6 * 2 ** (octave + (found.level + found.offset[:, 3]) / 3)
        np.testing.assert_allclose(own.scale, 2.5 * sigma, rtol=1e-6)
        np.testing.assert_array_equal(own.response, found.response)
        np.testing.assert_array_equal(own.descriptor, found.descriptor)


@pytest.mark.parametrize("spread", [3.0, 4.5, 6.0, 8.5, 12.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_isolated_blob_is_found_at_its_centre_and_scale(
    spread: float, sign: int, tmp_path: Path, client: Client
) -> None:
    """Over two octaves; the difference of Gaussians of a 3-D Gaussian peaks at 0.727 spreads."""
    n = 97
    centre = np.array([48.3, 47.8, 48.0])
    squared = ((np.indices((n, n, n)).T - centre) ** 2).sum(axis=-1).T
    grid = Grid.isotropic((n, n, n), 1.0, (0, 0, 0))
    volume = create_volume(tmp_path / "v.zarr", grid, grid, name="blob")
    volume.levels[0][:] = -500 + sign * 400 * np.exp(-squared / (2 * spread**2))
    fill_pyramid(volume.levels, client=client)
    keypoints = extract(volume, client=client)
    strongest = keypoints.isel(keypoint=int(np.argmax(np.abs(keypoints.response.values))))
    np.testing.assert_allclose(strongest.position, centre, atol=0.1 * 2 ** int(strongest.octave))
    # A blob is a minimum of G(κσ) − G(σ) where it is bright.
    assert int(strongest.sign) == -sign
    assert float(strongest.scale) == pytest.approx(0.727 * np.sqrt(spread**2 - 0.25), rel=0.05)


@pytest.mark.parametrize("spread", [1.5, 2.0])
def test_a_small_blob_is_found_in_the_finer_octave(
    spread: float, tmp_path: Path, client: Client
) -> None:
    centre = np.array([16.3, 15.8, 16.0])
    squared = ((np.indices((33, 33, 33)).T - centre) ** 2).sum(axis=-1).T
    grid = Grid.isotropic((33, 33, 33), 2.0, (5, 6, 7))
    volume = create_volume(tmp_path / "v.zarr", grid, grid, name="blob")
    volume.levels[0][:] = 400 * np.exp(-squared / (2 * spread**2))
    fill_pyramid(volume.levels, client=client)
    keypoints = extract(volume, finer=True, client=client)
    strongest = keypoints.isel(keypoint=int(np.argmax(np.abs(keypoints.response.values))))
    assert int(strongest.octave) == 0
    np.testing.assert_allclose(strongest.position, 2 * centre + (5, 6, 7), atol=0.2)
    assert float(strongest.scale) == pytest.approx(1.454 * np.sqrt(spread**2 - 0.25), rel=0.06)
    whole = extract(volume, client=client)
    later = keypoints.isel(keypoint=keypoints.octave.values > 0)
    np.testing.assert_array_equal(later.position, whole.position)
    np.testing.assert_array_equal(later.scale, whole.scale)


@pytest.mark.parametrize("octave", [0, 1])
@pytest.mark.parametrize("shift", [(1, 0, 0), (3, -2, 5)])
def test_integer_translation_is_exact(octave: int, shift: Shape) -> None:
    """Structures far from the border, so that nothing but air repeats there."""
    values = np.full((120, 120, 120), AIR, np.float32)
    values[40:80, 40:80, 41:80] = texture((40, 40, 39), 8)
    here, there = found_in(values, octave), found_in(np.roll(values, shift, (0, 1, 2)), octave)
    assert here.level.size > 4
    np.testing.assert_array_equal(there.voxel, here.voxel + shift)
    for a, b in zip(here[1:], there[1:], strict=True):
        assert a.tobytes() == b.tobytes()


MOVES = [((0, 1, 2), (a,)) for a in range(3)] + [
    ((0, 2, 1), (1,)),
    ((2, 1, 0), (0,)),
    ((1, 0, 2), (1,)),
    ((1, 2, 0), ()),
]
"""Axes that a volume is transposed to, and which are flipped then: flips and rotations."""


@pytest.fixture(scope="module", params=["real", "texture"])
def upright(
    request: pytest.FixtureRequest, crop: np.ndarray
) -> tuple[np.ndarray, OctaveKeypoints, dict[tuple[int, ...], np.ndarray]]:
    """Voxels, keypoints, and the reference's gradient sums by level and voxel."""
    values = crop if request.param == "real" else texture((60, 70, 80), 3)
    naive = keypoints.find(values, True)
    sums = dict(zip(map(tuple, naive.voxel.tolist()), naive.sums, strict=True))
    return values, found_in(values), sums


@pytest.mark.parametrize(("axes", "flipped"), MOVES)
def test_flips_and_right_angles(
    upright: tuple[np.ndarray, OctaveKeypoints, dict[tuple[int, ...], np.ndarray]],
    axes: tuple[int, int, int],
    flipped: tuple[int, ...],
) -> None:
    """Flips are exact; transposing changes the order of the blur's axes, so its rounding."""
    values, here, sums_of = upright
    moved = np.ascontiguousarray(np.flip(values.transpose(axes), flipped))
    there = found_in(moved)
    index, offset = here.voxel[:, axes], here.offset[:, [*axes, 3]]
    for axis in flipped:
        index[:, axis] = moved.shape[axis] - 1 - index[:, axis]
        offset[:, axis] *= -1
    from_bin = permutation(axes, flipped)
    order = np.lexsort((*index.T[::-1], here.level))
    expected = OctaveKeypoints(*(a[order] for a in (index, offset, *here[2:])))
    np.testing.assert_array_equal(there.voxel, expected.voxel)
    np.testing.assert_array_equal(there.level, expected.level)
    np.testing.assert_array_equal(np.sign(there.response), np.sign(expected.response))
    exact = axes == (0, 1, 2)
    np.testing.assert_allclose(there.response, expected.response, rtol=0, atol=0 if exact else 4e-3)
    apart = np.abs(there.offset - expected.offset)
    # Where neighbours hardly differ, rounding moves the vertex a little further.
    assert np.percentile(apart, 99) <= (0 if exact else 2e-3)
    assert apart.max() <= (1e-9 if exact else 0.02)
    whole = np.flatnonzero(inside(there, moved.shape))
    assert whole.size > 10
    differ = beyond = 0
    for n in whole:
        i = order[n]
        sums = sums_of[int(here.level[i]), *here.voxel[i].tolist()][from_bin]
        if (there.descriptor[n] != here.descriptor[i][from_bin]).any():
            differ += 1
            inverted = -np.diff(sums[np.argsort(there.descriptor[n])]).min()
            beyond += bool(inverted > 1e-3 * sums.max())
    print(f"{whole.size} descriptors; the ranks of {differ} differ, of {beyond} by more than ties")
    # A gradient next to the border of two octants takes its whole magnitude along.
    assert beyond <= (0 if exact else 0.1 * whole.size)


@pytest.mark.parametrize(("axes", "flipped"), MOVES)
def test_local_frames_turn_with_the_volume(
    crop: np.ndarray, axes: tuple[int, int, int], flipped: tuple[int, ...]
) -> None:
    """Descriptors stay; only a mirrored volume mirrors them, along the third axis of a frame."""
    moved = np.ascontiguousarray(np.flip(crop.transpose(axes), flipped))
    here, there = found_in(crop, invariant=True), found_in(moved, invariant=True)
    turn = np.eye(3)[list(axes)]
    turn[list(flipped)] *= -1
    mirrored = np.linalg.det(turn) < 0
    index = here.voxel[:, axes]
    for axis in flipped:
        index[:, axis] = moved.shape[axis] - 1 - index[:, axis]
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for n, key in enumerate(np.column_stack([there.level, there.voxel]).tolist()):
        rows_of.setdefault(tuple(key), []).append(n)
    whole = np.flatnonzero(inside(here, crop.shape))
    missing, apart_ranks = 0, []
    for n in whole:
        expected = here.frame[n] @ turn.T
        ranks = here.descriptor[n]
        if mirrored:
            expected[2] *= -1
            ranks = np.flip(ranks.reshape(6 * (2,)), (2, 5)).ravel()
        rows = rows_of[int(here.level[n]), *index[n].tolist()]
        apart = np.abs(there.frame[rows] - expected).max(axis=(1, 2))
        if apart.min() > 1e-2:
            missing += 1
        else:
            other = there.descriptor[rows[int(apart.argmin())]]
            apart_ranks.append(int(((other.astype(int) - ranks) ** 2).sum()))
    swaps, worst = np.count_nonzero(apart_ranks), max(apart_ranks)
    print(f"{whole.size} frames; rounding changes {missing}, the ranks of {swaps}, by ≤ {worst}")
    assert whole.size > 20
    exact = axes == (0, 1, 2)
    assert missing <= (0 if exact else 0.05 * whole.size)
    # Mirroring turns the order of empty bins around, which are ties; of two descriptors that
    # have nothing in common it is 43 680.
    assert swaps <= (whole.size if mirrored else 0.05 * whole.size)
    assert worst <= 1000


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("factor", [0.25, 2.0, 1024.0])
def test_power_of_two_is_exact(crop: np.ndarray, factor: float, invariant: bool) -> None:
    here = found_in(crop, invariant=invariant)
    there = found_in(factor * crop, invariant=invariant)
    for name in ("voxel", "offset", "level", "descriptor", "frame"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    np.testing.assert_array_equal(there.response, factor * here.response)


@pytest.mark.parametrize(("factor", "plus"), [(2.0, 700.0), (0.7, -300.0)])
def test_linear_intensity_changes_only_ties(crop: np.ndarray, factor: float, plus: float) -> None:
    here, there = found_in(crop), found_in((factor * crop + plus).astype(np.float32))
    keys = [
        {(int(k), *v): i for i, (k, v) in enumerate(zip(f.level, f.voxel.tolist(), strict=True))}
        for f in (here, there)
    ]
    both = sorted(keys[0].keys() & keys[1].keys())
    lost = len(keys[0].keys() ^ keys[1].keys())
    a, b = (
        f.descriptor[[k[key] for key in both]] for f, k in zip((here, there), keys, strict=True)
    )
    differ = (a != b).any(axis=1)
    print(f"{len(both)} keypoints; {lost} others differ by ties, and the ranks of {differ.sum()}")
    assert lost <= 0.01 * len(both)
    assert differ.mean() < 0.1


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


def test_compiling_has_a_name_of_its_own(client: Client, head: Volume) -> None:
    with progress.recorded() as seconds:
        extract(head, client=client)
    assert "Compiling kernels, once on this machine" in seconds
