"""Schedule of mode `local`: plan, refinement, votes, borders.

Search boxes are planned before any voxel is read, and all fields share one lattice over them, so a
voxel's votes do not depend on how the volume is cut into blocks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numpy.typing import NDArray

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
from kpt_dask.organ_transfer.measures import OrganCounts, parts_of
from kpt_dask.organ_transfer.probability import Tiling, create_probability
from kpt_dask.organ_transfer.refinement import agreement
from kpt_dask.organ_transfer.refinement.lattice import FAST, FULL, fitting, typical_size
from kpt_dask.organ_transfer.refinement.schedule import compare_with, create_fields, refine
from kpt_dask.organ_transfer.warping.block import (
    BINS,
    EXTRA_PLANES,
    SLAB_BYTES,
    VotingJob,
    WarpedAtlas,
    per_plane,
    vote_in_block,
)
from kpt_dask.organ_transfer.warping.border import (
    BY_HU,
    Borders,
    draw_borders,
    plan_borders,
    size_weight,
)
from kpt_dask.organ_transfer.warping.kernels import ONE, REACH
from kpt_dask.organ_transfer.warping.landing import (
    by_atlas,
    in_cells,
    in_grid,
    in_voxels,
    predicted_boxes,
    search_boxes_of,
    step_of,
)
from kpt_dask.runtime import cluster
from kpt_dask.runtime.balance import cut
from kpt_dask.runtime.team import map_in_threads

BLOCKS_PER_TEAM = 1
"""Blocks for each team of threads, at least."""
CELL_COST = 6
"""Cost of voting in a voxel, relative to reading one (measured; only balance depends on it)."""
USABLE_BUDGET = 0.75
"""Fraction of its memory budget that a block plans with; the rest covers heap fragmentation."""
FEW = 0.2
"""Voxels added to each bin of a histogram."""
USUAL_SHARE = 0.35
"""Share of the atlases that an organ must have at least, where they agree as they usually do. Of
organs of which 0.4 is the best threshold, the estimates scatter between 0.35 and 0.45."""
SHARPER = 2.0
"""Logit of a share by the logit of the fraction of atlases: agreement with the scan sharpens it."""
SCRATCH = "warping"
"""Name of the temporary group beside the probabilities."""


def warp_atlases(
    job: TransferJob, atlases: Sequence[Atlas], evidence: Evidence, client: Client | None = None
) -> OrganCounts:
    """Fill the probabilities by warped atlases, and decide each voxel's organ.

    `kpt_dask.organ_transfer.warping` states the equations.

    Parameters
    ----------
    job : TransferJob
        Job of mode `local`.
    atlases : sequence of Atlas
        In the order of the matches' indices.
    evidence : Evidence
        Its matches from `kpt_dask.match` or `second_pass.rematch`; votes play no part.
    client : distributed.Client, optional
        Where the blocks are computed.

    Returns
    -------
    OrganCounts
        Counts of the labels and their shares.
    """
    organs, grid, options = job.organs, job.volume.grid, job.options
    step = step_of(grid)
    widths = options.sigma_x, options.sigma_t
    fields = by_atlas(evidence.keypoints, evidence.matches, len(atlases))
    own = zip(atlases, fields, strict=True)
    predicted = map_in_threads(predicted_boxes, ((*one, organs, grid, widths) for one in own))
    search_boxes = search_boxes_of(predicted, step)
    known = [in_grid(box, grid, step) for box in search_boxes if box is not None]
    if not known:
        none = np.zeros((len(organs), len(atlases)))
        return replace(OrganCounts.empty(len(organs)), weights=none)
    with cluster.session(client) as session, _scratch(job.probability) as group:
        size = typical_size(atlases)
        levels = fitting(FAST if options.fast else FULL, size)
        scan = compare_with(job.volume, known, organs, widths, levels)
        stored = create_fields(group, scan, len(atlases))
        refined = refine(
            scan, atlases, fields, stored, cluster.budget(session, job.memory), session
        )
        reached = [i for i, one in enumerate(refined) if one is not None]
        found = [one for one in refined if one is not None]
        means = agreement.correlations(found, len(organs))
        others = agreement.count_others(found, len(organs))
        alike = agreement.conformity(others).T
        warped = [
            WarpedAtlas(atlases[i], i, one.base, *measured)
            for i, one, *measured in zip(reached, found, means, alike, strict=True)
        ]
        del refined, found
        at_once, threads = cluster.teams(max(cluster.threads(session)))
        limit = USABLE_BUDGET * cluster.budget(session, job.memory) / at_once
        shares = create_probability(group, grid, organs, job.mode, job.tiling)
        votes = VotingJob(job, warped, stored, scan.levels[-1].lattice, search_boxes, shares, limit)
        pieces = BLOCKS_PER_TEAM * cluster.count_teams(session)
        largest = per_plane(atlases)
        blocks = plan_blocks(search_boxes, grid, step, job.tiling, largest, pieces, threads, limit)
        tasks = [(votes, job.tiling.region(block, grid.shape)) for block in blocks]
        counts = np.zeros((len(organs), 2, BINS), np.int64)
        for _, counted in cluster.run_in_teams(
            session, vote_in_block, tasks, "Transferring organs"
        ):
            counts += counted
        weight = size_weight(size)
        shifts = log_ratios(counts, BY_HU * weight)
        # A threshold that somebody asked for holds for all organs.
        if options.threshold is None:
            shifts += of_scattered(agreement.best_shares(others))[:, None]
        borders = Borders(job, search_boxes, shares, shifts, weight)
        regions = [(borders, region) for region in plan_borders(job, search_boxes)]
        total = OrganCounts.empty(len(organs))
        for _, of_shard in cluster.run(session, draw_borders, regions, "Drawing borders"):
            total += of_shard
    weights = np.zeros((len(organs), len(atlases)))
    for one in warped:
        weights[:, one.number] = one.reliability(organs)
    return replace(total, overlap=agreement.overlap(others), weights=parts_of(weights))


def log_ratios(counts: NDArray[np.int64], weight: float) -> NDArray[np.float32]:
    """Shift of the logit of each organ's share, by HU.

    Parameters
    ----------
    counts : int64 array (organ, 2, bin)
        From `vote_in_block`, of all blocks.
    weight : float
        Weight of the HU beside the votes.

    Returns
    -------
    float32 array (organ, bin)
        ``weight`` · ln(h₁ / h₀), of histograms in voxels, smoothed by a Gaussian of one bin, with
        `FEW` added, that sum to 1.
    """
    # Imported here, because only mode local needs it: it takes a tenth of a start.
    from scipy.ndimage import gaussian_filter1d

    voxels = counts / ONE
    smooth = gaussian_filter1d(voxels, 1.0, axis=2, mode="constant") + FEW
    smooth /= smooth.sum(axis=2, keepdims=True)
    return np.asarray(weight * np.log(smooth[:, 0] / smooth[:, 1]), np.float32)


def of_scattered(best: NDArray[np.float64]) -> NDArray[np.float32]:
    """Shift of the logit of each organ's share, where the atlases are scattered.

    Parameters
    ----------
    best : float64 array (organ)
        From `kpt_dask.organ_transfer.refinement.agreement.best_shares`.

    Returns
    -------
    float32 array (organ)
        `SHARPER` times what brings the logit of the share to that of `USUAL_SHARE`; 0 where the
        share is larger, or not known.
    """
    share = np.where(np.isnan(best), USUAL_SHARE, np.minimum(best, USUAL_SHARE))
    shift = np.log(USUAL_SHARE / (1 - USUAL_SHARE)) - np.log(share / (1 - share))
    return np.asarray(SHARPER * shift, np.float32)


def plan_blocks(
    search_boxes: Sequence[Box | None],
    grid: Grid,
    step: int,
    tiling: Tiling,
    per_plane: int,
    pieces: int,
    threads: int,
    limit: float,
) -> list[Box]:
    """Cut the scan where organs may be into blocks that take about as long as each other.

    Parameters
    ----------
    search_boxes : sequence of Box or None
        Where each organ is looked for, in cells.
    tiling : Tiling
        Blocks are whole shards.
    per_plane : int
        Voxels of a plane of the largest atlas.
    pieces : int
        Least number of blocks.
    threads : int
        Number of threads that share a block.
    limit : float
        Memory that a block may take, bytes, as far as whole shards allow.
    """
    known = [search_box for search_box in search_boxes if search_box is not None]
    whole = enclosing(known)
    if whole is None:
        return []
    covered = np.zeros(shape_of(whole), bool)
    for search_box in known:
        covered[within(search_box, whole)] = True

    def cells(box: Box) -> int:
        here = overlap(in_cells(box, step), whole)
        return 0 if here is None else int(covered[within(here, whole)].sum())

    def planes(box: Box) -> float:
        return float(per_plane * (shape_of(box)[0] + EXTRA_PLANES))

    def time(box: Box) -> float:
        return CELL_COST * cells(box) * step**3 + planes(box)

    def fits(piece: Box) -> bool:
        box = wider(piece, grid.shape, REACH)
        votes = sum(volume_of(overlap(in_voxels(search_box, step), box)) for search_box in known)
        finished = threads * SLAB_BYTES * math.prod(tiling.slab_shape(box))
        summed = 4 * (2 * cells(box) * step**3 + 2 * votes + planes(box))
        return summed + finished <= limit

    return [
        b for b in cut(in_grid(whole, grid, step), tiling.shard, pieces, time, fits) if cells(b)
    ]


@contextmanager
def _scratch(probability: "zarr.Array[Any]") -> Iterator[zarr.Group]:
    """Make a temporary group beside the probabilities; it is deleted at the end."""
    parent = probability.path.rpartition("/")[0]
    path = f"{parent}/{SCRATCH}" if parent else SCRATCH
    group = zarr.create_group(probability.store, path=path, zarr_format=3, overwrite=True)
    try:
        yield group
    finally:
        above = zarr.open_group(probability.store, path=parent, mode="r+")
        del above[SCRATCH]
