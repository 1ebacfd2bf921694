"""Overlap of two label maps that stream by: Dice of each organ."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas_store import OrganTable


def dice(
    reference: Iterable[NDArray[Any]],
    found: Iterable[NDArray[Any]],
    annotated: Iterable[str],
    organs: OrganTable,
) -> dict[str, float]:
    """Dice of each annotated organ: twice the overlap over the sum of both.

    Parameters
    ----------
    reference, found : iterable of ndarray
        Two label maps as the same sequence of parts.
    annotated : iterable of str
        The organs that the reference annotates.
    organs : OrganTable
        Label values by name.

    Returns
    -------
    dict of str to float
        By organ, in the order of the table. An annotated organ that neither shows is
        right: 1.
    """
    size = max(organs.values) + 1
    both, total = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for expected, actual in zip(reference, found, strict=True):
        total += np.bincount(expected.ravel(), minlength=size)
        total += np.bincount(actual.ravel(), minlength=size)
        both += np.bincount(expected[expected == actual], minlength=size)
    wanted = set(annotated)
    return {
        organ.name: float(2 * both[organ.value] / total[organ.value]) if total[organ.value] else 1.0
        for organ in organs
        if organ.name in wanted
    }
