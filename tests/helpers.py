"""What tests of several rooms build: volumes, stores, and where the pieces of an atlas lie."""

import numpy as np

from kpt_dask.volumes.blur import blur_planes, blur_scratch
from tests.naive.stations import Points


def integer_noise(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Whole numbers of HU, float32."""
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.float32)


def blurred(volume: np.ndarray, taps: np.ndarray, batch: int = 1) -> np.ndarray:
    """All planes through `blur_planes`, from a ring as small as may be."""
    n, r = volume.shape[0], taps.size - 1
    ring = np.full((min(2 * r + batch, n), *volume.shape[1:]), np.nan, np.float32)
    scratch = blur_scratch(batch, volume.shape[2], r)
    out = np.empty_like(volume)
    filled = 0
    for first in range(0, n, batch):
        last = min(first + batch, n)
        for plane in range(filled, min(last + r, n)):
            ring[plane % len(ring)] = volume[plane]
        filled = min(last + r, n)
        blur_planes(ring, first, last - first, n, taps, scratch, out)
    return out


def random_points(rng: np.random.Generator, n: int, spread: float = 40.0) -> Points:
    """Positions on a grid of 1/4 mm, so that float32 holds every distance squared exactly."""
    return Points(
        position=np.rint(rng.uniform(-spread, spread, (n, 3)) * 4).astype(np.float32) / 4,
        scale=rng.choice(np.float32([1.5, 3, 4.2, 6, 12, 12.1]), n),
        sign=rng.choice(np.int8([-1, 1]), n),
        descriptor=rng.permuted(np.tile(np.arange(64, dtype=np.uint8), (n, 1)), axis=1),
        label=rng.choice(np.uint16([0, 1, 7]), n),
    )
