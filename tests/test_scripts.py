"""Scripts that are not part of the program still run: each in its quickest way."""

import json
import os
import subprocess
import sys
from pathlib import Path

from atlas_store import AtlasStore

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_benchmark_of_the_store(tmp_path: Path) -> None:
    run("benchmark_store.py", "--quick", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["match_growth_20_to_2000"] > 0
    assert figures["add_growth_20_to_2000"] > 0
    assert (figures["grown_from"], figures["grown_to"]) == (4, 8)


def test_benchmark_of_selection(patients: AtlasStore, tmp_path: Path) -> None:
    run("benchmark_selection.py", patients.url, "--scans", "1", "--json", str(tmp_path / "f.json"))
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["scans"], figures["recall"]) == (1, 1.0)  # of so few, all are selected


def test_a_tenth_of_the_campaign_of_killing() -> None:
    told = run("campaign_store.py", "kill", "--rounds", "20")
    assert told.startswith("20 rounds of 8 processes")
    assert "320 atlases, none lost" in told


def test_a_tenth_of_the_campaign_of_flipping_bytes() -> None:
    assert "100 bytes changed" in run("campaign_store.py", "flip", "--bytes", "100")


def test_a_tenth_of_the_campaign_of_reading_what_is_damaged() -> None:
    told = run("campaign_store.py", "read", "--damages", "20")
    assert told.startswith("20 damages")
    assert "no other answer" in told


def test_a_tenth_of_the_campaign_of_killing_segmentations() -> None:
    assert "no fault" in run("campaign_segment.py", "--rounds", "3")
