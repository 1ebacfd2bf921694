"""Votes of warped atlases in one block of the scan.

A block reads only the planes of an atlas that the atlas's refined field maps its voxels to.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import (
    Box,
    begin_of,
    box_of,
    overlaps,
    shape_of,
    slices,
    wider,
    within,
)
from atlas_store.arrays.regions import Region
from atlas_store.crop import CropBuffer, crop_box, read_planes
from kpt_dask.grid import Grid
from kpt_dask.kernels.exponential import LOG2_E
from kpt_dask.organ_transfer.decision import Share
from kpt_dask.organ_transfer.job import TransferJob
from kpt_dask.organ_transfer.refinement.atlas import PER_MM, WEIGHT
from kpt_dask.organ_transfer.refinement.lattice import Lattice
from kpt_dask.organ_transfer.warping.cells import Cells, gather, plan_cells, spread, width_of
from kpt_dask.organ_transfer.warping.kernels import (
    REACH,
    AtlasPart,
    CellPlan,
    FieldPart,
    VoteSums,
    add_votes,
    count_hu,
    smooth,
)
from kpt_dask.organ_transfer.warping.landing import in_grid, in_voxels, step_of
from kpt_dask.runtime.team import Jobs, deferred, run_jobs

EXTRA_PLANES = 50
"""Planes of an atlas that a block reads beyond its own height (typical)."""
ATLASES_PER_THREAD = 8
"""Atlases read per thread before any of them votes, where the memory budget allows."""
CELLS_PER_JOB = 256
"""Cells in which these atlases vote in one job, so that the sums stay in the cache."""
SLAB_BYTES = 14
"""Bytes per voxel of a slab while it is finished: its share twice, and the compressed chunk."""
NOWHERE = np.float32(1e9)
"""HU of voxels beside the scan: unlike any voxel of an atlas."""
AGREEMENT = 4
"""Exponent of an atlas's mean correlation in ρ, no unit."""
CONFORMITY = 2
"""Exponent of an atlas's agreement with the other atlases in ρ, no unit."""
FIRST_HU, BIN = np.float32(-1000), np.float32(20)
"""Lower edge of a histogram's first bin, and width of a bin, HU."""
BINS = 200
"""Number of bins: up to 3000 HU."""


@dataclass(frozen=True)
class WarpedAtlas:
    """An atlas and its refined field.

    Attributes
    ----------
    atlas : Atlas
    number : int
        Its index in the array of fields.
    base : (float, float, float)
        Offset to add to its stored displacement, mm.
    correlation : float64 array (organ)
        Mean cc where any atlas labels the organ.
    conformity : float64 array (organ)
        From `kpt_dask.organ_transfer.refinement.agreement.conformity`.
    """

    atlas: Atlas
    number: int
    base: tuple[float, float, float]
    correlation: NDArray[np.float64]
    conformity: NDArray[np.float64]

    def reliability(self, organs: OrganTable) -> NDArray[np.float64]:
        """ρ of each organ, float64 array (organ); 0 where the atlas does not annotate it."""
        annotated = np.array([name in self.atlas.annotated for name in organs.names])
        rho: NDArray[np.float64] = self.correlation**AGREEMENT * self.conformity**CONFORMITY
        return np.where(annotated, rho, 0.0)


@dataclass(frozen=True)
class VotingJob:
    """Data that all blocks of one transfer share.

    Attributes
    ----------
    job : TransferJob
    atlases : sequence of WarpedAtlas
    fields : zarr.Array
        From `kpt_dask.organ_transfer.refinement.schedule.create_fields`.
    lattice : Lattice
        Lattice of the fields.
    search_boxes : sequence of Box or None
        Where each organ is looked for, in cells.
    shares : zarr.Array (organ, z, y, x)
        Shares of the votes, which the blocks fill.
    budget : float
        Memory that a block may take, bytes; one atlas at a time is read even where that exceeds it.
    """

    job: TransferJob
    atlases: Sequence[WarpedAtlas]
    fields: "zarr.Array[Any]"
    lattice: Lattice
    search_boxes: Sequence[Box | None]
    shares: "zarr.Array[Any]"
    budget: float

    @property
    def grid(self) -> Grid:
        """The working grid."""
        return self.job.volume.grid


def vote_in_block(votes: VotingJob, region: Region, threads: int = 1) -> NDArray[np.int64]:
    """Fill one block of the shares, by the votes of all atlases.

    Parameters
    ----------
    region : tuple of slice
        Whole shards.
    threads : int
        Number of threads that share the work.

    Returns
    -------
    int64 array (organ, 2, bin)
        Histograms of the HU inside and outside of each organ: see `count_hu`.
    """
    grid, search_boxes = votes.grid, votes.search_boxes
    nus, tiling = votes.job.nus, votes.job.tiling
    known = list(dict.fromkeys(nus))
    groups = [known.index(nu) for nu in nus]
    step = step_of(grid)
    # More voxels on each side: shares are averaged over neighbours.
    around = wider(box_of(region), grid.shape, REACH)
    cells = plan_cells(search_boxes, groups, around, step)
    block = _Block(votes, cells, known)
    found = {
        o: in_voxels(search_box, step)
        for o, search_box in enumerate(search_boxes)
        if search_box is not None
    }
    looked_for = [(slab, overlaps(found, box_of(slab))) for slab in tiling.slabs(region)]
    counts = []

    def finish(boxes: dict[int, Box]) -> None:
        counts.append(_finish_slab(votes, block.shares(boxes), (block.box, block.scan)))

    taken = block.nbytes + threads * SLAB_BYTES * math.prod(tiling.slab_shape(box_of(region)))
    per_atlas = 4 * per_plane(one.atlas for one in votes.atlases)
    per_atlas = per_atlas * (shape_of(block.box)[0] + EXTRA_PLANES) + block.field_bytes
    together = int(min((votes.budget - taken) / max(per_atlas, 1), threads * ATLASES_PER_THREAD))

    def jobs() -> Jobs:
        yield from block.votes_of(max(together, 1))
        for _, boxes in looked_for:
            if boxes:
                yield partial(finish, boxes)

    run_jobs(jobs(), threads)
    return sum(counts, start=np.zeros((len(votes.job.organs), 2, BINS), np.int64))


def _finish_slab(
    votes: VotingJob, shares: Iterable[Share], scan: tuple[Box, NDArray[np.float32]]
) -> NDArray[np.int64]:
    """Write the shares of a slab, one organ at a time, and count their HU."""
    counts = np.zeros((len(votes.job.organs), 2, BINS), np.int64)
    around, hu = scan
    with chunk_io.writing(votes.shares) as writer:
        for organ, box, share in shares:
            rows = np.zeros(share.shape[:2], np.bool_)
            count_hu(share, hu[within(box, around)], FIRST_HU, BIN, counts[organ], rows)
            if rows.any():
                writer.add((slice(organ, organ + 1), *slices(box)), share[None], rows[None])
    return counts


class _Block:
    """Votes in the cells of a block.

    Parameters
    ----------
    votes : VotingJob
    cells : Cells
    nus
        ν of each group of organs, HU.

    Attributes
    ----------
    box : Box
        Voxels of the cells.
    scan : float32 array (z, y, x)
        HU there.
    """

    def __init__(self, votes: VotingJob, cells: Cells, nus: Sequence[float]) -> None:
        self._all, self._cells, self._step = votes, cells, step_of(votes.grid)
        scale = np.array([LOG2_E / (2 * nu * nu) for nu in nus], np.float32)[cells.group]
        self._plan = CellPlan(self._step, cells.index, cells.groups, cells.organs, scale)
        self.box = in_grid(cells.box, votes.grid, self._step)
        self.scan = np.empty(shape_of(self.box), np.float32)
        self._part = box_of(votes.lattice.points_in(self.box))
        n = width_of(self._step)
        self._here = np.empty((len(cells.index), n), np.float32)
        slots = cells.organ.size
        self._sums = VoteSums(*(np.zeros((slots, n), np.float32) for _ in range(2)))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are held until the end."""
        return sum(a.nbytes for a in (self.scan, self._here, *self._sums))

    @property
    def field_bytes(self) -> int:
        """Bytes of an atlas's field while it is read."""
        return 4 * (2 + 4) * math.prod(shape_of(self._part))

    def votes_of(self, together: int) -> Jobs:
        """Yield jobs that let all atlases vote, reading `together` atlases at a time."""
        ready: list[Callable[[], None]] = []
        for slab in self._all.job.tiling.cut_in_slabs(self.box, self._all.grid.shape):
            job, wait = deferred(partial(self._read_scan, slab))
            ready.append(wait)
            yield job
        n = len(self._here)
        parts = [(begin, min(begin + CELLS_PER_JOB, n)) for begin in range(0, n, CELLS_PER_JOB)]
        buffers = [CropBuffer() for _ in range(together)]
        for first in range(0, max(len(self._all.atlases), 1), together):
            atlases = []
            batch = self._all.atlases[first : first + together]
            for one, buffer in zip(batch, buffers, strict=False):
                job, atlas = deferred(
                    partial(self._read_atlas, one, buffer, ready if first else ())
                )
                atlases.append(atlas)
                yield job
            done = []
            for part in parts:
                job, wait = deferred(partial(self._vote, part, atlases, () if first else ready))
                done.append(wait)
                yield job
            ready = done
        for wait in ready:
            wait()

    def shares(self, boxes: dict[int, Box]) -> Iterator[Share]:
        """Yield the smoothed share of each organ in its box, after all votes."""
        cells = self._cells
        for o, box in boxes.items():
            slots = np.flatnonzero(cells.organ == o)
            index = cells.index[cells.cell_of[slots]]
            depth, height, width = shape_of(box)
            wide = depth + 2 * REACH, height + 2 * REACH, width + 2 * REACH
            around = np.zeros(wide, np.float32)
            corner = begin_of(box) - REACH
            spread(self._sums, slots, index, corner, self._step, around)
            for axis, ((begin, end), n) in enumerate(zip(box, self._all.grid.shape, strict=True)):
                along = np.moveaxis(around, axis, 0)
                before, last = max(REACH - begin, 0), len(along) - max(end + REACH - n, 0)
                along[:before] = along[before]
                along[last:] = along[last - 1]
            share = np.empty((depth, height, width), np.float32)
            smooth(around, share)
            yield o, box, share

    def _read_scan(self, part: Box) -> None:
        chunk_io.read(
            self._all.job.volume.levels[0], slices(part), self.scan[within(part, self.box)]
        )

    def _read_atlas(
        self, one: WarpedAtlas, buffer: CropBuffer, free: Sequence[Callable[[], None]]
    ) -> AtlasPart | None:
        """Read the planes that an atlas's field maps the cells to, once the buffer is free."""
        field = self._read_field(one)
        planes = self._planes(one.atlas, field)
        for wait in free:
            wait()
        if planes is None:
            return None
        voxels, held, coding = read_planes(one.atlas, *planes, buffer)
        organs = self._all.job.organs
        codes = np.array([coding.number_of(value) for value in organs.values], np.uint16)
        rho = one.reliability(organs)
        slots = self._cells.organ
        return AtlasPart(
            voxels,
            coding.hu,
            coding.label,
            np.array(held),
            field,
            codes[slots],
            rho.astype(np.float32)[slots],
        )

    def _read_field(self, one: WarpedAtlas) -> FieldPart:
        """Read the part of an atlas's field that lies over the block, in voxels."""
        lattice, grid = self._all.lattice, self._all.grid
        number = slice(one.number, one.number + 1), slice(0, 4)
        stored = chunk_io.read(self._all.fields, (*number, *slices(self._part)))[0]
        values = stored.astype(np.float32)
        spacing = float(grid.spacing[0])
        to_atlas = (grid.origin - np.array(one.atlas.info.origin) + one.base) / spacing
        values[:3] *= np.float32(1 / (PER_MM * spacing))
        values[:3] += to_atlas.astype(np.float32)[:, None, None, None]
        values[3] *= np.float32(1 / WEIGHT)
        first, shape = np.array([lattice.first, lattice.shape], np.int64)
        return FieldPart(first, shape, 1 / lattice.step, begin_of(self._part), values)

    def _planes(self, atlas: Atlas, field: FieldPart) -> tuple[int, int] | None:
        """Range of the atlas's planes that its field can map the cells to, if any."""
        z = field.first[0] + (field.begin[0] + np.arange(field.values.shape[1])) / field.per_voxel
        at = field.values[0].reshape(len(z), -1)
        begin, end = crop_box(atlas)[0]
        first = max(int(np.floor((z + at.min(axis=1)).min())) - 1, begin)
        stop = min(int(np.ceil((z + at.max(axis=1)).max())) + 2, end)
        return (first, stop) if first < stop else None

    def _vote(
        self,
        part: tuple[int, int],
        atlases: Sequence[Callable[[], AtlasPart | None]],
        scan: Sequence[Callable[[], None]],
    ) -> None:
        """Add the votes of atlases in some cells, after waiting for the scan and each atlas."""
        cells, own = self._cells, slice(*part)
        if scan:
            for wait in scan:
                wait()
            self._here[own] = NOWHERE
            corner = begin_of(self.box)
            gather(self.scan, corner, cells.index[own], self._step, self._here[own])
        for atlas in atlases:
            if read := atlas():
                add_votes(part, self._plan, self._here, read, self._sums)


def per_plane(atlases: Iterable[Atlas]) -> int:
    """Count the voxels of a plane of the largest atlas."""
    return max((math.prod(shape_of(crop_box(a))[1:]) for a in atlases), default=0)
