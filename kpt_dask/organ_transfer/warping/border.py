"""From votes to borders: the scan's own HU, and the agreement of neighbours. Mode `local`.

One task finishes one shard of the probabilities, tile by tile; what it reads beyond its tile is
as many voxels as there are sweeps, so tiles are independent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box, box_of, enclosing, overlap, shape_of, slices, within
from atlas_store.arrays.regions import Region
from kpt_dask.grid import Grid
from kpt_dask.kernels.exponential import LOG2_E
from kpt_dask.organ_transfer.decision import Share, finish_slab
from kpt_dask.organ_transfer.job import TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts
from kpt_dask.organ_transfer.warping.block import BIN, FIRST_HU
from kpt_dask.organ_transfer.warping.kernels import relax, tell_by_hu
from kpt_dask.organ_transfer.warping.landing import in_voxels, step_of

SWEEPS = 5
"""Of the mean field."""
AGREEMENT = 1.0
"""λ of neighbours `USUAL` apart."""
USUAL = 3.0
"""mm; neighbours r mm apart count (`USUAL` / r)^`FADING`, and no more than these."""
FADING = 4
ALIKE = 25.0
"""β, HU: how much intensities of neighbours differ that hardly belong together."""
TILE = (32, 64, 64)
"""Voxels that are relaxed together."""


@dataclass(frozen=True)
class Borders:
    """What all tasks of one transfer share.

    Attributes
    ----------
    job : TransferJob
        Its probabilities and labels are what the tasks fill.
    domains
        Of each organ, where it is looked for, in cells.
    shares : zarr.Array (organ, z, y, x)
        Of the votes.
    by_hu : float32 array (organ, bin)
        From `kpt_dask.organ_transfer.warping.schedule.log_ratios`.
    """

    job: TransferJob
    domains: Sequence[Box | None]
    shares: "zarr.Array[Any]"
    by_hu: NDArray[np.float32]

    @property
    def grid(self) -> Grid:
        """The working grid."""
        return self.job.volume.grid


def plan_borders(job: TransferJob, domains: Sequence[Box | None]) -> list[Region]:
    """Find the shards in which any organ may be."""
    grid, shard = job.volume.grid, job.tiling.shard
    known = [in_voxels(domain, step_of(grid)) for domain in domains if domain is not None]
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
    around = _wider(shard, borders.grid.shape)
    scan = np.empty(shape_of(around), np.float32)
    chunk_io.read(borders.job.volume.levels[0], slices(around), scan)
    shares = dict(_read(borders, around, scan))
    step = step_of(borders.grid)
    out = {}
    for o, domain in enumerate(borders.domains):
        here = domain and overlap(in_voxels(domain, step), shard)
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
    """Read what the votes say of each organ in a box, and ask the HU."""
    for o, domain in enumerate(borders.domains):
        here = domain and overlap(in_voxels(domain, step_of(borders.grid)), around)
        if not here:
            continue
        organ = slice(o, o + 1)
        share = np.ascontiguousarray(chunk_io.read(borders.shares, (organ, *slices(here)))[0])
        tell_by_hu(share, scan[within(here, around)], FIRST_HU, BIN, borders.by_hu[o])
        yield o, (here, share)


def _relax(
    borders: Borders,
    tile: Box,
    scan: tuple[Box, NDArray[np.float32]],
    shares: dict[int, tuple[Box, NDArray[np.float32]]],
    out: dict[int, tuple[Box, NDArray[np.float32]]],
) -> None:
    """Let the neighbours in a tile agree, and put what they say into `out`."""
    wide = _wider(tile, borders.grid.shape)
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
    strength = AGREEMENT * (USUAL / r) ** FADING
    how = odds, np.float32(strength * LOG2_E), np.float32(LOG2_E / (2 * ALIKE**2))
    fields = np.empty((2, len(parts) + 1, *shape_of(wide)), np.float32)
    relax(near, np.ascontiguousarray(hu[within(wide, around)]), how, SWEEPS, fields)
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


def _wider(box: Box, shape: tuple[int, int, int]) -> Box:
    """As many voxels more on each side as there are sweeps, inside of the scan."""
    z, y, x = (
        (max(a - SWEEPS, 0), min(b + SWEEPS, n)) for (a, b), n in zip(box, shape, strict=True)
    )
    return z, y, x


def _tiles(shard: Box) -> Iterator[Box]:
    cuts = (range(a, b, size) for (a, b), size in zip(shard, TILE, strict=True))
    for corner in product(*cuts):
        z, y, x = (
            (a, min(a + size, b)) for a, size, (_, b) in zip(corner, TILE, shard, strict=True)
        )
        yield z, y, x
