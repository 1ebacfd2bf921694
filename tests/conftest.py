"""Shared fixtures: where the real data is."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("KPT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def openkbp() -> Path:
    folder = DATA / "openkbp"
    if not folder.is_dir():
        pytest.skip(f"real CT is missing: {folder} does not exist (set KPT_DATA)")
    return folder
