"""Label fusion: one label map of the labels of atlases that lie on the scan's grid.

An atlas that does not annotate an organ does not vote on it, as in this program's own transfer.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

PATCH = 5
"""Side of the cube of voxels in which locally weighted votes compare intensities."""
NU = 50.0
"""Difference of intensities, root mean square in a patch, at which a vote counts 61 %: HU."""
LEAST = 1e-6
"""Vote of an atlas that looks nothing like the scan, no unit."""


class WarpedAtlas(NamedTuple):
    """An atlas on the scan's grid.

    Attributes
    ----------
    image : float32 array (z, y, x)
        HU.
    labels : uint16 array (z, y, x)
        Label values.
    annotated : frozenset of int
        Values of the organs that whoever made the labels looked for.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.uint16]
    annotated: frozenset[int]


def majority(atlases: Iterable[WarpedAtlas]) -> NDArray[np.uint16]:
    """Fuse labels by majority: each atlas has one vote at a voxel.

    Parameters
    ----------
    atlases : iterable of WarpedAtlas
        All of one shape.

    Returns
    -------
    uint16 array (z, y, x)
        The organ with the largest share of the votes, where that is more than what is left for
        the background; 0 elsewhere.

    References
    ----------
    R. A. Heckemann et al., "Automatic anatomical brain MRI segmentation combining label
    propagation and decision fusion", NeuroImage 33(1), 115–126, 2006,
    https://doi.org/10.1016/j.neuroimage.2006.05.061.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.zeros((1, 1, 3), np.float32)
    >>> drawn = [[1, 1, 0], [1, 2, 0], [1, 2, 2]]
    >>> atlases = [
    ...     WarpedAtlas(image, np.array([[row]], np.uint16), frozenset({1, 2})) for row in drawn
    ... ]
    >>> majority(atlases).tolist()
    [[[1, 2, 0]]]
    """
    return _decide((atlas, 1.0) for atlas in atlases)


def locally_weighted(
    image: NDArray[np.float32], atlases: Iterable[WarpedAtlas], *, nu: float = NU
) -> NDArray[np.uint16]:
    """Fuse labels by votes that count more where an atlas looks like the scan.

    The weight of atlas a at voxel x is exp(−d²/2ν²), d² the mean of (I − I_a)² over the patch
    around x.

    Parameters
    ----------
    image : float32 array (z, y, x)
        The scan, HU.
    atlases : iterable of WarpedAtlas
        All of the scan's shape.
    nu : float
        ν, HU.

    Returns
    -------
    uint16 array (z, y, x)
        As from `majority`.

    References
    ----------
    M. R. Sabuncu, B. T. T. Yeo, K. Van Leemput, B. Fischl, P. Golland, "A Generative Model for
    Image Segmentation Based on Label Fusion", IEEE Transactions on Medical Imaging 29(10),
    1714–1729, 2010, https://doi.org/10.1109/TMI.2010.2050897, with a patch in place of the voxel.
    """
    return _decide((atlas, _likelihood(image, atlas.image, nu)) for atlas in atlases)


def _likelihood(
    image: NDArray[np.float32], other: NDArray[np.float32], nu: float
) -> NDArray[np.float32]:
    squared = uniform_filter(np.square(image - other), PATCH, mode="nearest")
    weight = np.exp(squared * np.float32(-0.5 / nu**2)) + np.float32(LEAST)
    return np.asarray(weight, np.float32)


def _decide(votes: Iterable[tuple[WarpedAtlas, Any]]) -> NDArray[np.uint16]:
    """Give each voxel to the organ with the largest share of what its annotators voted."""
    yes: dict[int, NDArray[np.float64]] = {}
    all_votes: dict[int, NDArray[np.float64]] = {}
    for atlas, weight in votes:
        for value in sorted(atlas.annotated):
            if value not in yes:
                yes[value] = np.zeros(atlas.labels.shape)
                all_votes[value] = np.zeros(atlas.labels.shape)
            yes[value] += weight * (atlas.labels == value)
            all_votes[value] += weight
    for value, share in yes.items():
        share /= all_votes.pop(value)
    return _largest_share(yes)


def _largest_share(shares: Mapping[int, NDArray[np.float64]]) -> NDArray[np.uint16]:
    if not shares:
        raise ValueError("no atlas annotates an organ")
    shape = next(iter(shares.values())).shape
    found, best, total = np.zeros(shape, np.uint16), np.zeros(shape), np.zeros(shape)
    for value in sorted(shares):
        total += shares[value]
        more = shares[value] > best
        found[more] = value
        best[more] = shares[value][more]
    found[best <= 1 - total] = 0
    return found
