"""Refinement of one atlas's field: a task of its own.

The result depends only on the scan, the atlas near its organs and the atlas's field; so it is the
same on whatever worker and beside whatever other atlases it is computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.regions import write_region
from atlas_store.crop import Coding, crop_box, read_planes
from kpt_dask.grid import Grid
from kpt_dask.matching.displacement import Field, Widths
from kpt_dask.organ_transfer.refinement import kernels
from kpt_dask.organ_transfer.refinement.iteration import PAD, UNITS, PointMap, runs_of
from kpt_dask.organ_transfer.refinement.lattice import COARSE, Lattice
from kpt_dask.organ_transfer.refinement.levels import (
    Region,
    ScanLevel,
    grown,
    iterate,
    local_correlation,
)

HU = -1000.0, -200.0, 0.0, 200.0, 1200.0
"""Breakpoints of the map from HU to intensity, HU."""
INTENSITY = -1.6, -1.0, 0.0, 1.0, 2.0
"""Intensities at `HU`, no unit; constant beyond the ends. Soft tissue has the steepest slope."""
NEAR = 18.0
"""Distance from an organ, as u⁰ maps it, up to which the field is refined, mm."""
NODE = 16.0
"""Distance between the nodes at which a field is regressed, mm; linear in between.

On real patients 10 mm are no better, 20 mm hardly worse.
"""
PER_MM = 64
"""Steps per mm of a stored displacement."""
WEIGHT = 1024
"""Steps per unit of a stored weight."""
SMALL = 100.0
"""Volume of an organ, mL, up to which its field is refined on the levels finer than `COARSE`.
In abdomens the Dice of liver, spleen, kidneys and aorta is the same without, that of gallbladder
and pancreas is not."""
GAP = 16
"""Lattice points of the widest gap between two parts of a row that are refined, that is refined
too: long rows take less time for each point."""
SLACK = 32.0
"""Margin of the planes that are read of an atlas, beyond those that u⁰ maps to, mm."""


_CORE = (..., *(3 * (slice(PAD, -PAD),)))
"""Points of a lattice in its padded arrays."""


@dataclass(frozen=True)
class Comparison:
    """Scan on the lattice of each level, which all atlases are compared with.

    Attributes
    ----------
    grid : Grid
        The working grid.
    levels : list of ScanLevel
        The scan on the lattice of each level, coarsest first.
    organs : OrganTable
    widths : (float, float)
        σ_x and σ_t, mm.
    """

    grid: Grid
    levels: Sequence[ScanLevel]
    organs: OrganTable
    widths: Widths


@dataclass(frozen=True)
class Refined:
    """Refined field of an atlas, except the array of its displacements.

    Attributes
    ----------
    base : (float, float, float)
        Offset to add to the stored displacement, mm.
    labels : uint16 array (z, y, x)
        Organ of the atlas at each point of the finest lattice: index + 1, or 0.
    correlation : uint8 array (z, y, x)
        cc there, in 255ths.
    """

    base: tuple[float, float, float]
    labels: NDArray[np.uint16]
    correlation: NDArray[np.uint8]


def intensity_table() -> NDArray[np.int16]:
    """Intensity of each HU from the first of `HU` to the last, in 1/`UNITS`."""
    hu = np.arange(HU[0], HU[-1] + 1)
    return np.asarray(np.round(UNITS * np.interp(hu, HU, INTENSITY)), np.int16)


def refine_atlas(
    scan: Comparison, atlas: Atlas, field: Field, out: "zarr.Array[Any]", number: int
) -> Refined | None:
    """Refine the field of one atlas and store it.

    Parameters
    ----------
    scan : Comparison
    atlas : Atlas
    field : Field
    out : zarr.Array (atlas, 4, z, y, x), int16
        On the lattice of the last level: where the field takes its points beyond `Refined.base`,
        in `PER_MM`-ths of a mm, and √(cc² · s^½), the weight of the atlas, in `WEIGHT`-ths.
    number : int
        Index of the atlas in `out`; that part is filled.

    Returns
    -------
    Refined or None
        None if the field maps no lattice point into the atlas; then nothing is stored.
    """
    moved = _Moved.read(scan, atlas, field)
    if moved is None:
        return None
    v = moved.refine()
    packed, refined = moved.weigh(v)
    write_region(
        out, (slice(number, number + 1), *(slice(0, n) for n in packed.shape)), packed[None]
    )
    return refined


@dataclass(frozen=True)
class _Moved:
    """An atlas near its organs, its field at nodes, and the points that are to be refined.

    Attributes
    ----------
    packed, coding, corner
        Voxels from `read_planes`, their coding, and the position of the first one, mm.
    image : int16 array
        Intensities, in 1/`UNITS`, of the same voxels.
    nodes : float32 array (4, z, y, x)
        Field at its nodes: y − x, mm, and the support.
    start : float32 array (4, point)
        The same at the points of the finest level.
    inside : bool array (z, y, x)
        Ω, of the points of the finest level.
    near_small : bool array (z, y, x)
        Those of them near organs of at most `SMALL`: Ω on the levels finer than `COARSE`.
    """

    scan: Comparison
    packed: NDArray[Any]
    coding: Coding
    corner: NDArray[np.float64]
    image: NDArray[np.int16]
    nodes: NDArray[np.float32]
    start: NDArray[np.float32]
    inside: NDArray[np.bool_]
    near_small: NDArray[np.bool_]

    @classmethod
    def read(cls, scan: Comparison, atlas: Atlas, field: Field) -> "_Moved | None":
        """Read the planes of an atlas that its field maps the lattice to, if any."""
        nodes = nodes_of(field, scan)
        spacing = float(scan.grid.spacing[0])
        finest = scan.levels[-1].lattice
        (begin, end), *_ = crop_box(atlas)
        if not nodes[3].any():
            return None
        z = finest.origin(scan.grid)[0] + NODE * np.arange(nodes.shape[1])
        z = (z - atlas.info.origin[0])[:, None, None] + nodes[0]
        low, high = float(z.min()) - SLACK, float(z.max()) + SLACK
        first = max(int(np.floor(low / spacing)), begin)
        stop = min(int(np.ceil(high / spacing)) + 1, end)
        if first >= stop:
            return None
        planes, box, coding = read_planes(atlas, first, stop)
        packed = planes[: box[0][1] - box[0][0]]
        image = np.empty(packed.shape, np.int16)
        shift, mask, least = coding.hu
        least -= int(HU[0])
        kernels.look_up(
            packed.reshape(-1), shift, mask, least, intensity_table(), image.reshape(-1)
        )
        corner = np.array(atlas.info.origin) + spacing * np.array([a for a, _ in box])
        wanted = scan.levels[-1].wanted
        start = _start(nodes, finest, wanted.fringe)
        nothing = np.empty(0, bool)
        made = cls(scan, packed, coding, corner, image, nodes, start, nothing, nothing)
        landed = made.labels(np.zeros_like(start[:3])).reshape(finest.padded)
        inside = near_small = made._near(landed > 0)
        small = np.array([False, *(atlas.volume_ml(name) <= SMALL for name in scan.organs.names)])
        if finest.spacing < COARSE and not small[1:].all():
            near_small = made._near(small[landed])
        return replace(made, inside=inside, near_small=near_small)

    def _near(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mark the points of the finest level within `NEAR` of those marked, and narrow gaps."""
        level = self.scan.levels[-1]
        near = 3 * (min(round(NEAR / level.lattice.spacing), PAD),)
        return _without_gaps(grown(mask, near) & level.wanted.mask, level.wanted)

    def labels(self, v: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Organ of the atlas at each point of the finest level: index + 1, or 0; (point)."""
        organs, level = self.scan.organs, self.scan.levels[-1]
        numbers = [self.coding.number_of(value) for value in organs.values]
        table = np.zeros(max(numbers) + 2, np.uint16)
        table[numbers] = np.arange(1, len(organs) + 1)
        out = np.zeros(v.shape[1], np.uint16)
        where, runs = self._where(level.lattice, self.start, v), level.wanted.points
        kernels.nearest(self.packed, self.coding.label, where, table, runs, out)
        return out

    def _where(
        self, lattice: Lattice, start: NDArray[np.float32], v: NDArray[np.float32]
    ) -> PointMap:
        spacing = float(self.scan.grid.spacing[0])
        first = lattice.origin(self.scan.grid) - PAD * lattice.spacing
        at = ((first - self.corner) / spacing).astype(np.float32)
        step, scale = np.float32(lattice.step), np.float32(1 / spacing)
        planes, *_ = shape = lattice.padded
        by_plane = start.reshape(len(start), planes, -1), v.reshape(3, planes, -1)
        return PointMap(at, step, scale, *by_plane, shape)

    def refine(self) -> NDArray[np.float32]:
        """Compute the correction v at the points of the finest level (3, point), mm."""
        finest = self.scan.levels[-1]
        v, before = np.zeros((3, 1), np.float32), None
        for level in self.scan.levels:
            lattice = level.lattice
            gained = np.zeros((3, math.prod(lattice.padded)), np.float32)
            if before is not None:
                ratio = lattice.spacing / before.spacing
                first = np.full(3, PAD * (1 - ratio), np.float32)
                values = v.reshape(3, *before.padded)
                runs = level.wanted.fringe
                kernels.spread(values, first, np.float32(ratio), lattice.padded, runs, gained)
            v, before = gained, lattice
            own = self.inside if lattice.spacing >= COARSE else self.near_small
            if level is finest:
                region, start = Region.around(own), self.start
            else:
                inside = np.zeros(lattice.padded, bool)
                ratio = lattice.spacing / finest.lattice.spacing
                kernels.coarsen(own[_CORE], ratio, inside[_CORE])
                region = Region.around(_without_gaps(inside, level.wanted))
                start = _start(self.nodes[:3], lattice, region.moved)
            iterate(level, region, self.image, self._where(lattice, start, v))
        return v

    def weigh(self, v: NDArray[np.float32]) -> tuple[NDArray[np.int16], Refined]:
        """Round the refined field and the atlas's weight to int16; add its labels and cc."""
        level = self.scan.levels[-1]
        shape = level.lattice.padded
        cc = local_correlation(level, self.image, self._where(level.lattice, self.start, v))
        base = np.round(self.nodes[:3].reshape(3, -1).mean(axis=1, dtype=np.float64))
        packed = np.zeros((4, v.shape[1]), np.int16)
        rounded = np.zeros(v.shape[1], np.uint8)
        units = np.array([*base, PER_MM, WEIGHT], np.float32)
        kernels.pack(self.start, v, cc, level.wanted.points, units, packed, rounded)
        labels = self.labels(v).reshape(shape)[_CORE]
        cc_there = rounded.reshape(shape)[_CORE]
        z, y, x = base.tolist()
        return packed.reshape(4, *shape)[_CORE], Refined((z, y, x), labels, cc_there)


def _without_gaps(mask: NDArray[np.bool_], wanted: Region) -> NDArray[np.bool_]:
    """Mark also the gaps of up to `GAP` points of a row of a padded lattice, as far as wanted."""
    out = mask.copy()
    kernels.fill_gaps(runs_of(mask), mask.shape[2], GAP, out.reshape(-1))
    out &= wanted.mask
    return out


def nodes_of(field: Field, scan: Comparison) -> NDArray[np.float32]:
    """Regress a field at the nodes around the lattices: y − x in mm, and the support (4, z, y, x).

    The first node is the lattices' first point.
    """
    finest = scan.levels[-1].lattice
    counts = [int(np.ceil((n - 1) * finest.spacing / NODE)) + 1 for n in finest.shape]
    points = finest.origin(scan.grid) + NODE * np.indices(counts).reshape(3, -1).T
    found = field.at(points, scan.widths)
    found[:, :3] *= -1
    return np.ascontiguousarray(found.T).reshape(4, *counts)


def _start(
    nodes: NDArray[np.float32], lattice: Lattice, runs: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Interpolate a field between its nodes at some points of a lattice alone: (c, point)."""
    out = np.empty((len(nodes), math.prod(lattice.padded)), np.float32)
    step = np.float32(lattice.spacing / NODE)
    kernels.spread(nodes, np.full(3, -PAD * step, np.float32), step, lattice.padded, runs, out)
    return out
