"""Match a scan's keypoints with each atlas's again, where a first field says they should be.

Near its displaced position a keypoint has few rivals, so a match needs no ratio test; that
both keypoints choose each other is enough. Twice: the second field knows better than the first.
"""

from typing import Any

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from atlas_store import AtlasKeypoints
from kpt_dask.kernels.jit import kernel
from kpt_dask.matching.displacement import Field, Widths
from kpt_dask.matching.first_pass import frame_arrays, slices_by_atlas
from kpt_dask.matching.search import SCALE_RATIO, FrameArrays, Keypoints, squared_distance
from kpt_dask.options import SIGMA_T, SIGMA_X
from kpt_dask.runtime import cluster

RADII = 35.0, 25.0
"""How far from where the field expects it a keypoint's match may lie, mm: first, when the field
is that of matches anywhere, and again, when it is that of the matches this gives."""


def rematch(
    keypoints: xr.Dataset,
    atlases: AtlasKeypoints,
    matches: xr.Dataset,
    *,
    widths: Widths = (SIGMA_X, SIGMA_T),
    client: Client | None = None,
) -> xr.Dataset:
    """Match again near the displacement that the matches of each atlas amount to.

    Parameters
    ----------
    keypoints : xarray.Dataset
        From `kpt_dask.extract`.
    atlases : AtlasKeypoints
        Keypoints of the atlases.
    matches : xarray.Dataset
        From `kpt_dask.match`.
    widths : (float, float)
        σ_x and σ_t of the field, mm.
    client : distributed.Client, optional
        Client whose workers match atlases in parallel.

    Returns
    -------
    xarray.Dataset
        Dimensions ``match`` and ``axis`` (z, y, x), ordered by atlas and test keypoint:
        ``keypoint``, ``atlas`` and ``atlas_keypoint`` (match) int32; ``translation``
        (match, axis) float32, mm, from the atlas to the scan. One to one in each atlas.
    """
    test, by_atlas = frame_arrays(keypoints, atlases)
    with cluster.session(client) as session:
        scattered = cluster.share(session, test)
        tasks = []
        for one, rows in zip(by_atlas, slices_by_atlas(matches, len(atlases)), strict=True):
            keypoint, translation = matches.keypoint.values[rows], matches.translation.values[rows]
            tasks.append((scattered, one, keypoint, translation, widths))
        pairs = cluster.run_small(session, rematch_atlas, tasks, "Matching again")
    keypoint = np.concatenate([i for i, _ in pairs])
    atlas_keypoint = np.concatenate([j for _, j in pairs])
    atlas = np.repeat(np.arange(len(pairs)), [i.size for i, _ in pairs])
    translation = (
        test.position[keypoint] - atlases.position[atlases.offsets[atlas] + atlas_keypoint]
    )
    return xr.Dataset(
        {
            "keypoint": ("match", keypoint.astype(np.int32)),
            "atlas": ("match", atlas.astype(np.int32)),
            "atlas_keypoint": ("match", atlas_keypoint.astype(np.int32)),
            "translation": (("match", "axis"), translation.astype(np.float32)),
        }
    )


def rematch_atlas(
    test: FrameArrays,
    atlas: FrameArrays,
    keypoint: NDArray[np.int32],
    translation: NDArray[np.float32],
    widths: Widths = (SIGMA_X, SIGMA_T),
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match with one atlas.

    Parameters
    ----------
    test, atlas : FrameArrays
        Keypoints of the scan and of the atlas.
    keypoint, translation : ndarray
        Test keypoints (m) of the first matches, and translations (m, 3) to the scan, mm.

    Returns
    -------
    keypoint, atlas_keypoint : int64 arrays (n)
        Pairs, each in its first frame, that are each other's nearest in descriptor, of those
        within the last of `RADII` whose scales and signs agree; in order of test keypoint.
    """
    here, there = Keypoints.of(test), Keypoints.of(atlas)
    order = np.argsort(there.position[:, 0], kind="stable")
    height = there.position[order, 0]
    position = np.asarray(test[0], np.float32)[keypoint]
    for radius in RADII:
        field = Field.of(position, translation).at(here.position, widths)
        moved = here._replace(position=here.position - field[:, :3])
        support = np.ascontiguousarray(field[:, 3])
        forth = _mutual_nearest(moved, support, there, order, height, np.float32(radius))
        mutual = np.flatnonzero(forth >= 0)
        position = here.position[mutual]
        translation = position - there.position[forth[mutual]]
    return here.first[mutual], there.first[forth[mutual]]


@kernel
def _mutual_nearest(
    test: Any,
    support: NDArray[np.float32],
    atlas: Any,
    order: NDArray[np.int64],
    height: NDArray[np.float32],
    radius: np.float32,
) -> NDArray[np.int64]:
    """Index of the atlas keypoint that each test keypoint chooses and is chosen by, or −1.

    Parameters
    ----------
    test, atlas : Keypoints
        The test keypoints displaced to where the field expects them in the atlas.
    support : float32 array (n)
        Weight of the matches that support the field at each test keypoint; 0 excludes it.
    order, height : ndarray (m)
        Atlas keypoints by ascending z, and their z, mm.
    radius : float32
        mm.
    """
    here, there = test.position, atlas.position
    forth = np.full(here.shape[0], -1, np.int64)
    back = np.full(there.shape[0], -1, np.int64)
    nearest = np.full(there.shape[0], np.inf, np.float32)
    for i in range(here.shape[0]):
        if support[i] == 0:
            continue
        best = np.float32(np.inf)
        for at in range(np.searchsorted(height, here[i, 0] - radius), height.size):
            if height[at] - here[i, 0] >= radius:
                break
            j = order[at]
            dz = here[i, 0] - there[j, 0]
            dy = here[i, 1] - there[j, 1]
            dx = here[i, 2] - there[j, 2]
            if not dz * dz + dy * dy + dx * dx < radius * radius or test.sign[i] != atlas.sign[j]:
                continue
            scale, other_scale = test.scale[i], atlas.scale[j]
            if other_scale < scale / SCALE_RATIO or other_scale > scale * SCALE_RATIO:
                continue
            squared = squared_distance(test, i, atlas, j)
            # Ties go to the lower index, on both sides.
            if squared < best or (squared == best and j < forth[i]):
                best = squared
                forth[i] = j
            if squared < nearest[j]:
                nearest[j] = squared
                back[j] = i
    for i in range(forth.size):
        if forth[i] >= 0 and back[forth[i]] != i:
            forth[i] = -1
    return forth
