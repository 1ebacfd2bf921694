"""One door to the four modes of the transfer; the job is checked when it is made.

`moving` moves organs whole, `warping` warps atlases; neither knows of the other.
"""

from collections.abc import Sequence

from distributed import Client

from atlas_store import Atlas, AtlasKeypoints
from kpt_dask.matching.second_pass import rematch
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.measures import OrganCounts
from kpt_dask.organ_transfer.moving.schedule import move_organs
from kpt_dask.organ_transfer.warping.schedule import warp_atlases


def transfer(
    job: TransferJob,
    atlases: Sequence[Atlas],
    evidence: Evidence,
    *,
    atlas_keypoints: AtlasKeypoints | None = None,
    client: Client | None = None,
) -> OrganCounts:
    """Transfer the atlases' organs to the scan: fill the probabilities, decide each voxel's organ.

    Modes `organ`, `affine` and `across` move organs whole; their equations stand in
    `kpt_dask.organ_transfer.moving`. Mode `local` matches the keypoints again, near where a first
    field expects them, and warps each atlas by a smooth field; its equations stand in
    `kpt_dask.organ_transfer.warping`.

    Parameters
    ----------
    job : TransferJob
        The scan, the arrays to fill, the mode and its options.
    atlases : sequence of Atlas
        In the order of the matches' indices.
    evidence : Evidence
        Keypoints, matches and votes, from `kpt_dask.extract`, `kpt_dask.match` and
        `kpt_dask.vote`. Mode `local` does not use the votes.
    atlas_keypoints : AtlasKeypoints, optional
        Keypoints of these atlases, if they are in memory already. Only mode `local` needs them,
        and loads them otherwise.
    client : distributed.Client, optional
        Where the blocks are computed; threads of this process if there is no current one.

    Returns
    -------
    OrganCounts
        Counts of each organ's voxels, from which
        `kpt_dask.organ_transfer.measures.organ_measures` measures the organs.

    Raises
    ------
    AtlasNotFoundError
        If an atlas was removed meanwhile.
    StoreFormatError
        If an atlas is damaged.

    References
    ----------
    Wachinger et al., Keypoint Transfer Segmentation, IPMI 2015,
    https://doi.org/10.1007/978-3-319-19992-4_18.

    Examples
    --------
    >>> import kpt_dask
    >>> from atlas_store import AtlasKeypoints, AtlasStore
    >>> from kpt_dask.organ_transfer.job import Evidence, TransferJob
    >>> from kpt_dask.organ_transfer.probability import TILING, create_probability
    >>> from kpt_dask.volumes.omezarr import create_label_image
    >>> store, scan = AtlasStore.open("atlases"), kpt_dask.open_scan("body_4_ct.nii.gz")
    >>> volume = kpt_dask.convert(scan, "transferred.zarr", spacing=4.0)
    >>> keypoints = kpt_dask.extract(volume)
    >>> matches = kpt_dask.match(keypoints, AtlasKeypoints.load(store))
    >>> votes = kpt_dask.vote(matches, keypoints.sizes["keypoint"], store.organs)
    >>> group, grid, organs = volume.group, volume.grid, store.organs
    >>> probability = create_probability(group, grid, organs, "affine")
    >>> [labels, *_] = create_label_image(group, "organs", grid, organs, TILING.shard)
    >>> job = TransferJob(volume, organs, probability, labels, "affine")
    >>> counts = kpt_dask.transfer(job, store.atlases(), Evidence(keypoints, matches, votes))
    >>> bool(counts.voxels.sum() > 0)
    True
    """
    if job.mode != "local":
        return move_organs(job, atlases, evidence, client)
    known = atlas_keypoints or AtlasKeypoints.of(atlases)
    widths = job.options.sigma_x, job.options.sigma_t
    nearer = rematch(evidence.keypoints, known, evidence.matches, widths=widths, client=client)
    return warp_atlases(job, atlases, evidence._replace(matches=nearer), client)
