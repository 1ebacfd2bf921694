"""Lists of atlases: which, and in which order."""

import operator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.cli.atlas_filter import filtered
from kpt_dask.errors import ParameterError


def info(name: str, keypoints: int, *organs: str) -> Any:
    counted = {organ: SimpleNamespace(keypoints=keypoints // 2) for organ in organs}
    return SimpleNamespace(
        id=name,
        annotated=organs,
        organs=counted,
        keypoints=keypoints,
        added=f"2026-0{len(organs) + 1}-01T00:00:00+00:00",
        source=(f"{name}_ct.nii.gz",),
    )


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
    ],
)
def test_conditions_and_orders(where: list[str], sort: str | None, expected: str) -> None:
    assert "".join(one.id for one in filtered(ATLASES, where, sort)) == expected


@given(
    st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
    st.lists(st.integers(0, 30), max_size=9),
    st.integers(0, 30),
)
@settings(max_examples=50, deadline=None)
def test_numbers_are_compared_as_numbers(sign: str, counts: list[int], value: int) -> None:
    names = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
    holds = getattr(operator, names[sign])
    found = filtered([info("x", n) for n in counts], [f"keypoints{sign}{value}"], None)
    assert [one.keypoints for one in found] == [n for n in counts if holds(n, value)]


@pytest.mark.parametrize(
    "where", ["", "keypoints", "keypoints<many", "keypoints~3", "organ<liver", "size=3", "=3"]
)
def test_a_condition_that_is_none_is_explained(where: str) -> None:
    with pytest.raises(ParameterError, match=r"is no condition; write for instance keypoints<500"):
        filtered(ATLASES, [where], None)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"--sort '-size' is no column; use one of id"):
        filtered(ATLASES, [], "-size")
