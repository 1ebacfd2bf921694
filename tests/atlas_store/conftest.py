"""Fixtures for stores of small synthetic atlases."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from atlas_store import AtlasStore, load_organs

SYNTHETIC = Path(__file__).with_name("synthetic.py")


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    """What `synthetic.py` defines, and its path."""
    return SimpleNamespace(**runpy.run_path(str(SYNTHETIC)), path=SYNTHETIC)


@pytest.fixture
def store(tmp_path: Path, synthetic: SimpleNamespace) -> AtlasStore:
    """An empty store in ``tmp_path / "store"``."""
    return AtlasStore.create(tmp_path / "store", load_organs("openkbp"), synthetic.PARAMETERS)
