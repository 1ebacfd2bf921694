"""Fixtures of the transfer: a small scan and a store of small atlases."""

import pytest

from atlas_store import AtlasStore
from kpt_dask.volumes.volume import Volume
from tests.helpers import ATLASES, SCAN, make_store, volume_of


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> AtlasStore:
    """Three small random atlases; leave it as it is."""
    return make_store(tmp_path_factory.mktemp("store") / "s", ATLASES)


@pytest.fixture(scope="session")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """The small random scan; leave it as it is."""
    return volume_of(tmp_path_factory.mktemp("scan") / "v.zarr", SCAN)
