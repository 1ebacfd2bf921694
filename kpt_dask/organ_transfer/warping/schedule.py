"""Move the atlases onto the scan by refined displacement fields: mode `local`.

Where organs can land is planned before any voxel is visited, and the fields live on one lattice
over all of that. So a voxel's votes do not depend on how the volume was cut.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from atlas_store import Atlas
from atlas_store.arrays.boxes import (
    Box,
    enclosing,
    overlap,
    shape_of,
    volume_of,
    wider,
    within,
)
from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts
from kpt_dask.organ_transfer.probability import Tiling, create_probability
from kpt_dask.organ_transfer.refinement.lattice import FAST, FULL, fitting, typical_size
from kpt_dask.organ_transfer.refinement.schedule import (
    agreement,
    compare_with,
    create_fields,
    refine,
)
from kpt_dask.organ_transfer.warping.block import (
    BEND,
    BINS,
    SLAB_BYTES,
    Votes,
    Warped,
    per_plane,
    vote_in_block,
)
from kpt_dask.organ_transfer.warping.border import Borders, draw_borders, plan_borders
from kpt_dask.organ_transfer.warping.kernels import ONE
from kpt_dask.organ_transfer.warping.landing import (
    by_atlas,
    domains_of,
    in_cells,
    in_grid,
    in_voxels,
    landing_boxes,
    step_of,
)
from kpt_dask.runtime import cluster
from kpt_dask.runtime.balance import cut
from kpt_dask.runtime.memory import budget
from kpt_dask.runtime.team import map_in_threads

PIECES = 1
"""Blocks for each team, so that all end at about the same time."""
VISIT = 6
"""How much longer a voxel of a cell takes than one that is only read, about."""
RETURNED = 0.75
"""Of its room, what a block plans with: memory that was given back may lie where nothing fits."""
BY_HU = 0.3
"""How much the scan's own HU count beside the votes."""
FEW = 0.2
"""Added to each bin of a histogram."""
SCRATCH = "warping"
"""Group beside the probabilities for what is only needed on the way."""


def warp_atlases(
    job: TransferJob, atlases: Sequence[Atlas], evidence: Evidence, client: Client | None = None
) -> OrganCounts:
    """Fill the probabilities by warped atlases, and decide each voxel's organ.

    1. The field of each atlas (`kpt_dask.matching.displacement.Field`) is refined where its
       organs land: `kpt_dask.organ_transfer.refinement`. It then takes voxel x of the scan to y
       in the atlas, with a support s_a and a local correlation cc_a.
    2. The atlases vote. The share of organ l at x is

           P_l = Σ_a K_a ρ_al [L_a(y) = l]  /  Σ_a K_a ρ_al
           K_a = [exp(−(I(x) − I_a(y))² / 2ν_l²) + 10⁻⁶] · cc_a² · √s_a

       over the atlases a that annotate the organ and hold y in the surroundings of their organs
       (`atlas_store.crop`). I_a is linear between voxels, L_a is that of the nearest one, and
       ρ_al is the fourth power of the mean of cc_a where any atlas says l. Shares are averaged
       over neighbours, with weights ¼, ½ and ¼ along each axis; edges of the scan repeat.
    3. The scan's own HU are asked: logit P_l grows by 0.3 ln(h₁ / h₀), where h₁ and h₀ are
       histograms of the HU that are the organ and that are not, over all the scan.
    4. Neighbours of like intensity agree: `kpt_dask.organ_transfer.warping.kernels.relax`.

    A voxel gets the organ with the largest share (ties go to the organ that comes first in the
    table), or 0 where that is below the threshold. An atlas that does not annotate an organ, or
    does not hold the place, votes neither for nor against it. Shares are 0, also when they are
    smoothed, in cells where no atlas's box of the organ, moved by its field, comes within
    `kpt_dask.organ_transfer.warping.landing.MARGIN`.

    Parameters
    ----------
    job : TransferJob
        Of mode `local`.
    atlases : sequence of Atlas
        In the order of the matches' indices.
    evidence : Evidence
        Its matches from `kpt_dask.match` or `second_pass.rematch`; votes play no part.
    client : distributed.Client, optional
        Where the blocks are computed.

    Returns
    -------
    OrganCounts
        What is counted of the labels and their shares.
    """
    organs, grid, options = job.organs, job.volume.grid, job.options
    step = step_of(grid)
    widths = options.sigma_x, options.sigma_t
    fields = by_atlas(evidence.keypoints, evidence.matches, len(atlases))
    own = zip(atlases, fields, strict=True)
    landed = map_in_threads(landing_boxes, ((*one, organs, grid, widths) for one in own))
    domains = domains_of(landed, step)
    whole = enclosing([domain for domain in domains if domain is not None])
    if whole is None:
        return OrganCounts.empty(len(organs))
    with cluster.session(client) as session, _scratch(job.probability) as group:
        levels = fitting(FAST if options.fast else FULL, typical_size(atlases))
        scan = compare_with(job.volume, in_grid(whole, grid, step), organs, widths, levels)
        stored = create_fields(group, scan, len(atlases))
        refined = refine(scan, atlases, fields, stored, budget(job.memory), session)
        reached = [i for i, one in enumerate(refined) if one is not None]
        known = [one for one in refined if one is not None]
        means = agreement(known, len(organs))
        warped = [
            Warped(atlases[i], i, one.base, mean)
            for i, one, mean in zip(reached, known, means, strict=True)
        ]
        del refined, known
        at_once, threads = cluster.teams(max(cluster.threads(session)))
        room = RETURNED * budget(job.memory) / at_once
        shares = create_probability(group, grid, organs, job.mode, job.tiling)
        votes = Votes(job, warped, stored, scan.levels[-1][0], domains, shares, room)
        pieces = PIECES * cluster.count_teams(session)
        largest = per_plane(atlases)
        blocks = plan_blocks(domains, grid, step, job.tiling, largest, pieces, threads, room)
        tasks = [(votes, job.tiling.region(block, grid.shape)) for block in blocks]
        counts = np.zeros((len(organs), 2, BINS), np.int64)
        for _, counted in cluster.run_in_teams(
            session, vote_in_block, tasks, "Transferring organs"
        ):
            counts += counted
        borders = Borders(job, domains, shares, log_ratios(counts))
        regions = [(borders, region) for region in plan_borders(job, domains)]
        total = OrganCounts.empty(len(organs))
        for _, of_shard in cluster.run(session, draw_borders, regions, "Drawing borders"):
            total += of_shard
    return total


def log_ratios(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Say by how much each HU shifts the logit of each organ's share.

    Parameters
    ----------
    counts : int64 array (organ, 2, bin)
        From `vote_in_block`, of all blocks.

    Returns
    -------
    float32 array (organ, bin)
        `BY_HU` · ln(h₁ / h₀), of histograms in voxels, smoothed by a Gaussian of one bin, with
        `FEW` added, that sum to 1.
    """
    voxels = counts / ONE
    smooth = gaussian_filter1d(voxels, 1.0, axis=2, mode="constant") + FEW
    smooth /= smooth.sum(axis=2, keepdims=True)
    return np.asarray(BY_HU * np.log(smooth[:, 0] / smooth[:, 1]), np.float32)


def plan_blocks(
    domains: Sequence[Box | None],
    grid: Grid,
    step: int,
    tiling: Tiling,
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
    tiling : Tiling
        Blocks are whole shards.
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
        finished = threads * SLAB_BYTES * math.prod(tiling.slab_shape(box))
        summed = 4 * (2 * cells(box) * step**3 + 2 * votes + planes(box))
        return summed + finished <= room

    return [
        b for b in cut(in_grid(whole, grid, step), tiling.shard, pieces, time, fits) if cells(b)
    ]


@contextmanager
def _scratch(probability: "zarr.Array[Any]") -> Iterator[zarr.Group]:
    """Make a group beside the probabilities that goes when its work is done."""
    parent = probability.path.rpartition("/")[0]
    path = f"{parent}/{SCRATCH}" if parent else SCRATCH
    group = zarr.create_group(probability.store, path=path, zarr_format=3, overwrite=True)
    try:
        yield group
    finally:
        above = zarr.open_group(probability.store, path=parent, mode="r+")
        del above[SCRATCH]
