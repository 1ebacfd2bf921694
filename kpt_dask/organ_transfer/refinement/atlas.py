"""Refinement of one atlas's field: a task of its own.

The result depends only on the scan, the atlas near its organs and the atlas's field; so it is the
same on whatever worker and beside whatever other atlases it is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray

from atlas_store import Atlas, OrganTable
from atlas_store.arrays.regions import write_region
from atlas_store.crop import Coding, crop_box, read_planes
from kpt_dask.grid import Grid
from kpt_dask.matching.displacement import Field, Widths
from kpt_dask.organ_transfer.refinement import kernels
from kpt_dask.organ_transfer.refinement.lattice import Lattice

HU = -1000.0, -200.0, 0.0, 200.0, 1200.0
"""Breakpoints of the map from HU to intensity, HU."""
INTENSITY = -1.6, -1.0, 0.0, 1.0, 2.0
"""Intensities at `HU`, no unit; constant beyond the ends. Soft tissue has the steepest slope."""
UNITS = 8192
"""Steps per unit of intensity, in int16."""
NEAR = 12.0
"""Distance from an organ, as u⁰ maps it, up to which the field is refined, mm."""
FOLLOWED = 0.99
"""Fraction of points that one iteration moves by at most half a lattice spacing."""
NODE = 16.0
"""Distance between the nodes at which a field is regressed, mm; linear in between.

On real patients 10 mm are no better, 20 mm hardly worse.
"""
PER_MM = 64
"""Steps per mm of a stored displacement."""
WEIGHT = 1024
"""Steps per unit of a stored weight."""
LEAST_CORRELATION = 0.02
"""Lower bound of a local correlation, no unit."""
SLACK = 32.0
"""Margin of the planes that are read of an atlas, beyond those that u⁰ maps to, mm."""
AROUND = kernels.BOX + 1
"""Halo of the refined points that their force depends on, lattice points."""
TINY = 1e-12
"""Largest length of a force that counts as 0, 1/mm."""


@dataclass(frozen=True)
class Comparison:
    """Scan on the lattice of each level, which all atlases are compared with.

    Attributes
    ----------
    grid : Grid
        The working grid.
    levels : list of (Lattice, int)
        From `kpt_dask.organ_transfer.refinement.lattice.lattices`.
    images : list of float32 array (z, y, x)
        The scan's intensities at the points of each.
    organs : OrganTable
    widths : (float, float)
        σ_x and σ_t, mm.
    """

    grid: Grid
    levels: Sequence[tuple[Lattice, int]]
    images: Sequence[NDArray[np.float32]]
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
    """Intensity of each HU from the first of `HU` to the last, in 1/`UNITS`, int16."""
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


class _LevelPart(NamedTuple):
    """Box of one level's lattice that is refined: the scan, the points that move, and u⁰, mm."""

    lattice: Lattice
    corner: NDArray[np.int64]
    fixed: NDArray[np.float32]
    inside: NDArray[np.bool_]
    start: NDArray[np.float32]


@dataclass(frozen=True)
class _Moved:
    """An atlas near its organs, its field at nodes, and the points that are to be refined.

    Attributes
    ----------
    packed, coding, corner
        Voxels from `read_planes`, their coding, and the position of the first one, mm.
    image : int16 array
        Intensities of the same voxels.
    nodes : float32 array (4, z, y, x)
        Field at its nodes: y − x, mm, and the support.
    inside : bool array
        Points of the finest lattice that are refined.
    """

    scan: Comparison
    packed: NDArray[Any]
    coding: Coding
    corner: NDArray[np.float64]
    image: NDArray[np.int16]
    nodes: NDArray[np.float32]
    inside: NDArray[np.bool_]

    @classmethod
    def read(cls, scan: Comparison, atlas: Atlas, field: Field) -> "_Moved | None":
        """Read the planes of an atlas that its field maps the lattice to, if any."""
        nodes = nodes_of(field, scan)
        spacing = float(scan.grid.spacing[0])
        finest = scan.levels[-1][0]
        (begin, end), *_ = crop_box(atlas)
        start = _start(nodes, finest, scan.grid)
        if not start[3].any():
            return None
        z = finest.origin(scan.grid)[0] + finest.spacing * np.arange(finest.shape[0])
        z = (z - atlas.info.origin[0]) / spacing
        low = float((z[:, None, None] + start[0] / spacing).min()) - SLACK / spacing
        high = float((z[:, None, None] + start[0] / spacing).max()) + SLACK / spacing
        first, stop = max(int(np.floor(low)), begin), min(int(np.ceil(high)) + 1, end)
        if first >= stop:
            return None
        planes, box, coding = read_planes(atlas, first, stop)
        packed = planes[: box[0][1] - box[0][0]]
        image = np.empty(packed.shape, np.int16)
        shift, mask, least = coding.hu
        kernels.look_up(
            packed.reshape(-1),
            shift,
            mask,
            least - int(HU[0]),
            intensity_table(),
            image.reshape(-1),
        )
        corner = np.array(atlas.info.origin) + spacing * np.array([a for a, _ in box])
        made = cls(scan, packed, coding, corner, image, nodes, np.empty(0, bool))
        labels = made.labels(finest, start[:3])
        inside = labels > 0
        kernels.grow(inside, round(NEAR / finest.spacing))
        return cls(scan, packed, coding, corner, image, nodes, inside)

    def labels(self, lattice: Lattice, u: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Organ of the atlas at each point of a lattice, mapped by u: index + 1, or 0."""
        organs = self.scan.organs
        numbers = [self.coding.number_of(value) for value in organs.values]
        table = np.zeros(max(numbers) + 2, np.uint16)
        table[numbers] = np.arange(1, len(organs) + 1)
        out = np.empty(lattice.shape, np.uint16)
        shape = np.array(self.packed.shape, np.int64)
        where = self._where(lattice, u)
        kernels.nearest(self.packed, shape, self.coding.label, where, table, out)
        return out

    def moved(
        self,
        lattice: Lattice,
        u: NDArray[np.float32],
        out: NDArray[np.float32],
        corner: Any = (0, 0, 0),
    ) -> None:
        """Sample the atlas's intensities at a lattice's points from `corner` on, mapped by u."""
        where = self._where(lattice, u, corner)
        kernels.sample(self.image, where, np.float32(1 / UNITS), out)

    def _where(
        self, lattice: Lattice, u: NDArray[np.float32], corner: Any = (0, 0, 0)
    ) -> kernels.PointMap:
        spacing = float(self.scan.grid.spacing[0])
        first = lattice.origin(self.scan.grid) + lattice.spacing * np.array(corner)
        at = (first - self.corner) / spacing
        step, scale = np.float32(lattice.step), np.float32(1 / spacing)
        return kernels.PointMap(at.astype(np.float32), step, scale, u)

    def refine(self) -> NDArray[np.float32]:
        """Compute the correction v at the points of the finest lattice (3, z, y, x), mm."""
        finest = self.scan.levels[-1][0]
        v, before = np.zeros((3, 1, 1, 1), np.float32), 1.0
        for (lattice, iterations), fixed in zip(self.scan.levels, self.scan.images, strict=True):
            inside = self.inside
            if lattice is not finest:
                inside = np.zeros(lattice.shape, bool)
                kernels.coarsen(self.inside, lattice.spacing / finest.spacing, inside)
            gained = np.empty((3, *lattice.shape), np.float32)
            ratio = np.float32(lattice.spacing / before)
            kernels.spread(v, np.zeros(3, np.float32), ratio, gained)
            v, before = gained, lattice.spacing
            if box := _box_of(inside):
                start = _start(self.nodes, lattice, self.scan.grid)[:3]
                fixed, inside = np.ascontiguousarray(fixed[box]), np.ascontiguousarray(inside[box])
                corner = np.array([side.start for side in box])
                part = (slice(None), *box)
                here = _LevelPart(lattice, corner, fixed, inside, np.ascontiguousarray(start[part]))
                v[part] = self._iterate(here, iterations, v[part].copy())
        return v

    def _iterate(
        self, part: _LevelPart, iterations: int, v: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Iterate the correction v, (3, z, y, x) in mm, in a box of a lattice."""
        lattice, corner, fixed, inside, start = part
        force_taps = kernels.taps(kernels.SMOOTHNESS, 5)
        field_taps = kernels.taps(kernels.ELASTICITY, 2)
        mean, square = np.empty_like(fixed), np.empty_like(fixed)
        kernels.box_moments(fixed, mean, square)
        moving, force, u = np.empty_like(fixed), np.empty_like(v), np.empty_like(v)
        h = np.float32(lattice.spacing)
        for _ in range(iterations):
            np.add(start, v, out=u)
            self.moved(lattice, u, moving, corner)
            kernels.force(fixed, mean, square, moving, h, inside, force)
            for axis in range(3):
                kernels.blur(force[axis], force_taps)
            length = kernels.largest(force, inside, FOLLOWED)
            if not length > TINY:
                break
            kernels.compose(u, start, force, np.float32(0.5 * h / length), h, v)
            for axis in range(3):
                kernels.blur(v[axis], field_taps)
        return v

    def weigh(self, v: NDArray[np.float32]) -> tuple[NDArray[np.int16], Refined]:
        """Round the refined field and the atlas's weight to int16; add its labels and cc."""
        finest, fixed = self.scan.levels[-1][0], self.scan.images[-1]
        start = _start(self.nodes, finest, self.scan.grid)
        u, support = start[:3] + v, start[3]
        moving, mean, square = np.empty_like(fixed), np.empty_like(fixed), np.empty_like(fixed)
        self.moved(finest, u, moving)
        kernels.box_moments(fixed, mean, square)
        cc = np.empty_like(fixed)
        kernels.correlation(fixed, mean, square, moving, cc)
        np.maximum(cc, np.float32(LEAST_CORRELATION), out=cc)
        labels = self.labels(finest, u)
        base = np.round(u.reshape(3, -1).mean(axis=1, dtype=np.float64))
        packed = np.empty((4, *finest.shape), np.int16)
        limit = np.iinfo(np.int16).max
        for axis in range(3):
            steps = np.rint((u[axis] - np.float32(base[axis])) * np.float32(PER_MM))
            packed[axis] = np.clip(steps, -limit, limit)
        weight = cc * np.sqrt(np.sqrt(support)) * np.float32(WEIGHT)
        packed[3] = np.clip(np.rint(weight), 0, limit)
        z, y, x = base.tolist()
        rounded = np.rint(cc * np.float32(255)).astype(np.uint8)
        return packed, Refined((z, y, x), labels, rounded)


def nodes_of(field: Field, scan: Comparison) -> NDArray[np.float32]:
    """Regress a field at the nodes around the lattices: y − x in mm, and the support (4, z, y, x).

    The first node is the lattices' first point.
    """
    finest = scan.levels[-1][0]
    counts = [int(np.ceil((n - 1) * finest.spacing / NODE)) + 1 for n in finest.shape]
    points = finest.origin(scan.grid) + NODE * np.indices(counts).reshape(3, -1).T
    found = field.at(points, scan.widths)
    found[:, :3] *= -1
    return np.ascontiguousarray(found.T).reshape(4, *counts)


def _start(nodes: NDArray[np.float32], lattice: Lattice, grid: Grid) -> NDArray[np.float32]:
    """Interpolate a field between its nodes at the points of a lattice."""
    out = np.empty((len(nodes), *lattice.shape), np.float32)
    kernels.spread(nodes, np.zeros(3, np.float32), np.float32(lattice.spacing / NODE), out)
    return out


def _box_of(inside: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """Box around all points to refine, with their halo; None if there are none."""
    sides = []
    for axis, n in enumerate(inside.shape):
        hit = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        if not hit.size:
            return None
        first, last = int(hit[0]), int(hit[-1])
        sides.append(slice(max(first - AROUND, 0), min(last + AROUND + 1, n)))
    return sides[0], sides[1], sides[2]
