"""Fill the upper levels of a volume: the octaves of its scale space.

Level o + 1 is level o blurred to 2·σ0 of its own voxels, every second voxel. A task makes
whole chunks of one level and reads what they need, with a halo, from the level below.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from atlas_store.arrays import chunk_io
from atlas_store.arrays.regions import blocks_of, write_region
from kpt_dask.errors import ParameterError
from kpt_dask.kernels.jit import kernel
from kpt_dask.runtime import cluster
from kpt_dask.volumes.blur import blur_planes, blur_scratch
from kpt_dask.volumes.omezarr import CHUNKS
from kpt_dask.volumes.scale_space import next_octave_taps


def fill_pyramid(
    levels: tuple[zarr.Array[Any], ...], *, memory: int | None = None, client: Client | None = None
) -> None:
    """Fill ``levels[1:]`` from ``levels[0]``.

    Parameters
    ----------
    levels : tuple of float32 zarr arrays (z, y, x)
        Level o + 1 has every second voxel of level o.
    memory : int, optional
        Bytes that all tasks of a process may take together.
    client : distributed.Client, optional
        Client whose workers run the tasks; see `kpt_dask.runtime.cluster.session`.

    Raises
    ------
    ParameterError
        If the levels lie in this process's memory: tasks would fill copies of them. If `memory`
        is too little.
    """
    if isinstance(levels[0].store, MemoryStore):
        raise ParameterError("A volume cannot lie in a MemoryStore: give a folder or a URL.")
    with cluster.session(client) as session:
        for octave, (fine, coarse) in enumerate(pairwise(levels)):
            slab = (CHUNKS[0], *coarse.shape[1:])
            room = cluster.budget(session, memory) // max(cluster.threads(session), default=1)
            planes = planes_at_once(fine.shape, octave, room, wanted=memory is not None)
            cut = blocks_of(coarse.shape, slab)
            tasks = [(fine, coarse, octave, region, planes) for region in cut]
            for _ in cluster.run(session, _fill, tasks, f"Octave {octave + 1}"):
                pass


def planes_at_once(shape: tuple[int, ...], octave: int, room: int, *, wanted: bool) -> int:
    """Choose how many planes of the next octave a task makes from one part of a level.

    Parameters
    ----------
    shape : tuple of int
        Shape of the level, (z, y, x).
    octave : int
        The level's.
    room : int
        Bytes that a task may take.
    wanted : bool
        Whether the user set it: what is only usual may be exceeded.

    Raises
    ------
    ParameterError
        If that is too little for one.
    """
    plane = 4 * shape[1] * shape[2]
    halo = 2 * (next_octave_taps(octave).size - 1)
    # A task's result is a quarter as wide; one plane more is being blurred.
    fixed = CHUNKS[0] * plane // 4 + (halo + 1) * plane
    planes = (room - fixed) // (2 * plane)
    if planes < 1 and wanted:
        raise ParameterError(
            f"{room / 2**20:.2g} MiB for a thread is too little for planes of {shape[1]} ×"
            f" {shape[2]} voxels, which take {(fixed + 2 * plane) / 2**20:.2g} MiB: give more with"
            " --memory, use fewer threads, or a coarser grid."
        )
    return min(max(planes, 1), CHUNKS[0])


def _fill(
    fine: zarr.Array[Any],
    coarse: zarr.Array[Any],
    octave: int,
    region: tuple[slice, slice, slice],
    planes: int,
) -> None:
    taps = next_octave_taps(octave)
    radius = taps.size - 1
    out = np.empty(tuple(s.stop - s.start for s in region), np.float32)
    for start in range(region[0].start, region[0].stop, planes):
        part = out[start - region[0].start :][:planes]
        first = max(2 * start - radius, 0)
        last = min(2 * (start + len(part) - 1) + radius + 1, fine.shape[0])
        needed = slice(first, last), *(slice(0, n) for n in fine.shape[1:])
        source = chunk_io.read(fine, needed).astype(np.float32, copy=False)
        _halve(source, first, taps, start, part)
    write_region(coarse, region, out)


@kernel
def _halve(
    source: NDArray[np.float32],
    first: int,
    taps: NDArray[np.float32],
    start: int,
    out: NDArray[np.float32],
) -> None:
    """Blur, and keep every second voxel; ``source[0]`` is plane `first`."""
    shape = source.shape[1:]
    scratch = blur_scratch(1, shape[1], taps.size - 1)
    plane = np.empty((1, *shape), np.float32)
    for k in range(out.shape[0]):
        z = 2 * (start + k) - first
        blur_planes(source, z, 1, source.shape[0], taps, scratch, plane)
        for j in range(out.shape[1]):
            row = plane[0, 2 * j]
            for i in range(out.shape[2]):
                out[k, j, i] = row[2 * i]
