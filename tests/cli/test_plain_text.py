"""Nothing that others wrote steers the terminal."""

import json
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from atlas_store import AtlasInfo, AtlasStore
from kpt_dask.cli.main import kpt
from kpt_dask.cli.plain_text import printable, printable_json

ARCHIVED = Path(__file__).parents[1] / "atlas_store" / "archived" / "version_1.zip"
STEERING = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r\x7f\u2028"


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    if "\\" not in text:
        assert shown.encode("latin-1", "backslashreplace").decode("unicode_escape") == text
    assert printable(text, keep="\n").count("\n") == text.count("\n")


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_stays_the_same(answer: object) -> None:
    text = printable_json(json.dumps(answer, indent=2, ensure_ascii=False))
    assert json.loads(text) == answer
    assert not {unicodedata.category(c) for c in text if c != "\n"} & {"Cc", "Cf", "Cs"}


@pytest.fixture
def steering_store(tmp_path: Path) -> AtlasStore:
    """A store that tells of an atlas, its parameters and its sources in control characters."""
    with zipfile.ZipFile(ARCHIVED) as archive:
        archive.extractall(tmp_path)
    path = tmp_path / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["parameters"][STEERING] = STEERING
    path.write_text(json.dumps(document))
    (tmp_path / "markers" / "pt_2.json").unlink()
    info = replace(
        AtlasInfo.load((tmp_path / "markers" / "pt_1.json").read_bytes(), "pt_1", "the marker"),
        source=(STEERING, STEERING),
        software=STEERING,
        added=STEERING,
        parameters=document["attributes"]["parameters"],
    )
    (tmp_path / "markers" / "pt_1.json").write_bytes(info.dump())
    return AtlasStore.open(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "{store}"),
        ("list", "{store}", "--json"),
        ("info", "{store}"),
        ("info", "{store}", "--json"),
        ("info", "{store}", "pt_1"),
        ("info", "{store}", "pt_1", "--json"),
        ("info", "{store}", STEERING),
        ("list", STEERING),
        ("remove", "{store}", STEERING),
        ("verify", "{store}"),
    ],
)
def test_what_a_store_holds_is_shown_without_effect(
    steering_store: AtlasStore, arguments: tuple[str, ...]
) -> None:
    texts = [text.format(store=steering_store.url) for text in arguments]
    result = CliRunner().invoke(kpt, ["atlas", *texts])
    assert "fault of the program" not in result.stderr
    assert "x1b" in result.output or "u001b" in result.output or "verify" in texts
    assert not {unicodedata.category(c) for c in result.output if c != "\n"} & {"Cc", "Cf", "Zl"}
