"""Blocks of an octave: planned to waste little on halos, and to fit in the memory budget.

A block owns the extrema of a half-open core, and reads beyond it as far as any Gaussian or
descriptor of the core reaches. So each extremum has exactly one owner, its values do not depend
on how the volume was cut, and nothing is deduplicated afterwards. Pure functions without I/O.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from atlas_store.arrays.boxes import Box
from kpt_dask.errors import ParameterError
from kpt_dask.keypoints.octaves import SLABS_AHEAD
from kpt_dask.keypoints.sweep_plan import planes_held
from kpt_dask.runtime import cluster
from kpt_dask.volumes.omezarr import CHUNKS

LATER_OCTAVE_COST = 1.15
"""Cost of a voxel of a later octave, relative to the first: its rows are shorter, and its task has
to wait for another one. Measured; only balance depends on it."""
MIN_CORE_PLANES = 32
"""Planes of a core, at least: a thinner one would be mostly halo."""


@dataclass(frozen=True)
class Block:
    """A core that owns extrema, and the box that a sweep must read for it, voxels."""

    core: Box
    read: Box


def plan_blocks(
    shape: tuple[int, int, int], core: tuple[int, int, int], margin: int
) -> list[Block]:
    """Cut an octave into blocks.

    Parameters
    ----------
    shape, core : tuple of int
        Shape of the octave and of the cores, voxels (z, y, x).
    margin : int
        Width of the halo around a core, voxels.
    """
    z, y, x = (
        [
            ((a, min(a + step, n)), (max(a - margin, 0), min(a + step + margin, n)))
            for a in range(0, n, step)
        ]
        for n, step in zip(shape, core, strict=True)
    )
    return [Block((k[0], j[0], i[0]), (k[1], j[1], i[1])) for k, j, i in product(z, y, x)]


def slab_lengths(shapes: Sequence[tuple[int, int, int]], teams: int) -> list[int]:
    """Choose how many planes the cores of each octave own, so that all teams end together.

    Each cut costs a halo. So as long as the later octaves together are less than a team's
    share of the work, they are left whole: the last slab is shorter by as much, and the team
    that has swept it goes on with them.

    Parameters
    ----------
    shapes : sequence of tuple of int
        Shapes of the octaves, (z, y, x), the largest first.
    teams : int
        Sweeps that run at once, on all workers.

    Returns
    -------
    list of int
        Planes per core, for each octave.
    """
    lengths = []
    for octave, (z, y, x) in enumerate(shapes):
        voxels = sum(math.prod(shape) for shape in shapes[octave + 1 :])
        later_planes = round(LATER_OCTAVE_COST * voxels / (y * x))
        length = -(-(z + later_planes) // teams)
        if z - (teams - 1) * length >= min(MIN_CORE_PLANES, z):
            teams = 1
        else:
            length = max(-(-z // teams), MIN_CORE_PLANES)
        lengths.append(min(length, z))
    return lengths


def core_width(
    shape: tuple[int, int, int], threads: int, memory: int, margin: int
) -> tuple[int, int]:
    """Choose how wide cores are along y and x: full width where memory allows.

    A sweep's memory is that of the planes it holds, whatever their number along z.

    Parameters
    ----------
    shape : tuple of int
        Shape of the octave, (z, y, x).
    threads : int
        Threads of a process.
    memory : int
        Budget of all sweeps of a process together, bytes.
    margin : int
        Width of the halo around a core, voxels.

    Raises
    ------
    ParameterError
        If not even a small core fits.
    """
    at_once, size = cluster.teams(threads)
    # Per team, slabs: those ahead, the current and the previous one, and two to decode the next.
    # A quarter more, as some threads of the team may already sweep the next octave.
    planes = 1.25 * planes_held(size) + (SLABS_AHEAD + 4) * CHUNKS[0]
    voxels = memory / at_once / 4 / planes
    height, width = shape[1:]
    while (min(height + 2 * margin, shape[1])) * (min(width + 2 * margin, shape[2])) > voxels:
        if max(height, width) <= margin // 2:
            raise ParameterError(
                f"{memory / 2**20:.0f} MiB for {threads} threads is too little to extract "
                "keypoints: give more with --memory, or use fewer threads."
            )
        if height >= width:
            height = -(-height // 2)
        else:
            width = -(-width // 2)
    return height, width
