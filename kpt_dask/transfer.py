"""Move whole organs of the atlases onto the scan, block by block: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so blocks are independent and their order of summation is the
same however the volume is cut. A block reads only what it needs of the atlases' organs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    begin_of,
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
from kpt_dask.moves import Moves, plan_affines, plan_moves, propose, without_negligible
from kpt_dask.omezarr import Region
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.rows import LANES
from kpt_dask.shares import SHARD, Part, finish_slab, intensity_table, run_blocks, slabs
from kpt_dask.strips import Strips, read_strips
from kpt_dask.summing import accumulate, sample
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
        reaches = [own.reach() for own in moves.by_organ().values()]
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
            return bool(12 * voxels + 4 * reached_in(box) + BYTES * largest <= room)

        reached = overlap(moves.reach(), box_of(tuple(slice(0, n) for n in grid.shape)))
        pieces: list[Box] = []
        for slab in slabs(aligned(reached, SHARD, grid.shape)) if reached else []:
            part = overlap(reached, box_of(slab))
            pieces += cut(part, SHARD, 1, time, fits) if part else []
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
    movers = {a: moves.take(np.flatnonzero(moves.atlas == a)).by_organ() for a in atlases}
    reaches = {o: own.reach() for o, own in moves.by_organ().items()}
    voxels = sum(atlases[a].organs[organs.names[o]].voxels for a in movers for o in movers[a])
    # Atlases that are kept are added together: few calls on much.
    keep = BYTES * voxels <= room / 2
    kept = _read(atlases, movers, regions, organs) if keep else {}
    parts: list[Part] = []
    tally = Tally.empty(len(organs))
    for slab in regions:
        found = {o: overlap(reach, box_of(slab)) for o, reach in reaches.items()}
        boxes = {o: box for o, box in found.items() if box is not None}
        whole = enclosing(list(boxes.values()))
        if whole is None:
            continue
        hu = direct.read(image, slices(whole)).astype(np.float32, copy=False)
        # Longer rows, as the kernel wants them, and of the same length in share and scan.
        padding = (0, 0), (0, 0), (LANES, LANES)
        short = hu.astype(np.int16)
        scans = {o: np.pad(short[within(box, whole)], padding) for o, box in boxes.items()}
        sums = {o: np.zeros(scan.shape, np.float32) for o, scan in scans.items()}
        groups = (
            [kept]
            if keep
            else (_read({a: atlases[a]}, {a: own}, [slab], organs) for a, own in movers.items())
        )
        for group in groups:
            for o, organ in group.items():
                if o in boxes:
                    _add(sums[o], scans[o], boxes[o], organ, nus[o])
        shares = [(o, box, sums[o][..., LANES:-LANES]) for o, box in boxes.items()]
        parts.append(finish_slab(probability, shares, organs, smallest, slab, (whole, hu), tally))
    return parts, tally


@dataclass(frozen=True)
class _Organ:
    """An organ of some atlases, and its moves.

    Attributes
    ----------
    strips : int16 array (n, `PLACE` + `LANES`)
        All that was read of these atlases.
    planes : int64 array (p)
        Where in it the strips of each plane of each atlas's organ begin, and where they end.
    shifts : int64 array (m, 7)
        Of moves by whole voxels: where the bounding box begins in the volume, its size, and
        where its planes begin in `planes`.
    weights : float32 array (m)
        Of these moves.
    affines : list of (dense, low, high, inverse, weight)
        Of the moves by affines: the bounding box, int16 (z, y, x), and as in `Moves`.
    """

    strips: NDArray[np.int16]
    planes: NDArray[np.int64]
    shifts: NDArray[np.int64]
    weights: NDArray[np.float32]
    affines: list[tuple[Any, Any, Any, Any, Any]]

    @classmethod
    def of(cls, parts: Sequence[tuple[Strips, Moves, Box]]) -> "_Organ":
        """Put together the strips of an organ, its moves, and its bounds, of each atlas."""
        planes, shifts, weights, affines = [], [], [], []
        n_planes = 0
        for own, moves, bounds in parts:
            size = shape_of(bounds)
            planes.append(own.planes)
            shifted = np.ones(moves.weight.size, bool)
            shifted[list(moves.inverse)] = False
            low = moves.low[shifted]
            shifts.append(np.column_stack([low, np.tile((*size, n_planes), (len(low), 1))]))
            weight = moves.weight.astype(np.float32)
            weights.append(weight[shifted])
            if moves.inverse:
                dense = own.dense(size)
                for i, inverse in moves.inverse.items():
                    affines.append((dense, moves.low[i], moves.high[i], inverse, weight[i]))
            n_planes += own.planes.size
        return cls(
            parts[0][0].values,
            np.concatenate(planes),
            np.concatenate(shifts),
            np.concatenate(weights),
            affines,
        )


def _read(
    atlases: dict[int, Atlas],
    movers: dict[int, dict[int, Moves]],
    regions: Sequence[Region],
    organs: OrganTable,
) -> dict[int, _Organ]:
    """Read what the moves of each organ of some atlases bring into some slabs."""
    box = enclosing([box_of(region) for region in regions])
    assert box is not None
    wanted = []
    for a, own in movers.items():
        bounds = {o: atlases[a].organs[organs.names[o]].bounding_box for o in own}
        planes = {o: _planes(moves, box, bounds[o]) for o, moves in own.items()}
        of_atlas = {organs.names[o]: part for o, part in planes.items() if part is not None}
        wanted.append((atlases[a], of_atlas))
    parts: dict[int, list[tuple[Strips, Moves, Box]]] = {}
    for (a, own), found in zip(movers.items(), read_strips(wanted, organs), strict=True):
        for name, strips in found.items():
            o = organs.names.index(name)
            bounds_of = atlases[a].organs[name].bounding_box
            parts.setdefault(o, []).append((strips, own[o], bounds_of))
    return {o: _Organ.of(own) for o, own in parts.items()}


def _planes(moves: Moves, box: Box, bounds: Box) -> tuple[int, int] | None:
    """Planes of an organ, of these bounds in its atlas, that its moves bring into a box, if any."""
    here = moves.voxels_in(box) > 0
    if not here.any():
        return None
    if moves.inverse:
        return 0, bounds[0][1] - bounds[0][0]
    low, high = moves.low[here, 0], moves.high[here, 0]
    first = np.maximum(low, box[0][0]) - low
    stop = np.minimum(high, box[0][1]) - low
    return int(first.min()), int(stop.max())


def _add(
    share: NDArray[np.float32],
    scan: NDArray[np.int16],
    box: Box,
    organ: _Organ,
    nu: float,
) -> None:
    """Add the moves of an organ to its share, that of a box in the volume."""
    first = begin_of(box)
    if organ.weights.size:
        moved = organ.strips, organ.planes, organ.shifts, organ.weights
        accumulate(share, scan, first, *moved, nu)
    for dense, low, high, inverse, weight in organ.affines:
        start, stop = np.maximum(low - first, 0), np.minimum(high - first, shape_of(box))
        where = start, stop, inverse
        sample(share, scan, first, dense, *where, weight, intensity_table(nu))
