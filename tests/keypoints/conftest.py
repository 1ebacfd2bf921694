"""Real CT for the tests of keypoints."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client

from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert_into
from kpt_dask.volumes.volume import Volume


@pytest.fixture(scope="session")
def head(openkbp: Path, tmp_path_factory: pytest.TempPathFactory, one_process: Client) -> Volume:
    """A real scan at 3 mm."""
    group = zarr.create_group(str(tmp_path_factory.mktemp("head") / "v.zarr"), zarr_format=3)
    return convert_into(
        open_scan(openkbp / "pt_100_ct.nii.gz"), group, spacing=3.0, client=one_process
    )


@pytest.fixture(scope="session")
def crop(head: Volume) -> np.ndarray:
    """The middle of the body, odd along each axis so that flips map every second voxel to such."""
    values = np.asarray(head.levels[0][:])
    middle = np.argwhere(values > 0).mean(axis=0).astype(int)
    window = tuple(
        slice(max(c - 40, 0), max(c - 40, 0) + 81)
        for c in np.minimum(middle, np.array(values.shape) - 41)
    )
    return np.ascontiguousarray(values[window])
