"""Move whole organs of the atlases onto the scan, block by block.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so blocks are independent and their order of summation is the
same however the volume is cut. A block reads only what it needs of the atlases' organs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable
from kpt_dask import cluster
from kpt_dask.grid import Grid
from kpt_dask.jit import kernel
from kpt_dask.omezarr import COMPRESSOR, Region, regions, write_region
from kpt_dask.patches import OUTSIDE, read_patch
from kpt_dask.volume import Volume

SMALLEST_SHARE = 0.15
"""Voxels whose largest share is below this are background (section 2.4)."""

BLOCK = (128, 128, 128)
"""What one task decides at most (z, y, x): whole chunks of the probabilities and the labels."""
CHUNKS = (64, 64, 64)
"""Of one organ's probabilities; chunks without the organ are not stored."""

_VANISHING = 6.0
"""Standard deviations beyond which the intensity likelihood is 0."""


@dataclass(frozen=True)
class Move:
    """One organ of one atlas, moved by whole voxels.

    Attributes
    ----------
    atlas : int
        Index of the atlas.
    organ : int
        Index of the organ in the table.
    weight : float
        Sum of p(L) · p(m) of the matches that propose this move.
    box : ((int, int), (int, int), (int, int))
        Bounding box of the moved organ, in voxels of the scan, half-open.
    """

    atlas: int
    organ: int
    weight: float
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def plan_moves(
    matches: xr.Dataset,
    votes: xr.Dataset,
    atlases: Sequence[Atlas],
    organs: OrganTable,
    grid: Grid,
) -> list[Move]:
    """Decide which organs move where, and with which weight.

    Every match whose atlas label equals its test keypoint's label moves the whole organ by
    its translation, rounded to voxels, with weight p(L) · p(m) (eqs. 8–10). Matches that
    propose the same move are one move.

    Returns
    -------
    list of Move
        Ordered by atlas, organ and shift: the order of summation.
    """
    keypoint = matches.keypoint.values
    label = matches.label.values
    agree = np.flatnonzero((label > 0) & (label == votes.label.values[keypoint]))
    index_of = {organ.value: i for i, organ in enumerate(organs)}
    organ = np.array([index_of[int(v)] for v in label[agree]], np.int64)
    weight = votes.posterior.values[keypoint[agree], organ].astype(np.float64)
    weight *= matches.probability.values[agree]
    atlas = matches.atlas.values[agree].astype(np.int64)
    origins = np.array([a.info.origin for a in atlases]).reshape(-1, 3)
    moved = matches.translation.values[agree].astype(np.float64) + origins[atlas] - grid.origin
    shift = np.rint(moved / grid.spacing).astype(np.int64)
    keys, inverse = np.unique(np.column_stack([atlas, organ, shift]), axis=0, return_inverse=True)
    weights = np.bincount(inverse.ravel(), weight, minlength=len(keys))
    moves = []
    names = organs.names
    for (a, o, *by), w in zip(keys.tolist(), weights.tolist(), strict=True):
        info = atlases[a].organs[names[o]]
        box = tuple((s + d, e + d) for (s, e), d in zip(info.bounding_box, by, strict=True))
        moves.append(Move(a, o, w, (box[0], box[1], box[2])))
    return moves


def create_probability(group: zarr.Group, grid: Grid, organs: OrganTable) -> zarr.Array[Any]:
    """Make ``probability`` (organ, z, y, x) float32; chunks without the organ cost nothing."""
    return group.create_array(
        "probability",
        shape=(len(organs), *grid.shape),
        dtype=np.float32,
        chunks=(1, *(min(n, c) for n, c in zip(grid.shape, CHUNKS, strict=True))),
        compressors=COMPRESSOR,
        fill_value=0,
        dimension_names=("organ", "z", "y", "x"),
        attributes={
            "description": "share of each organ's vote weight that places the organ at a voxel "
            "and agrees with the scan's intensity there",
            "organs": list(organs.names),
        },
    )


def transfer(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    matches: xr.Dataset,
    votes: xr.Dataset,
    probability: zarr.Array[Any],
    *,
    client: Client | None = None,
) -> list[tuple[Region, NDArray[np.uint16]]]:
    """Fill the probabilities, and decide each voxel's organ.

    The share of organ l at voxel x is

        Σ_m p(L) · p(m) · [S_m(x) = l] · exp(−(I(x) − I_m(x))² / 2ν_l²)  /  Σ_m p(L) · p(m)

    over the matches that transfer the organ (eqs. 8–11); I_m and S_m are the atlas's image
    and labels, moved. A voxel gets the organ with the largest share (ties go to the organ
    that comes first in the table), or 0 where that is below `SMALLEST_SHARE`. An atlas that
    does not annotate an organ has no match for it, so it does not count against it.

    Parameters
    ----------
    volume : Volume
        The scan.
    store, atlas_ids
        The atlases, in the order of the matches' indices.
    matches, votes : xarray.Dataset
        From `kpt_dask.match` and `kpt_dask.vote`.
    probability : zarr.Array
        From `create_probability`.
    client : distributed.Client, optional
        Where the blocks are computed.

    Returns
    -------
    list of (region, labels)
        The parts of the label map that hold anything, uint16 (z, y, x).
    """
    atlases = store.atlases(atlas_ids)
    organs = store.organs
    moves = plan_moves(matches, votes, atlases, organs, volume.grid)
    totals = np.zeros(len(organs))
    for move in moves:
        totals[move.organ] += move.weight
    tasks = []
    for region in regions(volume.grid.shape, BLOCK):
        here = [move for move in moves if _touches(move, region)]
        if here:
            local = {move.atlas: atlases[move.atlas] for move in here}
            tasks.append((volume.levels[0], local, here, organs, totals, probability, region))
    parts = []
    with cluster.session(client) as session:
        for _, part in cluster.run(session, transfer_block, tasks, "Transferring organs"):
            parts.append(part)
    for atlas in atlases:
        atlas.ensure_present()
    return parts


def transfer_block(
    image: zarr.Array[Any],
    atlases: dict[int, Atlas],
    moves: Sequence[Move],
    organs: OrganTable,
    totals: NDArray[np.float64],
    probability: zarr.Array[Any],
    region: Region,
) -> tuple[Region, NDArray[np.uint16]]:
    """Fill one block of the probabilities, and return its part of the label map."""
    labels = np.zeros([s.stop - s.start for s in region], np.uint16)
    # Only the chunks that some organ reaches are worth computing and writing.
    box = tuple(
        slice(low // c * c, min(-(-high // c) * c, s.stop))
        for low, high, c, s in zip(
            *_bounds(moves, region), probability.chunks[1:], region, strict=True
        )
    )
    here = np.asarray(image[box], np.float32)
    present = sorted({move.organ for move in moves})
    shares = np.zeros((len(present), *here.shape), np.float32)
    for (a, o), own in groupby(moves, key=lambda move: (move.atlas, move.organ)):
        group = list(own)
        organ = organs.organs[o]
        source = _source(group, box)
        patch = read_patch(atlases[a], organ.name, source)
        table = intensity_table(organ.nu)
        for move in group:
            start, stop, offset = _overlap(move, box, source)
            weight = float(move.weight / totals[o])
            accumulate(shares[present.index(o)], here, patch, start, stop, offset, weight, table)
    for o, share in zip(present, shares, strict=True):
        write_region(probability, (slice(o, o + 1), *box), share[None])
    inside = tuple(
        slice(b.start - s.start, b.stop - s.start) for b, s in zip(box, region, strict=True)
    )
    values = np.array([organs.values[o] for o in present], np.uint16)
    decide(shares, values, np.float32(SMALLEST_SHARE), labels[inside])
    return region, labels


@kernel
def decide(
    shares: NDArray[np.float32],
    values: NDArray[np.uint16],
    smallest: np.float32,
    labels: NDArray[np.uint16],
) -> None:
    """Give each voxel the label of its largest share, where that is at least `smallest`.

    Parameters
    ----------
    shares : float32 array (organ, z, y, x)
    values : uint16 array (organ)
        Their labels; ties go to the first.
    smallest : float32
    labels : uint16 array (z, y, x)
        Changed where an organ wins.
    """
    for z in range(shares.shape[1]):
        for y in range(shares.shape[2]):
            for x in range(shares.shape[3]):
                largest = np.float32(0)
                for o in range(values.size):
                    share = shares[o, z, y, x]
                    if share > largest:
                        largest = share
                        if share >= smallest:
                            labels[z, y, x] = values[o]


def intensity_table(nu: float) -> NDArray[np.float32]:
    """exp(−d² / 2ν²) for d = 0, 1, 2, … HU; scans hold whole HU, so differences are whole."""
    d = np.arange(int(np.ceil(_VANISHING * nu)) + 1)
    table = np.exp(-(d**2) / (2 * nu**2)).astype(np.float32)
    table[-1] = 0
    return table


@kernel
def accumulate(
    share: NDArray[np.float32],
    image: NDArray[np.float32],
    patch: NDArray[np.int16],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    offset: NDArray[np.int64],
    weight: float,
    table: NDArray[np.float32],
) -> None:
    """Add one moved organ to its share, within the box ``start … stop`` of the block.

    Parameters
    ----------
    share, image : float32 arrays (z, y, x)
        Of the block; `share` is changed.
    patch : int16 array (z, y, x)
        HU of the atlas's organ, `OUTSIDE` elsewhere; voxel v of the block is ``v + offset``.
    weight : float
        Of the move, as a share of the organ's.
    table : float32 array
        From `intensity_table`.
    """
    last = table.size - 1
    w = np.float32(weight)
    for z in range(start[0], stop[0]):
        for y in range(start[1], stop[1]):
            row = share[z, y]
            scan = image[z, y]
            atlas = patch[z + offset[0], y + offset[1]]
            for x in range(start[2], stop[2]):
                hu = atlas[x + offset[2]]
                if hu != OUTSIDE:
                    row[x] += w * table[min(int(abs(scan[x] - hu)), last)]


def _bounds(moves: Sequence[Move], region: Region) -> tuple[list[int], list[int]]:
    """Find the lowest and highest voxels of a region that moves reach, along each axis."""
    low = [max(min(m.box[a][0] for m in moves), s.start) for a, s in enumerate(region)]
    high = [min(max(m.box[a][1] for m in moves), s.stop) for a, s in enumerate(region)]
    return low, high


def _touches(move: Move, region: Region) -> bool:
    return all(a < s.stop and b > s.start for (a, b), s in zip(move.box, region, strict=True))


def _source(moves: Sequence[Move], region: Region) -> Region:
    """Find the part of an organ's patch that its moves bring into a region."""
    parts = []
    for axis, s in enumerate(region):
        lows = [max(s.start - m.box[axis][0], 0) for m in moves]
        highs = [min(m.box[axis][1], s.stop) - m.box[axis][0] for m in moves]
        parts.append(slice(min(lows), max(highs)))
    return tuple(parts)


def _overlap(
    move: Move, region: Region, source: Region
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where a move's box lies in a region, and how to get from there to the source."""
    base = np.array([s.start for s in region])
    start = np.array([max(a, s.start) for (a, _), s in zip(move.box, region, strict=True)])
    stop = np.array([min(b, s.stop) for (_, b), s in zip(move.box, region, strict=True)])
    first = np.array([a + s.start for (a, _), s in zip(move.box, source, strict=True)])
    return start - base, stop - base, base - first
