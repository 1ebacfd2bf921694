"""Descriptors in local frames of a keypoint, which a rotation of the scan leaves unchanged.

The directions of the gradients in a sphere around the keypoint fall into a histogram. Its
peaks are first axes; for each, the peaks of what the gradients have perpendicular to it are
second axes (Toews and Wells, "Efficient and robust model-to-image alignment using 3D
scale-invariant features", 2013; used by Wachinger et al. 2015, section 2.1). Where the paper
is silent: gradients count by magnitude and a Gaussian of their distance; samples of the
upright patch are rotated rather than sampled anew, so a frame needs no voxel beyond it; and
the bins are points of a cubic lattice around a sphere, which flips and right angles map onto
each other. Kernels here know neither Dask nor Zarr.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from kpt_dask.kernels.jit import kernel
from kpt_dask.keypoints.descriptors import BINS, PATCH
from kpt_dask.keypoints.extrema import vertex

MAX_FRAMES = 8
"""Frames of a keypoint at most: those of the highest peaks."""
PRIMARY = 0.8
"""Peaks of at least this share of the highest are first axes."""
SECONDARY = 0.5
"""The same for second axes."""
WINDOW = 0.5
"""σ of the Gaussian by which samples count for a frame, in units of the sphere's radius."""
RADIUS = 5
"""Radius of the sphere of directions, bins."""
SIZE = 2 * (RADIUS + 3) + 1
"""Bins along each side of the lattice; smoothing and the test for peaks stay inside."""

Vectors = Annotated[NDArray[np.float64], "n 3"]
Lattice = Annotated[NDArray[np.float64], "z y x"]


@kernel
def describe_in_frames(
    patch: NDArray[np.float32], frames: NDArray[np.float32], ranks: NDArray[np.uint8]
) -> int:
    """Find the local frames of a patch, and rank its 64 gradient sums in each.

    Parameters
    ----------
    patch : float32 array (13, 13, 13)
        As for `kpt_dask.keypoints.descriptors.describe`, which must have accepted it.
    frames : float32 array (`MAX_FRAMES`, 3, 3)
        Receives rotations: row i is the i-th axis of the frame, (z, y, x). By falling
        peaks of the first axes, then of the second.
    ranks : uint8 array (`MAX_FRAMES`, 64)
        Receives the ranks 0 … 63 in each frame, in the order (bin along its first, second,
        third axis, octant); equal sums rank by their position.

    Returns
    -------
    int
        Number of frames, at least 1: without any direction it is the upright one.
    """
    place = np.empty((PATCH**3, 3), np.float64)
    gradient = np.empty((PATCH**3, 3), np.float64)
    weight = np.empty(PATCH**3, np.float64)
    n = _sphere(patch, place, gradient, weight)
    place, gradient, weight = place[:n], gradient[:n], weight[:n]
    histogram = np.empty((SIZE, SIZE, SIZE), np.float64)
    across = np.empty((n, 3), np.float64)
    first = np.empty((MAX_FRAMES, 3), np.float64)
    second = np.empty((MAX_FRAMES, 3), np.float64)
    frame = np.eye(3)
    count = 0
    _histogram(gradient, weight, histogram)
    for i in range(_peaks(histogram, PRIMARY, first)):
        frame[0] = first[i]
        _perpendicular(gradient, frame[0], across)
        _histogram(across, weight, histogram)
        for j in range(_peaks(histogram, SECONDARY, second)):
            if count == MAX_FRAMES:
                break
            _perpendicular(second[j : j + 1], frame[0], frame[1:2])
            frame[1] /= np.sqrt((frame[1] ** 2).sum())
            frame[2] = np.cross(frame[0], frame[1])
            _rank(place, gradient, frame, ranks[count])
            frames[count] = frame
            count += 1
    if count == 0:
        frame = np.eye(3)
        _rank(place, gradient, frame, ranks[0])
        frames[0] = frame
        count = 1
    return count


@kernel
def _sphere(
    patch: NDArray[np.float32],
    place: Vectors,
    gradient: Vectors,
    weight: NDArray[np.float64],
) -> int:
    """Collect the samples in a patch's inscribed sphere whose gradient is not 0."""
    half = PATCH // 2
    n = 0
    for k in range(PATCH):
        for j in range(PATCH):
            for i in range(PATCH):
                squared = ((k - half) ** 2 + (j - half) ** 2 + (i - half) ** 2) / half**2
                gz = patch[k + 2, j + 1, i + 1] - patch[k, j + 1, i + 1]
                gy = patch[k + 1, j + 2, i + 1] - patch[k + 1, j, i + 1]
                gx = patch[k + 1, j + 1, i + 2] - patch[k + 1, j + 1, i]
                if squared > 1.0 or (gz == 0 and gy == 0 and gx == 0):
                    continue
                place[n] = ((k - half) / half, (j - half) / half, (i - half) / half)
                gradient[n] = (gz, gy, gx)
                weight[n] = np.exp(-0.5 * squared / WINDOW**2)
                n += 1
    return n


@kernel
def _perpendicular(vectors: Vectors, axis: NDArray[np.float64], out: Vectors) -> None:
    """Subtract from vectors their component along a unit axis."""
    for i in range(vectors.shape[0]):
        z, y, x = vectors[i]
        along = z * axis[0] + y * axis[1] + x * axis[2]
        out[i, 0] = z - along * axis[0]
        out[i, 1] = y - along * axis[1]
        out[i, 2] = x - along * axis[2]


@kernel
def _histogram(vectors: Vectors, weight: NDArray[np.float64], out: Lattice) -> None:
    """Distribute the weighted lengths over the bins around their directions, and smooth."""
    out[:] = 0
    middle = SIZE // 2
    for i in range(vectors.shape[0]):
        z, y, x = vectors[i]
        length = np.sqrt(z * z + y * y + x * x)
        if length == 0:
            continue
        z = middle + RADIUS * z / length
        y = middle + RADIUS * y / length
        x = middle + RADIUS * x / length
        k, j, i0 = int(z), int(y), int(x)
        for a in range(2):
            fz = z - k if a else 1 - (z - k)
            for b in range(2):
                fy = y - j if b else 1 - (y - j)
                for c in range(2):
                    fx = x - i0 if c else 1 - (x - i0)
                    out[k + a, j + b, i0 + c] += weight[i] * length * fz * fy * fx
    before = np.empty_like(out)
    for axis in range(3):
        before[:] = out
        dz, dy, dx = int(axis == 0), int(axis == 1), int(axis == 2)
        for k in range(2, SIZE - 2):
            for j in range(2, SIZE - 2):
                for i in range(2, SIZE - 2):
                    near = before[k - dz, j - dy, i - dx] + before[k + dz, j + dy, i + dx]
                    far = (
                        before[k - 2 * dz, j - 2 * dy, i - 2 * dx]
                        + before[k + 2 * dz, j + 2 * dy, i + 2 * dx]
                    )
                    out[k, j, i] = (6 * before[k, j, i] + 4 * near + far) / 16


@kernel
def _peaks(histogram: Lattice, share: float, directions: Vectors) -> int:
    """Find the directions of peaks of at least a share of the highest; the highest first.

    The first of equal neighbours is a peak; equal peaks stay in order.
    """
    middle = SIZE // 2
    limit = share * histogram.max()
    height = np.empty(directions.shape[0], np.float64)
    count = 0
    for k in range(1, SIZE - 1):
        for j in range(1, SIZE - 1):
            for i in range(1, SIZE - 1):
                v = histogram[k, j, i]
                if v <= 0 or v < limit or not _is_peak(histogram, k, j, i):
                    continue
                at = count
                while at > 0 and height[at - 1] < v:
                    at -= 1
                if at == height.size:
                    continue
                count = min(count + 1, height.size)
                for later in range(count - 1, at, -1):
                    height[later] = height[later - 1]
                    directions[later] = directions[later - 1]
                height[at] = v
                z = k - middle + vertex(histogram[k - 1, j, i], v, histogram[k + 1, j, i])
                y = j - middle + vertex(histogram[k, j - 1, i], v, histogram[k, j + 1, i])
                x = i - middle + vertex(histogram[k, j, i - 1], v, histogram[k, j, i + 1])
                length = np.sqrt(z * z + y * y + x * x)
                directions[at] = (z / length, y / length, x / length)
    return count


@kernel
def _is_peak(histogram: Lattice, k: int, j: int, i: int) -> bool:
    v = histogram[k, j, i]
    later = False
    for a in range(k - 1, k + 2):
        for b in range(j - 1, j + 2):
            for c in range(i - 1, i + 2):
                if a == k and b == j and c == i:
                    later = True
                elif histogram[a, b, c] > v or (histogram[a, b, c] == v and not later):
                    return False
    return True


@kernel
def _rank(
    place: Vectors, gradient: Vectors, frame: NDArray[np.float64], ranks: NDArray[np.uint8]
) -> None:
    """Rank the gradient sums of a sphere in a frame, as `descriptors.describe` does."""
    sums = np.zeros((2, 2, 2, 8), np.float64)
    upper = np.empty(3, np.float64)
    for i in range(place.shape[0]):
        octant = 0
        for axis in range(3):
            a, b, c = frame[axis]
            along = place[i, 0] * a + place[i, 1] * b + place[i, 2] * c
            upper[axis] = min(max(along + 0.5, 0.0), 1.0)
            slope = gradient[i, 0] * a + gradient[i, 1] * b + gradient[i, 2] * c
            octant = 2 * octant + (slope > 0)
        z, y, x = gradient[i]
        magnitude = np.sqrt(z * z + y * y + x * x)
        for k in range(2):
            wz = (upper[0] if k else 1 - upper[0]) * magnitude
            for j in range(2):
                wy = wz * (upper[1] if j else 1 - upper[1])
                sums[k, j, 0, octant] += wy * (1 - upper[2])
                sums[k, j, 1, octant] += wy * upper[2]
    order = np.argsort(sums.ravel(), kind="mergesort")
    for rank in range(BINS):
        ranks[order[rank]] = rank
