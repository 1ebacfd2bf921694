"""A store of shapes: every fault is named for what it is, and nothing else is doubted."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from atlas_store import Organ, OrganTable
from kpt_dask.annotation_check.comparison import Comparison, compare
from kpt_dask.annotation_check.findings import Finding
from kpt_dask.annotation_check.rules import Rules, partner, unchecked
from kpt_dask.grid import Grid
from tests.helpers import Array

SPACING = 4.0
SHAPE = (40, 32, 44)
GRID = Grid.isotropic(SHAPE, SPACING, (0.0, 0.0, 0.0))
PLACES = {
    "kidney_right": ((14, 20, 10), 4),
    "kidney_left": ((14, 20, 34), 4),
    "liver": ((26, 12, 14), 6),
    "spleen": ((28, 20, 36), 4),
    "cord": ((18, 26, 22), 3),
}
ORGANS = OrganTable(tuple(Organ(k + 1, name, 50.0, (k, k, k)) for k, name in enumerate(PLACES)))


def body(seed: int, wobble: float) -> Array:
    """Balls, each a little off its place."""
    rng = np.random.default_rng(seed)
    at = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    for organ, (centre, radius) in zip(ORGANS, PLACES.values(), strict=True):
        moved = np.array(centre) + rng.normal(0, wobble, 3)
        distance = ((at - moved[:, None, None, None]) ** 2).sum(axis=0)
        labels[distance < (radius + rng.normal(0, 0.1)) ** 2] = organ.value
    return labels


def compared(labels: Array, seed: int) -> Comparison:
    scan = np.full(SHAPE, -100.0)
    own = body(seed, 0.6)
    scan[own > 0] = 50.0 + 10.0 * own[own > 0]
    predicted = np.roll(own, seed % 2, seed % 3)
    return compare(labels, predicted, scan, GRID, ORGANS)


def judged(
    fault: Callable[[Array], Array], atlases: int = 20
) -> tuple[list[Finding], list[Finding]]:
    """Findings on the first atlas, whose labels are made wrong, and on the others."""
    found = {
        str(seed): compared(fault(body(seed, 0.6)) if seed == 0 else body(seed, 0.6), seed)
        for seed in range(atlases)
    }
    rules = Rules(ORGANS, SPACING, {name: one.layout for name, one in found.items()}, found)
    others = [finding for name in found if name != "0" for finding in rules.findings(name)]
    return rules.findings("0"), others


def renamed(**names: str) -> Callable[[Array], Array]:
    table = np.arange(256, dtype=np.uint8)
    for organ, other in names.items():
        table[ORGANS.by_name(organ).value] = ORGANS.by_name(other).value
    return lambda labels: np.asarray(table[labels])


def without_middle(labels: Array) -> Array:
    labels[23:30] = np.where(labels[23:30] == 3, 0, labels[23:30])
    return labels


def smaller(labels: Array) -> Array:
    liver = np.argwhere(labels == 3)
    far = np.linalg.norm(liver - liver.mean(axis=0), axis=1) > 3
    labels[tuple(liver[far].T)] = 0
    return labels


SIDES = renamed(kidney_left="kidney_right", kidney_right="kidney_left")
FAULTS: dict[str, tuple[Callable[[Array], Array], str, set[str], str]] = {
    "sides": (SIDES, "swapped", {"kidney_left", "kidney_right"}, "left and right are swapped"),
    "one side": (
        lambda labels: renamed(kidney_left="kidney_right")(np.where(labels == 1, 0, labels)),
        "swapped",
        {"kidney_right"},
        "left and right are swapped",
    ),
    "numbers": (
        renamed(liver="spleen", spleen="cord", cord="liver"),
        "relabelled",
        {"liver", "spleen", "cord"},
        "spleen fits what the others predict of liver better",
    ),
    "mirror": (lambda labels: labels[:, ::-1], "mirrored", set(), "from front to back"),
    "shift": (lambda labels: np.roll(labels, 8, 0), "shifted", set(), "mm to the head"),
    "other places": (lambda labels: body(77, 6.0), "", set(), "mean Dice"),
    "gap": (without_middle, "organ", {"liver"}, "planes missing (mm) 28"),
    "volume": (smaller, "organ", {"liver"}, "volume (mL)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_no_other_atlas_is_doubted(name: str) -> None:
    fault, kind, organs, words = FAULTS[name]
    findings, others = judged(fault)
    assert others == []
    [finding] = findings
    assert finding.atlas == "0"
    assert finding.kind == kind or (not kind and finding.whole)
    assert set(finding.organs) == organs
    assert words in finding.sentence
    assert "--overwrite" in finding.remedy


def test_a_sound_store_is_not_doubted() -> None:
    findings, others = judged(lambda labels: labels)
    assert findings == others == []


def test_a_small_store_tells_organs_apart_and_says_what_it_cannot_tell() -> None:
    findings, others = judged(SIDES, atlases=4)
    assert [finding.kind for finding in findings] == ["swapped"]
    assert others == []
    findings, _ = judged(lambda labels: np.roll(labels, 6, 0), atlases=4)
    assert findings == []


def test_organs_that_few_atlases_show_are_named() -> None:
    found = {
        str(seed): compared(
            body(seed, 0.6) if seed < 5 else renamed(cord="liver")(body(seed, 0.6)), seed
        )
        for seed in range(12)
    }
    [sentence] = unchecked(ORGANS, found)
    assert "cord" in sentence
    assert "liver" not in sentence


@pytest.mark.parametrize(
    ("organ", "other"),
    [("lung_left", "lung_right"), ("right_lobe", "left_lobe"), ("cleft", None), ("liver", None)],
)
def test_sides_are_told_by_words(organ: str, other: str | None) -> None:
    assert partner(organ) == other


@pytest.mark.parametrize(("dice", "named"), [(0.06, False), (0.6, True)])
def test_what_hardly_fits_is_no_better_name(dice: float, named: bool) -> None:
    """Where a store holds copies of a scan, the least noise is unusual."""
    found = {str(n): compared(body(0, 0.6), 0) for n in range(12)}
    own, other = found["0"].own_dice.copy(), found["0"].other_dice.copy()
    own[0], other[0] = 0.0, dice
    found["0"] = replace(found["0"], own_dice=own, other_dice=other)
    rules = Rules(ORGANS, SPACING, {name: one.layout for name, one in found.items()}, found)
    kinds = {finding.kind for finding in rules.findings("0")}
    assert bool(kinds & {"relabelled", "swapped"}) == named


def test_a_mistake_of_a_third_of_the_atlases_does_not_hide_itself() -> None:
    found = {
        str(seed): compared(SIDES(body(seed, 0.6)) if seed < 4 else body(seed, 0.6), seed)
        for seed in range(12)
    }
    rules = Rules(ORGANS, SPACING, {name: one.layout for name, one in found.items()}, found)
    named = {name for name in found for one in rules.findings(name) if one.kind == "swapped"}
    assert named == {"0", "1", "2", "3"}
