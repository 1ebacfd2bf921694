"""Move whole organs of the atlases onto the scan, block by block: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so blocks are independent and their order of summation is the
same however the volume is cut. A block reads only what it needs of the atlases' organs.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable, direct
from kpt_dask import cluster
from kpt_dask.boxes import (
    Box,
    aligned,
    box_of,
    cut,
    enclosing,
    overlap,
    shape_of,
    slices,
    volume_of,
    within,
)
from kpt_dask.distances import REACH, organ_distances
from kpt_dask.matching import slices_by_atlas
from kpt_dask.measures import Tally
from kpt_dask.moves import Moves, plan_affines, plan_moves, propose, without_negligible
from kpt_dask.omezarr import CHUNKS, Region
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.shares import Part, finish_block, intensity_table, run_blocks
from kpt_dask.summing import LANES, accumulate, cut_out, sample
from kpt_dask.surroundings import Room, read_planes, room_for, surroundings_of
from kpt_dask.volume import Volume

PIECES = 1
"""Blocks for each thread, so that the threads end at about the same time."""
READING = 6
"""How much longer a voxel takes to be read and cut out than to be added once, about."""
BEND = 50
"""Planes of an atlas that a block reads, beyond as many as it has itself, about."""

DESCRIPTION = (
    "share of each organ's vote weight that places the organ at a voxel and agrees with the "
    "scan's intensity there"
)
"""What the probabilities are."""


def transfer(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    votes: xr.Dataset,
    probability: zarr.Array[Any],
    *,
    mode: str = "organ",
    options: TransferOptions = DEFAULTS,
    memory: int = 1 << 30,
    client: Client | None = None,
) -> tuple[list[Part], Tally]:
    """Fill the probabilities, and decide each voxel's organ.

    The share of organ l at voxel x is

        Σ_m w_lm · [S_m(x) = l] · exp(−(I(x) − I_m(x))² / 2ν_l²)  /  Σ_m w_lm

    over the matches that move the organ; I_m and S_m are the atlas's image and labels, moved.
    A voxel gets the organ with the largest share (ties go to the organ that comes first in
    the table), or 0 where that is below the threshold. An atlas that does not annotate an
    organ does not move it, so it does not count against it. The modes differ in the matches
    that move an organ, in their weights, and in how:

    - `organ` (eqs. 8–11): those whose atlas label and test keypoint's label are l, with
      w_lm = p(L) · p(m), by their translation, rounded to voxels.
    - `affine`: the same, but where at least `kpt_dask.affine.LEAST` matches between an atlas
      and the scan agree on a plausible affine of the organ, these move it by that affine, and
      the others of that atlas do not; I_m and S_m are those of the voxel nearest to where x
      came from.
    - `across`: all matches, of any label or none, with w_lm = p(m) · exp(−d² / 2ρ²), d the
      distance of the atlas keypoint to the organ, by their translation. Matches farther than
      `kpt_dask.distances.REACH` · ρ have no say, and neither have the lightest moves, at most
      `kpt_dask.moves.NEGLIGIBLE` of the organ's weight.

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
        From `kpt_dask.shares.create_probability`.
    mode : str
        As above.
    options : TransferOptions
        The threshold, ν, ρ, and which organs move which.
    memory : int
        Bytes that all blocks of a process may take together, down to one chunk a block.
    client : distributed.Client, optional
        Where the blocks are computed.

    Returns
    -------
    parts : list of (region, labels)
        The parts of the label map that may hold anything, uint16 (z, y, x).
    tally : Tally
        What they count together.
    """
    atlases = store.atlases(atlas_ids)
    organs, grid = store.organs, volume.grid
    probability.update_attributes({"description": DESCRIPTION})
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
        per_plane = max((math.prod(shape_of(surroundings_of(a))[1:]) for a in atlases), default=0)
        threads = session.nthreads().values()

        def time(box: Box) -> float:
            """Voxels to be added, and those to be read and cut out, which takes longer."""
            planes = len(atlases) * per_plane * (shape_of(box)[0] + BEND)
            return float(moves.voxels_in(box).sum()) + READING * planes

        def fits(box: Box) -> bool:
            """Whether shares, the scan, planes of one atlas and an organ cut out of them do."""
            organs_here = np.unique(moves.organ[moves.voxels_in(box) > 0]).size
            planes = 3 * per_plane * (shape_of(box)[0] + BEND)
            needed = 4 * ((2 + organs_here) * volume_of(box) + planes)
            return bool(needed <= memory / max(threads))

        reached = overlap(moves.reach(), box_of(tuple(slice(0, n) for n in grid.shape)))
        tasks = []
        for piece in cut(reached, CHUNKS, PIECES * sum(threads), time, fits) if reached else []:
            here = moves.take(np.flatnonzero(moves.voxels_in(piece)))
            if here.atlas.size:
                local = {a: atlases[a] for a in np.unique(here.atlas).tolist()}
                region = aligned(piece, CHUNKS, grid.shape)
                what = local, here, organs, nus, totals, smallest
                tasks.append((volume.levels[0], *what, probability, region))
        return run_blocks(transfer_block, tasks, atlases, organs, session)


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


def transfer_block(
    image: zarr.Array[Any],
    atlases: dict[int, Atlas],
    moves: Moves,
    organs: OrganTable,
    nus: Sequence[float],
    totals: NDArray[np.float64],
    smallest: float,
    probability: zarr.Array[Any],
    region: Region,
) -> tuple[Part, Tally]:
    """Fill one block of the probabilities, and decide its voxels.

    Parameters
    ----------
    moves : Moves
        Those that reach the region.
    nus, totals
        Of each organ, ν in HU, and the sum of the weights of all its moves.
    smallest : float
        Share below which a voxel is background.
    """
    boxes: dict[int, Box] = {}
    for o in np.unique(moves.organ).tolist():
        box = overlap(moves.take(np.flatnonzero(moves.organ == o)).reach(), box_of(region))
        assert box is not None
        boxes[o] = box
    whole = enclosing(list(boxes.values()))
    assert whole is not None
    scan = direct.read(image, slices(whole)).astype(np.float32, copy=False)
    # Longer rows, as the kernel wants them, and side by side: it is slow on a cut-out that is none.
    padding = (0, 0), (0, 0), (0, LANES)
    scans = {o: np.pad(scan[within(box, whole)], padding) for o, box in boxes.items()}
    sums = {o: np.zeros(here.shape, np.float32) for o, here in scans.items()}
    room = Room()
    for a, atlas in atlases.items():
        own = moves.take(np.flatnonzero(moves.atlas == a))
        _add(sums, scans, boxes, own, atlas, organs, nus, totals, room)
    found = [(o, box, sums[o][..., :-LANES]) for o, box in boxes.items()]
    return finish_block(probability, found, organs, smallest, region, (whole, scan))


def _add(
    sums: dict[int, NDArray[np.float32]],
    scans: dict[int, NDArray[np.float32]],
    boxes: dict[int, Box],
    moves: Moves,
    atlas: Atlas,
    organs: OrganTable,
    nus: Sequence[float],
    totals: NDArray[np.float64],
    room: Room,
) -> None:
    """Add all moves of one atlas to the shares of its organs, each in a box of its own."""
    wanted: dict[int, tuple[Moves, Box]] = {}
    for o in np.unique(moves.organ).tolist():
        own = moves.take(np.flatnonzero(moves.organ == o))
        bounds = atlas.organs[organs.names[o]].bounding_box
        planes = _planes(own, boxes[o], bounds)
        if planes is not None:
            wanted[o] = own, (planes, bounds[1], bounds[2])
    needed = enclosing([source for _, source in wanted.values()])
    if needed is None:
        return
    first_plane, last_plane = needed[0]
    own_room = room.of(room_for(atlas, last_plane - first_plane))
    values, held = read_planes(atlas, first_plane, last_plane, own_room)
    for o, (own, source) in wanted.items():
        packed = values[within(source, held)]
        patch = np.empty((*packed.shape[:2], packed.shape[2] + LANES), np.int16)
        extent = np.empty((*packed.shape[:2], 2), np.int64)
        cut_out(packed, organs.values[o], patch, extent)
        corner = np.array([start for start, _ in boxes[o]])
        bounds = atlas.organs[organs.names[o]].bounding_box
        # First voxel of the patch in the organ's bounding box.
        first = np.array([a - b for (a, _), (b, _) in zip(source, bounds, strict=True)])
        weights = (own.weight / totals[o]).astype(np.float32)
        shifted = np.array([i not in own.inverse for i in range(own.atlas.size)])
        offsets = corner - own.low[shifted] - first
        accumulate(sums[o], scans[o], patch, extent, offsets, weights[shifted], nus[o])
        for i, inverse in own.inverse.items():
            start = np.maximum(own.low[i] - corner, 0)
            stop = np.minimum(own.high[i] - corner, shape_of(boxes[o]))
            where = start, stop, corner, first, inverse
            sample(sums[o], scans[o], patch, *where, weights[i], intensity_table(nus[o]))


def _planes(moves: Moves, box: Box, bounds: Box) -> tuple[int, int] | None:
    """Planes of an atlas that moves of an organ, of these bounds in it, bring into a box."""
    (begin, end), _, _ = bounds
    reaching = np.flatnonzero(moves.voxels_in(box))
    if not reaching.size:
        return None
    if any(i in moves.inverse for i in reaching.tolist()):
        return begin, end
    low, high = moves.low[reaching, 0], moves.high[reaching, 0]
    first = np.maximum(low, box[0][0]) - low
    stop = np.minimum(high, box[0][1]) - low
    return begin + int(first.min()), begin + int(stop.max())
