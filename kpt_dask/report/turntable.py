"""The organs in 3-D, seen from all around: pictures for pages without a 3-D viewer, and for print.

Each ray stops at the first voxel of an organ. Light comes from the viewer.
"""

from dataclasses import dataclass
from math import ceil, cos, pi, sin

import numpy as np
from numpy.typing import NDArray

from kpt_dask.report.encoding import number_pixels, png_uri

TURNS = 24
"""Directions of view, 15° apart; the first one is from the front."""
MOST_VOXELS = 5_000_000
"""Voxels of the box of all organs, at most; every second, third, … one is taken otherwise."""
DARKEST = 70
"""Shade, of 255, of a surface that is seen edge-on."""


@dataclass(frozen=True)
class Turntable:
    """Pictures from all around.

    Attributes
    ----------
    shape : (int, int)
        Rows and columns.
    frames : list of str
        PNG as data URI: number of the organ in red and green, shade in blue, all 0 where there
        is none. Frame n is seen after the patient has turned by n · 360° / `TURNS` to his right.
    """

    shape: tuple[int, int]
    frames: list[str]


def turntable_of(organs: NDArray[np.uint16], turns: int = TURNS) -> Turntable | None:
    """Look at organs from all around the long axis of the body.

    Parameters
    ----------
    organs : uint16 array (z, y, x)
        Numbers of organs, 0 for none; isotropic.
    turns : int
        Number of directions.

    Returns
    -------
    Turntable or None
        None without any organ, or if all are smaller than a step.
    """
    found = [
        np.flatnonzero(organs.any(axis=tuple(a for a in range(3) if a != axis)))
        for axis in range(3)
    ]
    if not found[0].size:
        return None
    box = tuple(slice(int(one[0]), int(one[-1]) + 1) for one in found)
    step = ceil((organs[box].size / MOST_VOXELS) ** (1 / 3))
    voxels = np.pad(organs[box][::step, ::step, ::step][::-1], ((2, 2), (1, 1), (1, 1)))
    frames = [_frame(voxels, 2 * pi * turn / turns) for turn in range(turns)]
    # The longest run of columns that holds all of them: from all sides the width differs.
    used = np.flatnonzero(np.any([f.any(axis=(0, 2)) for f in frames], axis=0))
    if not used.size:
        return None
    kept = slice(max(int(used[0]) - 2, 0), int(used[-1]) + 3)
    frames = [frame[:, kept] for frame in frames]
    rows, columns, _ = frames[0].shape
    return Turntable((rows, columns), [png_uri(frame) for frame in frames])


def _frame(voxels: NDArray[np.uint16], angle: float) -> NDArray[np.uint8]:
    """Look at voxels (row, y, x) from the front, once the patient has turned."""
    _, height, width = voxels.shape
    size = ceil(np.hypot(height, width))
    across = np.arange(size) - (size - 1) / 2
    along, side = np.meshgrid(across, across, indexing="ij")
    y = np.rint(along * cos(angle) + side * sin(angle) + (height - 1) / 2).astype(int)
    x = np.rint(side * cos(angle) - along * sin(angle) + (width - 1) / 2).astype(int)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    turned = voxels[:, np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)] * inside
    first = (turned > 0).argmax(axis=1)
    number = np.take_along_axis(turned, first[:, None], axis=1)[:, 0]
    return number_pixels(number, _shades(first.astype(np.float32), number))


def _shades(depth: NDArray[np.float32], number: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Shade of each pixel by the slope of the surface, 0 where there is none."""
    # Imported here: only pages need it.
    from scipy.ndimage import gaussian_filter

    seen = (number > 0).astype(np.float32)
    # Averaged over what is seen only, and a little: steps of voxels are no slopes.
    weight = np.maximum(gaussian_filter(seen, 1.0), 1e-3)
    smooth = gaussian_filter(depth * seen, 1.0) / weight
    down, right = np.gradient(smooth)
    facing = 1 / np.sqrt(1 + down**2 + right**2)
    return np.where(number > 0, DARKEST + (255 - DARKEST) * facing, 0).astype(np.uint8)
