"""Rules: from the measures of a store's atlases to findings. Pure functions.

A measure is unusual if it lies more than `spread.LIMIT` robust standard deviations from the median
of the store, whatever the measure. The floors of the deviations, below which differences never
matter, are those of annotators: 0.03 of Dice, a tenth of a volume, 10 HU, a voxel, and 5 mm between
two organs.

An organ is taken for another one where the other's prediction fits it better than its own. That
needs no spread; where there is one, it must also be half of `LIMIT` beyond what is usual, so that
an organ that is never predicted well is not taken for its neighbour. Where more atlases make one
mistake than the spread leaves out, the median still tells: a gain of `FITS` above it will do.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.annotation_check.comparison import Comparison, Layout
from kpt_dask.annotation_check.findings import Finding, Reason, told
from kpt_dask.annotation_check.spread import LEAST, LIMIT, Spread

DICE_FLOOR, MEAN_DICE_FLOOR = 0.03, 0.02
VOLUME_FLOOR = 0.1
"""Of the natural logarithm of the volume."""
HU_FLOOR, ORDER_FLOOR_MM = 10.0, 5.0

FITS = 0.3
"""Dice from which a prediction fits."""
FITS_BETTER = 0.1
"""By how much the mean Dice must gain for a label map to be called mirrored."""

AXES = ("from head to foot", "from front to back", "from left to right")
TOWARDS = (("feet", "head"), ("front", "back"), ("right", "left"))
READD = "correct the labels and add it again with --overwrite"


@dataclass(frozen=True, eq=False)
class Rules:
    """What is usual in a store.

    Parameters
    ----------
    organs : OrganTable
        The organs.
    spacing : float
        Voxel size, mm: the floor of what is measured in mm.
    layouts : mapping of str to Layout
        Of all atlases, by id.
    comparisons : mapping of str to Comparison
        Of those that were predicted, by id.
    limit : float
        Standard deviations from which a measure is unusual.
    """

    organs: OrganTable
    spacing: float
    layouts: Mapping[str, Layout]
    comparisons: Mapping[str, Comparison]
    limit: float = LIMIT

    @cached_property
    def spreads(self) -> Mapping[str, Spread]:
        """What is usual of each measure, by its name."""
        layouts, compared = list(self.layouts.values()), list(self.comparisons.values())
        n = len(self.organs.names)
        dice = Spread.of(_stack([one.own_dice for one in compared], n), DICE_FLOOR)
        offset = Spread.of(_stack([one.offset for one in compared], n, 3), self.spacing)
        # Whole atlases are compared by what is left once each organ's usual value is taken off.
        means = _stack([_mean(one.own_dice - dice.centre) for one in compared])
        shifts = _stack([_common(one.offset - offset.centre) for one in compared], 3)
        return {
            "dice": dice,
            "offset": offset,
            "mean dice": Spread.of(means, MEAN_DICE_FLOOR),
            "shift": Spread.of(shifts, self.spacing),
            "volume": Spread.of(_stack([_log_volume(one) for one in layouts], n), VOLUME_FLOOR),
            "hu": Spread.of(_stack([one.hu for one in compared], n, 2), HU_FLOOR),
            "gap": Spread.of(_stack([one.gap_mm for one in compared], n), self.spacing),
            "better": Spread.of(
                _stack([one.other_dice - one.own_dice for one in compared], n), DICE_FLOOR
            ),
        }

    @cached_property
    def order(self) -> Sequence[Spread]:
        """What is usual of the vectors from each organ's centroid to the others'."""
        n = len(self.organs.names)
        centroids = _stack([one.centroid for one in self.layouts.values()], n, 3)
        return [Spread.of(centroids - centroids[:, [i]], ORDER_FLOOR_MM) for i in range(n)]

    def findings(self, atlas: str) -> list[Finding]:
        """Find what is unusual about an atlas that was predicted."""
        found = self.comparisons[atlas]
        relabelled = self._relabelled(found)
        whole = self._reasons_of_atlas(found, relabelled)
        reasons = {
            organ: said
            for i, organ in enumerate(self.organs.names)
            if organ not in relabelled and (said := self._reasons_of_organ(found, i, relabelled))
        }
        if not (relabelled or reasons or whole):
            return []
        if mirrored := self._mirrored(atlas, found, relabelled, whole):
            return [mirrored]
        shown = np.count_nonzero(~np.isnan(found.own_dice)) - len(relabelled)
        if whole or len(reasons) > max(shown / 2, 2):
            return [self._misfit(atlas, found, whole, reasons)]
        answers = self._relabelled_findings(atlas, found, relabelled)
        return answers + [_of_organ(atlas, organ, said) for organ, said in reasons.items()]

    def _relabelled(self, found: Comparison) -> dict[str, str]:
        """Name the organs that another one's prediction fits better, and the other one."""
        better = found.other_dice - found.own_dice
        beyond = self.spreads["better"].deviation(better)
        gain = better - self.spreads["better"].centre
        names = self.organs.names
        wrong = {}
        for i in np.flatnonzero(better > 0):
            # What hardly fits is no better name, however little the own one does.
            if found.other_dice[i] < FITS:
                continue
            clear = found.own_dice[i] < found.other_dice[i] / 2
            if np.isnan(beyond[i]):
                taken = clear
            else:
                taken = beyond[i] > self.limit / 2 or (clear and gain[i] > FITS)
            if taken:
                wrong[names[i]] = names[found.other[i]]
        return wrong

    def _relabelled_findings(
        self, atlas: str, found: Comparison, wrong: Mapping[str, str]
    ) -> list[Finding]:
        answers: list[Finding] = []
        # A side is swapped with the other one, and not part of a longer permutation.
        sides = {
            organ: other
            for organ, other in wrong.items()
            if partner(organ) == other and wrong.get(other, organ) == organ
        }
        rest = {organ: other for organ, other in wrong.items() if organ not in sides}
        for kind, labels in (("swapped", sides), ("relabelled", rest)):
            if not labels:
                continue
            pairs = [
                f"{organ} fits what the others predict of {other} better (Dice"
                f" {found.other_dice[i]:.2f}) than of {organ} ({found.own_dice[i]:.2f})"
                for organ, other in labels.items()
                for i in [self.organs.names.index(organ)]
            ]
            what = ("left and right are swapped: " if kind == "swapped" else "") + ", ".join(pairs)
            table = "look whether its label values are those of the store's organ table, and"
            sides_too = "look whether its labels or its scan are mirrored, and"
            remedy = f"{sides_too if kind == 'swapped' else table} {READD}"
            answers.append(Finding(atlas, kind, tuple(labels), what, remedy))
        return answers

    def _mirrored(
        self,
        atlas: str,
        found: Comparison,
        relabelled: Mapping[str, str],
        whole: Sequence[Reason],
    ) -> Finding | None:
        """Say that a label map is mirrored, if that explains it best."""
        now = float(np.nanmean(found.own_dice))
        renamed = np.array([name in relabelled for name in self.organs.names])
        named = np.nanmean(np.where(renamed, found.other_dice, found.own_dice))
        axis = int(np.argmax(np.nanmean(found.mirrored, axis=1)))
        then = float(np.nanmean(found.mirrored[axis]))
        centre = self.spreads["dice"].centre[~np.isnan(found.own_dice)]
        usual = float(np.nanmean(centre)) if (~np.isnan(centre)).any() else 2 * FITS - now
        # Mirrored back, it must be nearer to what is usual than to what it is.
        if then < max(now + FITS_BETTER, (now + usual) / 2, float(named)):
            return None
        return Finding(
            atlas,
            "mirrored",
            (),
            f"the label map is mirrored {AXES[axis]}: mean Dice with what the others predict is"
            f" {now:.2f}, and {then:.2f} once it is mirrored back",
            f"look how its file says where it lies, {READD}",
            tuple(whole),
        )

    def _misfit(
        self,
        atlas: str,
        found: Comparison,
        whole: Sequence[Reason],
        organs: Mapping[str, Sequence[Reason]],
    ) -> Finding:
        """Say that a label map as a whole does not fit its scan."""
        shift = _common(found.offset - self.spreads["offset"].centre)
        beyond = self.spreads["shift"].deviation(shift)
        now = float(np.nanmean(found.own_dice))
        usual = now - float(_mean(found.own_dice - self.spreads["dice"].centre)[0])
        dice = f"mean Dice with what the others predict is {now:.2f}"
        if not np.isnan(usual):
            dice += f", usual {usual:.2f}"
        shifted = bool((np.abs(beyond) > self.limit).any())
        if shifted:
            ways = [
                f"{abs(mm):.0f} mm to the {TOWARDS[axis][mm > 0]}"
                for axis, mm in enumerate(shift.tolist())
                if abs(mm) > self.spacing
            ]
            what = f"the labels lie {' and '.join(ways)} of what the others predict; {dice}"
        else:
            what = f"the labels do not fit the scan: {dice}"
        all_reasons = [*whole, *(reason for said in organs.values() for reason in said)]
        return Finding(
            atlas,
            "shifted" if shifted else "misfit",
            (),
            what,
            f"look whether they are another scan's or patient's, {READD}",
            tuple(sorted(all_reasons, key=lambda one: -abs(one.deviation))),
        )

    def _reasons_of_atlas(self, found: Comparison, leave_out: Container[str]) -> list[Reason]:
        """Look at all organs together, but for those that are taken for others."""
        out = np.array([organ in leave_out for organ in self.organs.names])
        own = np.where(out, np.nan, found.own_dice)
        dice = _mean(own - self.spreads["dice"].centre)
        reasons = self._beyond("mean dice", "mean Dice against the usual one", dice, low=True)
        offset = np.where(out[:, None], np.nan, found.offset)
        shift = _common(offset - self.spreads["offset"].centre)
        for axis, name in enumerate(AXES):
            reasons += self._beyond("shift", f"common offset {name} (mm)", shift, axis)
        return sorted(reasons, key=lambda one: -abs(one.deviation))

    def _reasons_of_organ(
        self, found: Comparison, i: int, leave_out: Container[str]
    ) -> list[Reason]:
        """Look at one organ; those that are taken for others do not say where it should be."""
        reasons = self._beyond("dice", "Dice", found.own_dice, i, low=True)
        volume = self._beyond("volume", "volume (mL)", _log_volume(found.layout), i)
        reasons += [
            Reason(one.measure, float(np.exp(one.value)), float(np.exp(one.usual)), one.deviation)
            for one in volume
        ]
        # Labels that lie beside the organ hold air or fat.
        reasons += [
            one
            for one in self._beyond("hu", "10th percentile of HU", found.hu, (i, 0))
            if one.deviation < 0
        ]
        reasons += self._beyond("hu", "median HU", found.hu, (i, 1))
        reasons += [
            one
            for one in self._beyond("gap", "planes missing (mm)", found.gap_mm, i)
            if one.deviation > 0
        ]
        for axis in range(3):
            name = f"offset {AXES[axis]} (mm)"
            reasons += self._beyond("offset", name, found.offset, (i, axis))
        reasons += self._out_of_order(found.layout, i, leave_out)
        return sorted(reasons, key=lambda one: -abs(one.deviation))

    def _out_of_order(self, layout: Layout, i: int, leave_out: Container[str]) -> list[Reason]:
        """Compare an organ's position with those of most other organs."""
        spread = self.order[i]
        vectors = layout.centroid - layout.centroid[i]
        beyond = spread.deviation(vectors)
        beyond[[k == i or name in leave_out for k, name in enumerate(self.organs.names)]] = np.nan
        reasons = []
        for axis in range(3):
            known = np.flatnonzero(~np.isnan(beyond[:, axis]))
            # The larger of two middle ones would let one misplaced organ accuse another.
            middle = known[np.argsort(np.abs(beyond[known, axis]), kind="stable")]
            if known.size and abs(beyond[(k := middle[(known.size - 1) // 2]), axis]) > self.limit:
                reasons.append(
                    Reason(
                        f"distance from {self.organs.names[k]} {AXES[axis]} (mm)",
                        -float(vectors[k, axis]),
                        -float(spread.centre[k, axis]),
                        -float(beyond[k, axis]),
                    )
                )
        return reasons

    def _beyond(
        self,
        name: str,
        measure: str,
        values: NDArray[np.float64],
        at: int | tuple[int, ...] = 0,
        *,
        low: bool = False,
    ) -> list[Reason]:
        """Name a value that is unusual; with `low` only one that is too low."""
        spread = self.spreads[name]
        beyond = float(spread.deviation(values)[at])
        if not (beyond < -self.limit if low else abs(beyond) > self.limit):
            return []
        return [Reason(measure, float(values[at]), float(spread.centre[at]), beyond)]


def partner(organ: str) -> str | None:
    """Name of an organ's other side, if it has one.

    Examples
    --------
    >>> partner("parotid_left"), partner("liver")
    ('parotid_right', None)
    """
    for here, there in (("left", "right"), ("right", "left")):
        parts = organ.split("_")
        if here in parts:
            return "_".join(there if part == here else part for part in parts)
    return None


def unchecked(organs: OrganTable, comparisons: Mapping[str, Comparison]) -> list[str]:
    """Say which organs too few atlases show to know what is usual."""
    shown = {
        name: sum(not np.isnan(one.own_dice[i]) for one in comparisons.values())
        for i, name in enumerate(organs.names)
    }
    few = [name for name, number in shown.items() if 0 < number < LEAST]
    if not few:
        return []
    return [
        f"fewer than {LEAST} of the atlases that were predicted show {', '.join(few)}, so it is"
        " not known what is usual there: only taking one organ for another was checked"
    ]


def _of_organ(atlas: str, organ: str, reasons: Sequence[Reason]) -> Finding:
    said = [f"{one.measure} {told(one.value)}, usual {told(one.usual)}" for one in reasons]
    sentence = f"{organ} is unusual: {'; '.join(said)}"
    remedy = f"look at it, and if it is wrong, {READD}"
    return Finding(atlas, "organ", (organ,), sentence, remedy, tuple(reasons))


def _stack(arrays: Sequence[NDArray[np.float64]], *shape: int) -> NDArray[np.float64]:
    return np.stack(arrays) if arrays else np.zeros((0, *shape))


def _log_volume(layout: Layout) -> NDArray[np.float64]:
    shown = layout.volume_ml > 0
    return np.log(np.where(shown, layout.volume_ml, np.nan))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = values[~np.isnan(values)]
    return np.array([known.mean() if known.size else np.nan])


def _common(offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the organs of their offsets, (3); NaN of fewer than two."""
    known = offset[~np.isnan(offset).any(axis=1)]
    return np.median(known, axis=0) if len(known) >= 2 else np.full(3, np.nan)
