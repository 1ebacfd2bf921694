"""Move the atlases onto the scan by smooth displacement fields, block by block: mode `local`.

Where organs can land, and each atlas's field, are planned before any voxel is visited; fields
live on one lattice that begins at the scan's first voxel. So a voxel's votes do not depend on
how the volume was cut, and a block reads only the part of an atlas that its field brings here.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable
from kpt_dask import cluster
from kpt_dask.boxes import Box, aligned, cut, enclosing, overlap, shape_of, slices, within
from kpt_dask.jit import kernel
from kpt_dask.omezarr import CHUNKS, Region
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.shares import Part, finish_block, intensity_table, run_blocks
from kpt_dask.surroundings import read_surroundings, surroundings_of
from kpt_dask.volume import Volume
from kpt_dask.warps import NODE, Field, by_atlas, fit, join, landing_boxes

PIECES = 2
"""Blocks for each thread, so that the threads end at about the same time."""
VOXEL_BYTES = 32
"""What a voxel of a block takes, whatever its organs: the scan, a part of one atlas, labels."""
ORGAN_BYTES = 8
"""And for each organ: its votes and all votes."""

DESCRIPTION = (
    "share of the votes for the organ at a voxel, among the atlases that annotate the organ; a "
    "vote counts as much as matches support its atlas's displacement there and as its intensity "
    "agrees with the scan's"
)
"""What the probabilities are."""


def transfer(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    probability: zarr.Array[Any],
    *,
    options: TransferOptions = DEFAULTS,
    memory: int = 1 << 30,
    client: Client | None = None,
) -> list[Part]:
    """Fill the probabilities, and decide each voxel's organ.

    The share of organ l at voxel x is

        Σ_a s_a(x) · g_l(I(x) − I_a(y)) · [S_a(y) = l]  /  Σ_a s_a(x) · g_l(I(x) − I_a(y))

    over the atlases a that annotate the organ and hold y = x − u_a(x), the point that the
    atlas's field moves to x, in the surroundings of their organs (`kpt_dask.surroundings`).
    s_a is the field's support, I_a and S_a are the atlas's image and label map at the voxel
    nearest to y, and g_l(d) = exp(−d² / 2ν_l²). All matches carry the field, those outside of
    organs too. A voxel gets the organ with the largest share (ties go to the organ that comes
    first in the table), or 0 where that is below the threshold. An atlas that does not
    annotate an organ, or does not hold the place, votes neither for nor against
    it. Shares are 0 where no atlas's box of the organ, moved by its field, comes within
    `MARGIN`.

    Parameters
    ----------
    volume : Volume
        The scan.
    store, atlas_ids
        The atlases, in the order of the matches' indices.
    keypoints, matches : xarray.Dataset
        From `kpt_dask.extract`, and from `kpt_dask.match` or `kpt_dask.rematching.rematch`.
    probability : zarr.Array
        From `kpt_dask.shares.create_probability`.
    options : TransferOptions
        The threshold, ν, σ_x and σ_t.
    memory : int
        Bytes that all blocks of a process may take together, down to one chunk a block.
    client : distributed.Client, optional
        Where fields and blocks are computed.

    Returns
    -------
    list of (region, labels)
        The parts of the label map that hold anything, uint16 (z, y, x).
    """
    atlases = store.atlases(atlas_ids)
    organs = store.organs
    grid = volume.grid
    step = NODE / float(grid.spacing[0])
    probability.update_attributes({"description": DESCRIPTION})
    widths = options.sigma_x, options.sigma_t
    smallest, nus = options.smallest_share("local"), options.nus("local", organs)
    own = list(zip(atlases, by_atlas(keypoints, matches, len(atlases)), strict=True))
    with cluster.session(client) as session:
        landing = [(*one, organs, grid, widths) for one in own]
        landed = dict(cluster.run(session, landing_boxes, landing, "Finding organs"))
        domains = join([landed[a] for a in range(len(atlases))])
        whole = enclosing([box for box in domains if box is not None])
        fitting = [(*one, grid, whole, widths) for one in own] if whole else []
        fields = dict(cluster.run(session, fit, fitting, "Fitting fields"))
        workers = session.nthreads().values()
        room = memory / max(workers) / (VOXEL_BYTES + ORGAN_BYTES * len(organs))
        # Slabs, since atlases are stored in slabs; smaller only where memory asks for it.
        high = CHUNKS[0], *grid.shape[1:]
        slabs = cut(whole, high, math.inf, PIECES * sum(workers)) if whole else []
        tasks = []
        for piece in (piece for slab in slabs for piece in cut(slab, CHUNKS, room, 1)):
            here = [overlap(box, piece) for box in domains]
            box = enclosing([box for box in here if box is not None])
            if box is not None:
                local = [(a, fields[i].part(box, step)) for i, a in enumerate(atlases)]
                image, region = volume.levels[0], aligned(piece, CHUNKS, grid.shape)
                tasks.append((image, local, here, organs, nus, step, smallest, probability, region))
        return run_blocks(transfer_block, tasks, atlases, session)


def transfer_block(
    image: zarr.Array[Any],
    atlases: Sequence[tuple[Atlas, Field]],
    domains: Sequence[Box | None],
    organs: OrganTable,
    nus: Sequence[float],
    step: float,
    smallest: float,
    probability: zarr.Array[Any],
    region: Region,
) -> Part:
    """Fill one block of the probabilities, and return its part of the label map.

    Parameters
    ----------
    domains
        Of each organ, where in the region it is looked for.
    nus
        Of each organ, HU.
    step : float
        Voxels between nodes.
    smallest : float
        Share below which a voxel is background.
    """
    present = [(o, box) for o, box in enumerate(domains) if box is not None]
    whole = enclosing([box for _, box in present])
    assert whole is not None
    scan = np.asarray(image[slices(whole)], np.float32)
    votes = {o: np.zeros(shape_of(box), np.float32) for o, box in present}
    totals = {o: np.zeros_like(votes[o]) for o in votes}
    tables = {o: intensity_table(nus[o]) for o in votes}
    for atlas, field in atlases:
        wanted = [(o, box) for o, box in present if organs.names[o] in atlas.annotated]
        box = enclosing([box for _, box in wanted])
        source = field.part(box, step).source(box, surroundings_of(atlas)) if box else None
        if source is None:
            continue
        hu, labels = read_surroundings(atlas, source)
        begin = np.array([start for start, _ in source])
        for o, own in wanted:
            corner = np.array([start for start, _ in own])
            accumulate(
                votes[o],
                totals[o],
                scan[within(own, whole)],
                corner,
                (field.nodes, np.array(field.first), step),
                (hu, labels, begin),
                organs.values[o],
                tables[o],
            )
    shares = []
    for o, box in present:
        share = np.divide(votes[o], totals[o], out=votes[o], where=totals[o] > 0)
        shares.append((o, box, share))
    return finish_block(probability, shares, organs, smallest, region)


@kernel
def accumulate(
    votes: NDArray[np.float32],
    totals: NDArray[np.float32],
    scan: NDArray[np.float32],
    corner: NDArray[np.int64],
    field: tuple[NDArray[np.float32], NDArray[np.int64], float],
    atlas: tuple[NDArray[np.int16], NDArray[np.uint16], NDArray[np.int64]],
    value: int,
    table: NDArray[np.float32],
) -> None:
    """Add one atlas's votes for one organ, and all its votes, within a box.

    Parameters
    ----------
    votes, totals : float32 arrays (z, y, x)
        Of the box; changed.
    scan : float32 array (z, y, x)
        HU of the box.
    corner : int64 array (3)
        The box's first voxel in the scan.
    field : tuple
        Nodes, first node and step of a `Field`.
    atlas : tuple
        HU and labels (z, y, x) of a part of the atlas, and the part's first voxel; outside of
        the part the atlas has no say.
    value : int
        Label of the organ.
    table : float32 array
        From `kpt_dask.shares.intensity_table`.
    """
    nodes, first, step = field
    hu, labels, begin = atlas
    last = table.size - 1
    half = np.float32(0.5)
    row = np.empty((nodes.shape[2], 4), np.float32)
    node = np.empty(votes.shape[2], np.int64)
    part = np.empty(votes.shape[2], np.float32)
    for x in range(votes.shape[2]):
        px = (corner[2] + x) / step
        node[x] = int(px)
        part[x] = px - node[x]
        node[x] -= first[2]
    for z in range(votes.shape[0]):
        pz = (corner[0] + z) / step
        kz = int(pz)
        fz = np.float32(pz - kz)
        kz -= first[0]
        for y in range(votes.shape[1]):
            py = (corner[1] + y) / step
            ky = int(py)
            fy = np.float32(py - ky)
            ky -= first[1]
            for i in range(nodes.shape[2]):
                for c in range(4):
                    low = nodes[kz, ky, i, c]
                    low += fy * (nodes[kz, ky + 1, i, c] - low)
                    high = nodes[kz + 1, ky, i, c]
                    high += fy * (nodes[kz + 1, ky + 1, i, c] - high)
                    row[i, c] = low + fz * (high - low)
            for x in range(votes.shape[2]):
                kx = node[x]
                fx = part[x]
                support = row[kx, 3] + fx * (row[kx + 1, 3] - row[kx, 3])
                if support == 0:
                    continue
                az = row[kx, 0] + fx * (row[kx + 1, 0] - row[kx, 0])
                ay = row[kx, 1] + fx * (row[kx + 1, 1] - row[kx, 1])
                ax = row[kx, 2] + fx * (row[kx + 1, 2] - row[kx, 2])
                tz = np.float32(corner[0] + z) + az + half
                ty = np.float32(corner[1] + y) + ay + half
                tx = np.float32(corner[2] + x) + ax + half
                if tz < 0 or ty < 0 or tx < 0:
                    continue
                k = int(tz) - begin[0]
                j = int(ty) - begin[1]
                i = int(tx) - begin[2]
                if k < 0 or j < 0 or i < 0:
                    continue
                if k >= hu.shape[0] or j >= hu.shape[1] or i >= hu.shape[2]:
                    continue
                w = support * table[min(int(abs(scan[z, y, x] - np.float32(hu[k, j, i]))), last)]
                totals[z, y, x] += w
                if labels[k, j, i] == value:
                    votes[z, y, x] += w
