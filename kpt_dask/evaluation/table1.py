"""Statistics of keypoints, as in the paper's Table 1: how many there are, get a vote, are right.

References
----------
C. Wachinger, M. Toews, G. Langs, W. Wells, P. Golland, "Keypoint Transfer for Fast Whole-Body
Segmentation", IEEE Transactions on Medical Imaging 39(2), 273–282, 2020,
https://doi.org/10.1109/TMI.2018.2851194.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from atlas_store import OrganTable
from kpt_dask.matching.voting import weights_of


class Background(NamedTuple):
    """Numbers of a scan's keypoints that lie in no organ.

    Attributes
    ----------
    keypoints : int
        All that can be judged.
    labelled : int
        Those that have a match, whose atlas keypoint lies in an organ or in none.
    correct : int
        Those of them for which background wins, if background votes like an organ.
    in_organ : int
        Those that the segmentation counts as an organ's: there, background does not vote.
    """

    keypoints: int
    labelled: int
    correct: int
    in_organ: int


def keypoint_votes(
    inside: NDArray[np.uint16],
    voted: NDArray[np.uint16],
    annotated: Iterable[str],
    organs: OrganTable,
) -> dict[str, tuple[int, int, int]]:
    """Count, for each annotated organ, its keypoints, those with a vote, and the right votes.

    Parameters
    ----------
    inside : ndarray (keypoint), uint16
        Label of the reference where each keypoint lies.
    voted : ndarray (keypoint), uint16
        Label that its matches voted for, 0 for none.
    """
    counts = {}
    for name in annotated:
        value = organs.by_name(name).value
        votes = voted[inside == value]
        counts[name] = (
            int(votes.size),
            int(np.count_nonzero(votes)),
            int(np.count_nonzero(votes == value)),
        )
    return counts


def background_votes(
    inside: NDArray[np.uint16],
    matches: xr.Dataset,
    annotated: Iterable[str],
    organs: OrganTable,
    counted: NDArray[np.int64],
) -> Background:
    """Count the keypoints in no organ, with background as one more label to vote for.

    A keypoint that votes for an organ that the reference does not annotate is not counted: nobody
    knows whether it lies there.

    Parameters
    ----------
    inside : ndarray (keypoint), uint16
        Label of the reference where each keypoint lies.
    matches : xarray.Dataset
        From `kpt_dask.match`.
    annotated : iterable of str
        The organs that the reference annotates.
    organs : OrganTable
        The organs of the atlases.
    counted : ndarray of int
        Keypoints that are counted: one of each position.
    """
    weight = weights_of(matches)
    # Column 0 is the background, the others are organs in the order of the table.
    column = np.zeros(1 << 16, np.int64)
    column[list(organs.values)] = np.arange(1, len(organs) + 1)
    votes = np.zeros((inside.size, len(organs) + 1))
    at = column[matches.label.values.astype(np.int64)]
    np.add.at(votes, (matches.keypoint.values, at), weight)
    known = np.zeros(len(organs) + 1, np.bool_)
    known[column[[organs.by_name(name).value for name in annotated]]] = True
    votes, inside = votes[counted], inside[counted]
    in_organ = votes[:, 1:].any(axis=1)
    judged = (inside == 0) & (known[1 + votes[:, 1:].argmax(axis=1)] | ~in_organ)
    labelled = judged & votes.any(axis=1)
    correct = labelled & (votes.argmax(axis=1) == 0)
    return Background(*(int(one.sum()) for one in (judged, labelled, correct, judged & in_organ)))


def organ_statistics(
    counts: Sequence[Mapping[str, tuple[int, int, int]]], organs: OrganTable
) -> dict[str, Any]:
    """Average the counts of several scans, by organ.

    Returns
    -------
    dict
        By organ, in JSON types: ``mean``, keypoints of a scan in the organ; ``labelled``, how many
        per cent of them got a vote; ``correct``, how many per cent of these are right; both None
        where there is none.
    """
    table = {}
    for name in organs.names:
        known = np.array([one[name] for one in counts if name in one])
        if known.size:
            inside, labelled, correct = known.sum(axis=0).tolist()
            table[name] = {
                "mean": inside / len(known),
                "labelled": _per_cent(labelled, inside),
                "correct": _per_cent(correct, labelled),
            }
    return table


def background_statistics(counts: Sequence[Background]) -> dict[str, float | None]:
    """Average the counts of several scans: as `organ_statistics`, and ``in_organ``, per cent."""
    keypoints, labelled, correct, in_organ = np.array(counts).sum(axis=0).tolist()
    return {
        "mean": keypoints / len(counts),
        "labelled": _per_cent(labelled, keypoints),
        "correct": _per_cent(correct, labelled),
        "in_organ": _per_cent(in_organ, keypoints),
    }


def _per_cent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
