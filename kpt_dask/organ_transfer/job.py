"""Jobs: the data that all blocks of one transfer share, and the results of earlier stations."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import xarray as xr
import zarr

from atlas_store import OrganTable
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.organ_transfer.probability import TILING, Tiling
from kpt_dask.volumes.volume import Volume


class Evidence(NamedTuple):
    """Results of the stations before the transfer.

    Attributes
    ----------
    keypoints, matches, votes : xarray.Dataset
        From `kpt_dask.extract`, `kpt_dask.match` and `kpt_dask.vote`.
    """

    keypoints: xr.Dataset
    matches: xr.Dataset
    votes: xr.Dataset


@dataclass(frozen=True, eq=False)
class TransferJob:
    """A scan, what is filled, and how: the same for every block. Pickled once per task.

    Attributes
    ----------
    volume : Volume
        The scan.
    organs : OrganTable
        Organs that are transferred.
    probability : zarr.Array (organ, z, y, x), float32
        From `kpt_dask.organ_transfer.probability.create_probability`, made for the same mode and
        tiling.
    labels : zarr.Array (z, y, x)
        Level 0 of the label map, filled with 0, from `kpt_dask.volumes.omezarr.create_label_image`.
    mode : str
        One of `kpt_dask.options.MODES`.
    options : TransferOptions
        Threshold, ν, widths of kernels, and which organs move which.
    memory : int, optional
        Bytes that all blocks of a process may take together, down to one shard per thread; see
        `kpt_dask.runtime.cluster.budget` for the default.
    tiling : Tiling
        Tiling of `probability`; blocks are whole shards.
    atlas_organs : OrganTable, optional
        All organs of the atlases, where these are more: matches in all of them vote.

    Raises
    ------
    ParameterError
        If there is no such mode, or the options do not fit it or the organs.
    """

    volume: Volume
    organs: OrganTable
    probability: "zarr.Array[Any]"
    labels: "zarr.Array[Any]"
    mode: str = "local"
    options: TransferOptions = DEFAULTS
    memory: int | None = None
    tiling: Tiling = TILING
    atlas_organs: OrganTable | None = None

    def __post_init__(self) -> None:
        """Refuse what no mode can do."""
        self.options.check(self.mode, self.voting)

    @property
    def voting(self) -> OrganTable:
        """Organs that matches vote for."""
        return self.atlas_organs or self.organs

    @property
    def threshold(self) -> float:
        """Share below which a voxel is background."""
        return self.options.smallest_share(self.mode)

    @property
    def nus(self) -> tuple[float, ...]:
        """ν of each organ, HU, in the order of the table."""
        return self.options.nus(self.mode, self.organs)
