"""Lists of atlases: which, and in which order."""

import operator
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import OrganTableError, load_organs
from kpt_dask.cli.atlas_filter import filtered
from kpt_dask.cli.main import kpt
from kpt_dask.errors import ParameterError

ARCHIVED = Path(__file__).parents[1] / "atlas_store" / "archived" / "version_1.zip"


def info(name: str, keypoints: int, *organs: str) -> Any:
    counted = {organ: SimpleNamespace(keypoints=keypoints // 2) for organ in organs}
    return SimpleNamespace(
        id=name,
        annotated=organs,
        organs=counted,
        keypoints=keypoints,
        added=f"2026-0{len(organs) + 1}-01T00:00:00+00:00",
        source=(f"{name}_ct.nii.gz", f"{name}_seg.nii.gz"),
    )


ORGANS = load_organs("visceral")
ATLASES = [info("b", 10, "liver"), info("a", 30), info("c", 20, "liver", "spleen")]


@pytest.mark.parametrize(
    ("where", "sort", "expected"),
    [
        ([], None, "bac"),
        ([], "id", "abc"),
        ([], "-keypoints", "acb"),
        ([], "-added", "cba"),
        (["organ=liver"], None, "bc"),
        (["organ!=liver"], None, "a"),
        (["organ=liver", " keypoints > 10 "], None, "c"),
        (["in_organs>=5"], "in_organs", "bc"),
        (["from~b_ct"], None, "b"),
        (["from!~b_ct"], "id", "ac"),
        (["added>=2026-02"], None, "bc"),
        (["id=a"], None, "a"),
        (["from=b_ct.nii.gz"], None, "b"),
        (["from~seg"], None, ""),
    ],
)
def test_conditions_and_orders(where: list[str], sort: str | None, expected: str) -> None:
    assert "".join(one.id for one in filtered(ATLASES, where, sort, ORGANS)) == expected


@given(
    st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
    st.lists(st.integers(0, 30), max_size=9),
    st.integers(0, 30),
)
@settings(max_examples=50, deadline=None)
def test_numbers_are_compared_as_numbers(sign: str, counts: list[int], value: int) -> None:
    names = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
    holds = getattr(operator, names[sign])
    found = filtered([info("x", n) for n in counts], [f"keypoints{sign}{value}"], None, ORGANS)
    assert [one.keypoints for one in found] == [n for n in counts if holds(n, value)]


@pytest.mark.parametrize(
    "where", ["", "keypoints", "keypoints<many", "keypoints~3", "organ<liver", "size=3", "=3"]
)
def test_a_condition_that_is_none_is_explained(where: str) -> None:
    with pytest.raises(ParameterError, match=r"is no condition; write for instance keypoints<500"):
        filtered(ATLASES, [where], None, ORGANS)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"--sort '-size' is no column; use one of id"):
        filtered(ATLASES, [], "-size", ORGANS)


def test_an_organ_that_the_store_does_not_know_is_refused() -> None:
    with pytest.raises(OrganTableError, match="has no organ 'livr': use one of liver"):
        filtered(ATLASES, ["organ=livr"], None, ORGANS)


def test_ids_and_files_are_in_natural_order() -> None:
    infos = [info(name, 1) for name in ("p10", "p100", "p2")]
    for column in ("id", "from"):
        found = filtered(infos, [], column, ORGANS)
        assert [one.id for one in found] == ["p2", "p10", "p100"]
    assert [one.id for one in filtered(infos, ["id<p10"], None, ORGANS)] == ["p2"]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("added=2026-12-01 11:14", True),
        ("added=2026-12-01T11:14:07", True),
        ("added=2026-12-01 11:14:06", False),
        ("added!=2026-12-01 11", False),
        ("added<2026-12-01 23:00", True),
        ("added<=2026-12-01", True),
        ("added<2026-12-01", False),
        ("added>2026-12-01", False),
        ("added>=2026-12-01", True),
        ("added=2026-12", True),
        ("added=2026", True),
        ("added>2025", True),
        ("added<2026-12-31", True),
        ("added>2026-11", True),
        ("added>=2027-01", False),
        ("added~12-01 11:1", True),
        ("added!~2026-12", False),
    ],
)
def test_a_date_is_all_that_it_leaves_open(condition: str, holds: bool) -> None:
    one = info("a", 1)
    one.added = "2026-12-01T11:14:07+00:00"
    assert filtered([one], [condition], None, ORGANS) == ([one] if holds else [])


@pytest.mark.parametrize(
    "value", ["12/01/2026", "2026-13", "2026-02-30", "0000", "9999", "2026-1", "yesterday", ""]
)
def test_what_is_no_date_is_refused(value: str) -> None:
    with pytest.raises(ParameterError, match="no date; write it as the list does, 2026-12-01 11:1"):
        filtered(ATLASES, [f"added<{value}"], None, ORGANS)


def test_a_list_says_how_many_of_the_stores_atlases_it_shows(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARCHIVED) as archive:
        archive.extractall(tmp_path)
    for where, number in (((), "2 atlases"), (("--where", "id=pt_1"), "1 of 2 atlases")):
        result = CliRunner().invoke(kpt, ["atlas", "list", str(tmp_path), *where])
        assert result.exit_code == 0
        assert f": {number} at " in result.stdout
