"""The largest component of each label: that of the whole map, however it is cut into slabs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kpt_dask.label_files.components import largest_components
from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.scans import nifti_writer
from tests.label_files.maps import Array


def naive(labels: Array) -> Array:
    """Components of each label by scipy, of the whole map; the first of the largest is kept."""
    kept = np.zeros_like(labels)
    for value in np.unique(labels[labels > 0]):
        parts, _ = ndimage.label(labels == value, np.ones((3, 3, 3)))
        kept[parts == np.bincount(parts.ravel())[1:].argmax() + 1] = value
    return kept


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), planes=st.integers(1, 9), sparse=st.sampled_from([0.5, 0.8]))
def test_slabs_give_the_components_of_the_whole(seed: int, planes: int, sparse: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (9, 7, 6)).astype(np.uint8)
    labels[rng.random(labels.shape) < sparse] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti_writer, "PIECE_BYTES", planes * labels[0].nbytes)
        whole = PackedLabels.of((9, 7, 6), labels.dtype, [labels])
        found = np.concatenate(list(largest_components(whole).slabs()))
    np.testing.assert_array_equal(found, naive(labels))


def test_a_u_is_one_part_though_its_ends_meet_in_another_slab() -> None:
    labels = np.zeros((6, 5, 5), np.uint16)
    labels[:5, 2, 1] = labels[:5, 2, 3] = labels[4, 2, 1:4] = 300
    labels[0, 0, 0] = 300
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti_writer, "PIECE_BYTES", 1)
        whole = PackedLabels.of((6, 5, 5), labels.dtype, [labels])
        found = np.concatenate(list(largest_components(whole).slabs()))
    assert found[0, 0, 0] == 0
    assert (found > 0).sum() == (labels > 0).sum() - 1
