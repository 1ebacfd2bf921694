"""Comparison of two label maps on one grid, label by label."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kpt_dask.label_files.label_map import Extent, LabelMap
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.measures.surfaces import Agreement, agreement
from kpt_dask.runtime import progress


def compare_labels(
    both: Sequence[LabelMap],
    extents: Sequence[Mapping[int, Extent]],
    values: Sequence[int],
    tolerance_mm: float = 3.0,
) -> dict[int, Agreement]:
    """Compare labels of two label maps, each in the box that holds both.

    Parameters
    ----------
    both : two LabelMap
        On the same grid.
    extents : two mappings
        Boxes of the labels of each, from `LabelMap.extents`.
    values : sequence of int
        Labels to compare, whether they occur or not.
    tolerance_mm : float
        For the surface Dice.

    Returns
    -------
    dict of int to Agreement
        In the order of `values`.
    """
    axes = both[0].grid.affine[:3, :3]
    found = {}
    with progress.stage("Comparing", total=len(values)) as advance:
        for value in values:
            known = [boxes[value] for boxes in extents if value in boxes]
            if known:
                box = _enclosing(known)
                masks = [_mask(one.voxels, value, box) for one in both]
            else:
                masks = [np.zeros((1, 1, 1), np.bool_)] * 2
            found[value] = agreement(masks[0], masks[1], axes, tolerance_mm=tolerance_mm)
            advance(1)
    return found


def _enclosing(boxes: list[Extent]) -> Extent:
    z, y, x = (
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*boxes, strict=True)
    )
    return z, y, x


def _mask(labels: PackedLabels, value: int, box: Extent) -> NDArray[np.bool_]:
    """Cut the mask of a label out of a label map."""
    parts = [slab[(slice(None), *box[1:])] == value for slab in labels.slabs(box[0])]
    return np.concatenate(parts)
