"""The folder of an evaluation: whole or not there, and nobody else's is replaced."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from jinja2 import UndefinedError

from atlas_store import AtlasStore
from kpt_dask.cli.main import kpt
from kpt_dask.errors import OutputExistsError
from kpt_dask.evaluation.folder import writing
from tests.evaluation.results import ORGANS, made_up


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(out: Path, *, full: bool = True, overwrite: bool = False) -> None:
    with writing(out, overwrite=overwrite) as folder:
        assert folder is not None
        for name in made_up()["dice"]:
            folder.keep(name, f"<!-- picture of {name} -->")
        folder.write(made_up(full=full), ORGANS)


def test_tables_hold_the_measures(tmp_path: Path) -> None:
    results = made_up()
    write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html",
        "limited_view.csv",
        "measures.csv",
        "results.json",
    }
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (stored.pop("encoding-type"), stored.pop("encoding-version")) == ("kpt-evaluation", "1")
    assert stored == results
    rows = rows_of(tmp_path / "out" / "measures.csv")
    assert len(rows) == 14
    for row in rows:
        scan, organ = row.pop("scan"), row.pop("organ")
        baseline = results["baselines"]["SyN <1>"]["dice"].get(scan, {}).get(organ)
        expected = results["measures"][scan][organ] | results["claims"][scan][organ]
        expected["dice_SyN <1>"] = baseline
        assert {n: float(v) if v else None for n, v in row.items()} == expected
    [row] = rows_of(tmp_path / "out" / "limited_view.csv")
    assert (row["around"], row["organ"], row["cropped"]) == ("lung_left", "liver", "0.61")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<!-- picture of") == 3


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with writing(tmp_path / "out", overwrite=False) as folder:
            assert folder is not None
            folder.write(made_up() | {"store": {}}, ORGANS)

    with pytest.raises(UndefinedError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_only_an_evaluation_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    with pytest.raises(OutputExistsError, match="exists already"):
        write(out, full=False)
    write(out, full=False, overwrite=True)
    assert not (out / "limited_view.csv").exists()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"thesis.txt in it is not written by kpt evaluate"):
        write(out, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "results.json").write_text('{"results": "of somebody else"}')
    with pytest.raises(OutputExistsError, match="does not say of itself"):
        write(mine, overwrite=True)
    assert (mine / "results.json").read_text() == '{"results": "of somebody else"}'


def test_the_command_writes_the_folder(body_store: AtlasStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["evaluate", body_store.url, "--mode", "organ", "--out", str(out)]
    more = ["--atlases", "1,2", "--cropped", "spleen", "--json", str(tmp_path / "results.json")]
    done = CliRunner().invoke(kpt, [*command, *more])
    assert done.exit_code == 0, done.output
    assert f"Written: {out}" in done.stdout
    assert "1 atlas: mean Dice" in done.stdout
    assert "Mode across, cropped" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads((out / "results.json").read_text()).items() > results.items()
    assert {row["scan"] for row in rows_of(out / "measures.csv")} == {"body_1", "body_2", "body_3"}
    page = (out / "index.html").read_text()
    assert page.count("<image") == 9
    assert f"{results['mean_dice']:.3f}" in page

    # It is refused before anything is computed.
    again = CliRunner().invoke(kpt, command)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    for wrong, sentence in (("1,x", "whole number"), ("0", "at least 1")):
        refused = CliRunner().invoke(kpt, [*command, "--overwrite", "--atlases", wrong])
        assert refused.exit_code != 0
        assert sentence in refused.stderr
