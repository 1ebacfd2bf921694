"""Borders of organs from shares: the scan's HU, and the agreement of neighbours.

One task finishes one shard of the probabilities, tile by tile. A tile's halo is one voxel per
sweep, so tiles are independent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import (
    Box,
    box_of,
    enclosing,
    overlap,
    shape_of,
    slices,
    wider,
    within,
)
from atlas_store.arrays.regions import Region
from kpt_dask.grid import Grid
from kpt_dask.kernels.exponential import LOG2_E
from kpt_dask.organ_transfer.decision import Share, finish_slab
from kpt_dask.organ_transfer.job import TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts
from kpt_dask.organ_transfer.warping.block import BIN, FIRST_HU
from kpt_dask.organ_transfer.warping.kernels import BorderWeights, relax, tell_by_hu
from kpt_dask.organ_transfer.warping.landing import in_voxels, step_of

SWEEPS = 5
"""Sweeps of the mean field."""
SIZES = 60.0, 120.0
"""Typical sizes of small and of large organs, mm; see `size_weight`."""
BY_HU = 0.3
"""Weight of the scan's own HU beside the votes, no unit."""
USUAL = 3.0
"""Distance up to which neighbours count fully, mm; at r mm they count (`USUAL` / r)^`FADING`."""
FADING = 4
"""Exponent of that decay, no unit."""
ALIKE = 25.0
"""Standard deviation β of the Gaussian on the difference of neighbours' intensities, HU."""
TILE = (32, 64, 64)
"""Shape (z, y, x) of a tile, voxels."""


@dataclass(frozen=True)
class Borders:
    """Data that all border tasks of one transfer share.

    Attributes
    ----------
    job : TransferJob
        Its probabilities and labels are what the tasks fill.
    search_boxes : sequence of Box or None
        Where each organ is looked for, in cells.
    shares : zarr.Array (organ, z, y, x)
        Shares of the votes.
    shifts : float32 array (organ, bin)
        Shifts of the logit in each bin of HU, by `kpt_dask.organ_transfer.warping.schedule`.
    size_weight : float
        γ, from `size_weight`.
    """

    job: TransferJob
    search_boxes: Sequence[Box | None]
    shares: "zarr.Array[Any]"
    shifts: NDArray[np.float32]
    size_weight: float

    @property
    def grid(self) -> Grid:
        """The working grid."""
        return self.job.volume.grid


def size_weight(size: float) -> float:
    """Weight γ of what organs' HU and a voxel's neighbours say: ½ of small organs, 1 of large ones.

    Of small organs, as of the head and neck, more voxels lie at a border: these mix the HU of both
    sides, and the few voxels that sweeps reach are a large part of the organ.

    Parameters
    ----------
    size : float
        From `kpt_dask.organ_transfer.refinement.lattice.typical_size`, mm.
    """
    small, large = SIZES
    return min(max(size, small), large) / large


def plan_borders(job: TransferJob, search_boxes: Sequence[Box | None]) -> list[Region]:
    """Find the shards in which any organ may be."""
    grid, shard = job.volume.grid, job.tiling.shard
    known = [
        in_voxels(search_box, step_of(grid))
        for search_box in search_boxes
        if search_box is not None
    ]
    found = []
    cuts = (range(0, n, size) for n, size in zip(grid.shape, shard, strict=True))
    for corner in product(*cuts):
        z, y, x = (
            (a, min(a + size, n)) for a, size, n in zip(corner, shard, grid.shape, strict=True)
        )
        if any(overlap((z, y, x), box) for box in known):
            found.append(slices((z, y, x)))
    return found


def draw_borders(borders: Borders, region: Region) -> OrganCounts:
    """Turn the shares of a shard into probabilities, decide its labels, and count them."""
    shard = box_of(region)
    around = wider(shard, borders.grid.shape, SWEEPS)
    scan = np.empty(shape_of(around), np.float32)
    chunk_io.read(borders.job.volume.levels[0], slices(around), scan)
    shares = dict(_read(borders, around, scan))
    step = step_of(borders.grid)
    out = {}
    for o, search_box in enumerate(borders.search_boxes):
        here = search_box and overlap(in_voxels(search_box, step), shard)
        if here:
            out[o] = here, np.zeros(shape_of(here), np.float32)
    for tile in _tiles(shard):
        _relax(borders, tile, (around, scan), shares, out)
    found: Iterator[Share] = ((o, box, share) for o, (box, share) in out.items())
    whole = enclosing([box for box, _ in out.values()])
    assert whole is not None
    hu = np.ascontiguousarray(scan[within(whole, around)])
    return finish_slab(borders.job, found, region, (whole, hu))


def _read(
    borders: Borders, around: Box, scan: NDArray[np.float32]
) -> Iterator[tuple[int, tuple[Box, NDArray[np.float32]]]]:
    """Read each organ's share in a box, and shift its logit by the HU."""
    for o, search_box in enumerate(borders.search_boxes):
        here = search_box and overlap(in_voxels(search_box, step_of(borders.grid)), around)
        if not here:
            continue
        organ = slice(o, o + 1)
        share = np.ascontiguousarray(chunk_io.read(borders.shares, (organ, *slices(here)))[0])
        tell_by_hu(share, scan[within(here, around)], FIRST_HU, BIN, borders.shifts[o])
        yield o, (here, share)


def _relax(
    borders: Borders,
    tile: Box,
    scan: tuple[Box, NDArray[np.float32]],
    shares: dict[int, tuple[Box, NDArray[np.float32]]],
    out: dict[int, tuple[Box, NDArray[np.float32]]],
) -> None:
    """Relax a tile with its halo, and write its probabilities into `out`."""
    wide = wider(tile, borders.grid.shape, SWEEPS)
    parts = []
    for o, (box, share) in shares.items():
        here = overlap(box, wide)
        if here and (own := share[within(here, box)]).any():
            parts.append((o, here, own))
    inside = [
        o
        for o, (box, share) in shares.items()
        if (here := overlap(box, tile)) and share[within(here, box)].any()
    ]
    if not inside:
        return
    near = np.zeros((len(parts), *shape_of(wide)), np.float32)
    for i, (_, here, own) in enumerate(parts):
        near[i][within(here, wide)] = own
    around, hu = scan
    theta = borders.job.threshold
    # Votes at exactly 1 would leave no odds.
    odds = np.float32(min(theta, 0.999))
    r = max(float(borders.grid.spacing[0]), USUAL)
    strength = borders.size_weight**2 * (USUAL / r) ** FADING
    scale = np.float32(LOG2_E / (2 * ALIKE**2))
    weights = BorderWeights(odds, np.float32(strength * LOG2_E), scale)
    fields = np.empty((2, len(parts) + 1, *shape_of(wide)), np.float32)
    relax(near, np.ascontiguousarray(hu[within(wide, around)]), weights, SWEEPS, fields)
    own = fields[SWEEPS % 2]
    core = within(tile, wide)
    rest = own[-1][core] * (1 - odds)
    for i, (o, _, _) in enumerate(parts):
        if o not in out or not (here := overlap(out[o][0], tile)):
            continue
        box, target = out[o]
        q = own[i][core] * odds
        share = q / (q + rest)
        target[within(here, box)] = share[within(here, tile)]


def _tiles(shard: Box) -> Iterator[Box]:
    cuts = (range(a, b, size) for (a, b), size in zip(shard, TILE, strict=True))
    for corner in product(*cuts):
        z, y, x = (
            (a, min(a + size, b)) for a, size, (_, b) in zip(corner, TILE, shard, strict=True)
        )
        yield z, y, x
