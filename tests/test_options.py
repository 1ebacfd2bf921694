"""Options of the transfer: what is refused, and what the modes make of them."""

from typing import Any

import pytest
from click.testing import CliRunner

from atlas_store import load_organs
from kpt_dask.cli.main import kpt
from kpt_dask.errors import ParameterError
from kpt_dask.options import MODES, TransferOptions, parse_across, parse_nu

ORGANS = load_organs("openkbp")


def nus(mode: str, nu: Any = 1.0) -> dict[str, float]:
    return dict(zip(ORGANS.names, TransferOptions(nu=nu).nus(mode, ORGANS), strict=True))


def test_nu_is_a_factor_or_what_is_said_of_an_organ() -> None:
    assert nus("organ") == {organ.name: organ.nu for organ in ORGANS}
    assert nus("across")["larynx"] == MODES["across"].least_nu > nus("organ")["larynx"]
    assert nus("local")["mandible"] == nus("organ")["mandible"] == 300
    assert nus("local", 0.5) == {name: 0.5 * nu for name, nu in nus("local").items()}
    assert nus("local", {"larynx": 70.0}) == nus("local") | {"larynx": 70.0}


def test_the_threshold_is_the_modes_unless_given() -> None:
    assert TransferOptions().smallest_share("organ") == 0.15
    assert TransferOptions(threshold=0.3).smallest_share("organ") == 0.3


def test_syntax() -> None:
    assert parse_nu("1.5") == 1.5
    assert parse_nu("mandible=300, larynx=80") == {"mandible": 300, "larynx": 80}
    assert parse_across(["a=b, c", "d=d"]) == {"a": ("b", "c"), "d": ("d",)}
    for text in ("x", "larynx=", "larynx=1=2", "larynx=1,"):
        with pytest.raises(ParameterError, match="says no nu"):
            parse_nu(text)
    for text in ("spleen", "spleen=", "=liver", "spleen=liver,"):
        with pytest.raises(ParameterError, match="does not say which organs move which"):
            parse_across([text])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"threshold": 0.0}, "threshold must be over 0"),
        ({"threshold": 1.5}, "at most 1, not 1.5"),
        ({"threshold": float("nan")}, "threshold"),
        ({"nu": -1.0}, "nu must be a positive number"),
        ({"nu": {"larynx": 0.0}}, "nu of larynx must be a positive number, not 0"),
        ({"rho": float("inf")}, "rho must be a positive number"),
        ({"sigma_x": 0.0}, "sigma_x"),
        ({"sigma_t": -2.0}, "sigma_t"),
        ({"sigma_x": 1e300}, "sigma_x must lie between 0.001 and 1e"),
        ({"nu": 1e-300}, "nu must lie between 0.001 and 1e"),
    ],
)
def test_what_is_out_of_range_is_refused(given: Any, sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        TransferOptions(**given)


@pytest.mark.parametrize(
    ("mode", "given", "sentence"),
    [
        ("magic", {}, "mode 'magic' is unknown; use local, across, affine or organ"),
        ("organ", {"nu": {"tail": 3.0}}, "know no organ tail; they know brainstem"),
        ("organ", {"across": {"larynx": ["tail"]}}, "know no organ tail"),
        ("local", {"across": {"larynx": ["mandible"]}}, "use another mode with --across"),
    ],
)
def test_what_does_not_fit_is_refused(mode: str, given: Any, sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        TransferOptions(**given).check(mode, ORGANS)


@pytest.mark.parametrize("command", ["segment", "evaluate"])
def test_help_teaches_every_mode(command: str) -> None:
    said = " ".join(CliRunner().invoke(kpt, [command, "--help"]).output.split())
    for name, mode in MODES.items():
        assert f"{name} {mode.does}" in said
        assert f"{mode.threshold:g} in mode {name}" in said
