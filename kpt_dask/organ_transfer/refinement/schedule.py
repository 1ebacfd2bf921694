"""Schedule of the refinement: one task per atlas, as many at once as the memory budget allows."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from threading import Condition
from typing import Any

import numpy as np
import zarr
from distributed import Client
from zarr.codecs import BloscCodec

from atlas_store import Atlas, OrganTable
from atlas_store.arrays import chunk_io
from atlas_store.arrays.boxes import Box, enclosing
from atlas_store.crop import crop_box
from kpt_dask.matching.displacement import Field, Widths
from kpt_dask.organ_transfer.refinement import kernels
from kpt_dask.organ_transfer.refinement.atlas import (
    HU,
    Comparison,
    Refined,
    intensity_table,
    refine_atlas,
)
from kpt_dask.organ_transfer.refinement.iteration import PAD, UNITS
from kpt_dask.organ_transfer.refinement.lattice import Level, lattices
from kpt_dask.organ_transfer.refinement.levels import ScanLevel
from kpt_dask.runtime import cluster
from kpt_dask.volumes.volume import Volume

SLAB = 32
"""Thickness of the slabs in which the scan is read, voxels."""
DEPTH = 16
"""Thickness of a chunk of the stored fields, lattice points."""
POINT_BYTES = 64
"""Memory of a task per point of its finest padded lattice, coarser levels included, bytes."""
VOXEL_BYTES = 4
"""Memory of a task per voxel that it reads of its atlas, bytes."""


def compare_with(
    volume: Volume,
    boxes: Sequence[Box],
    organs: OrganTable,
    widths: Widths,
    levels: Sequence[Level],
) -> Comparison:
    """Sample the scan's intensities over boxes of its voxels, on the lattice of each level.

    The scan is read in slabs; beyond the box around all boxes its edge repeats.
    """
    box = enclosing(boxes)
    assert box is not None
    laid = lattices(box, volume.grid, levels)
    images = [np.empty(lattice.shape, np.float32) for lattice, _ in laid]
    (begin, end), *sides = box
    y, x = (slice(*side) for side in sides)
    table = intensity_table() / np.float32(UNITS)
    for z in range(begin, end, SLAB):
        stop = min(z + SLAB + 1, end)
        hu = np.asarray(chunk_io.read(volume.levels[0], (slice(z, stop), y, x)))
        slab = np.empty(hu.shape, np.float32)
        kernels.look_up(hu.reshape(-1), 0, -1, -int(HU[0]), table, slab.reshape(-1))
        last = stop == end
        for (lattice, _), image in zip(laid, images, strict=True):
            # Points from this plane up to the next slab's first one; the last ones lie beyond.
            first = math.ceil((z - begin) / lattice.step)
            after = len(image) if last else math.ceil((z + SLAB - begin) / lattice.step)
            corner = np.array([begin + first * lattice.step - z, 0, 0], np.float32)
            own = image[first:after]
            rows = np.arange(0, own.size, lattice.shape[2])
            runs = np.stack([rows, rows + lattice.shape[2]], axis=1)
            step = np.float32(lattice.step)
            kernels.spread(slab[None], corner, step, own.shape, runs, own.reshape(1, -1))
        if last:
            break
    finest = laid[-1][0]
    inside = np.zeros(finest.shape, bool)
    for one in boxes:
        inside[finest.points_in(one)] = True
    scans = []
    for (lattice, iterations), image in zip(laid, images, strict=True):
        wanted = np.zeros(lattice.shape, bool)
        kernels.coarsen(inside, lattice.spacing / finest.spacing, wanted)
        scans.append(ScanLevel.of(lattice, iterations, image, np.pad(wanted, PAD)))
    return Comparison(volume.grid, scans, organs, widths)


def create_fields(group: zarr.Group, scan: Comparison, n: int) -> "zarr.Array[Any]":
    """Create the array of the refined fields of n atlases; see `refine_atlas`."""
    shape = scan.levels[-1].lattice.shape
    return group.create_array(
        "fields",
        shape=(n, 4, *shape),
        dtype=np.int16,
        chunks=(1, 4, min(DEPTH, shape[0]), *shape[1:]),
        compressors=BloscCodec(cname="lz4", shuffle="shuffle"),
        fill_value=0,
        config={"write_empty_chunks": True},
    )


def refine(
    scan: Comparison,
    atlases: Sequence[Atlas],
    fields: Sequence[Field],
    out: "zarr.Array[Any]",
    memory: int,
    client: Client,
) -> list[Refined | None]:
    """Refine the fields of atlases, and fill the part of `out` of each that reaches the lattice.

    Parameters
    ----------
    scan : Comparison
        From `compare_with`.
    atlases, fields
        Atlases and their fields.
    out : zarr.Array
        From `create_fields`.
    memory : int
        Budget of all tasks of a process together, bytes; one task runs whatever it needs.
    client : distributed.Client
    """
    found: list[Refined | None] = [None] * len(atlases)
    scattered = cluster.share(client, scan)
    points = POINT_BYTES * math.prod(scan.levels[-1].lattice.padded)
    tasks = []
    for i, (atlas, field) in enumerate(zip(atlases, fields, strict=True)):
        voxels = math.prod(b - a for a, b in crop_box(atlas))
        needed = points + VOXEL_BYTES * voxels
        tasks.append((scattered, atlas, field, out, i, needed, memory))
    for i, one in cluster.run(client, _refine, tasks, "Refining"):
        found[i] = one
    return found


def _refine(
    scan: Comparison,
    atlas: Atlas,
    field: Field,
    out: "zarr.Array[Any]",
    number: int,
    needed: int,
    memory: int,
) -> Refined | None:
    with _memory_reserved(needed, memory):
        return refine_atlas(scan, atlas, field, out, number)


_TAKEN = [0]
_CHANGED = Condition()


@contextmanager
def _memory_reserved(needed: int, memory: int) -> Any:
    """Reserve memory; wait until the process's running tasks leave enough, or none runs."""
    with _CHANGED:
        _CHANGED.wait_for(lambda: _TAKEN[0] == 0 or _TAKEN[0] + needed <= memory)
        _TAKEN[0] += needed
    try:
        yield
    finally:
        with _CHANGED:
            _TAKEN[0] -= needed
            _CHANGED.notify_all()
