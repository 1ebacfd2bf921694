"""Move the atlases onto the scan by smooth displacement fields, block by block: mode `local`.

Where organs can land, and each atlas's field, are planned before any voxel is visited; fields
live on one lattice that begins at the scan's first voxel. So a voxel's votes do not depend on
how the volume was cut, and a block reads only the part of an atlas that its field brings here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import xarray as xr
import zarr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, OrganTable, StoreFormatError
from kpt_dask import cluster
from kpt_dask.fields import regress
from kpt_dask.grid import Grid
from kpt_dask.jit import kernel
from kpt_dask.omezarr import Region, open_array, regions, write_region
from kpt_dask.transfer import intensity_table
from kpt_dask.volume import Volume

SMALLEST_SHARE = 0.4
"""Voxels whose largest share is below this are background."""
NU = 200.0
"""ν of the intensity likelihood, HU, at least; an organ's own counts where it is larger."""
NODE = 10.0
"""Distance between the nodes of the fields' lattice, mm."""
MARGIN = 15.0
"""How far beyond where the corners of its box land an organ may reach, mm."""
LEAST_SUPPORT = 0.01
"""Matches that must agree on where an organ lands for its atlas to have a say in where to look."""

BLOCK = (64, 256, 256)
"""What one task decides at most (z, y, x): whole chunks of the probabilities and the labels."""

DESCRIPTION = (
    "share of the votes for the organ at a voxel, among the atlases that annotate the organ; a "
    "vote counts as much as matches support its atlas's displacement there and as its intensity "
    "agrees with the scan's"
)
"""What the probabilities are."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""(start, stop) along z, y, x, half-open."""


@dataclass(frozen=True)
class Matched:
    """What a field is made of: matches of one atlas.

    Attributes
    ----------
    position, translation : float32 arrays (m, 3)
        Of the test keypoints, and from the atlas to the scan, mm.
    """

    position: NDArray[np.float32]
    translation: NDArray[np.float32]


@dataclass(frozen=True)
class Field:
    """One atlas's displacement field on a box of the lattice.

    Attributes
    ----------
    first : tuple of int
        Lattice index of the first node (z, y, x).
    nodes : float32 array (z, y, x, 4)
        What to add to a voxel index of the scan to get the atlas's, (z, y, x), and the support.
    """

    first: tuple[int, int, int]
    nodes: NDArray[np.float32]

    def part(self, box: Box, step: float) -> "Field":
        """Cut out the nodes that the voxels of `box` lie between, `step` voxels apart."""
        low, high = lattice(box, step)
        cut = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, self.first, strict=True))
        return Field(low, self.nodes[cut])

    def source(self, box: Box, shape: tuple[int, int, int]) -> Box | None:
        """Find the atlas's voxels, of `shape`, that the field can bring to `box`, if any."""
        ends = []
        for axis, (start, stop) in enumerate(box):
            shift = self.nodes[..., axis]
            low = max(int(np.floor(start + shift.min() - 1)), 0)
            high = min(int(np.ceil(stop + shift.max() + 1)), shape[axis])
            if low >= high:
                return None
            ends.append((low, high))
        return ends[0], ends[1], ends[2]


def lattice(box: Box, step: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First node, and the one past the last, that the voxels of `box` lie between."""
    # The quotient, not the floor division: it is what the kernel computes.
    z, y, x = ((int(start / step), int((stop - 1) / step) + 2) for start, stop in box)
    return (z[0], y[0], x[0]), (z[1], y[1], x[1])


def transfer(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    probability: zarr.Array[Any],
    *,
    client: Client | None = None,
) -> list[tuple[Region, NDArray[np.uint16]]]:
    """Fill the probabilities, and decide each voxel's organ.

    The share of organ l at voxel x is

        Σ_a s_a(x) · g_l(I(x) − I_a(y)) · [S_a(y) = l]  /  Σ_a s_a(x) · g_l(I(x) − I_a(y))

    over the atlases a that annotate the organ and see y = x − u_a(x), the point that the
    atlas's field moves to x. s_a is the field's support, I_a and S_a are the atlas's image
    and label map at the voxel nearest to y, and g_l(d) = exp(−d² / 2ν_l²). All matches carry
    the field, those outside of organs too. A voxel gets the organ with the largest share
    (ties go to the organ that comes first in the table), or 0 where that is below
    `SMALLEST_SHARE`. An atlas that does not annotate an organ votes neither for nor against
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
        From `kpt_dask.transfer.create_probability`.
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
    matched = _by_atlas(keypoints, matches, len(atlases))
    parts = []
    with cluster.session(client) as session:
        landing = [(atlas, own, organs, grid) for atlas, own in zip(atlases, matched, strict=True)]
        landed = dict(cluster.run(session, landing_boxes, landing, "Finding organs"))
        domains = join([landed[a] for a in range(len(atlases))])
        whole = enclosing([box for box in domains if box is not None])
        fitting = [(atlas, own, grid, whole) for atlas, own in zip(atlases, matched, strict=True)]
        fields = dict(cluster.run(session, fit, fitting if whole else [], "Fitting fields"))
        tasks = []
        for region in regions(grid.shape, BLOCK):
            here = [_overlap(box, region) for box in domains]
            box = enclosing([box for box in here if box is not None])
            if box is not None:
                local = [(a, fields[i].part(box, step)) for i, a in enumerate(atlases)]
                tasks.append((volume.levels[0], local, here, organs, step, probability, region))
        for _, part in cluster.run(session, transfer_block, tasks, "Transferring organs"):
            parts.append(part)
    for atlas in atlases:
        atlas.ensure_present()
    return parts


def _by_atlas(keypoints: xr.Dataset, matches: xr.Dataset, n: int) -> list[Matched]:
    position = keypoints.position.values[matches.keypoint.values]
    translation = matches.translation.values
    ends = np.searchsorted(matches.atlas.values, np.arange(n + 1))
    return [Matched(position[a:b], translation[a:b]) for a, b in pairwise(ends)]


def landing_boxes(
    atlas: Atlas, matched: Matched, organs: OrganTable, grid: Grid
) -> list[Box | None]:
    """Find where each organ of an atlas lands in the scan, in voxels, with a margin.

    The same regression with the roles exchanged says where the corners and the centre of the
    organ's box go, as far as matches support that.
    """
    boxes: list[Box | None] = []
    source = Grid.isotropic(atlas.info.shape, float(grid.spacing[0]), atlas.info.origin)
    for organ in organs:
        if organ.name not in atlas.organs:
            boxes.append(None)
            continue
        ends = np.array(atlas.organs[organ.name].bounding_box, np.float64) - (0, 1)
        along = [(low, (low + high) / 2, high) for low, high in ends]
        points = source.to_mm(list(product(*along)))
        moved = regress(points, matched.position - matched.translation, matched.translation)
        sure = moved[:, 3] >= LEAST_SUPPORT
        if not sure.any():
            boxes.append(None)
            continue
        at = grid.to_index((points + moved[:, :3])[sure])
        margin = MARGIN / grid.spacing
        low = np.maximum(np.floor(at.min(axis=0) - margin), 0).astype(int).tolist()
        high = np.minimum(np.ceil(at.max(axis=0) + margin) + 1, grid.shape).astype(int).tolist()
        empty = any(a >= b for a, b in zip(low, high, strict=True))
        boxes.append(None if empty else ((low[0], high[0]), (low[1], high[1]), (low[2], high[2])))
    return boxes


def join(landed: Sequence[Sequence[Box | None]]) -> list[Box | None]:
    """Enclose what each atlas says of each organ."""
    return [enclosing([b for b in boxes if b is not None]) for boxes in zip(*landed, strict=True)]


def enclosing(boxes: Sequence[Box]) -> Box | None:
    """Smallest box around boxes, None around none."""
    if not boxes:
        return None
    z, y, x = (
        (min(box[axis][0] for box in boxes), max(box[axis][1] for box in boxes))
        for axis in range(3)
    )
    return z, y, x


def fit(atlas: Atlas, matched: Matched, grid: Grid, box: Box) -> Field:
    """Regress an atlas's field at the nodes around a box of the scan's voxels."""
    spacing = float(grid.spacing[0])
    first, stop = lattice(box, NODE / spacing)
    axes = [grid.origin[a] + NODE * np.arange(first[a], stop[a]) for a in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    nodes = regress(points, matched.position, matched.translation)
    nodes[:, :3] = (grid.origin - np.array(atlas.info.origin) - nodes[:, :3]) / spacing
    return Field(first, nodes.reshape(*(b - a for a, b in zip(first, stop, strict=True)), 4))


def transfer_block(
    image: zarr.Array[Any],
    atlases: Sequence[tuple[Atlas, Field]],
    domains: Sequence[Box | None],
    organs: OrganTable,
    step: float,
    probability: zarr.Array[Any],
    region: Region,
) -> tuple[Region, NDArray[np.uint16]]:
    """Fill one block of the probabilities, and return its part of the label map.

    Parameters
    ----------
    domains
        Of each organ, where in the region it is looked for.
    step : float
        Voxels between nodes.
    """
    present = [(o, box) for o, box in enumerate(domains) if box is not None]
    whole = enclosing([box for _, box in present])
    assert whole is not None
    scan = np.asarray(image[_slices(whole)], np.float32)
    votes = {o: np.zeros([b - a for a, b in box], np.float32) for o, box in present}
    totals = {o: np.zeros_like(votes[o]) for o in votes}
    tables = {o: intensity_table(max(organs.organs[o].nu, NU)) for o in votes}
    for atlas, field in atlases:
        wanted = [(o, box) for o, box in present if organs.names[o] in atlas.annotated]
        box = enclosing([box for _, box in wanted])
        source = field.part(box, step).source(box, atlas.info.shape) if box else None
        if source is None:
            continue
        hu, labels = _read(atlas, source)
        bounds = np.array([[low, n] for (low, _), n in zip(source, atlas.info.shape, strict=True)])
        for o, own in wanted:
            corner = np.array([start for start, _ in own])
            part = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(own, whole, strict=True))
            accumulate(
                votes[o],
                totals[o],
                scan[part],
                corner,
                (field.nodes, np.array(field.first), step),
                (hu, labels, bounds),
                organs.values[o],
                tables[o],
            )
    labels = np.zeros([s.stop - s.start for s in region], np.uint16)
    best = np.full(labels.shape, np.nextafter(np.float32(SMALLEST_SHARE), np.float32(0)))
    for o, box in present:
        share = np.divide(votes[o], totals[o], out=votes[o], where=totals[o] > 0)
        _write_share(probability, o, box, share, region)
        inside = tuple(
            slice(a - s.start, b - s.start) for (a, b), s in zip(box, region, strict=True)
        )
        wins = share > best[inside]
        best[inside][wins] = share[wins]
        labels[inside][wins] = organs.values[o]
    return region, labels


@kernel
def accumulate(
    votes: NDArray[np.float32],
    totals: NDArray[np.float32],
    scan: NDArray[np.float32],
    corner: NDArray[np.int64],
    field: tuple[NDArray[np.float32], NDArray[np.int64], float],
    atlas: tuple[NDArray[np.float32], NDArray[np.uint16], NDArray[np.int64]],
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
        HU and labels (z, y, x) of a part of the atlas, and per axis the part's first voxel and
        the atlas's size; beyond its size the atlas has no say.
    value : int
        Label of the organ.
    table : float32 array
        From `kpt_dask.transfer.intensity_table`.
    """
    nodes, first, step = field
    hu, labels, bounds = atlas
    last = table.size - 1
    half = np.float32(0.5)
    row = np.empty((nodes.shape[2], 4), np.float32)
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
                px = (corner[2] + x) / step
                kx = int(px)
                fx = np.float32(px - kx)
                kx -= first[2]
                support = row[kx, 3] + fx * (row[kx + 1, 3] - row[kx, 3])
                if support == 0:
                    continue
                az = row[kx, 0] + fx * (row[kx + 1, 0] - row[kx, 0])
                ay = row[kx, 1] + fx * (row[kx + 1, 1] - row[kx, 1])
                ax = row[kx, 2] + fx * (row[kx + 1, 2] - row[kx, 2])
                k = int(np.floor(np.float32(corner[0] + z) + az + half))
                j = int(np.floor(np.float32(corner[1] + y) + ay + half))
                i = int(np.floor(np.float32(corner[2] + x) + ax + half))
                if k < 0 or j < 0 or i < 0:
                    continue
                if k >= bounds[0, 1] or j >= bounds[1, 1] or i >= bounds[2, 1]:
                    continue
                k -= bounds[0, 0]
                j -= bounds[1, 0]
                i -= bounds[2, 0]
                w = support * table[min(int(abs(scan[z, y, x] - hu[k, j, i])), last)]
                totals[z, y, x] += w
                if labels[k, j, i] == value:
                    votes[z, y, x] += w


def _read(atlas: Atlas, box: Box) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """Read a box of an atlas's image and label map."""
    try:
        image = open_array(atlas.group, "image/0")
        hu = np.asarray(image[_slices(box)], np.float32)
        return hu, np.asarray(atlas.labels[_slices(box)]).astype(np.uint16)
    except (KeyError, ValueError, RuntimeError) as error:
        atlas.ensure_present()
        raise StoreFormatError(
            f"{atlas.objects.url}: the image or labels of the atlas {atlas.id!r} cannot be read"
            f" ({error}); remove the atlas and add it again."
        ) from error


def _write_share(
    probability: zarr.Array[Any], organ: int, box: Box, share: NDArray[np.float32], region: Region
) -> None:
    """Write the whole chunks that the box of an organ touches."""
    chunks = probability.chunks[1:]
    aligned = tuple(
        slice(a // c * c, min(-(-b // c) * c, s.stop))
        for (a, b), c, s in zip(box, chunks, region, strict=True)
    )
    whole = np.zeros([s.stop - s.start for s in aligned], np.float32)
    inside = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(box, aligned, strict=True))
    whole[inside] = share
    write_region(probability, (slice(organ, organ + 1), *aligned), whole[None])


def _overlap(box: Box | None, region: Region) -> Box | None:
    if box is None:
        return None
    z, y, x = ((max(a, s.start), min(b, s.stop)) for (a, b), s in zip(box, region, strict=True))
    return (z, y, x) if z[0] < z[1] and y[0] < y[1] and x[0] < x[1] else None


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in box)
