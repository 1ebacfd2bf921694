"""How far what an answer says of itself is true: its confidence, and intervals of volume.

Judged over all pairs of a scan and an organ that its reference annotates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpt_dask.measures.surfaces import Agreement
from kpt_dask.organ_transfer.measures import UNSURE, OrganMeasures

FAILED = 0.3
"""Dice below which an answer has failed, which its confidence should tell."""


class Claim(NamedTuple):
    """What an answer says of an organ, and the true volume.

    Attributes
    ----------
    confidence : float
        From 0 to 1; see `kpt_dask.organ_transfer.measures.OrganMeasures`.
    volume_ml, low_ml, high_ml : float
        The volume that was found, and its interval.
    reference_ml : float
        Volume in the reference.
    """

    confidence: float
    volume_ml: float
    low_ml: float
    high_ml: float
    reference_ml: float

    @classmethod
    def of(cls, found: OrganMeasures, reference_ml: float) -> "Claim":
        """Take from measures what can be compared with a reference."""
        return cls(found.confidence, found.volume_ml, *found.interval_ml, reference_ml)


def trust(scans: Sequence[tuple[Mapping[str, Claim], Mapping[str, Agreement]]]) -> dict[str, Any]:
    """Count how often what answers say of themselves is true.

    Parameters
    ----------
    scans : sequence of (dict of str to Claim, dict of str to Agreement)
        Of each scan, by organ.

    Returns
    -------
    dict
        ``answers``, how many pairs of scan and organ; ``rank_correlation``, Spearman's ρ of
        confidence and Dice, None where one of them does not vary; ``failed``, how many have a Dice
        below `FAILED`; ``not_found``, in how many nothing was found; ``unsure``, how many others
        have a confidence below `UNSURE`; ``failed_and_unsure``, how many both failed and were
        unsure or not found; ``volume_in_interval``, the fraction whose interval holds the volume
        in the reference.
    """
    pairs = [(one, dice[name]) for claims, dice in scans for name, one in claims.items()]
    confidence = np.array([claim.confidence for claim, _ in pairs])
    dice = np.array([agreement.dice for _, agreement in pairs])
    nothing = np.array([claim.volume_ml == 0 for claim, _ in pairs])
    unsure, failed = (confidence < UNSURE) & ~nothing, dice < FAILED
    return {
        "answers": len(pairs),
        "rank_correlation": _rank_correlation(confidence, dice),
        "failed": int(failed.sum()),
        "not_found": int(nothing.sum()),
        "unsure": int(unsure.sum()),
        "failed_and_unsure": int((failed & (unsure | nothing)).sum()),
        "volume_in_interval": float(
            np.mean([one.low_ml <= one.reference_ml <= one.high_ml for one, _ in pairs])
        ),
    }


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    # Imported here: it takes a third of a second.
    from scipy.stats import spearmanr

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
