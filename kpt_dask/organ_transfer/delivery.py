"""Label map on the scan's own grid, as a file: decided and compressed in tasks, written in order.

A task returns compressed labels, ≈ 1 % of their size, so a cluster's workers may be wherever
the probabilities can be read.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.grid import Grid
from kpt_dask.resampling.labels_on_scan import SLAB_VOXELS, count_values, decide_planes
from kpt_dask.runtime import cluster
from kpt_dask.runtime.memory import budget
from kpt_dask.scans.nifti_writer import NiftiWriter, Packed, pack, planes_at_once

VOXEL_BYTES = 16
"""Peak per voxel that is decided: its label, the largest share, and what is read of the working
grid, decompressed."""

TASKS_PER_THREAD = 3
"""Least number of tasks, where a scan is large enough, so that threads end together."""

DTYPE = np.dtype(np.uint16)


class Decision(NamedTuple):
    """Decision of labels on a grid.

    Attributes
    ----------
    probability : zarr.Array
        Shares on the working grid, (organ, z, y, x).
    organs : OrganTable
    threshold : float
        Smallest share of an organ.
    grid : Grid
        The working grid.
    target : Grid
        The grid to fill.
    """

    probability: Any
    organs: OrganTable
    threshold: float
    grid: Grid
    target: Grid


def fill(
    file: NiftiWriter, decision: Decision, *, memory: int | None, client: Client
) -> NDArray[np.int64]:
    """Decide all planes of a grid on the client's workers, and write them.

    Parameters
    ----------
    file : NiftiWriter
        Label map in the target's shape, uint16.
    decision : Decision
    memory : int, optional
        Budget of each process, bytes.
    client : distributed.Client

    Returns
    -------
    int64 array (organ)
        Voxels of each organ in the file.
    """
    shape = decision.target.shape
    step = planes_per_task(shape, cluster.threads(client), budget(memory))
    tasks = [(decision, first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
    counts = np.zeros(len(decision.organs), np.int64)
    for pieces, counted in _in_order(cluster.run(client, _decide, tasks, "Writing labels")):
        counts += counted
        for piece in pieces:
            file.write(piece)
    return counts


def planes_per_task(shape: tuple[int, int, int], threads: list[int], memory: int) -> int:
    """Choose the planes of a task: whole pieces, as many as memory and threads allow."""
    piece = planes_at_once(shape, DTYPE)
    voxels = min(SLAB_VOXELS, memory // (max(threads, default=1) * VOXEL_BYTES))
    fair = -(-shape[0] // (TASKS_PER_THREAD * max(sum(threads), 1)))
    return max(min(voxels // (shape[1] * shape[2]), fair) // piece, 1) * piece


def _decide(decision: Decision, first: int, last: int) -> tuple[list[Packed], NDArray[np.int64]]:
    probability, organs, threshold, grid, target = decision
    labels = decide_planes(probability, organs.values, threshold, grid, target, first, last)
    counts = np.zeros(max(organs.values) + 1, np.int64)
    count_values(labels, counts)
    step = planes_at_once(target.shape, DTYPE)
    pieces = [pack(labels[z : z + step]) for z in range(0, len(labels), step)]
    return pieces, counts[list(organs.values)]


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results in the order of their indices; early ones wait."""
    early: dict[int, Any] = {}
    following = 0
    for index, result in results:
        early[index] = result
        while following in early:
            yield early.pop(following)
            following += 1
