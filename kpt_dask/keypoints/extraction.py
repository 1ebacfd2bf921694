"""Extract the keypoints of a volume, block by block, each octave from its own level.

Blocks own half-open cores, and see beyond them as far as any Gaussian or descriptor of the
core reaches. So each extremum has exactly one owner, its values do not depend on how the
volume was cut, and nothing is deduplicated afterwards.

What a block must see beyond its core is work done twice. So there are no more blocks than needed:
threads of a process share a sweep, in teams.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.keypoints import first_frames as first_frames
from kpt_dask.errors import ParameterError
from kpt_dask.keypoints.descriptors import ANISOTROPY, HALF_WIDTH, PATCH
from kpt_dask.keypoints.sweep import Found, Sweep, halo, planes_held
from kpt_dask.runtime import cluster, progress
from kpt_dask.runtime.memory import budget
from kpt_dask.runtime.team import Jobs, deferred, run_jobs
from kpt_dask.volumes.omezarr import CHUNKS
from kpt_dask.volumes.scale_space import INPUT_SIGMA, LEVELS, SIGMA0, TRUNCATE, level_sigma
from kpt_dask.volumes.volume import Volume

PARAMETERS: dict[str, Any] = {
    "detector": "difference of Gaussians",
    "sigma0": SIGMA0,
    "input_sigma": INPUT_SIGMA,
    "levels": LEVELS,
    "truncate": TRUNCATE,
    "patch": PATCH,
    "half_width": HALF_WIDTH,
    "anisotropy": ANISOTROPY,
}
"""What keypoints depend on: those of a scan and of its atlases must agree in it."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "descriptor": ("upright", "invariant"),
    "finer": (False, True),
}
"""Further parameters, and what each may be, the default first."""

SLABS_AHEAD = 2
"""Slabs read, or being read, while one is swept, if others read them."""
LATER = 1.15
"""How much longer a voxel of a later octave takes, about: its rows are shorter, and its task comes
after another one."""
SHARED_VOXELS = 1 << 13
"""Of a plane, at least, for threads to share a sweep: else handing out batches takes as long."""
FEWEST_PLANES = 32
"""A core thinner than this would be mostly halo."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Block:
    """A core that owns extrema, and what a sweep must read for it, (start, stop) along z, y, x."""

    core: Box
    read: Box


@dataclass(frozen=True, eq=False)
class Octave:
    """Where an octave's voxels come from.

    Attributes
    ----------
    level : zarr.Array (z, y, x), float32
        Of a volume's pyramid.
    first : bool
        Whether it is level 0, not yet blurred to σ0.
    finer : bool
        Whether the octave has half its spacing: values halfway are means of neighbours.
    """

    level: "zarr.Array[Any]"
    first: bool
    finer: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the octave along z, y, x."""
        z, y, x = (2 * n - 1 if self.finer else n for n in self.level.shape)
        return z, y, x

    def slabs(
        self, first: int, last: int, across: tuple[tuple[int, int], tuple[int, int]]
    ) -> Iterator[Callable[[], NDArray[np.float32]]]:
        """Give what reads planes in slabs, C order, each gone when the one after the next comes.

        Each chunk is read once; twice of a finer octave, whose slabs hold half a chunk.

        Parameters
        ----------
        first, last : int
            First plane, and the one after the last.
        across : ((y0, y1), (x0, x1))
            What of each plane.
        """
        depth = self.level.chunks[0]
        boxes = [(planes, *across) for planes in _slabs(first, last, depth)]
        if chunk_io.serves(self.level):
            # By those that sweep: other threads would only compete with them.
            room = np.empty((2, depth, *(stop - start for start, stop in across)), np.float32)
            yield from (partial(self._read, box, room[i % 2]) for i, box in enumerate(boxes))
            return
        with ThreadPoolExecutor(1) as reader:
            ahead: deque[Future[NDArray[np.float32]]] = deque()
            for box in boxes:
                ahead.append(reader.submit(self._read, box))
                if len(ahead) > SLABS_AHEAD:
                    yield ahead.popleft().result
            while ahead:
                yield ahead.popleft().result

    def _read(self, box: Box, room: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Read a box of the octave's voxels, where there is room for them."""
        if not self.finer:
            out = None if room is None else room[: box[0][1] - box[0][0]]
            return chunk_io.read(self.level, tuple(slice(*ends) for ends in box), out)
        source = tuple(slice(start // 2, stop // 2 + 1) for start, stop in box)
        values = chunk_io.read(self.level, source)
        for axis, (start, stop) in enumerate(box):
            values = _halfway(values, axis)
            kept = slice(start % 2, start % 2 + stop - start)
            values = values[tuple(kept if a == axis else slice(None) for a in range(3))]
        return np.ascontiguousarray(values)


Part = tuple[Octave, Block]
"""A block of an octave."""


def _halfway(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Put the mean between any two neighbours; exact for whole numbers, so also in any order."""
    n = values.shape[axis]
    out = np.empty([2 * m - 1 if a == axis else m for a, m in enumerate(values.shape)], np.float32)
    moved, spread = np.moveaxis(values, axis, 0), np.moveaxis(out, axis, 0)
    spread[::2] = moved
    if n > 1:
        np.add(moved[1:], moved[:-1], out=spread[1::2])
        spread[1::2] *= 0.5
    return out


def parameters(descriptor: str = "upright", finer: bool = False) -> dict[str, Any]:
    """All that keypoints depend on.

    Parameters
    ----------
    descriptor, finer
        As for `extract`.

    Raises
    ------
    ParameterError
        If the descriptor is unknown.
    """
    known = CHOICES["descriptor"]
    if descriptor not in known:
        raise ParameterError(f"The descriptor {descriptor!r} is unknown; use {' or '.join(known)}.")
    return {**PARAMETERS, "descriptor": descriptor, "finer": bool(finer)}


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


def slab_lengths(shapes: Sequence[tuple[int, int, int]], teams: int) -> list[int]:
    """Choose how many planes the cores of each octave own, so that all teams end together.

    Each cut costs a halo. So as long as the later octaves together are less than a team's
    share of the work, they are left whole: the last slab is shorter by as much, and whoever
    has swept it goes on with them.

    Parameters
    ----------
    shapes : sequence of tuple of int
        Of the octaves, (z, y, x), the largest first.
    teams : int
        Sweeps that run at once, wherever.

    Returns
    -------
    list of int
        For each octave.
    """
    lengths = []
    for octave, (z, y, x) in enumerate(shapes):
        later = round(LATER * sum(math.prod(shape) for shape in shapes[octave + 1 :]) / (y * x))
        length = -(-(z + later) // teams)
        if z - (teams - 1) * length >= min(FEWEST_PLANES, z):
            teams = 1
        else:
            length = max(-(-z // teams), FEWEST_PLANES)
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
        Of the octave, (z, y, x).
    threads : int
        Of a process.
    memory : int
        Bytes that all its sweeps may take together.
    margin : int
        How far beyond its core a block must see.

    Raises
    ------
    ParameterError
        If not even a small core fits.
    """
    at_once, size = cluster.teams(threads)
    # Slabs ahead, the one that is swept, the one before it, and two to unpack the next. Some of a
    # team may be at the next octave already, which takes a quarter.
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


def extract(
    volume: Volume,
    *,
    descriptor: str = "upright",
    finer: bool = False,
    memory: int | None = None,
    client: Client | None = None,
) -> xr.Dataset:
    """Find the keypoints of a volume (Wachinger et al. 2015, section 2.1, eq. 1).

    Parameters
    ----------
    volume : Volume
        From `kpt_dask.convert` or `kpt_dask.volumes.volume.open_volume`.
    descriptor : str
        ``upright``: along the axes of the grid. ``invariant``: in the local frames of the
        gradients, unchanged by rotations.
    finer : bool
        Whether to begin one octave earlier, at half the voxel size, linearly interpolated.
    memory : int, optional
        Bytes that all sweeps of a process may take together.
    client : distributed.Client, optional
        Where the blocks are computed; threads of this process if there is no current one.

    Returns
    -------
    xarray.Dataset
        Dimensions ``keypoint``, ``axis`` (z, y, x), ``bin`` (64) and ``direction`` (3),
        ordered by octave, level and voxel. A keypoint with several frames comes as often,
        in a row; see `first_frames`.
        ``position`` (keypoint, axis) float32, mm, LPS;
        ``scale`` (keypoint) float32, mm, the σ of the extremum;
        ``sign`` (keypoint) int8, that of the extremum, −1 or 1;
        ``response`` (keypoint) float32, the difference of Gaussians there, HU;
        ``octave`` (keypoint) uint8, 0 for the finest;
        ``descriptor`` (keypoint, bin) uint8, ranks 0 … 63;
        ``frame`` (keypoint, direction, axis) float32, the rotation whose rows are the axes
        that the descriptor was taken along; the identity if upright.

    Raises
    ------
    ParameterError
        If `memory` is too little, or the descriptor is unknown.
    """
    invariant = parameters(descriptor, finer)["descriptor"] == "invariant"
    octaves = [Octave(level, o == 0, False) for o, level in enumerate(volume.levels)]
    if finer:
        octaves.insert(0, Octave(volume.levels[0], True, True))
    with cluster.session(client) as session:
        if str(getattr(session.scheduler, "address", "")).startswith("inproc:"):
            _prepare()
        at_once, threads = cluster.count_teams(session), max(cluster.threads(session))
        lengths = slab_lengths([octave.shape for octave in octaves], at_once)
        cuts: list[list[Part]] = []
        for octave, length in zip(octaves, lengths, strict=True):
            shape, margin = octave.shape, halo(octave.first, octave.finer)
            core = length, *core_width(shape, threads, budget(memory), margin)
            cuts.append([(octave, block) for block in plan_blocks(shape, core, margin)])
        # The last octaves are small: those that are whole are one task.
        whole = [len(cut) == 1 for cut in cuts]
        rest = next(o for o in range(at_once > 1, len(cuts) + 1) if all(whole[o:]))
        together = [[part] for cut in cuts[:rest] for part in cut]
        if rest < len(cuts):
            together.append([part for cut in cuts[rest:] for part in cut])
        tasks = [(parts, invariant) for parts in together]
        found: list[list[Found]] = [[] for _ in octaves]
        for index, results in cluster.run_in_teams(
            session, sweep_blocks, tasks, "Extracting keypoints"
        ):
            for (octave, _), result in zip(together[index], results, strict=True):
                found[octaves.index(octave)].append(result)
    return _dataset(volume, [Found.join(parts) for parts in found], finer)


def _prepare() -> None:
    """Compile the kernels under a name of its own, so that nobody wonders what takes so long.

    With a warm cache it is over at once; workers elsewhere compile when they begin.
    """
    with progress.stage("Compiling kernels, once on this machine"):
        sweep = Sweep(((0, 4), (0, 4), (0, 4)), (4, 4), 4, first_octave=True)
        sweep.feed(np.zeros((4, 4, 4), np.float32))
        sweep.finish()


def sweep_blocks(parts: Sequence[Part], invariant: bool = False, threads: int = 1) -> list[Found]:
    """Find the keypoints whose voxels lie in the cores of blocks; indices are of the octaves.

    Parameters
    ----------
    parts : sequence of (Octave, Block)
        Swept one after the other, but for the last batches of one and the first of the next, and
        small ones, which one thread sweeps while others begin.
    invariant : bool
        Whether descriptors are taken in local frames.
    threads : int
        That share the work.
    """
    found: list[dict[int, Found]] = [{} for _ in parts]
    small = [math.prod(b - a for a, b in block.read[1:]) < SHARED_VOXELS for _, block in parts]

    def jobs() -> Jobs:
        for i in sorted(range(len(parts)), key=lambda i: not small[i]):
            batches = _batches(*parts[i], invariant, 1 if small[i] else threads, found[i])
            if small[i]:
                yield partial(run_jobs, batches, 1)
            else:
                yield from batches

    run_jobs(jobs(), threads)
    results = [Found.in_order(batches) for batches in found]
    for (_, block), result in zip(parts, results, strict=True):
        result.index[:, 1:] += [start for start, _ in block.read[1:]]
    return results


def _batches(
    octave: Octave, block: Block, invariant: bool, threads: int, found: dict[int, Found]
) -> Jobs:
    """Give the batches of a sweep, and before them what reads their planes."""
    (y0, y1), (x0, x1) = block.read[1:]
    z, y, x = block.core
    sweep = Sweep(
        (z, (y[0] - y0, y[1] - y0), (x[0] - x0, x[1] - x0)),
        (y1 - y0, x1 - x0),
        octave.shape[0],
        octave.first,
        finer=octave.finer,
        invariant=invariant,
        threads=threads,
        found=found,
    )
    before: Callable[[], NDArray[np.float32]] | None = None
    for read in octave.slabs(sweep.first_plane, sweep.last_plane, block.read[1:]):
        job, slab = deferred(read)
        yield job
        if before is not None:
            yield from sweep.take(before())
        before = slab
    assert before is not None
    yield from sweep.take(before())
    yield from sweep.drain()


def _slabs(first: int, last: int, depth: int) -> Iterator[tuple[int, int]]:
    """Cut planes where chunks end, so that each chunk is read once."""
    while first < last:
        stop = min((first // depth + 1) * depth, last)
        yield first, stop
        first = stop


def _dataset(volume: Volume, octaves: list[Found], finer: bool) -> xr.Dataset:
    """Order the keypoints of all octaves, and put them in the world."""
    position, scale, sign, response, octave, descriptor, frame = [], [], [], [], [], [], []
    for o, found in enumerate(octaves):
        order = np.lexsort((*found.index.T[::-1], found.level))
        step = 2.0 ** (o - finer)
        mm = volume.grid.to_mm((found.index[order] + found.offset[order, :3]) * step)
        # Around an oblique scan its outermost voxels are repeated: nothing there was seen.
        at = volume.source_grid.to_index(mm)
        seen = ((at >= -0.5) & (at <= np.array(volume.source_grid.shape) - 0.5)).all(axis=1)
        order, mm = order[seen], mm[seen]
        position.append(mm.astype(np.float32))
        levels = found.level[order] + found.offset[order, 3]
        sigma = level_sigma(0) * 2.0 ** (levels / LEVELS) * step * volume.grid.spacing[0]
        scale.append(sigma.astype(np.float32))
        response.append(found.response[order])
        sign.append(np.sign(found.response[order]).astype(np.int8))
        octave.append(np.full(order.size, o, np.uint8))
        descriptor.append(found.descriptor[order])
        frame.append(found.frame[order])
    return xr.Dataset(
        {
            "position": (("keypoint", "axis"), np.concatenate(position)),
            "scale": ("keypoint", np.concatenate(scale)),
            "sign": ("keypoint", np.concatenate(sign)),
            "response": ("keypoint", np.concatenate(response)),
            "octave": ("keypoint", np.concatenate(octave)),
            "descriptor": (("keypoint", "bin"), np.concatenate(descriptor)),
            "frame": (("keypoint", "direction", "axis"), np.concatenate(frame)),
        }
    )
