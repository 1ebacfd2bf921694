"""Move whole organs of the atlases onto the scan, block by block: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so blocks are independent and their order of summation is the
same however the volume is cut. A block reads only what it needs of the atlases' organs.
"""

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
from kpt_dask.omezarr import Region
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.rows import LANES
from kpt_dask.shares import CHUNKS, Part, finish_block, intensity_table, run_blocks
from kpt_dask.strips import read_strips
from kpt_dask.summing import accumulate, sample
from kpt_dask.volume import Volume

FINISHING = 140
"""How much longer a voxel that an organ reaches takes than to be moved there once, about."""
PIECES = 1
"""Blocks for each thread, so that the threads end at about the same time."""

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
            moves = plan_affines(proposals, keypoints, matches, atlases, organs, grid, session)
        else:
            moves = plan_moves(proposals, matches, atlases, organs, grid)
        if mode == "across":
            moves = without_negligible(moves, len(organs))
        totals = np.bincount(moves.organ, moves.weight, minlength=len(organs))
        threads = session.nthreads().values()
        reaches = [own.reach() for own in moves.by_organ().values()]
        voxels = max((sum(o.voxels for o in a.organs.values()) for a in atlases), default=0)

        def reached_in(box: Box) -> int:
            return sum(volume_of(overlap(reach, box)) for reach in reaches)

        def time(box: Box) -> float:
            return float(moves.voxels_in(box).sum()) + FINISHING * reached_in(box)

        def fits(box: Box) -> bool:
            """Whether scan, labels, the organs' scans and shares, and those of an atlas do."""
            needed = 4 * (2 * volume_of(box) + 3 * reached_in(box) + 2 * voxels)
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
    for o, own in moves.by_organ().items():
        box = overlap(own.reach(), box_of(region))
        assert box is not None
        boxes[o] = box
    whole = enclosing(list(boxes.values()))
    assert whole is not None
    scan = direct.read(image, slices(whole)).astype(np.float32, copy=False)
    # Longer rows, as the kernel wants them, and side by side: it is slow on a cut-out that is none.
    padding = (0, 0), (0, 0), (LANES, LANES)
    scans = {o: np.pad(scan[within(box, whole)], padding) for o, box in boxes.items()}
    sums = {o: np.zeros(here.shape, np.float32) for o, here in scans.items()}
    for a, atlas in atlases.items():
        of_atlas = moves.take(np.flatnonzero(moves.atlas == a))
        _add(sums, scans, boxes, of_atlas, atlas, organs, nus, totals)
    found = [(o, box, sums[o][..., LANES:-LANES]) for o, box in boxes.items()]
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
) -> None:
    """Add all moves of one atlas to the shares of its organs, each in a box of its own."""
    own_moves = moves.by_organ()
    bounds = {o: atlas.organs[organs.names[o]].bounding_box for o in own_moves}
    wanted = {organs.names[o]: _planes(own, boxes[o], bounds[o]) for o, own in own_moves.items()}
    strips = read_strips(atlas, wanted, organs)
    for o, own in own_moves.items():
        organ = strips[organs.names[o]]
        corner = np.array([start for start, _ in boxes[o]])
        weights = (own.weight / totals[o]).astype(np.float32)
        shifted = np.array([i not in own.inverse for i in range(own.atlas.size)])
        offsets = own.low[shifted] - corner
        what = sums[o], scans[o]
        accumulate(*what, organ.values, organ.planes, offsets, weights[shifted], nus[o])
        if own.inverse:
            dense = organ.dense(shape_of(bounds[o]))
        for i, inverse in own.inverse.items():
            start = np.maximum(own.low[i] - corner, 0)
            stop = np.minimum(own.high[i] - corner, shape_of(boxes[o]))
            where = start, stop, corner, inverse
            sample(*what, dense, *where, weights[i], intensity_table(nus[o]))


def _planes(moves: Moves, box: Box, bounds: Box) -> tuple[int, int]:
    """Planes of an organ, of these bounds in its atlas, that its moves bring into a box."""
    if moves.inverse:
        return 0, bounds[0][1] - bounds[0][0]
    low, high = moves.low[:, 0], moves.high[:, 0]
    first = np.maximum(low, box[0][0]) - low
    stop = np.minimum(high, box[0][1]) - low
    return int(first.min()), int(stop.max())
