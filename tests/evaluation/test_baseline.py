"""The baseline beside an evaluation: real registrations, where antspyx is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.cli.main import kpt
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.errors import ParameterError
from kpt_dask.evaluation.run import evaluate

SHAPE, SPACING = (75, 33, 40), 8.0
INSTALLED = find_spec("ants") is not None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AtlasStore:
    folder = tmp_path_factory.mktemp("coarse")
    made = AtlasStore.create(folder / "s", load_organs("visceral"), store_parameters(SPACING))
    for seed in (1, 2, 3):
        scan, labels = folder / f"{seed}_ct.nii.gz", folder / f"{seed}_seg.nii.gz"
        write_phantom(scan, labels, seed, SHAPE, SPACING)
        add_atlas(made, scan, labels, atlas_id=f"body_{seed}")
    return made


@pytest.mark.skipif(not INSTALLED, reason="antspyx is not installed: pip install '.[baselines]'")
def test_the_same_atlases_are_registered_and_kept(tmp_path: Path, store: AtlasStore) -> None:
    kept = tmp_path / "registrations"
    asked = {"limit": 1, "mode": "organ", "baseline": "syn", "registrations": kept}
    first = evaluate(store, out=tmp_path / "page", **asked)
    assert set(first["baselines"]) == {"SyN, majority", "SyN, locally weighted"}
    for method, found in first["baselines"].items():
        assert found["dice"]["body_1"]["liver"] > 0.5
        assert found["seconds"]["body_1"] > 0.1
        assert method in (tmp_path / "page" / "index.html").read_text()
    files = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(files) == 2
    again = evaluate(store, **asked)
    assert (
        again["baselines"]["SyN, majority"]["dice"] == first["baselines"]["SyN, majority"]["dice"]
    )
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == files


def test_an_unknown_baseline_is_refused_before_the_work(store: AtlasStore) -> None:
    with pytest.raises(ParameterError, match="use syn"):
        evaluate(store, baseline="elastix")


@pytest.mark.skipif(INSTALLED, reason="antspyx is installed")
def test_what_the_baseline_needs_is_said(store: AtlasStore) -> None:
    result = CliRunner().invoke(kpt, ["evaluate", store.url, "--baseline", "syn"])
    assert result.exit_code == 1
    assert "kpt-dask[baselines]" in result.stderr
