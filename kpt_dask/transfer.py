"""Move whole organs of the atlases onto the scan, block by block: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so blocks are independent and their order of summation is the
same however the volume is cut. A block reads only what it needs of the atlases' organs.
"""

import math
from collections.abc import Sequence
from itertools import groupby, product
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
from kpt_dask.moves import Move, plan_affines, plan_moves, propose, without_negligible
from kpt_dask.omezarr import CHUNKS, Region
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.shares import Part, finish_block, intensity_table, run_blocks
from kpt_dask.summing import LANES, accumulate, cut_out, sample
from kpt_dask.surroundings import read_planes, surroundings_of
from kpt_dask.volume import Volume

PIECES = 2
"""Blocks for each thread, so that the threads end at about the same time."""
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
    list of (region, labels)
        The parts of the label map that hold anything, uint16 (z, y, x).
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
        totals = np.zeros(len(organs))
        for move in moves:
            totals[move.organ] += move.weight
        lows, highs = _ends(moves)
        per_plane = max((math.prod(shape_of(surroundings_of(a))[1:]) for a in atlases), default=0)

        def overlaps(box: Box) -> NDArray[np.int64]:
            """Voxels of a box that each move reaches."""
            start, stop = np.array(box).T
            sides = np.minimum(highs, stop) - np.maximum(lows, start)
            voxels: NDArray[np.int64] = np.maximum(sides, 0).prod(axis=1)
            return voxels

        def time(box: Box) -> float:
            return float(overlaps(box).sum()) + per_plane * shape_of(box)[0]

        def fits(box: Box) -> bool:
            """Shares, the scan, and planes of one atlas with an organ cut out of them."""
            organs_here = np.unique([moves[i].organ for i in np.flatnonzero(overlaps(box))]).size
            planes = 3 * per_plane * (shape_of(box)[0] + BEND)
            needed = 4 * ((2 + organs_here) * volume_of(box) + planes)
            return bool(needed <= memory / max(threads))

        threads = session.nthreads().values()
        reached = overlap(
            enclosing([move.box for move in moves]), box_of(tuple(slice(0, n) for n in grid.shape))
        )
        tasks = []
        for piece in cut(reached, CHUNKS, PIECES * sum(threads), time, fits) if reached else []:
            here = [moves[i] for i in np.flatnonzero(overlaps(piece))]
            if here:
                local = {move.atlas: atlases[move.atlas] for move in here}
                region = aligned(piece, CHUNKS, grid.shape)
                what = local, here, organs, nus, totals, smallest
                tasks.append((volume.levels[0], *what, probability, region))
        return run_blocks(transfer_block, tasks, atlases, organs, session)


def _ends(moves: Sequence[Move]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First voxels of the moves' boxes, and the ones past their last, (move, 3)."""
    ends = np.array([move.box for move in moves], np.int64).reshape(-1, 3, 2)
    return ends[..., 0], ends[..., 1]


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
    moves: Sequence[Move],
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
    moves
        Those that reach the region, ordered by atlas and organ.
    nus, totals
        Of each organ, ν in HU, and the sum of the weights of all its moves.
    smallest : float
        Share below which a voxel is background.
    """
    reached: dict[int, list[Box]] = {}
    for move in moves:
        box = overlap(move.box, box_of(region))
        assert box is not None
        reached.setdefault(move.organ, []).append(box)
    boxes = {o: box for o, own in sorted(reached.items()) if (box := enclosing(own))}
    whole = enclosing(list(boxes.values()))
    assert whole is not None
    scan = direct.read(image, slices(whole)).astype(np.float32, copy=False)
    # Longer rows, as the kernel wants them, and side by side: it is slow on a cut-out that is none.
    padding = (0, 0), (0, 0), (0, LANES)
    scans = {o: np.pad(scan[within(box, whole)], padding) for o, box in boxes.items()}
    sums = {o: np.zeros(here.shape, np.float32) for o, here in scans.items()}
    for a, own in groupby(moves, key=lambda move: move.atlas):
        _add(sums, scans, boxes, list(own), atlases[a], organs, nus, totals)
    found = [(o, box, sums[o][..., :-LANES]) for o, box in boxes.items()]
    return finish_block(probability, found, organs, smallest, region, (whole, scan))


def _add(
    sums: dict[int, NDArray[np.float32]],
    scans: dict[int, NDArray[np.float32]],
    boxes: dict[int, Box],
    moves: Sequence[Move],
    atlas: Atlas,
    organs: OrganTable,
    nus: Sequence[float],
    totals: NDArray[np.float64],
) -> None:
    """Add all moves of one atlas to the shares of its organs, each in a box of its own."""
    wanted: dict[int, tuple[list[Move], Box]] = {}
    for o, of_organ in groupby(moves, key=lambda move: move.organ):
        own = list(of_organ)
        bounds = atlas.organs[organs.names[o]].bounding_box
        sources = [_source(move, boxes[o], bounds) for move in own]
        source = enclosing([one for one in sources if one is not None])
        if source is not None:
            wanted[o] = own, (source[0], bounds[1], bounds[2])
    needed = enclosing([source for _, source in wanted.values()])
    if needed is None:
        return
    planes, held = read_planes(atlas, *needed[0])
    for o, (own, source) in wanted.items():
        packed = planes[within(source, held)]
        patch = np.empty((*packed.shape[:2], packed.shape[2] + LANES), np.int16)
        extent = np.empty((*packed.shape[:2], 2), np.int64)
        cut_out(packed, organs.values[o], patch, extent)
        corner = np.array([start for start, _ in boxes[o]])
        first = np.array([start for start, _ in source])
        bounds = atlas.organs[organs.names[o]].bounding_box
        shifted = [move for move in own if move.inverse is None]
        if shifted:
            to_atlas = np.array([b[0] for b in bounds]) - _ends(shifted)[0]
            weights = np.array([move.weight / totals[o] for move in shifted], np.float32)
            offsets = corner + to_atlas - first
            accumulate(sums[o], scans[o], patch, extent, offsets, weights, nus[o])
        for move in own:
            if move.inverse is not None:
                common = overlap(move.box, boxes[o])
                assert common is not None
                start, stop = (np.array(ends) - corner for ends in zip(*common, strict=True))
                begin = first - [b[0] for b in bounds]
                weight = np.float32(move.weight / totals[o])
                where = start, stop, corner, begin, move.inverse
                sample(sums[o], scans[o], patch, *where, weight, intensity_table(nus[o]))


def _source(move: Move, box: Box, bounds: Box) -> Box | None:
    """Find the part of an organ, of these bounds in its atlas, that a move brings into a box."""
    common = overlap(move.box, box)
    if common is None:
        return None
    if move.inverse is None:
        z, y, x = (
            (a - s + first, b - s + first)
            for (a, b), (s, _), (first, _) in zip(common, move.box, bounds, strict=True)
        )
        return z, y, x
    corners = np.array(list(product(*((a, b - 1) for a, b in common))))
    at = corners @ move.inverse[:, :3].T + move.inverse[:, 3] + [first for first, _ in bounds]
    low = np.floor(at.min(axis=0)).astype(int).tolist()
    high = (np.ceil(at.max(axis=0)) + 1).astype(int).tolist()
    z, y, x = zip(low, high, strict=True)
    return overlap((z, y, x), bounds)
