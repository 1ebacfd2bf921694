import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import Organ, OrganTable, OrganTableError, load_organs

GOOD = """
[[organ]]
value = 1
name = "liver"
nu = 50
colour = [198, 104, 69]
snomed = { code = "10200004", meaning = "Liver" }
"""

ORGANS = st.builds(
    Organ,
    value=st.integers(1, 65535),
    name=st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,20}", fullmatch=True),
    nu=st.floats(0.1, 5000),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    snomed=st.none() | st.just(("10200004", "Liver")),
)
TABLES = st.lists(
    ORGANS, min_size=1, max_size=12, unique_by=(lambda o: o.value, lambda o: o.name.lower())
).map(lambda organs: OrganTable(tuple(organs)))


def as_toml(table: OrganTable) -> str:
    lines = []
    for organ in table:
        lines += ["[[organ]]", f"value = {organ.value}", f'name = "{organ.name}"']
        lines += [f"nu = {organ.nu!r}", f"colour = {list(organ.colour)}"]
        if organ.snomed:
            code, meaning = organ.snomed
            lines += [f'snomed = {{ code = "{code}", meaning = "{meaning}" }}']
    return "\n".join(lines)


def verhoeff(number: str) -> int:
    """Check sum of a SNOMED CT identifier, from the dihedral group D5; 0 if it is right."""

    def times(a: int, b: int) -> int:
        if a < 5:
            return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
        return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5

    permutation = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit)
        for _ in range(place % 8):
            value = permutation[value]
        total = times(total, value)
    return total


def test_the_default_table_holds_the_ten_organs_of_the_paper() -> None:
    table = load_organs()
    assert table.names == (
        "liver", "spleen", "aorta", "trachea", "lung_right", "lung_left",
        "kidney_right", "kidney_left", "psoas_right", "psoas_left",
    )  # fmt: skip
    wide = {organ.name for organ in table if organ.nu == 300}
    assert wide == {"trachea", "lung_right", "lung_left"}
    assert {organ.nu for organ in table if organ.name not in wide} == {50}


def test_the_openkbp_table_has_the_labels_of_that_data() -> None:
    table = load_organs("openkbp")
    assert {organ.value: organ.name for organ in table} == {
        1: "brainstem",
        2: "spinal_cord",
        3: "parotid_right",
        4: "parotid_left",
        5: "esophagus",
        6: "larynx",
        7: "mandible",
    }
    assert table.by_name("mandible").nu == 300


@pytest.mark.parametrize("name", ["visceral", "openkbp"])
def test_shipped_tables_have_valid_codes_and_colours_that_can_be_told_apart(name: str) -> None:
    table = load_organs(name)
    for organ in table:
        assert organ.snomed is None or verhoeff(organ.snomed[0]) == 0
    for i, one in enumerate(table.organs):
        for other in table.organs[:i]:
            assert max(abs(a - b) for a, b in zip(one.colour, other.colour, strict=True)) > 20


def test_organs_without_colours_get_ones_that_can_be_told_apart(tmp_path: Path) -> None:
    blocks = (f'[[organ]]\nvalue = {n}\nname = "organ_{n}"\nnu = 50\n' for n in range(1, 118))
    (tmp_path / "organs.toml").write_text("\n".join(blocks))
    table = load_organs(tmp_path / "organs.toml")
    colours = [organ.colour for organ in table]
    assert len({*colours}) == 117
    for i, one in enumerate(colours):
        for other in colours[max(i - 8, 0) : i]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 40
    # Stored, they stay what they were.
    assert OrganTable.from_json(table.to_json()) == table


@given(TABLES)
@settings(max_examples=40, deadline=None)
def test_a_table_survives_json_and_toml(tmp_path_factory: pytest.TempPathFactory, table) -> None:
    assert OrganTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    path = tmp_path_factory.mktemp("organs") / "table.toml"
    path.write_text(as_toml(table))
    assert load_organs(path) == table
    for organ in table:
        assert organ.name in table
        assert table.by_name(organ.name) is table.by_value(organ.value) is organ


def test_asking_for_an_organ_that_is_not_there_names_those_that_are() -> None:
    table = load_organs("openkbp")
    with pytest.raises(OrganTableError, match=r"no organ 'liver'.*brainstem"):
        table.by_name("liver")
    with pytest.raises(OrganTableError, match=r"no label 9.*1, 2"):
        table.by_value(9)
    assert "liver" not in table


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no organ"),
        ("organ = 3", "no list"),
        ("organ = [3]", "described by 3"),
        ("liver = 1", "'liver' means nothing"),
        ("[[organ", "no TOML"),
        (GOOD + GOOD, "'liver' stands twice"),
        (GOOD + GOOD.replace("liver", "spleen"), "label value 1 stands twice"),
        (GOOD.replace("value = 1", ""), "'liver' lacks value"),
        (GOOD.replace('name = "liver"', ""), "without a name lacks name"),
        (GOOD + "weight = 3", "unknown field weight"),
        (GOOD.replace("value = 1", "value = 0"), "'liver' has the label value 0"),
        (GOOD.replace("value = 1", "value = 65536"), "label value 65536"),
        (GOOD.replace("value = 1", "value = true"), "label value True"),
        (GOOD.replace("value = 1", "value = 1.0"), "label value 1.0"),
        (GOOD.replace('"liver"', '"Right lung"'), "'Right lung' cannot be used"),
        (GOOD.replace('"liver"', "5"), "name 5 cannot be used"),
        (GOOD.replace("nu = 50", "nu = 0"), "'liver' has nu = 0"),
        (GOOD.replace("nu = 50", "nu = nan"), "'liver' has nu = nan"),
        (GOOD.replace("nu = 50", 'nu = "wide"'), "'liver' has nu = 'wide'"),
        (GOOD.replace("198", "256"), "'liver' has the colour"),
        (GOOD.replace("198,", ""), "'liver' has the colour"),
        (GOOD.replace("[198, 104, 69]", '"red"'), "'liver' has the colour 'red'"),
        (GOOD.replace("10200004", "liver"), "'liver' has the SNOMED CT code"),
        (GOOD.replace('{ code = "10200004", meaning = "Liver" }', "3"), "'liver' has snomed = 3"),
        (GOOD.replace('code = "10200004"', "code = 10200004"), "quotation marks"),
    ],
)
def test_a_malformed_table_is_refused_in_one_sentence_that_names_the_file(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(OrganTableError) as caught:
        load_organs(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert message.endswith(".")


def test_what_is_no_table_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OrganTableError, match=r"nowhere\.toml does not exist.*visceral, openkbp"):
        load_organs(tmp_path / "nowhere.toml")
    with pytest.raises(OrganTableError, match="cannot be read"):
        load_organs(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OrganTableError, match="no UTF-8 text"):
        load_organs(binary)


def test_names_may_have_capitals_but_not_differ_by_them_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(GOOD.replace('"liver"', '"vertebrae_L1"'))
    assert load_organs(path).by_name("vertebrae_L1").value == 1
    path.write_text(GOOD + GOOD.replace('"liver"', '"Liver"').replace("value = 1", "value = 2"))
    with pytest.raises(OrganTableError, match="'liver' stands twice"):
        load_organs(path)


def test_a_byte_order_mark_is_taken(tmp_path: Path) -> None:
    """Editors on Windows write one."""
    (tmp_path / "table.toml").write_bytes(GOOD.encode("utf-8-sig"))
    assert load_organs(tmp_path / "table.toml").names == ("liver",)
