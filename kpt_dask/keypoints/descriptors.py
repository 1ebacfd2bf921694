"""Rank-ordered gradient descriptors of a keypoint's surroundings (SIFT-Rank in 3-D).

A patch of 11³ points around the keypoint, spaced by its scale, is sampled from the
Gaussian of the keypoint's level. Gradients fall into 2 × 2 × 2 soft spatial bins times
8 octants of direction, weighted by magnitude, and the 64 sums are replaced by their ranks
(Toews and Wells, "Efficient and robust model-to-image alignment using 3D scale-invariant
features", 2013; used by Wachinger et al. 2015, section 2.1). Kernels here know neither
Dask nor Zarr.
"""

import math
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel
from kpt_dask.volumes.scale_space import LEVELS, level_sigma

PATCH = 11
"""Points along each side of a patch."""
HALF_WIDTH = 4.0
"""Half the side of a patch, in units of the keypoint's σ."""
STEP = HALF_WIDTH / (PATCH // 2)
"""Distance between a patch's points, in units of the keypoint's σ."""
BINS = 64
ANISOTROPY = 10_000.0
"""Patches whose structure tensor has trace³ ≥ this · det are refused: flat or line-like.

featExtract uses 140 (an isotropic tensor has 27). On real CT that refuses two keypoints in
three, and most of those in the parotids: see `kpt_dask/README.md`.
"""
PATCH_REACH = math.ceil(STEP * (PATCH // 2 + 1) * level_sigma(LEVELS + 0.5) + 0.5)
"""Planes that a patch may need on either side of its keypoint's plane."""

Planes = Annotated[NDArray[np.float32], "z y x"]


@kernel
def sample_patch(
    ring: Planes,
    n: int,
    index: NDArray[np.int64],
    offset: NDArray[np.float64],
    step: float,
    patch: NDArray[np.float32],
) -> None:
    """Sample a cube of points around a keypoint by trilinear interpolation; edges repeat.

    Parameters
    ----------
    ring : float32 array (m, y, x)
        Ring buffer of planes of one Gaussian of a volume of `n` planes; plane p is ``ring[p % m]``.
    n : int
        Number of planes of the volume.
    index, offset : int64 and float64 arrays (3)
        Centre of the cube, voxels (z, y, x): ``index + offset``. They are passed separately
        because rounding of their sum would depend on where the array begins in the body.
    step : float
        Distance between points, voxels.
    patch : float32 array (s, s, s)
        Receives the samples; s is odd.
    """
    m, ny, nx = ring.shape
    size = patch.shape[0]
    half = size // 2
    # Unsigned indices, so that none is tested for being negative.
    low = np.empty((3, size), np.uint64)
    high = np.empty((3, size), np.uint64)
    part = np.empty((3, size), np.float32)
    for axis in range(3):
        last = (n if axis == 0 else (ny if axis == 1 else nx)) - 1
        for i in range(size):
            at = offset[axis] + (i - half) * step
            floor = np.floor(at)
            voxel = index[axis] + int(floor)
            low[axis, i] = min(max(voxel, 0), last)
            high[axis, i] = min(max(voxel + 1, 0), last)
            part[axis, i] = at - floor
    # One axis after the other, not as a weighted sum of eight: where all eight are equal, as in
    # air and beyond an edge, so is the result, and rounding makes no gradient. Rows are addressed
    # by offsets, because numba counts references to views.
    flat = ring.reshape(-1)
    for k in range(size):
        upper = low[0, k] % np.uint64(m) * np.uint64(ny)
        lower = high[0, k] % np.uint64(m) * np.uint64(ny)
        fz = part[0, k]
        for j in range(size):
            fy = part[1, j]
            a = (upper + low[1, j]) * np.uint64(nx)
            b = (upper + high[1, j]) * np.uint64(nx)
            c = (lower + low[1, j]) * np.uint64(nx)
            d = (lower + high[1, j]) * np.uint64(nx)
            for i in range(size):
                p = low[2, i]
                q = high[2, i]
                fx = part[2, i]
                near = flat[a + p] + fx * (flat[a + q] - flat[a + p])
                far = flat[b + p] + fx * (flat[b + q] - flat[b + p])
                above = near + fy * (far - near)
                near = flat[c + p] + fx * (flat[c + q] - flat[c + p])
                far = flat[d + p] + fx * (flat[d + q] - flat[d + p])
                below = near + fy * (far - near)
                patch[k, j, i] = above + fz * (below - above)


@kernel
def describe(patch: NDArray[np.float32], ranks: NDArray[np.uint8]) -> bool:
    """Rank the 64 gradient sums of a patch, unless it is flat or line-like.

    Parameters
    ----------
    patch : float32 array (13, 13, 13)
        Samples, one more on each side than the 11³ at which gradients are taken.
    ranks : uint8 array (64)
        Receives the ranks 0 … 63, in the order (z bin, y bin, x bin, octant z y x);
        equal sums rank by their position. Untouched if the patch is refused.

    Returns
    -------
    bool
        Whether trace³ < `ANISOTROPY` · det holds for the patch's structure tensor.
    """
    sums = np.zeros((2, 2, 2, 8), np.float32)
    upper = np.empty(PATCH, np.float32)
    for i in range(PATCH):
        u = (i - PATCH // 2) / (PATCH // 2)
        upper[i] = min(max(u + 0.5, 0.0), 1.0)
    one = np.float32(1.0)
    zz = yy = xx = zy = zx = yx = 0.0
    row = np.empty((2, 8), np.float32)
    for k in range(PATCH):
        for j in range(PATCH):
            row[:] = 0
            for i in range(PATCH):
                gz = patch[k + 2, j + 1, i + 1] - patch[k, j + 1, i + 1]
                gy = patch[k + 1, j + 2, i + 1] - patch[k + 1, j, i + 1]
                gx = patch[k + 1, j + 1, i + 2] - patch[k + 1, j + 1, i]
                zz += gz * gz
                yy += gy * gy
                xx += gx * gx
                zy += gz * gy
                zx += gz * gx
                yx += gy * gx
                octant = 4 * (gz > 0) + 2 * (gy > 0) + (gx > 0)
                magnitude = np.sqrt(gz * gz + gy * gy + gx * gx)
                row[1, octant] += upper[i] * magnitude
                row[0, octant] += (one - upper[i]) * magnitude
            for octant in range(8):
                for b in range(2):
                    value = row[b, octant]
                    sums[1, 1, b, octant] += upper[k] * upper[j] * value
                    sums[1, 0, b, octant] += upper[k] * (one - upper[j]) * value
                    sums[0, 1, b, octant] += (one - upper[k]) * upper[j] * value
                    sums[0, 0, b, octant] += (one - upper[k]) * (one - upper[j]) * value
    trace = zz + yy + xx
    det = zz * (yy * xx - yx * yx) - zy * (zy * xx - yx * zx) + zx * (zy * yx - yy * zx)
    if not trace * trace * trace < ANISOTROPY * det:
        return False
    flat = sums.ravel()
    order = np.argsort(flat, kind="mergesort")
    for rank in range(BINS):
        ranks[order[rank]] = rank
    return True
