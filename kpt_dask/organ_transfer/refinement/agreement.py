"""Agreement of the warped atlases: with the scan, and with each other.

Each atlas stands in for the scan once: what the others say is compared with its own labels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kpt_dask.organ_transfer.refinement import kernels
from kpt_dask.organ_transfer.refinement.atlas import Refined

FEWEST = 8
"""Atlases that must label an organ, before they say at which share of votes it is found best."""
LEAST = 0.05
"""Least conformity of an atlas, relative to the largest: it is never left out."""


def correlations(refined: Sequence[Refined], organs: int) -> NDArray[np.float64]:
    """Mean of each atlas's cc where any atlas labels an organ (atlas, organ); 0 if none does."""
    found = np.zeros((len(refined), organs))
    if not refined:
        return found
    marked = np.zeros((refined[0].labels.size, -(-organs // 64)), np.uint64)
    for one in refined:
        kernels.mark_organs(one.labels.reshape(-1), marked)
    for i, one in enumerate(refined):
        sums, counts = np.zeros((2, 64 * marked.shape[1]), np.int64)
        kernels.sum_by_organ(one.correlation.reshape(-1), marked, sums, counts)
        found[i] = (sums / (255 * np.maximum(counts, 1)))[:organs]
    return found


def count_others(refined: Sequence[Refined], organs: int) -> NDArray[np.int64]:
    """Count the points of each organ in each atlas by how many of the other atlases agree.

    Returns
    -------
    int64 array (organ, atlas, others)
        Points where the atlas labels the organ and so many others do.
    """
    counts = np.zeros((organs, len(refined), max(len(refined), 1)), np.int64)
    # Plane by plane, so that not all labels are held twice.
    for planes in zip(*(one.labels for one in refined), strict=True):
        kernels.count_others(np.stack(planes).reshape(len(refined), -1), counts)
    return counts


def overlap(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean overlap of two atlases' labels, of each organ, float64 array (organ).

    With n(x) atlases that label the organ at x, and A that label it anywhere, it is
    Σ n (n − 1) / ((A − 1) Σ n): for two atlases, their Dice coefficient. 0 where A < 2: no other
    atlas says the same.

    Parameters
    ----------
    counts : int64 array (organ, atlas, others)
        From `count_others`.
    """
    found = np.zeros(len(counts))
    atlases = counts.any(axis=2).sum(axis=1)
    several = atlases > 1
    points = counts[several].sum(axis=1)
    pairs = points @ np.arange(counts.shape[2])
    found[several] = pairs / ((atlases[several] - 1) * points.sum(axis=1))
    return found


def conformity(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far each atlas's labels agree with those of the others, relative to the best atlas.

    With s(x) the share of the other A − 1 atlases that label the organ at x, it is the soft Dice
    coefficient 2 Σ s [L_a = l] / (Σ [L_a = l] + Σ s), divided by the largest of all atlases, and at
    least `LEAST`. An atlas whose labels were drawn otherwise, or that was warped badly, has less:
    the idea of SIMPLE (T. R. Langerak et al., IEEE Transactions on Medical Imaging 29(12),
    2000–2008, 2010, https://doi.org/10.1109/TMI.2010.2057442), in one round.

    Parameters
    ----------
    counts : int64 array (organ, atlas, others)
        From `count_others`.

    Returns
    -------
    float64 array (organ, atlas)
        From `LEAST` to 1. Of atlases that do not label the organ the mean of those that do, so that
        whether there is an organ at all is decided as if all counted alike; 1 if none overlap.
    """
    volume = counts.sum(axis=2).astype(np.float64)
    labelling = volume > 0
    others = np.maximum(labelling.sum(axis=1, keepdims=True) - 1, 1)
    agreed = counts @ np.arange(counts.shape[2]) / others
    usual = (volume.sum(axis=1, keepdims=True) - volume) / others
    dice = 2 * agreed / np.maximum(volume + usual, 1)
    largest = dice.max(axis=1, keepdims=True, initial=0.0)
    alike = np.divide(dice, largest, out=np.ones_like(dice), where=largest > 0)
    alike = np.maximum(alike, LEAST)
    number = np.maximum(labelling.sum(axis=1, keepdims=True), 1)
    mean = np.where(labelling, alike, 0).sum(axis=1, keepdims=True) / number
    return np.where(labelling, alike, np.where(labelling.any(axis=1, keepdims=True), mean, 1.0))


def best_shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of the other atlases' votes at which each atlas is found best, of each organ.

    Atlases that lie exactly on each other are found at any share, those that are scattered, or end
    elsewhere, at a lower one. With k the number of others that must agree, out of A − 1, the
    mean over the atlases of the Dice coefficient of the points where k others or more label the
    organ with those where the atlas does is greatest at k*, by a parabola through three values; the
    share is (k* − ½) / (A − 1).

    Parameters
    ----------
    counts : int64 array (organ, atlas, others)
        From `count_others`.

    Returns
    -------
    float64 array (organ)
        NaN where fewer than `FEWEST` atlases label the organ.
    """
    found = np.full(len(counts), np.nan)
    for o, of_organ in enumerate(counts):
        own = of_organ[of_organ.any(axis=1)]
        atlases = len(own)
        if atlases < FEWEST:
            continue
        # A point that n atlases label was counted for each of them, with n − 1 others.
        labelled = own.sum(axis=0)[:atlases] / np.arange(1, atlases + 1)
        agreed = own[:, ::-1].cumsum(axis=1)[:, ::-1]
        dice = []
        for k in range(1, atlases):
            right = agreed[:, k]
            # Where the atlas does not label a point, all that do are others.
            wrong = labelled[k - 1 :].sum() - agreed[:, k - 1]
            dice.append((2 * right / (own.sum(axis=1) + right + wrong)).mean())
        found[o] = (_peak(np.array(dice)) + 0.5) / (atlases - 1)
    return found


def _peak(values: NDArray[np.float64]) -> float:
    """Index of the greatest value, between indices by a parabola."""
    i = int(values.argmax())
    if not 0 < i < len(values) - 1:
        return float(i)
    before, here, after = values[i - 1 : i + 2]
    bend = before - 2 * here + after
    return i + (0.5 * float((before - after) / bend) if bend < 0 else 0.0)
