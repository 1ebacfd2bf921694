"""Plan of a sweep: which planes each Gaussian makes at which step, and the buffers that hold them.

At step s the input gains plane s, and Gaussian i plane s − ``lead[i]``: the sum of the radii of
its taps and all before it, as that is the last plane its source can make. So all buffers advance
in lockstep, also after the input has ended. Pure functions, but for the allocation of buffers.
"""

import math
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.handoff import first_steps
from kpt_dask.keypoints.descriptors import PATCH_REACH
from kpt_dask.volumes.scale_space import FINER_TAPS, FIRST_TAPS, LEVEL_TAPS, LEVELS

Planes = Annotated[NDArray[np.float32], "z y x"]

BATCH = 8
"""Planes that each Gaussian gains at a time: see `kpt_dask.volumes.blur.blur_planes`."""

_IDENTITY_TAPS = np.ones(1, np.float32)


class SweepPlan(NamedTuple):
    """Parameters of a sweep, for its kernels; Gaussian i is made from Gaussian i − 1.

    Attributes
    ----------
    n_planes : int
        Planes of the whole volume at this octave.
    core : int64 array (3, 2)
        (start, stop) along z, y, x of the voxels that are tested: the core without the volume's
        outermost voxels.
    taps : tuple of float32 arrays
        Taps of each Gaussian.
    first, stop : int64 arrays
        First plane that each Gaussian makes, and the one after the last.
    lead : int64 array
        Planes that each Gaussian lags behind the input.
    first_input, last_input : int
        First plane of the input, and the one after the last.
    last_step : int
        Step at which the last plane of the last Gaussian is made.
    invariant : bool
        Whether descriptors are taken in local frames.
    """

    n_planes: int
    core: NDArray[np.int64]
    taps: tuple[NDArray[np.float32], ...]
    first: NDArray[np.int64]
    stop: NDArray[np.int64]
    lead: NDArray[np.int64]
    first_input: int
    last_input: int
    last_step: int
    invariant: bool


class SweepState(NamedTuple):
    """Buffers that the threads of a sweep share.

    Attributes
    ----------
    next_step : int64 array
        Step at which each stage goes on, see `kpt_dask.kernels.handoff`: one stage per Gaussian,
        one for the extrema, one for their descriptors.
    rings : tuple of float32 arrays (m, y, x)
        Ring buffers of the input and of each Gaussian; plane p is ``ring[p % m]``.
    differences : float32 array (levels + 2, 3, y, x)
        Ring buffers of the differences of Gaussians.
    """

    next_step: NDArray[np.int64]
    rings: tuple[Planes, ...]
    differences: NDArray[np.float32]


def plan_sweep(
    core: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    volume: tuple[int, int, int],
    first_octave: bool,
    finer: bool,
    invariant: bool,
) -> SweepPlan:
    """Plan the sweep of a core.

    Parameters
    ----------
    core : ((z0, z1), (y0, y1), (x0, x1))
        Half-open box that owns the extrema.
    volume : (int, int, int)
        Planes of the volume, and height and width of the planes that are fed.
    first_octave, finer, invariant
        As for `kpt_dask.keypoints.sweep.Sweep`.
    """
    taps = _taps(first_octave, finer)
    radii = [one.size - 1 for one in taps]
    lead = np.cumsum(radii)
    need = _planes_needed(radii)
    (z0, z1), _, _ = core
    n = volume[0]
    first = np.maximum(z0 - need, 0)
    inside = [(max(a, 1), min(b, m - 1)) for (a, b), m in zip(core, volume, strict=True)]
    return SweepPlan(
        n_planes=n,
        core=np.array(inside, np.int64),
        taps=taps,
        first=first[1:].copy(),
        stop=np.minimum(z1 + need[1:], n),
        lead=lead,
        first_input=int(first[0]),
        last_input=int(min(z1 + need[0], n)),
        last_step=z1 + int(lead[-1]),
        invariant=invariant,
    )


def allocate(plan: SweepPlan, plane_shape: tuple[int, int], threads: int) -> SweepState:
    """Allocate the buffers of a sweep that `threads` threads share."""
    # In one piece, which the system maps in huge pages.
    sizes = _ring_sizes(plan.taps, threads)
    differences = LEVELS + 2, 3, *plane_shape
    ends = np.cumsum([*sizes, math.prod(differences[:2])]) * math.prod(plane_shape)
    *rings, last = np.split(np.empty(ends[-1], np.float32), ends[:-1])
    return SweepState(
        next_step=first_steps(len(plan.taps) + 2, plan.first_input),
        rings=tuple(ring.reshape(-1, *plane_shape) for ring in rings),
        differences=last.reshape(differences),
    )


def halo(first_octave: bool, finer: bool = False) -> int:
    """Width of the halo that a sweep needs around its core, voxels of the octave."""
    return int(_planes_needed([one.size - 1 for one in _taps(first_octave, finer)])[0])


def planes_held(threads: int) -> int:
    """Count the planes that a sweep of the first octave keeps, if `threads` threads share it."""
    return sum(_ring_sizes(_taps(True, False), threads)) + 3 * (LEVELS + 2)


def _taps(first_octave: bool, finer: bool) -> tuple[NDArray[np.float32], ...]:
    if finer:
        return FINER_TAPS, *LEVEL_TAPS
    return FIRST_TAPS if first_octave else _IDENTITY_TAPS, *LEVEL_TAPS


def _ring_sizes(taps: tuple[NDArray[np.float32], ...], threads: int) -> list[int]:
    """Count the planes of each ring buffer: as many as the stages that read it still need."""
    radii = [one.size - 1 for one in taps]
    lead = np.cumsum(radii)
    lag = lead[-1] - lead
    # The thread that is last may write the planes of its batch while the one that is first needs
    # those that were there when its own batch began.
    ahead = threads * BATCH
    sizes = [2 * radii[0] + 1 + ahead]
    for i in range(LEVELS + 3):
        blur = 2 * radii[i + 1] + 1 if i + 1 < len(radii) else 1
        reach = PATCH_REACH if 1 <= i <= LEVELS else 0
        sizes.append(max(blur, int(lag[i]) + reach + 3) + ahead)
    return sizes


def _planes_needed(radii: list[int]) -> NDArray[np.int64]:
    """Planes needed beyond a core, of the input and of each Gaussian."""
    need = [1]
    for i in reversed(range(len(radii))):
        tested = PATCH_REACH if 1 <= i - 1 <= LEVELS else 1
        need.insert(0, max(tested, need[0] + radii[i]) if i else need[0] + radii[0])
    return np.array(need, np.int64)
