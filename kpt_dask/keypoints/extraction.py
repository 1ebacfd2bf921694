"""Extract the keypoints of a volume, block by block, each octave from its own level.

Teams of threads share the sweep of a block: what a block reads beyond its core is work done
twice, so there are no more blocks than needed.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from kpt_dask.kernels.handoff import BETWEEN_THREADS
from kpt_dask.keypoints.blocks import Block, core_width, plan_blocks, slab_lengths
from kpt_dask.keypoints.octaves import Octave
from kpt_dask.keypoints.parameters import keypoint_parameters
from kpt_dask.keypoints.sweep import OctaveKeypoints, Sweep
from kpt_dask.keypoints.sweep_plan import halo
from kpt_dask.runtime import cluster, progress
from kpt_dask.runtime.team import Jobs, deferred, run_jobs
from kpt_dask.volumes.scale_space import LEVELS, level_sigma
from kpt_dask.volumes.volume import Volume

MIN_SHARED_PLANE = 1 << 13
"""Voxels of a plane; smaller ones are swept by one thread, as handing out batches would cost as
much."""

Part = tuple[Octave, Block]
"""A block of an octave."""


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
        Budget of all sweeps of a process together, bytes.
    client : distributed.Client, optional
        Client whose workers sweep the blocks; threads of this process if there is no current one.

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

    References
    ----------
    C. Wachinger, M. Toews, G. Langs, W. Wells, P. Golland, "Keypoint Transfer for Fast
    Whole-Body Segmentation", IEEE Transactions on Medical Imaging 39(2), 273–282, 2020,
    https://doi.org/10.1109/TMI.2018.2851194.

    Examples
    --------
    >>> import kpt_dask
    >>> keypoints = kpt_dask.extract(kpt_dask.open_volume("body_4.zarr"))
    >>> keypoints.descriptor.dtype, keypoints.sizes["bin"]
    (dtype('uint8'), 64)
    """
    invariant = keypoint_parameters(descriptor, finer)["descriptor"] == "invariant"
    octaves = [Octave(level, o == 0, False) for o, level in enumerate(volume.levels)]
    if finer:
        octaves.insert(0, Octave(volume.levels[0], True, True))
    with cluster.session(client) as session:
        if str(getattr(session.scheduler, "address", "")).startswith("inproc:"):
            _compile_kernels()
        at_once, threads = cluster.count_teams(session), max(cluster.threads(session))
        lengths = slab_lengths([octave.shape for octave in octaves], at_once)
        cuts: list[list[Part]] = []
        for octave, length in zip(octaves, lengths, strict=True):
            shape, margin = octave.shape, halo(octave.first, octave.finer)
            core = length, *core_width(shape, threads, cluster.budget(session, memory), margin)
            cuts.append([(octave, block) for block in plan_blocks(shape, core, margin)])
        # The last octaves are small: those that were not cut are one task.
        whole = [len(cut) == 1 for cut in cuts]
        rest = next(o for o in range(at_once > 1, len(cuts) + 1) if all(whole[o:]))
        together = [[part] for cut in cuts[:rest] for part in cut]
        if rest < len(cuts):
            together.append([part for cut in cuts[rest:] for part in cut])
        tasks = [(parts, invariant) for parts in together]
        found: list[list[OctaveKeypoints]] = [[] for _ in octaves]
        for index, results in cluster.run_in_teams(
            session, sweep_blocks, tasks, "Extracting keypoints"
        ):
            for (octave, _), result in zip(together[index], results, strict=True):
                found[octaves.index(octave)].append(result)
    return _dataset(volume, [OctaveKeypoints.join(parts) for parts in found], finer)


def _compile_kernels() -> None:
    """Compile the kernels as a stage of its own, so that its name is shown while it takes long.

    With a warm cache it ends at once; workers of other processes compile at their first task.
    """
    with progress.stage("Compiling kernels, once on this machine"):
        sweep = Sweep(((0, 4), (0, 4), (0, 4)), (4, 4), 4, first_octave=True)
        sweep.feed(np.zeros((4, 4, 4), np.float32))
        sweep.finish()


def sweep_blocks(
    parts: Sequence[Part], invariant: bool = False, threads: int = 1
) -> list[OctaveKeypoints]:
    """Find the keypoints whose voxels lie in the cores of blocks; indices are of the octaves.

    Parameters
    ----------
    parts : sequence of (Octave, Block)
        Swept one after the other; the last batches of one overlap with the first of the next, and
        one thread sweeps a small one while others begin. So it does each without atomics.
    invariant : bool
        Whether descriptors are taken in local frames.
    threads : int
        Number of threads that share the work.
    """
    found: list[dict[int, OctaveKeypoints]] = [{} for _ in parts]
    areas = [math.prod(b - a for a, b in block.read[1:]) for _, block in parts]
    small = [area < MIN_SHARED_PLANE or not BETWEEN_THREADS for area in areas]

    def jobs() -> Jobs:
        for i in sorted(range(len(parts)), key=lambda i: not small[i]):
            batches = _batches(*parts[i], invariant, 1 if small[i] else threads, found[i])
            if small[i]:
                yield partial(run_jobs, batches, 1)
            else:
                yield from batches

    run_jobs(jobs(), threads)
    results = [OctaveKeypoints.in_order(batches) for batches in found]
    for (_, block), result in zip(parts, results, strict=True):
        result.voxel[:, 1:] += [start for start, _ in block.read[1:]]
    return results


def _batches(
    octave: Octave, block: Block, invariant: bool, threads: int, found: dict[int, OctaveKeypoints]
) -> Jobs:
    """Yield the batches of a sweep, and before them the jobs that read their planes."""
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
    previous: Callable[[], NDArray[np.float32]] | None = None
    for read in octave.slabs(*sweep.input_planes, block.read[1:]):
        job, slab = deferred(read)
        yield job
        if previous is not None:
            yield from sweep.take(previous())
        previous = slab
    assert previous is not None
    yield from sweep.take(previous())
    yield from sweep.drain()


def _dataset(volume: Volume, octaves: list[OctaveKeypoints], finer: bool) -> xr.Dataset:
    """Order the keypoints of all octaves, and map them to millimetres."""
    position, scale, sign, response, octave, descriptor, frame = [], [], [], [], [], [], []
    for o, found in enumerate(octaves):
        order = np.lexsort((*found.voxel.T[::-1], found.level))
        step = 2.0 ** (o - finer)
        mm = volume.grid.to_mm((found.voxel[order] + found.offset[order, :3]) * step)
        # Around an oblique scan its outermost voxels are repeated: no keypoint there is real.
        source = volume.source_grid.to_index(mm)
        end = np.array(volume.source_grid.shape) - 0.5
        inside = ((source >= -0.5) & (source <= end)).all(axis=1)
        order, mm = order[inside], mm[inside]
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
