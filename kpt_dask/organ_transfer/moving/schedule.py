"""Move whole organs of the atlases onto the scan, slab by slab: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so slabs are independent and their order of summation is the
same however the volume is cut. Nothing is read of the atlases' organs that no slab needs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
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
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.organ_transfer.decision import SHARD, Share, cut_in_slabs, finish_slab, run_blocks
from kpt_dask.organ_transfer.measures import Tally
from kpt_dask.organ_transfer.moving.distances import REACH, organ_distances
from kpt_dask.organ_transfer.moving.organ import MovedOrgan, read_moved
from kpt_dask.organ_transfer.moving.plan import (
    Moves,
    plan_affines,
    plan_moves,
    propose,
    without_negligible,
)
from kpt_dask.runtime import cluster
from kpt_dask.runtime.balance import cut, deal
from kpt_dask.runtime.memory import budget
from kpt_dask.runtime.team import Jobs, deferred, run_jobs
from kpt_dask.volumes.volume import Volume

READING, FINISHING = 8, 28
"""How much longer it takes than to move a voxel of an organ to unpack a voxel of the scan, and what
is left to do where an organ may be, about."""
BYTES = 8
"""What a voxel of an atlas's organ takes while it is read, about, and at most half afterwards."""
SAMPLING = 10
"""How much longer it takes to look whether an affine brings one, about."""


def move_organs(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    votes: xr.Dataset,
    probability: zarr.Array[Any],
    labels: zarr.Array[Any],
    *,
    mode: str = "organ",
    options: TransferOptions = DEFAULTS,
    memory: int | None = None,
    client: Client | None = None,
) -> Tally:
    """Fill the probabilities by whole organs, and decide each voxel's organ.

    The share of organ l at voxel x is

        Σ_m w_lm · [S_m(x) = l] · exp(−(I(x) − I_m(x))² / 2ν_l²)  /  Σ_m w_lm

    over the matches that move the organ; I_m and S_m are the atlas's image and labels, moved.
    A voxel gets the organ with the largest share (ties go to the organ that comes first in
    the table), or 0 where that is below the threshold. An atlas that does not annotate an
    organ does not move it, so it does not count against it. The modes differ in the matches
    that move an organ, in their weights, and in how:

    - `organ` (eqs. 8–11): those whose atlas label and test keypoint's label are l, with
      w_lm = p(L) · p(m), by their translation, rounded to voxels.
    - `affine`: the same, but where at least `ransac.LEAST` matches between an atlas
      and the scan agree on a plausible affine of the organ, these move it by that affine, and
      the others of that atlas do not; I_m and S_m are those of the voxel nearest to where x
      came from.
    - `across`: all matches, of any label or none, with w_lm = p(m) · exp(−d² / 2ρ²), d the
      distance of the atlas keypoint to the organ, by their translation. Matches farther than
      `distances.REACH` · ρ have no say, and neither have the lightest moves, at most
      `plan.NEGLIGIBLE` of the organ's weight.

    In all three, ``options.across`` names organs that others move: by matches of these labels,
    with w_lm = p(L) · p(m).

    Parameters
    ----------
    volume : Volume
        The scan.
    store, atlas_ids
        The atlases, in the order of the matches' indices.
    keypoints, matches, votes : xarray.Dataset
        From `kpt_dask.extract`, `kpt_dask.match` and `kpt_dask.vote`.
    probability : zarr.Array
        From `kpt_dask.organ_transfer.decision.create_probability`.
    labels : zarr.Array (z, y, x)
        Level 0 of the label map, filled with 0, from `kpt_dask.volumes.omezarr.create_label_image`.
    mode : str
        As above.
    options : TransferOptions
        The threshold, ν, ρ, and which organs move which.
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
    organs, grid = store.organs, volume.grid
    smallest, nus = options.smallest_share(mode), options.nus(mode, organs)
    with cluster.session(client) as session:
        distance = None
        if mode == "across":
            reach = REACH * options.rho
            distance = _distances(keypoints, matches, atlases, organs, reach, session)
        proposals = propose(matches, votes, atlases, organs, options.across, distance, options.rho)
        if mode == "affine":
            moves = plan_affines(proposals, keypoints, matches, atlases, organs, grid)
        else:
            moves = plan_moves(proposals, matches, atlases, organs, grid)
        if mode == "across":
            moves = without_negligible(moves, len(organs))
        totals = np.bincount(moves.organ, moves.weight, minlength=len(organs))
        room = budget(memory) / max(cluster.threads(session))
        reaches = moves.reaches()
        largest = max((sum(o.voxels for o in a.organs.values()) for a in atlases), default=0)
        each, chunks = np.where(moves.bent(), SAMPLING, 1), volume.levels[0].chunks

        @cache
        def time(box: Box) -> float:
            own = list(overlaps(reaches, box).values())
            moved, there = moves.visited_in(box) @ each, sum(map(volume_of, own))
            # Chunks are unpacked whole.
            ends = zip(enclosing(own) or (), chunks, strict=False)
            unpacked = math.prod((-(-b // n) - a // n) * n for (a, b), n in ends) if own else 0
            return float(moved + FINISHING * there + READING * unpacked)

        def fits(box: Box) -> bool:
            """Whether scan and labels, the share of an organ, and the organs of an atlas do."""
            voxels = math.prod(shape_of(box_of(aligned(box, SHARD, grid.shape))))
            return bool(14 * voxels + BYTES * largest <= room)

        everywhere = box_of(tuple(slice(0, n) for n in grid.shape))
        reached = overlap(enclosing(list(reaches.values())), everywhere)
        pieces: list[Box] = []
        for part in cut_in_slabs(reached, grid.shape) if reached else []:
            pieces += [part] if fits(part) else cut(part, SHARD, 1, time, fits)
        tasks = []
        for hand in deal(pieces, cluster.count_teams(session), time):
            # The smallest last, so that threads end together.
            hand.sort(key=time, reverse=True)
            here = moves.take(
                np.flatnonzero(np.any([moves.reach(piece) for piece in hand], axis=0))
            )
            if here.atlas.size:
                local = {a: atlases[a] for a in np.unique(here.atlas).tolist()}
                regions = [aligned(piece, SHARD, grid.shape) for piece in hand]
                what = local, here, organs, nus, totals, smallest, room
                tasks.append((volume.levels[0], *what, probability, labels, regions))
        return run_blocks(transfer_slabs, tasks, organs, session)


def _distances(
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    reach: float,
    client: Client,
) -> NDArray[np.float32]:
    """Distance (match, organ) of each match's atlas keypoint to the atlas's organs, mm."""
    before = keypoints.position.values[matches.keypoint.values] - matches.translation.values
    tasks = [
        (atlas, before[own], organs, reach)
        for atlas, own in zip(atlases, slices_by_atlas(matches, len(atlases)), strict=True)
    ]
    return np.concatenate(cluster.run_small(client, organ_distances, tasks, "Measuring distances"))


def transfer_slabs(
    image: zarr.Array[Any],
    atlases: dict[int, Atlas],
    moves: Moves,
    organs: OrganTable,
    nus: Sequence[float],
    totals: NDArray[np.float64],
    smallest: float,
    room: float,
    probability: zarr.Array[Any],
    labels: zarr.Array[Any],
    regions: Sequence[Region],
    threads: int = 1,
) -> Tally:
    """Fill some slabs of the probabilities, and decide their voxels.

    What is done to a slab, and to its shares, is done while it is in the cache.

    Parameters
    ----------
    moves : Moves
        Those that reach the slabs.
    nus, totals
        Of each organ, ν in HU, and the sum of the weights of all its moves.
    smallest : float
        Share below which a voxel is background.
    room : float
        Bytes that each thread may take. The atlases' organs are kept from slab to slab if they
        fit, and else read again.
    regions : sequence of tuple of slice
        The slabs: whole shards, one shard deep.
    threads : int
        That share the work.
    """
    moves = replace(moves, weight=moves.weight / totals[moves.organ])
    spare = threads * room / 2 - _bytes_to_keep(atlases, moves, organs)
    keep = spare >= 0
    kept: list[dict[int, MovedOrgan]] = []
    boxes: list[dict[int, Box]] = []
    unpacked: dict[int, Callable[[], NDArray[np.int16]]] = {}
    rooms: list[NDArray[np.float32]] = []
    tallies: list[Tally] = []
    everywhere = [box_of(slab) for slab in regions]

    def jobs() -> Jobs:
        ready, left = None, spare
        if keep:
            job, ready = deferred(read_atlases)
            yield job
        reaches = moves.reaches()
        boxes.extend(overlaps(reaches, slab) for slab in everywhere)
        whole = [enclosing(list(own.values())) for own in boxes]
        slabs = [(i, box) for i, box in enumerate(whole) if box is not None]
        shapes = [
            _padded((*box[:2], around[2])) for i, around in slabs for box in boxes[i].values()
        ]
        # One piece of memory a thread: to get new memory takes as long as to fill it.
        rooms.extend(np.zeros(max(map(math.prod, shapes)), np.float32) for _ in range(threads))
        # Threads that all read atlases would wait for each other's Python; to unpack takes none.
        for i, box in slabs:
            left -= 2 * volume_of(box)
            if kept or left < 0:
                break
            job, unpacked[i] = deferred(partial(unpack, box))
            yield job
        for i, box in slabs:
            yield partial(fill, i, box, ready)

    def read_atlases() -> None:
        kept.append(read_moved(atlases, moves, everywhere, organs))

    def unpack(box: Box) -> NDArray[np.int16]:
        hu = np.zeros(_padded(box), np.int16)
        chunk_io.read(image, slices(box), hu[..., LANES:-LANES])
        return hu

    def fill(i: int, around: Box, ready: Callable[[], None] | None) -> None:
        hu = unpacked.pop(i)() if i in unpacked else unpack(around)
        if ready:
            ready()
        room = rooms.pop()
        found = shares(boxes[i], around, hu, room)
        what = organs, smallest, regions[i], (around, hu[..., LANES:-LANES])
        tallies.append(finish_slab(probability, labels, found, *what))
        rooms.append(room)

    def shares(
        own: dict[int, Box], around: Box, hu: NDArray[np.int16], room: NDArray[np.float32]
    ) -> Iterator[Share]:
        for o, box in own.items():
            rows = *box[:2], around[2]
            shape = _padded(rows)
            share = room[: math.prod(shape)].reshape(shape)
            parts = [kept[0][o]] if keep and o in kept[0] else []
            fresh = True
            for bent in (False, True):
                read = parts if keep else _one_by_one(atlases, moves, o, bent, box, organs)
                for organ in read:
                    organ.add(share, box, hu, around, nus[o], bent, fresh)
                    fresh = False
            columns = share[..., LANES:-LANES][within(box, rows)]
            if fresh:
                columns[...] = 0
            yield o, box, columns

    run_jobs(jobs(), threads)
    return sum(tallies, start=Tally.empty(len(organs)))


def _padded(box: Box) -> tuple[int, int, int]:
    """Shape of a box with longer rows, as kernels want them."""
    depth, height, width = shape_of(box)
    return depth, height, LANES + width + LANES


def _bytes_to_keep(atlases: dict[int, Atlas], moves: Moves, organs: OrganTable) -> int:
    """About how many bytes all organs that are moved take, while they are read."""
    begins = moves.begins()
    bent = np.logical_or.reduceat(moves.bent(), begins).tolist()
    pairs = zip(moves.atlas[begins].tolist(), moves.organ[begins].tolist(), strict=True)
    size, names = 0, organs.names
    for (a, o), by_affine in zip(pairs, bent, strict=True):
        info = atlases[a].organs[names[o]]
        size += BYTES * info.voxels + (2 * volume_of(info.bounding_box) if by_affine else 0)
    return size


def _one_by_one(
    atlases: dict[int, Atlas], moves: Moves, organ: int, bent: bool, box: Box, organs: OrganTable
) -> Iterator[MovedOrgan]:
    """Read what moves of a kind bring of an organ into a box, one atlas after the other."""
    wanted = (moves.organ == organ) & (moves.bent() == bent)
    for a in np.unique(moves.atlas[wanted]).tolist():
        own = moves.take(np.flatnonzero(wanted & (moves.atlas == a)))
        yield from read_moved(atlases, own, [box], organs).values()
