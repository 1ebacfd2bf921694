"""Blocks: cores own every voxel once, fit in memory, and keep all teams busy."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kpt_dask.errors import ParameterError
from kpt_dask.keypoints.blocks import LATER_OCTAVE_COST, core_width, plan_blocks, slab_lengths
from kpt_dask.keypoints.extraction import sweep_blocks
from kpt_dask.keypoints.octaves import Octave
from kpt_dask.keypoints.sweep_plan import halo
from kpt_dask.runtime import cluster
from kpt_dask.volumes.scale_space import octave_shapes
from tests.helpers import integer_noise, stored

Shape = tuple[int, int, int]


@given(
    st.tuples(*3 * [st.integers(1, 300)]), st.tuples(*3 * [st.integers(1, 300)]), st.integers(1, 50)
)
def test_cores_own_every_voxel_once_and_see_far_enough(
    shape: Shape, block: Shape, margin: int
) -> None:
    assume(np.prod([-(-n // b) for n, b in zip(shape, block, strict=True)]) < 500)
    blocks = plan_blocks(shape, block, margin)
    assert sum(int(np.prod([b - a for a, b in one.core])) for one in blocks) == np.prod(shape)
    assert len({one.core for one in blocks}) == len(blocks)
    for one in blocks:
        for (a, b), (c, d), n in zip(one.core, one.read, shape, strict=True):
            assert 0 <= c <= a < b <= d <= n
            assert c in (0, a - margin)
            assert d in (n, b + margin)


@given(st.integers(0, 9), st.sampled_from([1, 2, 3, 4, 8]), st.integers(4, 40))
@settings(max_examples=5, deadline=None)
def test_a_sweep_stays_within_its_memory(seed: int, threads: int, mib: int) -> None:
    shape, memory, margin = (150, 110, 120), mib << 20, halo(True)
    at_once, size = cluster.teams(threads)
    try:
        core = slab_lengths([shape], at_once)[0], *core_width(shape, threads, memory, margin)
    except ParameterError:
        assume(False)
    octave = Octave(stored(integer_noise(shape, seed)), True, False)
    # A middle block has a halo on all sides that it may have.
    blocks = plan_blocks(shape, core, margin)
    block = max(blocks, key=lambda one: np.prod([b - a for a, b in one.read[1:]]))
    sweep_blocks([(octave, block)], threads=size)
    tracemalloc.start()
    try:
        sweep_blocks([(octave, block)], threads=size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= memory / at_once


@given(st.tuples(*3 * [st.integers(1, 4000)]), st.integers(1, 64), st.integers(16, 4096))
def test_what_is_planned_fits_or_is_refused(shape: Shape, threads: int, mib: int) -> None:
    margin = halo(True)
    try:
        height, width = core_width(shape, threads, mib << 20, margin)
    except ParameterError:
        assert mib / threads < 200
        return
    assert 1 <= height <= shape[1]
    assert 1 <= width <= shape[2]


@given(st.tuples(*3 * [st.integers(1, 4000)]), st.integers(1, 64))
def test_slabs_cover_every_octave_and_no_team_gets_much_more(shape: Shape, at_once: int) -> None:
    shapes = octave_shapes(shape)
    lengths = slab_lengths(shapes, at_once)
    slabs = []
    for (z, y, x), length in zip(shapes, lengths, strict=True):
        assert 1 <= length <= z
        assert length == z or length >= 32
        ends = [min(length, z - first) for first in range(0, z, length)]
        assert len(ends) <= at_once
        slabs += [planes * y * x for planes in ends]
    # Whoever is free takes the next one, as workers do.
    busy = at_once * [0]
    for voxels in slabs:
        busy[busy.index(min(busy))] += voxels
    share = sum(slabs) / at_once
    assert max(busy) <= max(1.5 * share, share + 40 * shapes[0][1] * shapes[0][2])


def test_two_teams_end_together() -> None:
    """One has half of the work in a slab; the other in a shorter one and all later octaves."""
    shapes = octave_shapes((349, 200, 200))
    lengths = slab_lengths(shapes, 2)
    assert lengths[1:] == [shape[0] for shape in shapes[1:]]
    first, *later = (int(np.prod(shape)) for shape in shapes)
    assert lengths[0] * 200 * 200 == pytest.approx(
        (first + LATER_OCTAVE_COST * sum(later)) / 2, rel=0.01
    )


@given(st.integers(1, 200))
def test_every_team_has_threads_and_few_are_left_out(threads: int) -> None:
    at_once, size = cluster.teams(threads)
    assert size >= 1
    assert threads - 1 <= at_once * size <= threads
