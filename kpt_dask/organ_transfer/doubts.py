"""What is doubtful about an answer: each doubt is a warning, one sentence.

`where` is the scan as a person knows it; `used` are the ids of the atlases that voted.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStoreError
from atlas_store.organ_strips import hu_of_organs
from kpt_dask.errors import some_of
from kpt_dask.organ_transfer.measures import UNSURE, OrganMeasures
from kpt_dask.runtime import notices

FEW_KEYPOINTS = 20
"""Fewer keypoints than this are doubtful."""
LITTLE = 0.01
"""A smaller share of the organs' volume in the atlases is doubtful."""
FEWEST = 5
"""Atlases that must show an organ before its HU can be unusual."""
UNUSUAL, UNUSUAL_OF_FEW = 1.5, 4.0
"""Times that a volume may be beyond the atlases' largest, or below their smallest; of fewer than
`FEWEST` atlases the second. With six random atlases 14 of 596 organs of OpenKBP were found with
such volumes, mean Dice 0.63; with twenty none. Of two random patients 4 % of the organs differ by
more than four times, most often larynx and esophagus.
"""

UNUSUAL_HU = 100.0
"""HU by which an organ's mean may be beyond those of the atlases at most. Of 275 organs of OpenKBP
one was farther away, a brainstem that was labelled in air; the next one by 59 HU."""
ROBUST = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""
FAR, LEAST_HU = 5.0, 10.0
"""An organ's mean may be so many robust standard deviations from the atlases' median, or within
their means; a deviation counts as `LEAST_HU` at least. No organ of 31 patients of OpenKBP is
farther away. Of those that were replaced by fat, fluid or muscle, 11 of 35 are told by this or the
next: most fat and fluid in brainstem and cord, hardly any in a parotid."""
UNIFORM = 0.5
"""An organ's HU are uniform if their standard deviation is less than this times the least of the
atlases."""

SCATTERED, SCATTERED_HU = 2.0, 50.0
"""An organ's HU scatter if their standard deviation is more than so many times the largest of the
atlases, plus so many HU. No organ of 15 patients of OpenKBP came near: 10 HU below the first term.
"""

Found = Mapping[str, OrganMeasures]


def unshown(organs: Iterable[str], atlases: Sequence[Atlas]) -> tuple[str, ...]:
    """Name the organs that no atlas shows, which cannot be found by them."""
    shown = {name for atlas in atlases for name in atlas.organs}
    return tuple(name for name in organs if name not in shown)


def doubt_unshown(
    where: str, organs: Sequence[str], candidates: Sequence[Atlas], *, asked: bool
) -> None:
    """Warn of organs that no atlas that voted shows.

    Parameters
    ----------
    where : str
    organs : sequence of str
        From `unshown`.
    candidates : sequence of Atlas
        Atlases that could have voted.
    asked : bool
        Whether the organs were asked for by name. If not, those that no candidate shows are no
        matter of this scan.
    """
    nowhere = unshown(organs, candidates)
    if nowhere and asked:
        notices.warn(
            f"{where}: no atlas shows {some_of(nowhere)}, so it cannot be found; add one that does."
        )
    if passed := [name for name in organs if name not in nowhere]:
        notices.warn(
            f"{where}: no atlas that was selected shows {some_of(passed)}, so it cannot be found;"
            " others do: use more of them (--select)."
        )


def doubt_alone(
    where: str, found: Found, weights: NDArray[np.float64], used: Sequence[str]
) -> Found:
    """Warn of organs that one atlas alone decided; `weights` (organ, atlas) are parts of votes.

    Returns the others, on which atlases can agree.
    """
    alone: dict[str, list[str]] = {}
    others = {}
    for (name, organ), parts in zip(found.items(), weights, strict=True):
        voting = np.flatnonzero(parts > 0).tolist()
        if organ.volume_ml and len(voting) == 1:
            alone.setdefault(used[voting[0]], []).append(name)
        else:
            others[name] = organ
    if alone:
        told = "; ".join(f"{some_of(names)} by {atlas}" for atlas, names in alone.items())
        notices.warn(
            f"{where}: a single atlas decided what is labelled ({told}), so nothing tells whether"
            " it is right; look at the label map there."
        )
    return others


def doubt_disagreement(where: str, found: Found) -> None:
    """Warn of organs on which the atlases, moved to the scan, hardly agree."""
    names = [n for n, o in found.items() if o.volume_ml and o.confidence < UNSURE]
    if names:
        notices.warn(
            f"{where}: the atlases hardly agree on {', '.join(names)} (confidence below"
            f" {UNSURE:g}); look at the label map there before anything depends on it."
        )


def doubt_volumes(where: str, found: Found, voted: Sequence[Atlas]) -> None:
    """Warn of organs far larger or smaller than in the atlases that voted.

    Organs at the border of the scan may be cut off: they are never too small.
    """
    unusual = []
    for name, organ in found.items():
        usual = [ml for atlas in voted if (ml := atlas.volume_ml(name))]
        if not organ.volume_ml or not usual:
            continue
        low, high = min(usual), max(usual)
        factor = UNUSUAL if len(usual) >= FEWEST else UNUSUAL_OF_FEW
        least = 0.0 if organ.at_border else low / factor
        if not least <= organ.volume_ml <= high * factor:
            unusual.append(f"{name} {organ.volume_ml:.1f} mL (atlases: {low:.1f} to {high:.1f})")
    if unusual:
        notices.warn(
            f"{where}: unusual volume of {some_of(unusual)}; look at the label map there, and check"
            " the scan's voxel spacing, its orientation and the part of the body that it shows."
        )


def doubt_hu(where: str, found: Found, voted: Sequence[Atlas]) -> None:
    """Warn of organs whose HU are unlike those in the atlases that voted."""
    shown = {name: organ for name, organ in found.items() if organ.mean_hu is not None}
    usual: dict[str, list[tuple[float, float]]] = {name: [] for name in shown}
    for atlas in voted:
        # What cannot be read any more was not needed for the answer; `kpt atlas verify` tells.
        with suppress(AtlasStoreError):
            for name, hu in hu_of_organs(atlas, list(shown)).items():
                usual[name].append(hu)
    unusual = []
    for name, organ in shown.items():
        if len(usual[name]) < FEWEST or organ.mean_hu is None or organ.sd_hu is None:
            continue
        means, deviations = np.array(usual[name]).T
        low, high = means.min(), means.max()
        middle = np.median(means)
        far = FAR * max(ROBUST * np.median(abs(means - middle)), LEAST_HU)
        least = max(low - UNUSUAL_HU, min(low, middle - far))
        most = min(high + UNUSUAL_HU, max(high, middle + far))
        if not least <= organ.mean_hu <= most:
            unusual.append(f"{name} {organ.mean_hu:.0f} HU (atlases: {low:.0f} to {high:.0f})")
        elif organ.sd_hu > SCATTERED * deviations.max() + SCATTERED_HU:
            widest = f"at most ± {deviations.max():.0f}"
            unusual.append(f"{name} ± {organ.sd_hu:.0f} HU (atlases: {widest})")
        elif organ.sd_hu < UNIFORM * deviations.min():
            narrowest = f"at least ± {deviations.min():.0f}"
            unusual.append(f"{name} ± {organ.sd_hu:.0f} HU (atlases: {narrowest})")
    if unusual:
        notices.warn(
            f"{where}: unusual density of {some_of(unusual)}; look whether the organ is there, and"
            " check the scan's orientation, its contrast agent and the part of the body that it"
            " shows."
        )


def doubt_little(
    where: str, found: Found, n_keypoints: int, n_matches: int, candidates: Sequence[Atlas]
) -> None:
    """Warn if no organ, or hardly any, was found."""
    shown = ([a.volume_ml(name) for a in candidates if name in a.organs] for name in found)
    usual = sum(float(np.mean(volumes)) for volumes in shown if volumes)
    total = sum(organ.volume_ml for organ in found.values())
    if total >= LITTLE * usual and n_keypoints >= FEW_KEYPOINTS:
        return
    what = f"{total:.1f} mL of organs" if total else "no organ"
    notices.warn(
        f"{where}: {what} found, where an atlas shows {usual:.0f} mL, with {n_keypoints} keypoints"
        f" and {n_matches} matches; check that it is a CT in HU and shows the same part of the body"
        " as the atlases."
    )
