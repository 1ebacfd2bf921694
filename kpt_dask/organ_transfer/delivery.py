"""Label map on the scan's own grid: decided and compressed in tasks.

A task returns compressed labels, ≈ 1 % of their size, so a cluster's workers may be wherever
the probabilities can be read, and the whole map is small enough for memory.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.grid import Grid
from kpt_dask.label_files.label_map import LabelMap, dtype_of
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.label_files.request import LabelRequest
from kpt_dask.resampling.labels_on_scan import SLAB_VOXELS, Shares, count_values, decide_planes
from kpt_dask.runtime import cluster
from kpt_dask.scans.nifti_writer import Packed, pack, planes_at_once

VOXEL_BYTES = 16
"""Peak per voxel that is decided: its label, the largest share, and what is read of the working
grid, decompressed."""

TASKS_PER_THREAD = 3
"""Least number of tasks, where a scan is large enough, so that threads end together."""


class Decision(NamedTuple):
    """Decision of labels on a grid.

    Attributes
    ----------
    shares : Shares
        Shares of all organs on the working grid.
    organs : OrganTable
    wanted : tuple of int
        Labels that the map shows; the other organs compete all the same.
    target : Grid
        The grid to fill.
    """

    shares: Shares
    organs: OrganTable
    wanted: tuple[int, ...]
    target: Grid


def decided(
    decision: Decision, request: LabelRequest, *, memory: int | None, client: Client
) -> tuple[LabelMap, NDArray[np.int64]]:
    """Make the label map that is asked for, of which scan is left open.

    Parameters
    ----------
    decision, memory, client
        As for `decide`.
    request : LabelRequest

    Returns
    -------
    label_map : LabelMap
        Of the wanted organs.
    counts : int64 array (wanted organ)
        Voxels of each organ in it.
    """
    labels, counts = decide(decision, memory=memory, client=client)
    organs = request.wanted(decision.organs)
    label_map = request.cleaned(LabelMap(labels, decision.target, organs))
    if request.largest:
        counts = label_map.voxels.counts(counts.size)
    return label_map, counts[[organ.value for organ in organs]]


def decide(
    decision: Decision, *, memory: int | None, client: Client
) -> tuple[PackedLabels, NDArray[np.int64]]:
    """Decide all planes of a grid on the client's workers.

    Parameters
    ----------
    decision : Decision
    memory : int, optional
        Budget of each process, bytes.
    client : distributed.Client

    Returns
    -------
    labels : PackedLabels
        In the target's shape, uint8 where all labels of the table fit, else uint16.
    counts : int64 array (label)
        Voxels of each label, from 0 to the largest of the table; that of 0 is 0.
    """
    shape, dtype = decision.target.shape, dtype_of(decision.organs)
    step = planes_per_task(shape, dtype, cluster.threads(client), cluster.budget(client, memory))
    tasks = [(decision, first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
    counts = np.zeros(max(decision.organs.values) + 1, np.int64)
    pieces: list[Packed] = []
    for packed, counted in _in_order(cluster.run(client, _decide, tasks, "Deciding labels")):
        counts += counted
        pieces += packed
    return PackedLabels(shape, dtype, tuple(pieces)), counts


def planes_per_task(
    shape: tuple[int, int, int], dtype: np.dtype[Any], threads: list[int], memory: int
) -> int:
    """Choose the planes of a task: whole pieces, as many as memory and threads allow."""
    piece = planes_at_once(shape, dtype)
    voxels = min(SLAB_VOXELS, memory // (max(threads, default=1) * VOXEL_BYTES))
    fair = -(-shape[0] // (TASKS_PER_THREAD * max(sum(threads), 1)))
    return max(min(voxels // (shape[1] * shape[2]), fair) // piece, 1) * piece


def _decide(decision: Decision, first: int, last: int) -> tuple[list[Packed], NDArray[np.int64]]:
    shares, organs, wanted, target = decision
    labels = decide_planes(shares, target, first, last, wanted)
    labels = labels.astype(dtype_of(organs), copy=False)
    counts = np.zeros(max(organs.values) + 1, np.int64)
    count_values(labels, counts)
    step = planes_at_once(target.shape, labels.dtype)
    return [pack(labels[z : z + step]) for z in range(0, len(labels), step)], counts


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results in the order of their indices; early ones wait."""
    early: dict[int, Any] = {}
    following = 0
    for index, result in results:
        early[index] = result
        while following in early:
            yield early.pop(following)
            following += 1
