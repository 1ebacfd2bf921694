"""Counts by plane are those of the whole array, however it is read."""

import numpy as np
import pytest
import zarr

from kpt_dask.atlases import profiles as module


@pytest.mark.parametrize("shards", [None, (8, 8, 8)])
def test_profiles_of_a_zarr_array_are_the_counted_ones(
    shards: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLAB_VOXELS", 500)
    labels = np.random.default_rng(0).integers(0, 6, (23, 11, 13)).astype(np.uint16)
    array = zarr.create_array({}, data=labels, chunks=(4, 4, 4), shards=shards)

    profiles = module.organ_profiles(array, [5, 2, 9])

    for axis, profile in enumerate(profiles):
        others = tuple(a for a in range(3) if a != axis)
        expected = [(labels == value).sum(axis=others) for value in (5, 2, 9)]
        np.testing.assert_array_equal(profile, expected)
