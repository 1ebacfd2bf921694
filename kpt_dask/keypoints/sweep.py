"""One octave of a block of a volume, swept plane by plane from its first plane to its last.

A sweep keeps only those planes of each Gaussian that are still needed: by the next Gaussian, by the
extremum test, or by a descriptor. So it holds ≈ 200 planes, however long the block is. Threads may
share it: each takes a batch of planes through all stages, right behind the thread that has the
batch before. It knows neither Dask nor Zarr.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.handoff import pass_turn, wait_for_turn
from kpt_dask.kernels.jit import kernel
from kpt_dask.keypoints.descriptors import BINS, PATCH, STEP, describe, sample_patch
from kpt_dask.keypoints.extrema import Extrema, find_extrema
from kpt_dask.keypoints.local_frames import MAX_FRAMES, describe_in_frames
from kpt_dask.keypoints.sweep_plan import BATCH, Planes, allocate, plan_sweep
from kpt_dask.volumes.blur import blur_planes, blur_scratch
from kpt_dask.volumes.scale_space import LEVELS, SIGMA0


class OctaveKeypoints(NamedTuple):
    """Keypoints of an octave, in the order of their planes; one with several frames, repeatedly.

    Attributes
    ----------
    voxel, offset, level, response
        As of `kpt_dask.keypoints.extrema.Extrema`.
    descriptor : uint8 array (n, 64)
        Ranks 0 … 63, in the frame.
    frame : float32 array (n, 3, 3)
        Row i is the i-th axis of the frame, (z, y, x).
    """

    voxel: NDArray[np.int64]
    offset: NDArray[np.float64]
    level: NDArray[np.uint8]
    response: NDArray[np.float32]
    descriptor: NDArray[np.uint8]
    frame: NDArray[np.float32]

    @classmethod
    def empty(cls, n: int) -> "OctaveKeypoints":
        """Uninitialized arrays for `n` keypoints."""
        return cls(
            *Extrema.empty(n), np.empty((n, BINS), np.uint8), np.empty((n, 3, 3), np.float32)
        )

    def copy_first(self, n: int) -> "OctaveKeypoints":
        """Copy the first `n` keypoints."""
        return OctaveKeypoints._make(a[:n].copy() for a in self)

    @classmethod
    def join(cls, parts: Iterable["OctaveKeypoints"]) -> "OctaveKeypoints":
        """Concatenate."""
        all_parts = list(parts) or [cls.empty(0)]
        return OctaveKeypoints._make(
            np.concatenate(arrays) for arrays in zip(*all_parts, strict=True)
        )

    @classmethod
    def in_order(cls, batches: Mapping[int, "OctaveKeypoints"]) -> "OctaveKeypoints":
        """Concatenate the keypoints of batches, given by their first steps."""
        return cls.join(batches[step] for step in sorted(batches))


class Batch(NamedTuple):
    """Steps ``first … stop − 1`` of a sweep, and buffers for the results of one thread."""

    first: int
    stop: int
    extrema: Extrema
    keypoints: OctaveKeypoints


class Sweep:
    """Finds the keypoints of one octave in a block; feed it slabs, then call `finish`.

    Threads that share it take the batches that `take` and `drain` yield instead; each thread
    holds at most one unfinished batch.

    Parameters
    ----------
    core : ((z0, z1), (y0, y1), (x0, x1))
        Half-open box that owns the extrema to be found: z in planes of the volume, y and x
        within the planes that are fed.
    plane_shape : (int, int)
        Shape of the planes that are fed. Where they end inside the volume they reach at least
        `halo` beyond the core.
    n_planes : int
        Planes of the whole volume at this octave.
    first_octave : bool
        Whether the planes fed are level 0 of a volume and not yet blurred to σ0.
    finer : bool
        Whether they are level 0 at half its spacing.
    invariant : bool
        Whether descriptors are taken in local frames, not upright.
    threads : int
        Number of threads that share it.
    found : dict of int to OctaveKeypoints, optional
        Receives the keypoints of each batch, by its first step.
    """

    def __init__(
        self,
        core: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
        plane_shape: tuple[int, int],
        n_planes: int,
        first_octave: bool,
        *,
        finer: bool = False,
        invariant: bool = False,
        threads: int = 1,
        found: dict[int, OctaveKeypoints] | None = None,
    ) -> None:
        self._plan = plan_sweep(core, (n_planes, *plane_shape), first_octave, finer, invariant)
        self._state = allocate(self._plan, plane_shape, threads)
        self._step = self._plan.first_input
        self._found = {} if found is None else found
        self._capacity = 1024
        self._failed = False

    @property
    def input_planes(self) -> tuple[int, int]:
        """First plane to feed, and the one after the last."""
        return self._plan.first_input, self._plan.last_input

    def feed(self, slab: Planes) -> None:
        """Take the next planes, float32 (n, y, x), C order; the first of `input_planes` first."""
        for batch in self.take(slab):
            batch()

    def finish(self) -> OctaveKeypoints:
        """Drain what is still under way and return all keypoints."""
        for batch in self.drain():
            batch()
        return OctaveKeypoints.in_order(self._found)

    def take(self, slab: Planes) -> Iterator[Callable[[], None]]:
        """Take the next planes as `feed` does, but leave the work of each batch to the caller.

        Each thread that shares the sweep may have one unfinished batch. The slab may be
        overwritten once all batches were yielded.
        """
        ring = self._state.rings[0]
        for first in range(0, slab.shape[0], BATCH):
            planes = slab[first : first + BATCH]
            for step, plane in enumerate(planes, self._step):
                ring[step % ring.shape[0]] = plane
            yield self._batch(planes.shape[0])

    def drain(self) -> Iterator[Callable[[], None]]:
        """Yield the batches that are left when all planes were taken."""
        last = self._plan.last_step
        while self._step <= last:
            yield self._batch(min(BATCH, last + 1 - self._step))

    def _batch(self, steps: int) -> Callable[[], None]:
        first, self._step = self._step, self._step + steps
        return partial(self._advance, first, self._step)

    def _advance(self, first: int, stop: int) -> None:
        """Take a batch of steps through all stages, each in its turn."""
        stage = count = 0
        try:
            batch = self._buffers(first, stop)
            while stage < self._state.next_step.size:
                stage, count = _advance(self._plan, self._state, batch, stage, count)
                if self._failed:
                    return
                if count < 0:
                    self._capacity *= 2
                    batch = self._buffers(first, stop)
                elif stage < self._state.next_step.size:
                    time.sleep(0)
            self._found[first] = batch.keypoints.copy_first(count)
        except BaseException:
            self._failed = True
            raise

    def _buffers(self, first: int, stop: int) -> Batch:
        """Allocate buffers for the extrema of a batch, and for their keypoints."""
        frames = MAX_FRAMES if self._plan.invariant else 1
        extrema = Extrema.empty(self._capacity)
        return Batch(first, stop, extrema, OctaveKeypoints.empty(frames * self._capacity))


@kernel
def _advance(plan: Any, state: Any, batch: Any, stage: int, count: int) -> Any:
    """Take a batch through the stages: each Gaussian, the extrema, their descriptors.

    Resumable: between two calls the thread yields the processor, or enlarges the buffers.

    Parameters
    ----------
    plan : SweepPlan
    state : SweepState
    batch : Batch
    stage, count : int
        Where the last call stopped, and the count it returned.

    Returns
    -------
    stage : int
        Stage to resume at, as its turn has not come; the number of stages if all have ended.
    count : int
        Number of extrema, or of keypoints at the end; −1 if the buffers are too small.
    """
    gaussians = plan.lead.size
    radius = 0
    for taps in plan.taps:
        radius = max(radius, taps.size - 1)
    scratch = blur_scratch(BATCH, state.differences.shape[3], radius)
    for i in range(stage, gaussians):
        if not wait_for_turn(state.next_step, i, batch.first):
            return i, 0
        a = max(batch.first - plan.lead[i], plan.first[i])
        b = min(batch.stop - plan.lead[i], plan.stop[i])
        if a < b:
            n, ring, out = plan.n_planes, state.rings[i], state.rings[i + 1]
            blur_planes(ring, a, b - a, n, plan.taps[i], scratch, out)
        pass_turn(state.next_step, i, batch.stop)
    if stage <= gaussians:
        if not wait_for_turn(state.next_step, gaussians, batch.first):
            return gaussians, count
        start, lead = plan.first[gaussians - 1], plan.lead[gaussians - 1]
        first = max(batch.first - lead, start)
        last = min(batch.stop - lead, plan.stop[gaussians - 1])
        # Run again with larger buffers, it must make the differences of two planes again.
        before = first - (min(2, first - start) if count < 0 else 0)
        planes = before, first, last
        count = find_extrema(state.rings, state.differences, planes, plan.core, batch.extrema)
        if count < 0:
            return gaussians, count
        pass_turn(state.next_step, gaussians, batch.stop)
    if not wait_for_turn(state.next_step, gaussians + 1, batch.first):
        return gaussians + 1, count
    count = _describe(plan, state.rings, batch.extrema, count, batch.keypoints)
    pass_turn(state.next_step, gaussians + 1, batch.stop)
    return gaussians + 2, count


@kernel
def _describe(plan: Any, rings: Any, extrema: Any, n_extrema: int, out: Any) -> int:
    """Describe the extrema of a batch, but for those that are refused; return the keypoints."""
    patch = np.empty((PATCH + 2, PATCH + 2, PATCH + 2), np.float32)
    ranks = np.empty((MAX_FRAMES, BINS), np.uint8)
    frames = np.zeros((MAX_FRAMES, 3, 3), np.float32)
    frames[0] = np.eye(3)
    count = 0
    for e in range(n_extrema):
        voxel, offset, level = extrema.voxel[e], extrema.offset[e], extrema.level[e]
        sigma = SIGMA0 * 2.0 ** ((level + offset[3]) / LEVELS)
        sample_patch(rings[level + 1], plan.n_planes, voxel, offset[:3], STEP * sigma, patch)
        if not describe(patch, ranks[0]):
            continue
        for i in range(describe_in_frames(patch, frames, ranks) if plan.invariant else 1):
            out.voxel[count] = voxel
            out.offset[count] = offset
            out.level[count] = level
            out.response[count] = extrema.response[e]
            out.descriptor[count] = ranks[i]
            out.frame[count] = frames[i]
            count += 1
    return count
