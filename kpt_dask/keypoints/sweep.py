"""One octave of a block of a volume, swept plane by plane from its first plane to its last.

Of each Gaussian a sweep keeps only the planes that something still needs: the next
Gaussian, the extremum test, or a descriptor. So it holds about two hundred planes, however
long the block is. Threads may share it: each takes a batch of planes through all stages, right
behind the one that has the batch before. It knows neither Dask nor Zarr.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.handoff import first_steps, pass_turn, wait_for_turn
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.rows import LANES, compare
from kpt_dask.keypoints.descriptors import BINS, PATCH, REACH, STEP, describe, sample_patch
from kpt_dask.keypoints.local_frames import MAX_FRAMES, describe_in_frames
from kpt_dask.volumes.scale_space import (
    FINER_TAPS,
    FIRST_TAPS,
    LEVEL_TAPS,
    LEVELS,
    SIGMA0,
    TILE,
    blur_planes,
    blur_scratch,
)

Planes = Annotated[NDArray[np.float32], "z y x"]

_AS_IT_IS = np.ones(1, np.float32)

BATCH = 8
"""Planes that each Gaussian gains at a time: see `kpt_dask.volumes.scale_space.blur_planes`."""


@dataclass(frozen=True)
class Found:
    """Keypoints of a sweep, in the order of their planes; one with several frames, repeatedly.

    Attributes
    ----------
    index : int64 array (n, 3)
        Voxel (z, y, x) of the octave.
    offset : float64 array (n, 4)
        From there to the extremum along z, y, x (voxels) and scale (levels), each ±0.5.
    level : uint8 array (n)
        Level of the octave, 1 … 3.
    response : float32 array (n)
        Difference of Gaussians at the voxel, HU.
    descriptor : uint8 array (n, 64)
        In the frame.
    frame : float32 array (n, 3, 3)
        Row i is the i-th axis of the frame, (z, y, x).
    """

    index: NDArray[np.int64]
    offset: NDArray[np.float64]
    level: NDArray[np.uint8]
    response: NDArray[np.float32]
    descriptor: NDArray[np.uint8]
    frame: NDArray[np.float32]

    @classmethod
    def room_for(cls, n: int) -> "Found":
        """Uninitialized arrays for `n` keypoints."""
        return cls(
            np.empty((n, 3), np.int64),
            np.empty((n, 4), np.float64),
            np.empty(n, np.uint8),
            np.empty(n, np.float32),
            np.empty((n, BINS), np.uint8),
            np.empty((n, 3, 3), np.float32),
        )

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All arrays, in the order of the fields."""
        own = self.index, self.offset, self.level, self.response, self.descriptor, self.frame
        return own

    def first(self, n: int) -> "Found":
        """Copy the first `n` keypoints."""
        return Found(*(a[:n].copy() for a in self.arrays))

    @classmethod
    def join(cls, parts: Iterable["Found"]) -> "Found":
        """Concatenate."""
        all_parts = list(parts) or [cls.room_for(0)]
        return cls(*(np.concatenate(a) for a in zip(*(p.arrays for p in all_parts), strict=True)))

    @classmethod
    def in_order(cls, batches: Mapping[int, "Found"]) -> "Found":
        """Concatenate what was found in batches, given by their first steps."""
        return cls.join(batches[step] for step in sorted(batches))


class Sweep:
    """Finds the keypoints of one octave in a block; feed it slabs, then call `finish`.

    Threads that share it take the batches that `take` and `drain` give instead, each its next
    one after its last one.

    Parameters
    ----------
    core : ((z0, z1), (y0, y1), (x0, x1))
        Half-open box that owns the extrema to be found: z in planes of the volume, y and x
        within the planes that are fed.
    plane_shape : (int, int)
        Of the planes that are fed. Where they end inside the volume they reach at least
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
        How many share it.
    found : dict of int to Found, optional
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
        found: dict[int, Found] | None = None,
    ) -> None:
        self._taps = _taps(first_octave, finer)
        self._invariant = invariant
        radii = [taps.size - 1 for taps in self._taps]
        lead = np.cumsum(radii)
        need = _planes_needed(radii)
        (z0, z1), _, _ = core
        first = np.maximum(z0 - need, 0)
        self.first_plane, self.last_plane = int(first[0]), int(min(z1 + need[0], n_planes))
        self._step = self.first_plane
        self._final_step = z1 + int(lead[-1])
        inside = [
            (max(a, 1), min(b, n - 1))
            for (a, b), n in zip(core, (n_planes, *plane_shape), strict=True)
        ]
        self._core = np.array(inside, np.int64)
        self._schedule = np.stack([first[1:], np.minimum(z1 + need[1:], n_planes), lead]).T.copy()
        self._n = n_planes
        lag = lead[-1] - lead
        # The last one may write the planes of its batch while the first one needs those that it
        # had when it began its own.
        ahead = threads * BATCH
        sizes = [2 * radii[0] + 1 + ahead]
        for i in range(LEVELS + 3):
            blur = 2 * radii[i + 1] + 1 if i + 1 < len(radii) else 1
            reach = REACH if 1 <= i <= LEVELS else 0
            sizes.append(max(blur, int(lag[i]) + reach + 3) + ahead)
        dogs = LEVELS + 2, 3, *plane_shape
        # All in one piece, which the system then gives in large pages. The last vector of the
        # last row of differences reaches beyond it.
        ends = np.cumsum([*sizes, math.prod(dogs[:2])]) * math.prod(plane_shape)
        *rings, differences = np.split(np.empty(ends[-1] + LANES, np.float32), ends)[:-1]
        self._rings = tuple(ring.reshape(-1, *plane_shape) for ring in rings)
        self._dogs = differences.reshape(dogs)
        self._turns = first_steps(len(self._taps) + 2, self._step)
        self._found = {} if found is None else found
        self._room = 1024
        self._failed = False

    def feed(self, slab: Planes) -> None:
        """Take the next planes, float32 (n, y, x), C order; the first is `first_plane`."""
        for batch in self.take(slab):
            batch()

    def finish(self) -> Found:
        """Drain what is still under way and return all keypoints."""
        for batch in self.drain():
            batch()
        return Found.in_order(self._found)

    def take(self, slab: Planes) -> Iterator[Callable[[], None]]:
        """Take the next planes as `feed` does, but leave the work of each batch to the caller.

        Of as many threads as share the sweep each may have one batch that is not done yet. The
        slab is not needed any longer once all are given.
        """
        ring = self._rings[0]
        for first in range(0, slab.shape[0], BATCH):
            planes = slab[first : first + BATCH]
            for step, plane in enumerate(planes, self._step):
                ring[step % ring.shape[0]] = plane
            yield self._batch(planes.shape[0])

    def drain(self) -> Iterator[Callable[[], None]]:
        """Give the batches that are left when all planes were taken."""
        while self._step <= self._final_step:
            yield self._batch(min(BATCH, self._final_step + 1 - self._step))

    def _batch(self, steps: int) -> Callable[[], None]:
        step, self._step = self._step, self._step + steps
        return partial(self._advance, step, self._step)

    def _advance(self, step: int, after: int) -> None:
        """Take a batch of steps through all stages, each in its turn."""
        stage = count = 0
        try:
            extrema, found = self._rooms()
            while stage < self._turns.size:
                stage, count = _advance(
                    step,
                    after,
                    stage,
                    count,
                    self._turns,
                    self._n,
                    self._schedule,
                    self._core,
                    self._taps,
                    self._rings,
                    self._dogs,
                    self._invariant,
                    extrema.arrays,
                    found.arrays,
                )
                if self._failed:
                    return
                if count < 0:
                    self._room *= 2
                    extrema, found = self._rooms()
                elif stage < self._turns.size:
                    time.sleep(0)
            self._found[step] = found.first(count)
        except BaseException:
            self._failed = True
            raise

    def _rooms(self) -> tuple[Found, Found]:
        """Make room for the extrema of a batch, and for their keypoints."""
        most = MAX_FRAMES if self._invariant else 1
        return Found.room_for(self._room), Found.room_for(most * self._room)


def halo(first_octave: bool, finer: bool = False) -> int:
    """How far beyond its core a sweep must see, in voxels of the octave."""
    return int(_planes_needed([t.size - 1 for t in _taps(first_octave, finer)])[0])


def _taps(first_octave: bool, finer: bool) -> tuple[NDArray[np.float32], ...]:
    if finer:
        return FINER_TAPS, *LEVEL_TAPS
    return FIRST_TAPS if first_octave else _AS_IT_IS, *LEVEL_TAPS


def planes_held(threads: int) -> int:
    """About how many planes a sweep that so many threads share keeps in memory."""
    sweep = Sweep(((0, 1), (0, 1), (0, 1)), (1, 1), 1, True, threads=threads)
    return sum(ring.shape[0] for ring in sweep._rings) + 3 * (LEVELS + 2)


def _planes_needed(radii: list[int]) -> NDArray[np.int64]:
    """Planes needed beyond a core of the input and of each Gaussian."""
    need = [1]
    for i in reversed(range(len(radii))):
        own = REACH if 1 <= i - 1 <= LEVELS else 1
        need.insert(0, max(own, need[0] + radii[i]) if i else need[0] + radii[0])
    return np.array(need, np.int64)


@kernel
def _difference(upper: Planes, lower: Planes, z: int, first: int, last: int, out: Planes) -> None:
    """Subtract rows ``first … last − 1`` of a plane."""
    u = upper[z % upper.shape[0], first:last].reshape(-1)
    v = lower[z % lower.shape[0], first:last].reshape(-1)
    w = out[z % out.shape[0], first:last].reshape(-1)
    for i in range(w.size):
        w[i] = u[i] - v[i]


@kernel
def _is_extremum(dogs: NDArray[np.float32], level: int, z: int, y: int, x: int) -> bool:
    """Whether a voxel is strictly above, or below, all 80 neighbours in space and scale."""
    v = dogs[level, z % 3, y, x]
    sign = 1 if v > dogs[level, z % 3, y, x - 1] else -1
    for d in range(level - 1, level + 2):
        for k in range(z - 1, z + 2):
            for j in range(y - 1, y + 2):
                for i in range(x - 1, x + 2):
                    itself = d == level and k == z and j == y and i == x
                    if not itself and not sign * v > sign * dogs[d, k % 3, j, i]:
                        return False
    return True


@kernel
def _extrema(
    dogs: NDArray[np.float32], z: int, rows: Any, columns: Any, places: NDArray[np.int64]
) -> int:
    """Put (level, y, x) of the extrema in a part of a plane into `places`; returns their number.

    `LANES` voxels at a time are compared with eight of their neighbours, those along x, y, z
    and scale; most fail at once, and few pass.
    """
    flat = dogs.reshape(-1)
    ny, nx = dogs.shape[2:]
    area = ny * nx
    under, over = ((z - 1) % 3 - z % 3) * area, ((z + 1) % 3 - z % 3) * area
    count = 0
    for y in range(rows[0], rows[1]):
        for level in range(1, dogs.shape[0] - 1):
            for start in range(columns[0], columns[1], LANES):
                at = ((level * 3 + z % 3) * ny + y) * nx + start
                bits = compare(flat, at, -1, 1) & compare(flat, at, -nx, nx)
                if bits == 0:
                    continue
                bits &= compare(flat, at, under, over)
                if bits == 0:
                    continue
                bits &= compare(flat, at, -3 * area, 3 * area)
                if bits == 0:
                    continue
                for i in range(min(LANES, columns[1] - start)):
                    passed = (bits >> i | bits >> (LANES + i)) & 1
                    if passed and _is_extremum(dogs, level, z, y, start + i):
                        places[count, 0] = level
                        places[count, 1] = y
                        places[count, 2] = start + i
                        count += 1
    return count


@kernel
def _vertex(before: float, here: float, after: float) -> float:
    """Where the parabola through three samples around an extremum has its vertex, ±0.5."""
    offset = 0.5 * (before - after) / (before - 2.0 * here + after)
    return min(max(offset, -0.5), 0.5)


@kernel
def _advance(
    step: Any,
    after: Any,
    stage: Any,
    count: Any,
    turns: Any,
    n: Any,
    schedule: Any,
    core: Any,
    taps: Any,
    rings: Any,
    dogs: Any,
    invariant: Any,
    extrema: Any,
    found: Any,
) -> Any:
    """Take the steps from `step` to `after`; in each, every Gaussian gains at most one plane.

    By step s the input has gained plane s, and Gaussian i plane s − ``schedule[i, 2]``, the
    sum of the taps' radii so far, which is the last plane its source can make. That keeps
    all rings in lockstep, also after the input has ended.

    Each Gaussian is a stage, then the extrema, then their descriptors. Begins with `stage` and
    what was counted before it; returns the one that could not begin yet, or their number if all
    have ended, and how many extrema or keypoints there are: −1 if there was no room for them.
    """
    gaussians = schedule.shape[0]
    radius = 0
    for i in range(gaussians):
        radius = max(radius, taps[i].size - 1)
    scratch = blur_scratch(BATCH, dogs.shape[3], radius)
    for i in range(stage, gaussians):
        if not wait_for_turn(turns, i, step):
            return i, 0
        a = max(step - schedule[i, 2], schedule[i, 0])
        b = min(after - schedule[i, 2], schedule[i, 1])
        if a < b:
            blur_planes(rings[i], a, b - a, n, taps[i], scratch, rings[i + 1])
        pass_turn(turns, i, after)
    if stage <= gaussians:
        if not wait_for_turn(turns, gaussians, step):
            return gaussians, count
        start, stop, lead = schedule[gaussians - 1]
        first, last = max(step - lead, start), min(after - lead, stop)
        # If run again, it finds the differences of the two planes before gone.
        before = min(2, first - start) if count < 0 else 0
        count = _find(first - before, first, last, core, rings, dogs, extrema)
        if count < 0:
            return gaussians, count
        pass_turn(turns, gaussians, after)
    if not wait_for_turn(turns, gaussians + 1, step):
        return gaussians + 1, count
    count = _describe(extrema, count, n, rings, invariant, found)
    pass_turn(turns, gaussians + 1, after)
    return gaussians + 2, count


@kernel
def _find(
    before: Any, first: Any, last: Any, core: Any, rings: Any, dogs: Any, extrema: Any
) -> int:
    """Find the extrema of the planes ``first − 1 … last − 2``, whose last neighbours are there.

    From plane `before` on differences are made. Returns the number, −1 if there is no room.
    """
    index, offset, level_of, response = extrema[0], extrema[1], extrema[2], extrema[3]
    ny, nx = dogs.shape[2:]
    levels = dogs.shape[0] - 2
    places = np.empty((levels * TILE * nx, 3), np.int64)
    count = 0
    for plane in range(before, last):
        z = plane - 1
        test = plane >= first and core[0, 0] <= z < core[0, 1]
        for top in range(0, ny, TILE):
            end = min(top + TILE, ny)
            for level in range(levels + 2):
                _difference(rings[level + 2], rings[level + 1], plane, top, end, dogs[level])
            if not test:
                continue
            # A row is tested against the ones beside it, so that it lags behind by one.
            rows = max(top - 1, core[1, 0]), min(end - 1, core[1, 1])
            here = _extrema(dogs, z, rows, (core[2, 0], core[2, 1]), places)
            if count + here > level_of.size:
                return -1
            for at in range(here):
                level, y, x = places[at, 0], places[at, 1], places[at, 2]
                d = dogs[level]
                v = d[z % 3, y, x]
                index[count, 0] = z
                index[count, 1] = y
                index[count, 2] = x
                offset[count, 0] = _vertex(d[(z - 1) % 3, y, x], v, d[(z + 1) % 3, y, x])
                offset[count, 1] = _vertex(d[z % 3, y - 1, x], v, d[z % 3, y + 1, x])
                offset[count, 2] = _vertex(d[z % 3, y, x - 1], v, d[z % 3, y, x + 1])
                under, over = dogs[level - 1, z % 3, y, x], dogs[level + 1, z % 3, y, x]
                offset[count, 3] = _vertex(under, v, over)
                level_of[count] = level
                response[count] = v
                count += 1
    return count


@kernel
def _describe(extrema: Any, n_extrema: int, n: int, rings: Any, invariant: bool, found: Any) -> int:
    """Describe the extrema of a batch, but for those that are refused; return the keypoints."""
    index, offset, level, response = extrema[0], extrema[1], extrema[2], extrema[3]
    out_index, out_offset, out_level, out_response, descriptor, frame = found
    patch = np.empty((PATCH + 2, PATCH + 2, PATCH + 2), np.float32)
    ranks = np.empty((MAX_FRAMES, BINS), np.uint8)
    frames = np.zeros((MAX_FRAMES, 3, 3), np.float32)
    frames[0] = np.eye(3)
    count = 0
    for at in range(n_extrema):
        sigma = SIGMA0 * 2.0 ** ((level[at] + offset[at, 3]) / LEVELS)
        ring = rings[level[at] + 1]
        sample_patch(ring, n, index[at], offset[at, :3], STEP * sigma, patch)
        if not describe(patch, ranks[0]):
            continue
        for i in range(describe_in_frames(patch, frames, ranks) if invariant else 1):
            out_index[count] = index[at]
            out_offset[count] = offset[at]
            out_level[count] = level[at]
            out_response[count] = response[at]
            descriptor[count] = ranks[i]
            frame[count] = frames[i]
            count += 1
    return count
