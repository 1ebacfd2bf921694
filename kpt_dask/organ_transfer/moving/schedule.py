"""Schedule of the modes that move whole organs: plan, slabs for each worker, jobs of a slab.

What moves where, and with which weight, is planned before any voxel is visited. So slabs are
independent of each other, and the order of summation does not depend on how the volume is cut.
Planes of an atlas's organ that no slab needs are not read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import (
    Box,
    box_of,
    enclosing,
    overlap,
    overlaps,
    shape_of,
    slices,
    volume_of,
    within,
)
from atlas_store.arrays.regions import Region
from kpt_dask.kernels.simd import LANES
from kpt_dask.matching.first_pass import slices_by_atlas
from kpt_dask.organ_transfer.decision import Share, finish_slab, run_blocks
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts, parts_of
from kpt_dask.organ_transfer.moving.distances import REACH_RHO, organ_distances
from kpt_dask.organ_transfer.moving.kernels import Slab
from kpt_dask.organ_transfer.moving.organ import OrganStripsAndMoves, read_organs
from kpt_dask.organ_transfer.moving.plan import (
    OrganMoves,
    plan_affines,
    plan_moves,
    propose,
    without_negligible,
)
from kpt_dask.runtime import cluster
from kpt_dask.runtime.balance import cut, distribute
from kpt_dask.runtime.team import Jobs, deferred, run_jobs

UNPACK_COST, FINISH_COST, AFFINE_COST = 8, 28, 10
"""Cost model, in units of adding one voxel of an organ by a shift: to decompress a voxel of the
scan; to decide and write a voxel where an organ may lie; to sample a voxel through an affine.
Measured; only the balance of the work depends on them."""
BYTES_PER_ORGAN_VOXEL = 8
"""Peak while an atlas's organ is read; half of it afterwards."""
BYTES_PER_SLAB_VOXEL = 14
"""Scan, labels, largest share, and one organ's share."""


def move_organs(
    job: TransferJob, atlases: Sequence[Atlas], evidence: Evidence, client: Client | None = None
) -> OrganCounts:
    """Fill the probabilities by whole organs, and decide each voxel's organ.

    The equations stand in `kpt_dask.organ_transfer.moving`.

    Parameters
    ----------
    job : TransferJob
        Job of mode `organ`, `affine` or `across`.
    atlases : sequence of Atlas
        In the order of the matches' indices.
    evidence : Evidence
    client : distributed.Client, optional
        Client whose workers fill the slabs.
    """
    with cluster.session(client) as session:
        moves = _plan(job, atlases, evidence, session)
        totals = np.bincount(moves.organ, moves.weight, minlength=len(job.organs))
        fractions = replace(moves, weight=moves.weight / totals[moves.organ])
        thread_budget = cluster.budget(session, job.memory) / max(cluster.threads(session))
        tasks = []
        for boxes in _share_out(job, atlases, moves, thread_budget, session):
            reaching = np.any([moves.reach(box) for box in boxes], axis=0)
            of_boxes = fractions.take(np.flatnonzero(reaching))
            if of_boxes.atlas.size:
                tasks.append(
                    (
                        SlabTask(
                            job,
                            {a: atlases[a] for a in np.unique(of_boxes.atlas).tolist()},
                            of_boxes,
                            [job.tiling.region(box, job.volume.grid.shape) for box in boxes],
                            thread_budget,
                        ),
                    )
                )
        counts = run_blocks(fill_slabs, job, tasks, session)
    weights = np.zeros((len(job.organs), len(atlases)))
    np.add.at(weights, (moves.organ, moves.atlas), moves.weight)
    return replace(counts, weights=parts_of(weights))


def _plan(
    job: TransferJob, atlases: Sequence[Atlas], evidence: Evidence, client: Client
) -> OrganMoves:
    """Plan which organs move where, by the job's mode."""
    organs, grid, options = job.organs, job.volume.grid, job.options
    distance = None
    if job.mode == "across":
        distance = _distances(evidence, atlases, organs, REACH_RHO * options.rho, client)
    proposals = propose(
        evidence, atlases, organs, job.voting, options.across, distance, options.rho
    )
    if job.mode == "affine":
        return plan_affines(proposals, evidence, atlases, organs, grid)
    moves = plan_moves(proposals, evidence.matches, atlases, organs, grid)
    return without_negligible(moves, len(organs)) if job.mode == "across" else moves


def _share_out(
    job: TransferJob,
    atlases: Sequence[Atlas],
    moves: OrganMoves,
    thread_budget: float,
    client: Client,
) -> list[list[Box]]:
    """Cut the scan where organs may lie, and share the pieces out among teams.

    Returns
    -------
    list of list of Box
        Pieces of each team, in slabs, the costliest first, so that threads end together.
    """
    shape = job.volume.grid.shape
    reaches, chunks = moves.reaches(), job.volume.levels[0].chunks
    largest = max((sum(o.voxels for o in a.organs.values()) for a in atlases), default=0)
    cost_of_moves = np.where(moves.by_affine(), AFFINE_COST, 1)

    @cache
    def cost(box: Box) -> float:
        reached = list(overlaps(reaches, box).values())
        added, finished = moves.visited_in(box) @ cost_of_moves, sum(map(volume_of, reached))
        # Chunks are decompressed whole.
        ends = zip(enclosing(reached) or (), chunks, strict=False)
        unpacked = math.prod((-(-b // n) - a // n) * n for (a, b), n in ends) if reached else 0
        return float(added + FINISH_COST * finished + UNPACK_COST * unpacked)

    def fits(box: Box) -> bool:
        slab = math.prod(shape_of(box_of(job.tiling.region(box, shape))))
        needed = BYTES_PER_SLAB_VOXEL * slab + BYTES_PER_ORGAN_VOXEL * largest
        return bool(needed <= thread_budget)

    everywhere = box_of(tuple(slice(0, n) for n in shape))
    reached = overlap(enclosing(list(reaches.values())), everywhere)
    pieces: list[Box] = []
    for slab in job.tiling.cut_in_slabs(reached, shape) if reached else []:
        pieces += [slab] if fits(slab) else cut(slab, job.tiling.shard, 1, cost, fits)
    shares = distribute(pieces, cluster.count_teams(client), cost)
    return [sorted(share, key=cost, reverse=True) for share in shares]


def _distances(
    evidence: Evidence,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    reach: float,
    client: Client,
) -> NDArray[np.float32]:
    """Distance (match, organ) of each match's atlas keypoint to the atlas's organs, mm."""
    keypoints, matches, _ = evidence
    in_atlas = keypoints.position.values[matches.keypoint.values] - matches.translation.values
    tasks = [
        (atlas, in_atlas[part], organs, reach)
        for atlas, part in zip(atlases, slices_by_atlas(matches, len(atlases)), strict=True)
    ]
    return np.concatenate(cluster.run_small(client, organ_distances, tasks, "Measuring distances"))


@dataclass(frozen=True, eq=False)
class SlabTask:
    """Slabs that one team fills, and what moves there.

    Attributes
    ----------
    job : TransferJob
    atlases : dict of int to Atlas
        By index, those of the moves.
    moves : OrganMoves
        Those that reach the slabs; weights are fractions of all of an organ's.
    regions : sequence of tuple of slice
        The slabs: whole shards, one shard deep.
    thread_budget : float
        Bytes that each thread may take. The atlases' organs are kept from slab to slab if they
        fit, and read again for each slab otherwise.
    """

    job: TransferJob
    atlases: dict[int, Atlas]
    moves: OrganMoves
    regions: Sequence[Region]
    thread_budget: float


def fill_slabs(task: SlabTask, threads: int = 1) -> OrganCounts:
    """Fill some slabs of the probabilities, and decide their voxels, in several threads."""
    team = _SlabTeam(task, threads)
    run_jobs(team.jobs(), threads)
    return sum(team.counts, start=OrganCounts.empty(len(task.job.organs)))


class _SlabTeam:
    """Jobs that fill the slabs of one task, shared by a team of threads.

    Everything that is done to a slab is done by one thread in a row, while it is in the cache.

    Attributes
    ----------
    counts : list of OrganCounts
        One for each slab that is done.
    """

    def __init__(self, task: SlabTask, threads: int) -> None:
        self.counts: list[OrganCounts] = []
        self._task, self._job, self._threads = task, task.job, threads
        self._slabs = [box_of(region) for region in task.regions]
        reaches = task.moves.reaches()
        self._boxes_of_organs = [overlaps(reaches, slab) for slab in self._slabs]
        to_keep = _bytes_to_keep(task.atlases, task.moves, task.job.organs)
        self._spare = threads * task.thread_budget / 2 - to_keep
        self._keep = self._spare >= 0
        self._kept: dict[int, OrganStripsAndMoves] = {}
        self._buffers: list[NDArray[np.float32]] = []

    def jobs(self) -> Jobs:
        """Yield jobs: read the atlases, decompress the first slabs' scan, fill each slab."""
        atlases_read = None
        if self._keep:
            job, atlases_read = deferred(self._read_atlases)
            yield job
        whole = [enclosing(list(boxes.values())) for boxes in self._boxes_of_organs]
        reached = [(i, box) for i, box in enumerate(whole) if box is not None]
        largest = max(
            math.prod(_padded((*box[:2], around[2])))
            for i, around in reached
            for box in self._boxes_of_organs[i].values()
        )
        # One buffer per thread: to fault in new pages takes as long as to fill them.
        self._buffers = [np.zeros(largest, np.float32) for _ in range(self._threads)]
        unpacked: dict[int, Callable[[], NDArray[np.int16]]] = {}
        spare = self._spare
        # Reading atlases holds the GIL; decompressing the scan meanwhile does not.
        for i, box in reached:
            spare -= 2 * volume_of(box)
            if self._kept or spare < 0:
                break
            job, unpacked[i] = deferred(partial(self._unpack, box))
            yield job
        for i, box in reached:
            scan = unpacked.pop(i, None) or partial(self._unpack, box)
            yield partial(self._fill, i, box, scan, atlases_read)

    def _read_atlases(self) -> None:
        task = self._task
        self._kept = read_organs(task.atlases, task.moves, self._slabs, self._job.organs)

    def _unpack(self, box: Box) -> NDArray[np.int16]:
        """HU of a box of the scan; rows are padded as kernels want them."""
        hu = np.zeros(_padded(box), np.int16)
        chunk_io.read(self._job.volume.levels[0], slices(box), hu[..., LANES:-LANES])
        return hu

    def _fill(
        self,
        i: int,
        around: Box,
        scan: Callable[[], NDArray[np.int16]],
        atlases_read: Callable[[], None] | None,
    ) -> None:
        """Fill a slab whose organs lie in the box `around`."""
        hu = scan()
        if atlases_read:
            atlases_read()
        buffer = self._buffers.pop()
        shares = self._organ_shares(i, around, hu, buffer)
        scan_of_slab = around, hu[..., LANES:-LANES]
        self.counts.append(finish_slab(self._job, shares, self._task.regions[i], scan_of_slab))
        self._buffers.append(buffer)

    def _organ_shares(
        self, i: int, around: Box, hu: NDArray[np.int16], buffer: NDArray[np.float32]
    ) -> Iterator[Share]:
        """Yield each organ's share in its part of a slab; the next one takes the same buffer."""
        nus = self._job.nus
        for o, box in self._boxes_of_organs[i].items():
            rows = *box[:2], around[2]
            shape = _padded(rows)
            share = buffer[: math.prod(shape)].reshape(shape)
            corner = box[0][0] - around[0][0], box[1][0] - around[1][0]
            slab = Slab(share, hu, corner, (box[0][0], box[1][0], around[2][0]))
            clear_first = True
            for by_affine in (False, True):
                for organ in self._organs(o, box, by_affine):
                    organ.add(slab, box, nus[o], by_affine=by_affine, clear_first=clear_first)
                    clear_first = False
            columns = share[..., LANES:-LANES][within(box, rows)]
            if clear_first:
                columns[...] = 0
            yield o, box, columns

    def _organs(self, organ: int, box: Box, by_affine: bool) -> Iterator[OrganStripsAndMoves]:
        """Yield an organ with its moves: as kept, or read one atlas after the other."""
        if self._keep:
            if organ in self._kept:
                yield self._kept[organ]
            return
        task, moves = self._task, self._task.moves
        wanted = (moves.organ == organ) & (moves.by_affine() == by_affine)
        for a in np.unique(moves.atlas[wanted]).tolist():
            of_atlas = moves.take(np.flatnonzero(wanted & (moves.atlas == a)))
            yield from read_organs(task.atlases, of_atlas, [box], self._job.organs).values()


def _padded(box: Box) -> tuple[int, int, int]:
    """Shape of a box with `LANES` more columns on either side, so that kernels need no bounds."""
    depth, height, width = shape_of(box)
    return depth, height, LANES + width + LANES


def _bytes_to_keep(atlases: dict[int, Atlas], moves: OrganMoves, organs: OrganTable) -> int:
    """Estimate the bytes that all organs that are moved take while they are read."""
    begins = moves.begins()
    by_affine = np.logical_or.reduceat(moves.by_affine(), begins).tolist()
    pairs = zip(moves.atlas[begins].tolist(), moves.organ[begins].tolist(), strict=True)
    size = 0
    for (a, o), needs_box in zip(pairs, by_affine, strict=True):
        info = atlases[a].organs[organs.names[o]]
        size += BYTES_PER_ORGAN_VOXEL * info.voxels
        size += 2 * volume_of(info.bounding_box) if needs_box else 0
    return size
