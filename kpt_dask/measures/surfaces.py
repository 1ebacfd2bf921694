"""Distances between the surfaces of two masks.

The surface of a mask is its voxels of which a neighbour across a face is not in it; distances are
those of voxel centres. Kernels here know neither Dask nor Zarr.

References
----------
S. Nikolov et al., "Clinically Applicable Segmentation of Head and Neck Anatomy for Radiotherapy",
J Med Internet Res 23(7), e26151, 2021, https://doi.org/10.2196/26151 (surface Dice).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Mask = NDArray[np.bool_]


class Agreement(NamedTuple):
    """How far two masks agree; distances are None where one of them is empty.

    Attributes
    ----------
    dice : float
        Dice coefficient; 1 if both are empty.
    mean_distance_mm : float or None
        Mean distance of the surface voxels of both to the surface of the other.
    distance_95_mm : float or None
        95 % Hausdorff distance: the larger of the 95th percentiles of the distances from one
        surface to the other and back.
    surface_dice : float
        Fraction of the surface voxels of both that lie within a tolerance of the other surface; 1
        if both masks are empty, 0 if one is.
    """

    dice: float
    mean_distance_mm: float | None
    distance_95_mm: float | None
    surface_dice: float


def agreement(
    one: Mask, other: Mask, axes: NDArray[np.float64], *, tolerance_mm: float = 3.0
) -> Agreement:
    """Compare two masks.

    Parameters
    ----------
    one, other : bool arrays (z, y, x)
        Beyond their edges is nothing of either.
    axes : ndarray (3, 3)
        Steps to the next voxel along each axis, mm, as columns; at any angles.
    tolerance_mm : float
        Distance of surfaces that the surface Dice allows.

    Returns
    -------
    Agreement

    Examples
    --------
    >>> import numpy as np
    >>> one = np.zeros((9, 9, 9), bool)
    >>> one[2:6, 2:6, 2:6] = True
    >>> found = agreement(one, np.roll(one, 1, axis=0), np.diag([2.0, 1, 1]))
    >>> found.dice, found.distance_95_mm, found.surface_dice
    (0.75, 2.0, 1.0)
    """
    sizes = int(np.count_nonzero(one)), int(np.count_nonzero(other))
    if not all(sizes):
        same = float(not any(sizes))
        return Agreement(same, None, None, same)
    dice = 2 * int(np.count_nonzero(one & other)) / sum(sizes)
    [box] = ndimage.find_objects((one | other).view(np.uint8))
    surfaces = [_surface(mask[box]) for mask in (one, other)]
    # Surfaces have few voxels: a tree of them is searched in a fraction of the time and memory of a
    # distance transform of the box.
    points = [np.argwhere(surface) @ axes.T for surface in surfaces]
    there, back = (cKDTree(target).query(source)[0] for source, target in (points, points[::-1]))
    both = np.concatenate([there, back])
    return Agreement(
        dice,
        float(both.mean()),
        float(max(np.percentile(there, 95), np.percentile(back, 95))),
        float(np.mean(both <= tolerance_mm)),
    )


def _surface(mask: Mask) -> Mask:
    inner: Mask = ndimage.binary_erosion(mask)
    return mask & ~inner
