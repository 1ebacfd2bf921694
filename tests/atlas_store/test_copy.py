"""Copies of atlases in other stores hold what the originals hold, or do not exist."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from atlas_store import (
    AtlasExistsError,
    AtlasStore,
    ParameterMismatchError,
    StoreFormatError,
    load_organs,
)


def test_a_copy_is_equal_and_sound(
    store: AtlasStore, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    url = f"memory://{tmp_path}/target"
    target = AtlasStore.create(url, load_organs("openkbp"), synthetic.PARAMETERS)
    for name in (None, "another"):
        copied = target.copy_from(store["pt_1"], name)
        xr.testing.assert_equal(copied.keypoints(), store["pt_1"].keypoints())
        np.testing.assert_array_equal(copied.labels[...], store["pt_1"].labels[...])
        assert copied.info.scan_digest == store["pt_1"].info.scan_digest
        assert copied.info.added == store["pt_1"].info.added
    assert target.ids() == ["another", "pt_1"]
    assert target.verify() == []
    with pytest.raises(AtlasExistsError, match="has an atlas 'pt_1' already"):
        target.copy_from(store["pt_1"])


def test_a_damaged_atlas_is_not_copied(
    store: AtlasStore, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    target = AtlasStore.create(tmp_path / "target", load_organs("openkbp"), synthetic.PARAMETERS)
    chunk = next(Path(store.url, store["pt_1"].path).glob("keypoints/scale/c/0"))
    for damage in (lambda: chunk.write_bytes(b"x"), chunk.unlink):
        damage()
        with pytest.raises(StoreFormatError, match=r"of the atlas 'pt_1' is (damaged|missing)"):
            target.copy_from(store["pt_1"])
        assert target.ids() == []
        assert target.verify() == []


def test_stores_of_other_parameters_or_organs_do_not_mix(
    store: AtlasStore, tmp_path: Path, synthetic: SimpleNamespace
) -> None:
    synthetic.add(store, "pt_1", seed=1)
    coarser = AtlasStore.create(tmp_path / "a", load_organs("openkbp"), {"spacing": 4.0})
    with pytest.raises(ParameterMismatchError, match="spacing"):
        coarser.copy_from(store["pt_1"])
    other = AtlasStore.create(tmp_path / "b", load_organs("visceral"), synthetic.PARAMETERS)
    with pytest.raises(ParameterMismatchError, match="another organ table"):
        other.copy_from(store["pt_1"])
