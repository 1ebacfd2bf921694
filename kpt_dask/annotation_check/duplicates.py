"""Scans of one patient, known by their keypoints, whatever was done to the files.

Two scans of different people share few keypoints: on OpenKBP at most 3 of 100 lie where those of
another atlas lie after a shift, with like descriptors. A second copy, though noisy, shifted by
parts of a voxel, cropped or turned by 3°, shares 19 or more.
"""

import numpy as np
import xarray as xr
from numpy.typing import NDArray

SHARED = 0.1
"""Least share of the keypoints of the poorer scan, from which two scans show one patient."""

FEWEST = 50
"""Least number of shared keypoints: fewer may be chance."""

UNUSUAL, SEVERAL = 3.0, 4
"""How many times as large the share must be as the lower quartile of all atlases, if they are
several: scans that look alike, as phantoms do, share more."""

NEAR = 2.0
"""Voxels by which the translation of a shared keypoint may differ from the median."""


def same_patient(
    matches: xr.Dataset, n_keypoints: int, n_atlas_keypoints: NDArray[np.int64], spacing: float
) -> NDArray[np.float64]:
    """Share of keypoints in common with each atlas of the same patient.

    Parameters
    ----------
    matches, n_keypoints, n_atlas_keypoints, spacing
        As for `shared_keypoints`.

    Returns
    -------
    ndarray (atlas), float64
        0 for other patients.
    """
    shared = shared_keypoints(matches, n_keypoints, n_atlas_keypoints, spacing)
    least = SHARED
    if len(shared) >= SEVERAL:
        least = max(least, UNUSUAL * float(np.percentile(shared, 25)))
    fewest = FEWEST / np.maximum(np.minimum(n_keypoints, n_atlas_keypoints), 1)
    return np.where(shared >= np.maximum(least, fewest), shared, 0.0)


def shared_keypoints(
    matches: xr.Dataset, n_keypoints: int, n_atlas_keypoints: NDArray[np.int64], spacing: float
) -> NDArray[np.float64]:
    """Share of keypoints that a scan has in common with each atlas.

    Parameters
    ----------
    matches : xarray.Dataset
        From `kpt_dask.match`.
    n_keypoints : int
        Keypoints of the scan, several frames counted once.
    n_atlas_keypoints : ndarray (atlas), int64
        Those of each atlas.
    spacing : float
        Voxel size, mm.

    Returns
    -------
    ndarray (atlas), float64
        Matches whose translation is within `NEAR` voxels of the median of their atlas, over the
        keypoints of the scan that has fewer.
    """
    shared = np.zeros(len(n_atlas_keypoints))
    atlas, translation = matches.atlas.values, matches.translation.values
    for i, n_atlas in enumerate(n_atlas_keypoints.tolist()):
        moved = translation[atlas == i]
        if len(moved):
            apart = np.linalg.norm(moved - np.median(moved, axis=0), axis=1)
            near = np.count_nonzero(apart <= NEAR * spacing)
            shared[i] = near / max(min(n_keypoints, n_atlas), 1)
    return shared
