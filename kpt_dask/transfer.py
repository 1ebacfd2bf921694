"""Move whole organs of the atlases onto the scan, block by block: `organ`, `affine`, `across`.

After Wachinger et al. 2015, eqs. 8–11. What moves where, and with which weight, is planned
before any voxel is visited, so blocks are independent and their order of summation is the
same however the volume is cut. A block reads only what it needs of the atlases' organs.
"""

from collections.abc import Sequence
from itertools import groupby, product
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable
from kpt_dask import cluster
from kpt_dask.boxes import Box, box_of, enclosing, overlap, shape_of, slices, within
from kpt_dask.distances import REACH, organ_distances
from kpt_dask.matching import slices_by_atlas
from kpt_dask.moves import Move, plan_affines, plan_moves, propose, without_negligible
from kpt_dask.omezarr import Region, regions
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.patches import read_patch
from kpt_dask.shares import Part, Share, finish_block, intensity_table, run_blocks
from kpt_dask.summing import accumulate, sample
from kpt_dask.volume import Volume

BLOCK = (128, 256, 256)
"""What one task decides at most (z, y, x): whole chunks of the probabilities and the labels."""

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
    client: Client | None = None,
) -> list[Part]:
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
    client : distributed.Client, optional
        Where the blocks are computed.

    Returns
    -------
    list of (region, labels)
        The parts of the label map that hold anything, uint16 (z, y, x).
    """
    atlases = store.atlases(atlas_ids)
    organs = store.organs
    probability.update_attributes({"description": DESCRIPTION})
    smallest, nus = options.smallest_share(mode), options.nus(mode, organs)
    with cluster.session(client) as session:
        distance = None
        if mode == "across":
            reach = REACH * options.rho
            distance = _distances(keypoints, matches, atlases, organs, reach, session)
        proposals = propose(matches, votes, atlases, organs, options.across, distance, options.rho)
        if mode == "affine":
            moves = plan_affines(proposals, keypoints, matches, atlases, organs, volume.grid)
        else:
            moves = plan_moves(proposals, matches, atlases, organs, volume.grid)
        if mode == "across":
            moves = without_negligible(moves, len(organs))
        totals = np.zeros(len(organs))
        for move in moves:
            totals[move.organ] += move.weight
        tasks = []
        for region in regions(volume.grid.shape, BLOCK):
            here = [move for move in moves if overlap(move.box, box_of(region))]
            if here:
                local = {move.atlas: atlases[move.atlas] for move in here}
                image = volume.levels[0]
                tasks.append(
                    (image, local, here, organs, nus, totals, smallest, probability, region)
                )
        return run_blocks(transfer_block, tasks, atlases, session)


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
    parts = dict(cluster.run(client, organ_distances, tasks, "Measuring distances"))
    return np.concatenate([parts[i] for i in range(len(tasks))])


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
) -> Part:
    """Fill one block of the probabilities, and return its part of the label map.

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
    shares: dict[int, Share] = {}
    for o, boxes in sorted(reached.items()):
        box = enclosing(boxes)
        assert box is not None
        shares[o] = o, box, np.zeros(shape_of(box), np.float32)
    whole = enclosing([box for _, box, _ in shares.values()])
    assert whole is not None
    scan = np.asarray(image[slices(whole)], np.float32)
    # Rows side by side: the kernels are slow on a cut-out that is none.
    scans = {o: np.ascontiguousarray(scan[within(box, whole)]) for o, box, _ in shares.values()}
    for (a, o), own in groupby(moves, key=lambda move: (move.atlas, move.organ)):
        _, box, share = shares[o]
        here = scans[o]
        _add(share, here, box, list(own), atlases[a], organs.names[o], nus[o], float(totals[o]))
    return finish_block(probability, list(shares.values()), organs, smallest, region)


def _add(
    share: NDArray[np.float32],
    scan: NDArray[np.float32],
    box: Box,
    moves: Sequence[Move],
    atlas: Atlas,
    organ: str,
    nu: float,
    total: float,
) -> None:
    """Add all moves of one organ of one atlas to the organ's share in a box."""
    size = shape_of(atlas.organs[organ].bounding_box)
    sources = [_source(move, box, size) for move in moves]
    source = enclosing([one for one in sources if one is not None])
    if source is None:
        return
    patch = read_patch(atlas, organ, slices(source))
    first = np.array([start for start, _ in source])
    for move in moves:
        common = overlap(move.box, box)
        assert common is not None
        start, stop = (np.array(ends) for ends in zip(*common, strict=True))
        corner = np.array([start for start, _ in box])
        weight = np.float32(move.weight / total)
        if move.inverse is None:
            offset = corner - first - [low for low, _ in move.box]
            accumulate(share, scan, patch, start - corner, stop - corner, offset, weight, nu)
        else:
            table = intensity_table(nu)
            ends = start - corner, stop - corner
            sample(share, scan, patch, *ends, corner, first, move.inverse, weight, table)


def _source(move: Move, box: Box, size: tuple[int, int, int]) -> Box | None:
    """Find the part of an organ's patch, of `size`, that a move brings into a box."""
    common = overlap(move.box, box)
    assert common is not None
    if move.inverse is None:
        z, y, x = ((a - s, b - s) for (a, b), (s, _) in zip(common, move.box, strict=True))
        return z, y, x
    corners = np.array(list(product(*((a, b - 1) for a, b in common))))
    at = corners @ move.inverse[:, :3].T + move.inverse[:, 3]
    low = np.floor(at.min(axis=0)).astype(int).tolist()
    high = (np.ceil(at.max(axis=0)) + 1).astype(int).tolist()
    z, y, x = zip(low, high, strict=True)
    return overlap((z, y, x), ((0, size[0]), (0, size[1]), (0, size[2])))
