"""Keypoints of a block, and volumes that have some."""

import numpy as np
from scipy import ndimage

from kpt_dask.keypoints.blocks import plan_blocks
from kpt_dask.keypoints.extraction import sweep_blocks
from kpt_dask.keypoints.octaves import Octave
from kpt_dask.keypoints.sweep import OctaveKeypoints
from kpt_dask.keypoints.sweep_plan import halo
from tests.helpers import stored

Shape = tuple[int, int, int]

AIR = -1000.0


def canonical(found: OctaveKeypoints) -> OctaveKeypoints:
    """Ordered by level and voxel."""
    order = np.lexsort((*found.voxel.T[::-1], found.level))
    return OctaveKeypoints(*(a[order] for a in found))


def found_in(
    values: np.ndarray,
    octave: int = 0,
    block: Shape | None = None,
    *,
    chunks: Shape = (32, 32, 32),
    finer: bool = False,
    invariant: bool = False,
) -> OctaveKeypoints:
    source = Octave(stored(values, chunks), octave == 0, finer)
    blocks = plan_blocks(source.shape, block or source.shape, halo(octave == 0, finer))
    return canonical(
        OctaveKeypoints.join(sweep_blocks([(source, one) for one in blocks], invariant))
    )


def assert_same_bytes(one: OctaveKeypoints, other: OctaveKeypoints) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.tobytes() == b.tobytes()


def noise(shape: Shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.float32)


def texture(shape: Shape, seed: int, spread: float = 2.5) -> np.ndarray:
    """As much of a keypoint's size as possible: white noise has no extremum over scale."""
    smooth = ndimage.gaussian_filter(noise(shape, seed), spread, mode="wrap")
    return (20 * smooth).astype(np.float32)
