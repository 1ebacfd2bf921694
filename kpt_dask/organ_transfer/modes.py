"""One door to the four modes: what is asked for is checked, then done.

What moves whole organs and what warps atlases lies in rooms of their own, `moving` and `warping`.
"""

from collections.abc import Sequence
from typing import Any

import xarray as xr
import zarr
from distributed import Client

from atlas_store import AtlasKeypoints, AtlasStore
from kpt_dask.matching.second_pass import rematch
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts
from kpt_dask.organ_transfer.moving.schedule import move_organs
from kpt_dask.organ_transfer.warping.schedule import warp_atlases
from kpt_dask.volumes.volume import Volume


def transfer(
    volume: Volume,
    store: AtlasStore,
    atlas_ids: Sequence[str],
    keypoints: xr.Dataset,
    matches: xr.Dataset,
    votes: xr.Dataset,
    probability: zarr.Array[Any],
    labels: zarr.Array[Any],
    *,
    mode: str = "local",
    options: TransferOptions = DEFAULTS,
    atlases: AtlasKeypoints | None = None,
    memory: int | None = None,
    client: Client | None = None,
) -> OrganCounts:
    """Transfer the atlases' organs to the scan: fill the probabilities, decide each voxel's organ.

    Modes `organ`, `affine` and `across` move organs whole; their equations stand in
    `kpt_dask.organ_transfer.moving`. Mode `local` matches the keypoints
    again, near where a first field expects them, and warps each atlas by a smooth field; its
    equations stand at `kpt_dask.organ_transfer.warping.schedule.warp_atlases`.

    Parameters
    ----------
    volume : Volume
        The scan.
    store, atlas_ids
        The atlases, in the order of the matches' indices.
    keypoints, matches, votes : xarray.Dataset
        From `kpt_dask.extract`, `kpt_dask.match` and `kpt_dask.vote`. Mode `local` does not look
        at the votes.
    probability : zarr.Array (organ, z, y, x), float32
        From `kpt_dask.organ_transfer.probability.create_probability`, made for the same mode.
    labels : zarr.Array (z, y, x)
        Level 0 of the label map, filled with 0, from `kpt_dask.volumes.omezarr.create_label_image`.
    mode : str
        One of `kpt_dask.options.MODES`.
    options : TransferOptions
        Threshold, ν, widths of kernels, and which organs move which.
    atlases : AtlasKeypoints, optional
        The keypoints of these atlases, where they are in memory already; only mode `local` needs
        them, and loads them if they are not given.
    memory : int, optional
        Bytes that all blocks of a process may take together, down to one chunk a block.
    client : distributed.Client, optional
        Where the blocks are computed; threads of this process if there is no current one.

    Returns
    -------
    OrganCounts
        What is counted of the labels and their shares.

    Raises
    ------
    ParameterError
        If there is no such mode, or the options do not fit it or the store.

    Examples
    --------
    >>> group = zarr.open_group("scan.zarr", mode="r+")  # doctest: +SKIP
    >>> probability = create_probability(
    ...     group, volume.grid, store.organs, "affine"
    ... )  # doctest: +SKIP
    >>> [labels, *_] = create_label_image(
    ...     group, "organs", volume.grid, store.organs, SHARD
    ... )  # doctest: +SKIP
    >>> transfer(volume, store, store.ids(), keypoints, matches, votes, probability, labels,
    ...          mode="affine")  # doctest: +SKIP
    """
    options.check(mode, store.organs)
    if mode == "local":
        if atlases is None:
            atlases = AtlasKeypoints.load(store, atlas_ids)
        widths = options.sigma_x, options.sigma_t
        nearer = rematch(keypoints, atlases, matches, widths=widths, client=client)
        return warp_atlases(
            volume,
            store,
            atlas_ids,
            keypoints,
            nearer,
            probability,
            labels,
            options=options,
            memory=memory,
            client=client,
        )
    job = TransferJob(volume, store.organs, probability, labels, mode, options, memory)
    return move_organs(job, store.atlases(atlas_ids), Evidence(keypoints, matches, votes), client)
