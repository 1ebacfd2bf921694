"""Move the atlases onto the scan by smooth displacement fields, block by block: mode `local`.

Where organs can land is planned before any voxel is visited, and the fields live on one lattice
that begins at the scan's first voxel. So a voxel's votes do not depend on how the volume was
cut, and a block reads only the planes of an atlas that its field brings here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import (
    Box,
    aligned,
    begin_of,
    box_of,
    enclosing,
    overlap,
    overlaps,
    shape_of,
    slices,
    volume_of,
    wider,
    within,
)
from atlas_store.arrays.regions import Region
from atlas_store.crop import Room, read_planes, surroundings_of
from kpt_dask.grid import Grid
from kpt_dask.kernels.exponential import LOG2_E, exp2
from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import prefetch
from kpt_dask.matching.displacement import Field, Widths
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.organ_transfer.decision import (
    SHARD,
    VANISHING,
    Share,
    cut_in_slabs,
    finish_slab,
    run_blocks,
    slabs,
)
from kpt_dask.organ_transfer.measures import Tally
from kpt_dask.organ_transfer.warping.cells import (
    Cells,
    gather,
    plan_cells,
    positions,
    spread,
    width_of,
)
from kpt_dask.organ_transfer.warping.landing import (
    around,
    by_atlas,
    domains_of,
    fit,
    in_cells,
    in_grid,
    in_voxels,
    landing_boxes,
    step_of,
)
from kpt_dask.runtime import cluster
from kpt_dask.runtime.balance import cut
from kpt_dask.runtime.memory import budget
from kpt_dask.runtime.team import Jobs, deferred, map_in_threads, run_jobs
from kpt_dask.volumes.volume import Volume

PIECES = 1
"""Blocks for each team, so that all end at about the same time."""
VISIT = 6
"""How much longer a voxel of a cell takes than one that is only read, about."""
BEND = 50
"""Planes of an atlas that a block reads, beyond as many as it has itself, about."""
TOGETHER = 8
"""Atlases that are read for each thread before any of them votes, where there is room."""
CELLS = 256
"""Cells in which they vote one after the other."""
AHEAD = 32
"""Voxels of an atlas from those that are read to those that are fetched: a cache line."""
SLAB_BYTES = 14
"""Bytes of a voxel of a slab while it is finished: its share twice, the largest one, its label."""
RETURNED = 0.75
"""Of its room, what a block plans with: memory that was given back may lie where nothing fits."""
NOWHERE = np.float32(1e9)
"""HU of what lies beside the scan: like nothing in any atlas."""


def warp_atlases(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    probability: zarr.Array[Any],
    labels: zarr.Array[Any],
    *,
    options: TransferOptions = DEFAULTS,
    memory: int | None = None,
    client: Client | None = None,
) -> Tally:
    """Fill the probabilities by warped atlases, and decide each voxel's organ.

    Before it is smoothed, the share of organ l at voxel x is

        Σ_a s_a(x) · g_l(I(x) − I_a(y)) · [S_a(y) = l]  /  Σ_a s_a(x) · g_l(I(x) − I_a(y))

    over the atlases a that annotate the organ and hold y = x − u_a(x), the point that the
    atlas's field moves to x, in the surroundings of their organs (`atlas_store.crop`). s_a is the
    field's support (`kpt_dask.matching.displacement.Field`), I_a and S_a are the atlas's image and
    label map at the voxel
    nearest to y, and g_l(d) = exp(−d² / 2ν_l²). All matches carry the field, those outside of
    organs too. Then shares are averaged over neighbours, with weights ¼, ½ and ¼ along each axis,
    so that the noise of single voxels decides less; edges of the scan repeat. A voxel gets the
    organ with the largest share (ties go to the organ that comes first in the table), or 0 where
    that is below the threshold. An atlas that does not annotate an organ, or does not hold the
    place, votes neither for nor against it. Shares are 0, also when they are smoothed, in cells of
    the fields' lattice where no atlas's box of the organ, moved by its field, comes within
    `kpt_dask.organ_transfer.warping.landing.MARGIN`.

    Parameters
    ----------
    volume : Volume
        The scan.
    store, atlas_ids
        The atlases, in the order of the matches' indices.
    keypoints, matches : xarray.Dataset
        From `kpt_dask.extract`, and from `kpt_dask.match` or `second_pass.rematch`.
    probability : zarr.Array
        From `kpt_dask.organ_transfer.decision.create_probability`.
    labels : zarr.Array (z, y, x)
        Level 0 of the label map, filled with 0, from `kpt_dask.volumes.omezarr.create_label_image`.
    options : TransferOptions
        The threshold, ν, σ_x and σ_t.
    memory : int, optional
        Bytes that all blocks of a process may take together, down to one chunk a block.
    client : distributed.Client, optional
        Where the blocks are computed.

    Returns
    -------
    Tally
        What is counted of the labels and their shares.
    """
    atlases = store.atlases(atlas_ids)
    organs = store.organs
    grid = volume.grid
    step = step_of(grid)
    widths = options.sigma_x, options.sigma_t
    smallest, nus = options.smallest_share("local"), options.nus("local", organs)
    own = list(zip(atlases, by_atlas(keypoints, matches, len(atlases)), strict=True))
    landed = map_in_threads(landing_boxes, ((*one, organs, grid, widths) for one in own))
    domains = domains_of(landed, step)
    per_plane = _per_plane(atlases)
    with cluster.session(client) as session:
        at_once, threads = cluster.teams(max(cluster.threads(session)))
        pieces = PIECES * cluster.count_teams(session)
        room = RETURNED * budget(memory) / at_once
        tasks = []
        for block in plan_blocks(domains, grid, step, per_plane, pieces, threads, room):
            region = aligned(block, SHARD, grid.shape)
            cells = in_cells(wider(box_of(region), grid.shape), step)
            here = [(atlas, around(field, cells, grid, widths)) for atlas, field in own]
            how = grid, here, domains, organs, nus, widths, smallest, room, probability, labels
            tasks.append((volume.levels[0], *how, region))
        return run_blocks(transfer_block, tasks, organs, session)


def plan_blocks(
    domains: Sequence[Box | None],
    grid: Grid,
    step: int,
    per_plane: int,
    pieces: int,
    threads: int,
    room: float,
) -> list[Box]:
    """Cut the scan where organs may be into blocks that take about as long as each other.

    Parameters
    ----------
    domains
        Of each organ, where it is looked for, in cells.
    per_plane : int
        Voxels of a plane of the largest atlas.
    pieces : int
        How many blocks there are to be at least.
    threads : int
        That share a block.
    room : float
        Bytes that a block may take, if it can be cut.
    """
    known = [domain for domain in domains if domain is not None]
    whole = enclosing(known)
    if whole is None:
        return []
    covered = np.zeros(shape_of(whole), bool)
    for domain in known:
        covered[within(domain, whole)] = True

    def cells(box: Box) -> int:
        here = overlap(in_cells(box, step), whole)
        return 0 if here is None else int(covered[within(here, whole)].sum())

    def planes(box: Box) -> float:
        return float(per_plane * (shape_of(box)[0] + BEND))

    def time(box: Box) -> float:
        return VISIT * cells(box) * step**3 + planes(box)

    def fits(piece: Box) -> bool:
        box = wider(piece, grid.shape)
        votes = sum(volume_of(overlap(in_voxels(domain, step), box)) for domain in known)
        finished = threads * SLAB_BYTES * math.prod(_slab(box))
        summed = 4 * (2 * cells(box) * step**3 + 2 * votes + planes(box))
        return summed + finished <= room

    return [b for b in cut(in_grid(whole, grid, step), SHARD, pieces, time, fits) if cells(b)]


def transfer_block(
    image: zarr.Array[Any],
    grid: Grid,
    atlases: Sequence[tuple[Atlas, Field]],
    domains: Sequence[Box | None],
    organs: OrganTable,
    nus: Sequence[float],
    widths: Widths,
    smallest: float,
    room: float,
    probability: zarr.Array[Any],
    labels: zarr.Array[Any],
    region: Region,
    threads: int = 1,
) -> Tally:
    """Fill one block of the probabilities, and decide its voxels.

    Parameters
    ----------
    domains
        Of each organ, where it is looked for, in cells.
    nus
        Of each organ, HU.
    widths : (float, float)
        σ_x and σ_t, mm.
    smallest : float
        Share below which a voxel is background.
    room : float
        Bytes that the block may take, if so few do; more are used to read several atlases at once.
    threads : int
        That share the work.
    """
    says = np.array([[name in atlas.annotated for name in organs.names] for atlas, _ in atlases])
    group_of, group_nus = _groups(says, nus)
    step = step_of(grid)
    # With the neighbours of its voxels.
    cells = plan_cells(domains, group_of, wider(box_of(region), grid.shape), step)
    block = _Block(image, grid, atlases, organs, widths, cells, says, group_nus)
    found = {o: in_voxels(domain, step) for o, domain in enumerate(domains) if domain is not None}
    looked_for = [(slab, overlaps(found, box_of(slab))) for slab in slabs(region)]
    tallies = []

    def finish(slab: Region, boxes: dict[int, Box]) -> None:
        what = organs, smallest, slab, (block.box, block.scan)
        tallies.append(finish_slab(probability, labels, block.shares(boxes), *what))

    taken = block.nbytes + threads * SLAB_BYTES * math.prod(_slab(box_of(region)))
    per_atlas = 4 * _per_plane(atlas for atlas, _ in atlases) * (shape_of(block.box)[0] + BEND)
    together = int(min((room - taken) / max(per_atlas, 1), threads * TOGETHER))

    def jobs() -> Jobs:
        yield from block.votes_of(max(together, 1))
        for slab, boxes in looked_for:
            if boxes:
                yield partial(finish, slab, boxes)

    run_jobs(jobs(), threads)
    return sum(tallies, start=Tally.empty(len(organs)))


class _Block:
    """Votes in the cells of a block.

    Parameters
    ----------
    image, grid, atlases, organs, widths
        As for `transfer_block`.
    cells : Cells
    says : bool array (atlas, organ)
        Whether an atlas annotates an organ.
    nus
        Of each group of organs, HU.

    Attributes
    ----------
    box : Box
        Of the cells.
    scan : float32 array (z, y, x)
        HU there.
    """

    def __init__(
        self,
        image: zarr.Array[Any],
        grid: Grid,
        atlases: Sequence[tuple[Atlas, Field]],
        organs: OrganTable,
        widths: Widths,
        cells: Cells,
        says: NDArray[np.bool_],
        nus: Sequence[float],
    ) -> None:
        self._image, self._grid, self._widths = image, grid, widths
        self._atlases, self._organs, self._says = atlases, organs, says
        self._cells, self._step = cells, step_of(grid)
        self._nodes, self._corners = cells.nodes()
        self._scale = np.array([LOG2_E / (2 * nu * nu) for nu in nus], np.float32)[cells.group]
        self._where = positions(self._step)
        self.box = in_grid(cells.box, grid, self._step)
        self.scan = np.empty(shape_of(self.box), np.float32)
        n = width_of(self._step)
        self._here = np.empty((len(cells.index), n), np.float32)
        self._votes = np.zeros((cells.organ.size, n), np.float32)
        self._totals = np.zeros((cells.group.size, n), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held until the end."""
        return sum(a.nbytes for a in (self.scan, self._here, self._votes, self._totals))

    def votes_of(self, together: int) -> Jobs:
        """Give jobs that let all atlases vote, of which so many are read together."""
        ready: list[Callable[[], None]] = []
        for slab in cut_in_slabs(self.box, self._grid.shape):
            job, wait = deferred(partial(self._read_scan, slab))
            ready.append(wait)
            yield job
        n = len(self._here)
        parts = [(begin, min(begin + CELLS, n)) for begin in range(0, n, CELLS)]
        # Some cells for all these atlases, so that their votes stay in the cache.
        rooms = [Room() for _ in range(together)]
        for first in range(0, len(self._atlases), together):
            atlases = []
            for i, room in zip(range(first, len(self._atlases)), rooms, strict=False):
                job, atlas = deferred(partial(self._read_atlas, i, room, ready if first else ()))
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
        """Share of each organ in its box, smoothed, when all have voted."""
        cells = self._cells
        for o, box in boxes.items():
            slots = np.flatnonzero(cells.organ == o)
            index = cells.index[cells.cell_of[slots]]
            depth, height, width = shape_of(box)
            around = np.zeros((depth + 2, height + 2, width + 2), np.float32)
            voted = self._votes, self._totals, cells.group_of
            spread(*voted, slots, index, begin_of(box) - 1, self._step, around)
            for axis, ((begin, end), n) in enumerate(zip(box, self._grid.shape, strict=True)):
                along = np.moveaxis(around, axis, 0)
                if begin == 0:
                    along[0] = along[1]
                if end == n:
                    along[-1] = along[-2]
            share = np.empty((depth, height, width), np.float32)
            smooth(around, share)
            yield o, box, share

    def _read_scan(self, part: Box) -> None:
        chunk_io.read(self._image, slices(part), self.scan[within(part, self.box)])

    def _read_atlas(self, i: int, room: Room, free: Sequence[Callable[[], None]]) -> Any:
        """Read what an atlas's field brings to the cells, when the room for it is free."""
        atlas, field = self._atlases[i]
        nodes = fit(atlas, field, self._grid, self._nodes, self._widths)
        planes = self._planes(atlas, nodes)
        for wait in free:
            wait()
        if planes is None:
            return None
        packed, there, coding = read_planes(atlas, *planes, room)
        values = self._organs.values
        numbers = np.array([coding.number_of(value) for value in values], np.uint16)
        own = numbers[self._cells.organ], self._scale, self._says[i][self._cells.organ]
        return own, nodes, packed, (*coding.hu, *coding.label), np.array(there)

    def _planes(self, atlas: Atlas, field: NDArray[np.float32]) -> tuple[int, int] | None:
        """Planes of an atlas, of those it holds, that its field can bring to the cells, if any."""
        reached = self._corners[(field[self._corners, 3] > 0).any(axis=1)]
        if not reached.size:
            return None
        z = (self._nodes[:, 0] * self._step + field[:, 0])[reached]
        begin, end = surroundings_of(atlas)[0]
        first, stop = max(int(np.floor(z.min())) - 1, begin), min(int(np.ceil(z.max())) + 2, end)
        return (first, stop) if first < stop else None

    def _vote(
        self,
        part: tuple[int, int],
        atlases: Sequence[Callable[[], Any]],
        scan: Sequence[Callable[[], None]],
    ) -> None:
        """Let atlases vote in some cells, when they are read; in the beginning, and the scan."""
        cells, own = self._cells, slice(*part)
        if scan:
            for wait in scan:
                wait()
            self._here[own] = NOWHERE
            corner = begin_of(self.box)
            gather(self.scan, corner, cells.index[own], self._step, self._here[own])
        lattice = cells.index, self._corners, cells.groups, cells.organs
        for atlas in atlases:
            if read := atlas():
                says, *brings = read
                what = self._step, self._where, self._here, *brings, self._votes, self._totals
                accumulate(part, lattice, says, *what)


def _slab(box: Box) -> tuple[int, int, int]:
    """Shape of a slab of a block."""
    depth, height, width = shape_of(box)
    return min(depth, SHARD[0]), height, width


def _per_plane(atlases: Iterable[Atlas]) -> int:
    """Count the voxels of a plane of the largest atlas."""
    return max((math.prod(shape_of(surroundings_of(a))[1:]) for a in atlases), default=0)


def _groups(says: NDArray[np.bool_], nus: Sequence[float]) -> tuple[list[int], list[float]]:
    """Group the organs whose totals are the same: equal ν, annotated by the same atlases.

    Returns
    -------
    list of int, list of float
        Group of each organ, and ν of each group.
    """
    kinds = [(nu, says[:, o].tobytes()) for o, nu in enumerate(nus)]
    known = list(dict.fromkeys(kinds))
    return [known.index(kind) for kind in kinds], [nu for nu, _ in known]


@kernel
def smooth(around: Any, out: Any) -> None:
    """Average over neighbours, with weights ¼, ½ and ¼ along each axis.

    Parameters
    ----------
    around : float32 array (z + 2, y + 2, x + 2)
        One voxel more on every side.
    out : float32 array (z, y, x)
        Changed.
    """
    quarter, half = np.float32(0.25), np.float32(0.5)
    depth, height, width = out.shape
    rows = np.empty((3, width + 2), np.float32)
    mean = np.empty(width + 2, np.float32)
    for z in range(depth):
        for y in range(height + 2):
            row = rows[y % 3]
            low, here, high = around[z, y], around[z + 1, y], around[z + 2, y]
            for x in range(width + 2):
                row[x] = quarter * (low[x] + high[x]) + half * here[x]
            if y < 2:
                continue
            before, same = rows[(y - 2) % 3], rows[(y - 1) % 3]
            for x in range(width + 2):
                mean[x] = quarter * (before[x] + row[x]) + half * same[x]
            line = out[z, y - 2]
            for x in range(width):
                line[x] = quarter * (mean[x] + mean[x + 2]) + half * mean[x + 1]


@kernel
def _in_plane(c: Any, f: Any) -> Any:
    """Coefficients of 1, x, y and yx where z is `f`, of those of a trilinear polynomial."""
    return c[0] + f * c[3], c[1] + f * c[5], c[2] + f * c[6], c[4] + f * c[7]


@kernel
def accumulate(
    part: Any,
    cells: Any,
    organs: Any,
    step: Any,
    where: Any,
    scan: Any,
    nodes: Any,
    packed: Any,
    coding: Any,
    held: Any,
    votes: Any,
    totals: Any,
) -> None:
    """Add the votes of an atlas in some cells, and all its votes there.

    Parameters
    ----------
    part : (int, int)
        The first of these cells, and the one after the last.
    cells : tuple of int64 arrays
        Lattice indices (cell, 3), nodes of each cell (cell, 8), and where its groups and their
        organs begin: see `kpt_dask.organ_transfer.warping.cells.Cells`.
    organs : tuple of ndarray
        What stands for the label of each organ (slot), log₂ e / 2ν² of each group (group), and
        whether the atlas annotates each organ (slot).
    step : int
        Voxels along the edge of a cell.
    where : float32 array (3, step²)
        From `kpt_dask.organ_transfer.warping.cells.positions`.
    scan : float32 array (cell, n)
        HU.
    nodes : float32 array (node, 4)
        From `kpt_dask.organ_transfer.warping.landing.fit`.
    packed : uint16 or int32 array (z, y, x)
        From `atlas_store.crop.read_planes`.
    coding : tuple of int
        Shift, mask and first of HU, shift and mask of labels: see `crop.Coding`.
    held : int64 array (3, 2)
        The voxels of the atlas that it begins with; outside of these it has no say.
    votes, totals : float32 arrays (slot, n), (group, n)
        Changed.
    """
    index, corners, groups, slots = cells
    values, scales, annotated = organs
    n = scan.shape[1]
    at = np.zeros(n, np.uint32)
    support = np.zeros(n, np.float32)
    hu = np.empty(n, np.float32)
    label = np.empty(n, np.uint16)
    weight = np.empty(n, np.float32)
    c = np.empty((4, 8), np.float32)
    half, nothing = np.float32(0.5), np.float32(0)
    vanishing = np.float32(VANISHING * VANISHING / 2 * LOG2_E)
    oz, oy, ox = held[0, 0], held[1, 0], held[2, 0]
    height, width = packed.shape[1], packed.shape[2]
    bz, by, bx = np.float32(oz), np.float32(oy), np.float32(ox)
    ez, ey, ex = np.float32(held[0, 1]), np.float32(held[1, 1]), np.float32(held[2, 1])
    voxels = packed.ravel()
    hu_shift, hu_mask, first_hu, label_shift, label_mask = coding
    for cell in range(part[0], part[1]):
        # The trilinear field as a polynomial, and so where voxels come from: no branches, and few
        # numbers for a cell.
        supported = nothing
        for d in range(4):
            v0 = nodes[corners[cell, 0], d]
            v1 = nodes[corners[cell, 1], d]
            v2 = nodes[corners[cell, 2], d]
            v3 = nodes[corners[cell, 3], d]
            v4 = nodes[corners[cell, 4], d]
            v5 = nodes[corners[cell, 5], d]
            v6 = nodes[corners[cell, 6], d]
            v7 = nodes[corners[cell, 7], d]
            c[d, 0] = v0
            c[d, 1] = v1 - v0
            c[d, 2] = v2 - v0
            c[d, 3] = v4 - v0
            c[d, 4] = v3 - v2 - v1 + v0
            c[d, 5] = v5 - v4 - v1 + v0
            c[d, 6] = v6 - v4 - v2 + v0
            c[d, 7] = v7 - v6 - v5 - v3 + v4 + v2 + v1 - v0
            supported = max(max(max(v0, v1), max(v2, v3)), max(max(v4, v5), max(v6, v7)))
        if supported == nothing:
            continue
        for d in range(3):
            c[d, 0] += np.float32(index[cell, d] * step) + half
            c[d, 3 - d] += np.float32(step)
        for plane in range(step):
            f = np.float32(plane) / np.float32(step)
            u0, ux, uy, uyx = _in_plane(c[0], f)
            v0, vx, vy, vyx = _in_plane(c[1], f)
            w0, wx, wy, wyx = _in_plane(c[2], f)
            s0, sx, sy, syx = _in_plane(c[3], f)
            here = slice(plane * step * step, (plane + 1) * step * step)
            at_here, support_here = at[here], support[here]
            for q in range(step * step):
                x, y, yx = where[0, q], where[1, q], where[2, q]
                tz = u0 + x * ux + y * uy + yx * uyx
                ty = v0 + x * vx + y * vy + yx * vyx
                tx = w0 + x * wx + y * wy + yx * wyx
                s = s0 + x * sx + y * sy + yx * syx
                inside = (tz >= bz) & (tz < ez) & (ty >= by) & (ty < ey) & (tx >= bx) & (tx < ex)
                k, j, i = np.int32(tz) - oz, np.int32(ty) - oy, np.int32(tx) - ox
                at_here[q] = np.uint32((k * height + j) * width + i if inside else 0)
                support_here[q] = max(s, nothing) if inside else nothing
        # Rows of a cell lie too far apart for the processor to see where the next ones are.
        for row in range(0, step * step * step, step):
            prefetch(voxels, np.intp(at[row]) + AHEAD)
        for q in range(n):
            value = np.int32(voxels[at[q]])
            hu[q] = np.float32((value >> hu_shift & hu_mask) + first_hu)
            label[q] = np.uint16(value >> label_shift & label_mask)
        for g in range(groups[cell], groups[cell + 1]):
            if not annotated[slots[g]]:
                continue
            scale = scales[g]
            for q in range(n):
                d = scan[cell, q] - hu[q]
                x = d * d * scale
                w = support[q] * (exp2(-x) if x < vanishing else nothing)
                weight[q] = w
                totals[g, q] += w
            for o in range(slots[g], slots[g + 1]):
                own = values[o]
                for q in range(n):
                    votes[o, q] += weight[q] if label[q] == own else nothing
