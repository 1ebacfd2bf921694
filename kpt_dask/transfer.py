"""Move whole organs of the atlases onto the scan, slab by slab: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so slabs are independent and their order of summation is the
same however the volume is cut. Nothing is read of the atlases' organs that no slab needs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    deal,
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
from kpt_dask.moved import MovedOrgan, read_moved
from kpt_dask.moves import Moves, plan_affines, plan_moves, propose, without_negligible
from kpt_dask.omezarr import Region
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.rows import LANES
from kpt_dask.shares import SHARD, Part, finish_slab, run_blocks, slabs
from kpt_dask.volume import Volume

FINISHING = 70
"""How much longer a voxel that an organ reaches takes than to be moved there once, about."""
BYTES = 8
"""What a voxel of an atlas's organ takes while it is read, about, and at most half afterwards."""
SAMPLING = 15
"""How much longer it takes to move a voxel by an affine, about."""

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
        room = memory / max(threads)
        reaches = list(moves.reaches().values())
        largest = max((sum(o.voxels for o in a.organs.values()) for a in atlases), default=0)
        each = np.ones(moves.atlas.size)
        each[list(moves.inverse)] = SAMPLING

        def reached_in(box: Box) -> int:
            return sum(volume_of(overlap(reach, box)) for reach in reaches)

        def time(box: Box) -> float:
            return float(moves.voxels_in(box) @ each) + FINISHING * reached_in(box)

        def fits(box: Box) -> bool:
            """Whether scan, labels and shares, and the organs of an atlas do."""
            voxels = math.prod(shape_of(box_of(aligned(box, SHARD, grid.shape))))
            return bool(12 * voxels + 6 * reached_in(box) + BYTES * largest <= room)

        everywhere = box_of(tuple(slice(0, n) for n in grid.shape))
        reached = overlap(enclosing(reaches), everywhere)
        pieces: list[Box] = []
        for slab in slabs(aligned(reached, SHARD, grid.shape)) if reached else []:
            part = overlap(reached, box_of(slab))
            if part is not None:
                pieces += [part] if fits(part) else cut(part, SHARD, 1, time, fits)
        tasks = []
        for hand in deal(pieces, sum(threads), time):
            reaching = [moves.voxels_in(piece) for piece in hand]
            here = moves.take(np.flatnonzero(np.sum(reaching, axis=0)))
            if here.atlas.size:
                local = {a: atlases[a] for a in np.unique(here.atlas).tolist()}
                regions = [aligned(piece, SHARD, grid.shape) for piece in hand]
                what = local, here, organs, nus, totals, smallest, room
                tasks.append((volume.levels[0], *what, probability, regions))
        return run_blocks(transfer_slabs, tasks, atlases, organs, session)


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
    regions: Sequence[Region],
) -> tuple[list[Part], Tally]:
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
        Bytes that all this may take. The atlases' organs are kept from slab to slab if they
        fit, and else read again.
    regions : sequence of tuple of slice
        The slabs: whole shards, one shard deep.
    """
    moves = replace(moves, weight=moves.weight / totals[moves.organ])
    reaches = moves.reaches()
    # Atlases that are kept are added together: few calls on much.
    keep = _bytes_to_keep(atlases, moves, organs) <= room / 2
    whole = enclosing([box_of(region) for region in regions])
    kept = read_moved(atlases, moves, whole, organs) if keep and whole is not None else {}
    parts: list[Part] = []
    tally = Tally.empty(len(organs))
    for slab in regions:
        found = {o: overlap(reach, box_of(slab)) for o, reach in reaches.items()}
        boxes = {o: box for o, box in found.items() if box is not None}
        whole = enclosing(list(boxes.values()))
        if whole is None:
            continue
        hu = direct.read(image, slices(whole)).astype(np.float32, copy=False)
        short = hu.astype(np.int16)
        scans, sums = {}, {}
        for o, box in boxes.items():
            depth, height, width = shape_of(box)
            # Longer rows, as the kernel wants them, and of the same length in share and scan.
            shape = depth, height, LANES + width + LANES
            scans[o], sums[o] = np.zeros(shape, np.int16), np.zeros(shape, np.float32)
            scans[o][..., LANES:-LANES] = short[within(box, whole)]
        for organs_here in [kept] if keep else _one_by_one(atlases, moves, box_of(slab), organs):
            for o, organ in organs_here.items():
                if o in boxes:
                    organ.add(sums[o], scans[o], boxes[o], nus[o])
        shares = [(o, box, sums[o][..., LANES:-LANES]) for o, box in boxes.items()]
        parts.append(finish_slab(probability, shares, organs, smallest, slab, (whole, hu), tally))
    return parts, tally


def _bytes_to_keep(atlases: dict[int, Atlas], moves: Moves, organs: OrganTable) -> int:
    """About how many bytes all organs that are moved take, while they are read."""
    begins = moves.begins()
    bent = np.searchsorted(begins, list(moves.inverse), side="right") - 1
    size = 0
    for i, begin in enumerate(begins.tolist()):
        info = atlases[int(moves.atlas[begin])].organs[organs.names[int(moves.organ[begin])]]
        size += BYTES * info.voxels + (2 * volume_of(info.bounding_box) if i in bent else 0)
    return size


def _one_by_one(
    atlases: dict[int, Atlas], moves: Moves, box: Box, organs: OrganTable
) -> Iterator[dict[int, MovedOrgan]]:
    """Read what moves bring into a box, one atlas after the other."""
    for a in atlases:
        own = moves.take(np.flatnonzero(moves.atlas == a))
        yield read_moved({a: atlases[a]}, own, box, organs)
