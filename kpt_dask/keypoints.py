"""Extract the keypoints of a volume, block by block, each octave from its own level.

Blocks own half-open cores, and see beyond them as far as any Gaussian or descriptor of the
core reaches. So each extremum has exactly one owner, its values do not depend on how the
volume was cut, and nothing is deduplicated afterwards.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from kpt_dask import cluster, progress
from kpt_dask.descriptors import ANISOTROPY, HALF_WIDTH, PATCH
from kpt_dask.errors import ParameterError
from kpt_dask.scalespace import INPUT_SIGMA, LEVELS, SIGMA0, TRUNCATE, level_sigma
from kpt_dask.sweep import Found, Sweep, halo, planes_held
from kpt_dask.volume import Volume

PARAMETERS: dict[str, Any] = {
    "detector": "difference of Gaussians",
    "sigma0": SIGMA0,
    "input_sigma": INPUT_SIGMA,
    "levels": LEVELS,
    "truncate": TRUNCATE,
    "descriptor": "upright",
    "patch": PATCH,
    "half_width": HALF_WIDTH,
    "anisotropy": ANISOTROPY,
}
"""What keypoints depend on: those of a scan and of its atlases must agree in it."""

SLAB = 64
"""Planes read at a time: one chunk's depth."""
FEWEST_PLANES = 32
"""A core thinner than this would be mostly halo."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Block:
    """A core that owns extrema, and what a sweep must read for it, (start, stop) along z, y, x."""

    core: Box
    read: Box


def plan_blocks(
    shape: tuple[int, int, int], block: tuple[int, int, int], margin: int
) -> list[Block]:
    """Cut a volume into blocks.

    Parameters
    ----------
    shape, block : tuple of int
        Of the volume and of the cores, (z, y, x).
    margin : int
        How far beyond its core a block must see.
    """
    z, y, x = (
        [
            ((a, min(a + step, n)), (max(a - margin, 0), min(a + step + margin, n)))
            for a in range(0, n, step)
        ]
        for n, step in zip(shape, block, strict=True)
    )
    return [Block((k[0], j[0], i[0]), (k[1], j[1], i[1])) for k, j, i in product(z, y, x)]


def block_shape(
    shape: tuple[int, int, int], threads: int, memory: int, margin: int
) -> tuple[int, int, int]:
    """Choose cores: full width where memory allows, and as long as keeps all threads busy.

    A sweep's memory is that of the planes it holds, whatever their number along z, so only
    the width of the cores is bounded by memory; cutting z costs a halo at each cut.

    Parameters
    ----------
    shape : tuple of int
        Of the octave, (z, y, x).
    threads : int
        Sweeps that run at once.
    memory : int
        Bytes that they may take together.
    margin : int
        How far beyond its core a block must see.

    Raises
    ------
    ParameterError
        If not even a small core fits.
    """
    voxels = memory / threads / 4 / (planes_held() + 3 * SLAB)
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
    length = max(-(-shape[0] // threads), min(FEWEST_PLANES, shape[0]))
    return length, height, width


def extract(volume: Volume, *, memory: int = 1 << 30, client: Client | None = None) -> xr.Dataset:
    """Find the keypoints of a volume (Wachinger et al. 2015, section 2.1, eq. 1).

    Parameters
    ----------
    volume : Volume
        From `kpt_dask.convert` or `kpt_dask.volume.open_volume`.
    memory : int
        Bytes that all sweeps of a process may take together.
    client : distributed.Client, optional
        Where the blocks are computed; threads of this process if there is no current one.

    Returns
    -------
    xarray.Dataset
        Dimensions ``keypoint``, ``axis`` (z, y, x) and ``bin`` (64), ordered by octave,
        level and voxel:
        ``position`` (keypoint, axis) float32, mm, LPS;
        ``scale`` (keypoint) float32, mm, the σ of the extremum;
        ``sign`` (keypoint) int8, that of the extremum, −1 or 1;
        ``response`` (keypoint) float32, the difference of Gaussians there, HU;
        ``octave`` (keypoint) uint8;
        ``descriptor`` (keypoint, bin) uint8, ranks 0 … 63.

    Raises
    ------
    ParameterError
        If `memory` is too little.
    """
    with cluster.session(client) as session:
        if str(getattr(session.scheduler, "address", "")).startswith("inproc:"):
            _prepare()
        workers = session.nthreads().values()
        threads, per_process = sum(workers), max(workers)
        tasks = []
        for octave, level in enumerate(volume.levels):
            shape = (level.shape[0], level.shape[1], level.shape[2])
            margin = halo(octave == 0)
            widest = block_shape(shape, per_process, memory, margin)
            length = block_shape(shape, threads, memory * threads, margin)[0]
            blocks = plan_blocks(shape, (length, *widest[1:]), margin)
            tasks += [(level, octave, block) for block in blocks]
        found: dict[int, list[Found]] = {o: [] for o in range(len(volume.levels))}
        for index, part in cluster.run(session, extract_block, tasks, "Extracting keypoints"):
            found[tasks[index][1]].append(part)
    return _dataset(volume, [Found.join(parts) for parts in found.values()])


def _prepare() -> None:
    """Compile the kernels under a name of its own, so that nobody wonders what takes so long.

    With a warm cache it is over at once; workers elsewhere compile when they begin.
    """
    with progress.stage("Compiling kernels, once on this machine"):
        sweep = Sweep(((0, 4), (0, 4), (0, 4)), (4, 4), 4, first_octave=True)
        sweep.feed(np.zeros((4, 4, 4), np.float32))
        sweep.finish()


def extract_block(level: "zarr.Array[Any]", octave: int, block: Block) -> Found:
    """Find the keypoints whose voxels lie in a block's core; indices are of the octave."""
    (y0, y1), (x0, x1) = block.read[1:]
    z, y, x = block.core
    core = z, (y[0] - y0, y[1] - y0), (x[0] - x0, x[1] - x0)
    sweep = Sweep(core, (y1 - y0, x1 - x0), level.shape[0], octave == 0)

    def read(slab: tuple[int, int]) -> NDArray[np.float32]:
        planes = level[slab[0] : slab[1], y0:y1, x0:x1]
        return np.ascontiguousarray(planes, np.float32)

    # The next slab is read while the last one is swept.
    with ThreadPoolExecutor(1) as reader:
        slabs = list(_slabs(sweep.first_plane, sweep.last_plane))
        ahead = reader.submit(read, slabs[0])
        for following in slabs[1:]:
            slab, ahead = ahead.result(), reader.submit(read, following)
            sweep.feed(slab)
        sweep.feed(ahead.result())
    found = sweep.finish()
    found.index[:, 1:] += (y0, x0)
    return found


def _slabs(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut planes where chunks end, so that each chunk is read once."""
    while first < last:
        stop = min((first // SLAB + 1) * SLAB, last)
        yield first, stop
        first = stop


def _dataset(volume: Volume, octaves: list[Found]) -> xr.Dataset:
    """Order the keypoints of all octaves, and put them in the world."""
    position, scale, sign, response, octave, descriptor = [], [], [], [], [], []
    for o, found in enumerate(octaves):
        order = np.lexsort((*found.index.T[::-1], found.level))
        step = 2.0**o
        voxel = (found.index[order] + found.offset[order, :3]) * step
        position.append(volume.grid.to_mm(voxel).astype(np.float32))
        levels = found.level[order] + found.offset[order, 3]
        sigma = level_sigma(0) * 2.0 ** (levels / LEVELS) * step * volume.grid.spacing[0]
        scale.append(sigma.astype(np.float32))
        response.append(found.response[order])
        sign.append(np.sign(found.response[order]).astype(np.int8))
        octave.append(np.full(order.size, o, np.uint8))
        descriptor.append(found.descriptor[order])
    return xr.Dataset(
        {
            "position": (("keypoint", "axis"), np.concatenate(position)),
            "scale": ("keypoint", np.concatenate(scale)),
            "sign": ("keypoint", np.concatenate(sign)),
            "response": ("keypoint", np.concatenate(response)),
            "octave": ("keypoint", np.concatenate(octave)),
            "descriptor": (("keypoint", "bin"), np.concatenate(descriptor)),
        }
    )
