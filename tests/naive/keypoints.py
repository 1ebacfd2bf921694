"""Keypoints the plain way: float64, the whole volume in memory, numpy and scipy only.

Written from the paper and the documented constants, to be read beside neither the sweep
nor the kernels. Besides the keypoints it keeps by how much each decision was taken, so that
a test can tell a float32 tie from a mistake.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kpt_dask.keypoints import descriptors, local_frames
from kpt_dask.volumes import scale_space

Array = NDArray[Any]


@dataclass(frozen=True)
class NaiveKeypoints:
    """Extrema of one octave, those with a flat or line-like patch included.

    Attributes
    ----------
    voxel : int array (n, 4)
        Level (1 … 3), z, y, x.
    offset : float array (n, 4)
        Along z, y, x (voxels) and scale (levels).
    response : float array (n)
    sign : int array (n)
        1 for maxima, −1 for minima.
    sums : float array (n, 64)
        Gradient sums, (z bin, y bin, x bin, octant).
    patch : float array (n, 13, 13, 13)
        What the sums are taken from.
    edge : float array (n)
        trace³ / det of the structure tensor over the limit; refused from 1 on.
    dogs : float array (5, z, y, x)
    """

    voxel: Array
    offset: Array
    response: Array
    sign: Array
    sums: Array
    patch: Array
    edge: Array
    dogs: Array

    @property
    def accepted(self) -> Array:
        return self.edge < 1

    @property
    def ranks(self) -> Array:
        return ranks(self.sums)


def blur(image: Array, sigma: float, from_sigma: float) -> Array:
    increment = np.sqrt(sigma**2 - from_sigma**2)
    radius = int(np.ceil(scale_space.TRUNCATE * increment))
    for axis in range(3):
        image = ndimage.gaussian_filter1d(
            image, increment, axis=axis, mode="nearest", radius=radius, output=np.float64
        )
    return image


def next_octave(level: Array, first_octave: bool) -> Array:
    """Every second voxel of the Gaussian at twice σ0."""
    already = scale_space.INPUT_SIGMA if first_octave else scale_space.SIGMA0
    return blur(level, 2 * scale_space.SIGMA0, already)[::2, ::2, ::2]


def halfway(level: Array) -> Array:
    """Half the spacing, linear in between."""
    at = np.meshgrid(*(np.arange(2 * n - 1) / 2 for n in level.shape), indexing="ij")
    doubled: Array = ndimage.map_coordinates(level.astype(np.float64), at, order=1)
    return doubled


def gaussians(level: Array, first_octave: bool, already: float) -> list[Array]:
    sigmas = [scale_space.SIGMA0 * 2 ** (i / scale_space.LEVELS) for i in range(6)]
    first = level.astype(np.float64)
    stack = [blur(first, sigmas[0], already) if first_octave else first]
    for i in range(5):
        stack.append(blur(stack[i], sigmas[i + 1], sigmas[i]))
    return stack


def margins(dogs: Array) -> tuple[Array, Array]:
    """By how much D[1 … 3] exceeds, and falls below, all 80 neighbours; −inf at the border."""
    here = dogs[1:-1, 1:-1, 1:-1, 1:-1]
    above, below = np.full(here.shape, np.inf), np.full(here.shape, np.inf)
    for move in product((0, 1, 2), repeat=4):
        if move != (1, 1, 1, 1):
            window = tuple(slice(d, d + n) for d, n in zip(move, here.shape, strict=True))
            above = np.minimum(above, here - dogs[window])
            below = np.minimum(below, dogs[window] - here)
    border = ((0, 0), (1, 1), (1, 1), (1, 1))
    return tuple(np.pad(m, border, constant_values=-np.inf) for m in (above, below))  # type: ignore[return-value]


def vertex(before: float, here: float, after: float) -> float:
    """Vertex of the parabola through (−1, before), (0, here), (1, after), within ±0.5."""
    slope, curvature = (after - before) / 2, after - 2 * here + before
    return float(np.clip(-slope / curvature, -0.5, 0.5))


def sample(gaussian: Array, centre: Array, step: float, size: int) -> Array:
    """A cube of size³ samples, trilinear; edges repeat."""
    reach = (np.arange(size) - size // 2) * step
    for axis in range(3):
        # Clipped before it is split, so that samples beyond an edge are equal, not nearly so.
        at = np.clip(centre[axis] + reach, 0, gaussian.shape[axis] - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, gaussian.shape[axis] - 1)
        part = np.moveaxis(np.expand_dims(at - low, (1, 2)), 0, axis)
        below, above = np.take(gaussian, low, axis), np.take(gaussian, high, axis)
        gaussian = below + part * (above - below)
    return gaussian


def gradient_sums(patch: Array) -> tuple[Array, float]:
    """64 gradient sums of a 13³ patch, and trace³ / det of its structure tensor over the limit."""
    inner = slice(1, -1)
    gz = patch[2:, inner, inner] - patch[:-2, inner, inner]
    gy = patch[inner, 2:, inner] - patch[inner, :-2, inner]
    gx = patch[inner, inner, 2:] - patch[inner, inner, :-2]
    gradient = np.stack([gz, gy, gx], axis=-1).reshape(-1, 3)
    tensor = gradient.T @ gradient
    det = np.linalg.det(tensor)
    limit = descriptors.ANISOTROPY * det
    edge = np.trace(tensor) ** 3 / limit if det > 0 else np.inf
    along = np.linspace(-1, 1, descriptors.PATCH)
    # Two bins along each axis, centred halfway between the middle and either face.
    weight = np.clip([0.5 - along, 0.5 + along], 0, 1)
    octant = (gradient > 0) @ (4, 2, 1)
    magnitude = np.linalg.norm(gradient, axis=1)
    sums = np.zeros((2, 2, 2, 8))
    for z, y, x in product((0, 1), repeat=3):
        share = weight[z][:, None, None] * weight[y][:, None] * weight[x]
        sums[z, y, x] = np.bincount(octant, share.ravel() * magnitude, minlength=8)
    return sums.ravel(), float(edge)


@dataclass(frozen=True)
class NaiveFrame:
    """A local frame, by rows, and the 64 gradient sums along it."""

    axes: Array
    sums: Array


def frames_of(patch: Array) -> list[NaiveFrame]:
    """All local frames of a 13³ patch, the highest peaks first."""
    along = np.linspace(-1, 1, descriptors.PATCH)
    place = np.stack(np.meshgrid(along, along, along, indexing="ij"), -1).reshape(-1, 3)
    inner = (slice(1, -1),) * 3
    gradient = np.stack([2 * g[inner].ravel() for g in np.gradient(patch)], axis=-1)
    kept = ((place**2).sum(axis=1) <= 1 + 1e-9) & gradient.any(axis=1)
    place, gradient = place[kept], gradient[kept]
    weight = np.exp(-(place**2).sum(axis=1) / (2 * local_frames.WINDOW**2))
    found = []
    for first in peaks(directions(gradient, weight), local_frames.PRIMARY):
        across = gradient - np.outer(gradient @ first, first)
        for second in peaks(directions(across, weight), local_frames.SECONDARY):
            second = second - (second @ first) * first
            second /= np.linalg.norm(second)
            axes = np.stack([first, second, np.cross(first, second)])
            there, turned = place @ axes.T, gradient @ axes.T
            share = np.stack([np.clip(0.5 - there, 0, 1), np.clip(0.5 + there, 0, 1)])
            octant = (turned > 0) @ (4, 2, 1)
            sums = np.zeros((2, 2, 2, 8))
            for z, y, x in product((0, 1), repeat=3):
                own = share[z, :, 0] * share[y, :, 1] * share[x, :, 2]
                own = own * np.linalg.norm(gradient, axis=1)
                sums[z, y, x] = np.bincount(octant, own, minlength=8)
            found.append(NaiveFrame(axes, sums.ravel()))
    return found[: local_frames.MAX_FRAMES]


def directions(vectors: Array, weight: Array) -> Array:
    """Smoothed histogram of directions on a cubic lattice, by the vectors' weighted lengths."""
    middle = local_frames.SIZE // 2
    length = np.linalg.norm(vectors, axis=1)
    at = middle + local_frames.RADIUS * vectors / length[:, None]
    low = np.floor(at).astype(int)
    histogram = np.zeros(3 * (local_frames.SIZE,))
    for corner in product((0, 1), repeat=3):
        share = np.where(corner, at - low, 1 - (at - low)).prod(axis=1)
        np.add.at(histogram, tuple((low + corner).T), share * weight * length)
    for axis in range(3):
        histogram = ndimage.correlate1d(histogram, np.array([1, 4, 6, 4, 1]) / 16, axis)
    return histogram


def peaks(histogram: Array, share: float) -> list[Array]:
    """Directions of the peaks, the highest first."""
    around = np.ones((3, 3, 3), bool)
    around[1, 1, 1] = False
    rivals = ndimage.maximum_filter(histogram, footprint=around)
    tops = np.argwhere((histogram > rivals) & (histogram >= share * histogram.max()))
    found = []
    for top in sorted(tops, key=lambda t: -histogram[tuple(t)]):
        direction = top - local_frames.SIZE // 2.0
        for axis in range(3):
            before, after = (
                histogram[tuple(top + d * np.eye(3, dtype=int)[axis])] for d in (-1, 1)
            )
            direction[axis] += vertex(before, histogram[tuple(top)], after)
        found.append(direction / np.linalg.norm(direction))
    return found


def ranks(sums: Array) -> Array:
    order = np.argsort(sums, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable").astype(np.uint8)


def find(
    level: Array, first_octave: bool, already: float = scale_space.INPUT_SIGMA
) -> NaiveKeypoints:
    """Keypoints of the octave that begins with a level of the pyramid, blurred `already`."""
    stack = gaussians(level, first_octave, already)
    dogs = np.diff(np.stack(stack), axis=0)
    above, below = margins(dogs)
    voxel = np.argwhere((above > 0) | (below > 0)) + np.array([1, 0, 0, 0])
    offset, sums, patches, edge = [], [], [], []
    for at in voxel:
        shift = []
        for axis in (1, 2, 3, 0):
            line = [dogs[tuple(at + d * np.eye(4, dtype=int)[axis])] for d in (-1, 0, 1)]
            shift.append(vertex(*line))
        sigma = scale_space.SIGMA0 * 2 ** ((at[0] + shift[3]) / scale_space.LEVELS)
        step = 2 * descriptors.HALF_WIDTH * sigma / (descriptors.PATCH - 1)
        patch = sample(stack[at[0]], at[1:] + shift[:3], step, descriptors.PATCH + 2)
        one_sums, one_edge = gradient_sums(patch)
        offset.append(shift)
        sums.append(one_sums)
        patches.append(patch)
        edge.append(one_edge)
    at = (voxel[:, 0] - 1, *voxel[:, 1:].T)
    return NaiveKeypoints(
        voxel,
        np.array(offset).reshape(-1, 4),
        dogs[tuple(voxel.T)],
        np.where(above[at] > 0, 1, -1),
        np.array(sums).reshape(-1, 64),
        np.array(patches),
        np.array(edge),
        dogs,
    )
