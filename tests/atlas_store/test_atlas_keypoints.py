from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from atlas_store import (
    AtlasKeypoints,
    AtlasNotFoundError,
    AtlasStore,
    EmptyStoreError,
    StoreFormatError,
)
from atlas_store.keypoints import VARIABLES


def test_the_keypoints_of_many_atlases_lie_one_after_the_other(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    counts = {"a1": 7, "a2": 0, "a10": 12}
    for seed, (atlas_id, count) in enumerate(counts.items()):
        synthetic.add(store, atlas_id, seed, count)
    keypoints = AtlasKeypoints.load(store)
    assert keypoints.ids == ("a1", "a2", "a10")
    assert len(keypoints) == 3
    np.testing.assert_array_equal(keypoints.offsets, [0, 7, 7, 19])
    for i, atlas_id in enumerate(keypoints.ids):
        expected = store[atlas_id].keypoints()
        for name, variable in VARIABLES.items():
            values = getattr(keypoints, name)
            assert values.dtype == variable.dtype
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(values[keypoints.slice_of(i)], expected[name])


def test_atlases_come_in_the_order_asked_for(store: AtlasStore, synthetic) -> None:
    for seed, atlas_id in enumerate(("a1", "a2", "a3")):
        synthetic.add(store, atlas_id, seed, 5 + seed)
    keypoints = AtlasKeypoints.load(store, ["a3", "a1"])
    assert keypoints.ids == ("a3", "a1")
    np.testing.assert_array_equal(keypoints.offsets, [0, 7, 12])


def test_some_of_those_loaded_are_those_loaded_alone(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    for seed, (atlas_id, count) in enumerate({"a1": 7, "a2": 0, "a3": 12}.items()):
        synthetic.add(store, atlas_id, seed, count)
    some, alone = AtlasKeypoints.load(store).only([2, 1]), AtlasKeypoints.load(store, ["a3", "a2"])
    assert some.ids == alone.ids
    for name in ("offsets", *VARIABLES):
        np.testing.assert_array_equal(getattr(some, name), getattr(alone, name))


def test_nothing_to_load_and_what_is_missing_or_damaged_are_refused(
    store: AtlasStore, synthetic: SimpleNamespace
) -> None:
    with pytest.raises(EmptyStoreError, match="has no atlas to use: add one"):
        AtlasKeypoints.load(store)
    synthetic.add(store, "a1")
    with pytest.raises(EmptyStoreError):
        AtlasKeypoints.load(store, [])
    with pytest.raises(AtlasNotFoundError, match="'a2'"):
        AtlasKeypoints.load(store, ["a1", "a2"])
    Path(store.url, store["a1"].path, "keypoints", "scale", "zarr.json").write_text("{}")
    with pytest.raises(StoreFormatError, match=r"scale/zarr\.json of the atlas 'a1' is damaged"):
        AtlasKeypoints.load(store)
