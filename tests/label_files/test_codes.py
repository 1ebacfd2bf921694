"""Codes of organs, judged by the dictionary of DICOM that pydicom carries."""

from typing import Any

import pytest
from pydicom.sr import _concepts_dict

from atlas_store import Organ
from kpt_dask.label_files import codes
from kpt_dask.label_files.codes import codes_of

_CONCEPTS: Any = _concepts_dict.concepts["SCT"]
MEANINGS: dict[str, set[str]] = {}
for _each in _CONCEPTS.values():
    for _code, (_meaning, _) in _each.items():
        MEANINGS.setdefault(_code, set()).add(_meaning.lower())


@pytest.mark.parametrize(
    ("name", "code"),
    [(name, code) for name, code in {**codes._COMMON, **codes._WHOLE}.items()],
)
def test_a_code_that_dicom_knows_means_the_organ_and_no_other_side(
    name: str, code: tuple[str, str]
) -> None:
    value, said = code
    known = MEANINGS.get(value, {said.lower()})
    words = set(said.lower().replace("(", " ").split())
    assert any(words & set(meaning.split()) for meaning in known)
    for side in ("left", "right"):
        assert any(side in meaning.split() for meaning in known) == (side in words), known


def test_an_organ_of_a_side_has_it_as_a_modifier() -> None:
    code, side = codes_of(Organ(1, "subclavian_artery_left", 50.0, (1, 2, 3)))
    assert side is not None
    assert (code.value, side.meaning) == ("36765005", "Left")
