"""Reasons of an answer: the atlases that decided an organ, and the matches that speak for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kpt_dask.grid import Grid
from kpt_dask.organ_transfer.measures import OrganMeasures
from kpt_dask.report.findings import Findings, Keypoints

NEAR = 10.0
"""mm around an organ; keypoints there speak for it where those in it are few."""


@dataclass(frozen=True)
class Match:
    """A keypoint of the scan and one of an atlas.

    Attributes
    ----------
    number : int
        Index among the matches.
    atlas : int
        Index of the atlas.
    atlas_keypoint : int
        Index of the atlas's keypoint.
    position, atlas_position : (float, float, float)
        (z, y, x), mm, each in its own world.
    scale : float
        mm, of the scan's keypoint.
    label : int
        Label of the atlas's keypoint, 0 for none.
    """

    number: int
    atlas: int
    atlas_keypoint: int
    position: tuple[float, float, float]
    atlas_position: tuple[float, float, float]
    scale: float
    label: int


def atlas_parts(findings: Findings, name: str) -> list[tuple[str, float]]:
    """Part of each atlas in an organ's votes, the largest first; without those that have none.

    For outputs that do not state it, the part of the matches' weights with the organ's label.
    """
    organ = findings.table.names.index(name)
    if findings.weights is not None:
        part = findings.weights[organ]
    else:
        matches = findings.keypoints
        own = matches.label == findings.table.values[organ]
        part = np.bincount(matches.atlas[own], matches.weight[own], len(findings.atlases))
        part = part / max(float(part.sum()), 1e-300)
    order = np.argsort(-part, kind="stable")
    return [(findings.atlases[a], float(part[a])) for a in order.tolist() if part[a] > 0]


def matches_of(keypoints: Keypoints, value: int, measures: OrganMeasures, most: int) -> list[Match]:
    """Choose matches that speak for an organ, the strongest first.

    Matches with the organ's label whose keypoint voted for it come first, then others with its
    label, then those of any label whose keypoint lies in the organ or near it. No keypoint comes
    twice, and atlases do so only when there is no other.

    Parameters
    ----------
    keypoints : Keypoints
    value : int
        Label of the organ.
    measures : OrganMeasures
    most : int
        Number of matches, at most.
    """
    labelled = keypoints.label == value
    voted = keypoints.vote[keypoints.keypoint] == value
    rank = np.select([labelled & voted, labelled, _near(keypoints, measures)], [0, 1, 2], 3)
    order = np.lexsort((-keypoints.weight, rank))
    order = order[rank[order] < 3]
    chosen: list[int] = []
    seen: set[int] = set()
    for tier in range(3):
        atlases = {int(keypoints.atlas[m]) for m in chosen}
        for fresh in (True, False):
            for m in order[rank[order] == tier].tolist():
                if len(chosen) == most:
                    break
                keypoint, atlas = int(keypoints.keypoint[m]), int(keypoints.atlas[m])
                if keypoint not in seen and not (fresh and atlas in atlases):
                    chosen.append(m)
                    seen.add(keypoint)
                    atlases.add(atlas)
    return [_match(keypoints, m) for m in chosen]


def _near(keypoints: Keypoints, measures: OrganMeasures) -> NDArray[np.bool_]:
    """Whether the keypoint of each match lies in the box of an organ or near it."""
    if measures.extent is None:
        return np.zeros(len(keypoints.keypoint), bool)
    low, high = (np.array(corner) for corner in measures.extent)
    inside = (keypoints.position > low - NEAR) & (keypoints.position < high + NEAR)
    near: NDArray[np.bool_] = np.all(inside[keypoints.keypoint], axis=1)
    return near


def _match(keypoints: Keypoints, m: int) -> Match:
    keypoint = int(keypoints.keypoint[m])
    position = keypoints.position[keypoint].astype(np.float64)
    there = position - keypoints.translation[m]
    return Match(
        m,
        int(keypoints.atlas[m]),
        int(keypoints.atlas_keypoint[m]),
        _point(position),
        _point(there),
        float(keypoints.scale[keypoint]),
        int(keypoints.label[m]),
    )


def _point(mm: NDArray[np.float64]) -> tuple[float, float, float]:
    z, y, x = (float(c) for c in mm)
    return z, y, x


def centre_voxel(
    measures: OrganMeasures, organs: NDArray[np.uint16], number: int, grid: Grid
) -> Sequence[int] | None:
    """Voxel of an organ that is nearest to its centroid; None if it is not shown.

    Parameters
    ----------
    measures : OrganMeasures
    organs : uint16 array (z, y, x)
        Numbers of organs.
    number : int
        Number of this one.
    grid : Grid
        Grid of the numbers.
    """
    if measures.centroid is None or measures.extent is None:
        return None
    last = np.array(organs.shape) - 1
    low, high = (
        np.clip(np.rint(grid.to_index(corner)).astype(int) + by, 0, last)
        for corner, by in zip(measures.extent, (-1, 1), strict=True)
    )
    box = tuple(slice(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    voxels = np.argwhere(organs[box] == number)
    if not len(voxels):
        return None
    voxels += low
    middle = grid.to_index(measures.centroid)
    nearest: list[int] = voxels[((voxels - middle) ** 2).sum(axis=1).argmin()].tolist()
    return nearest
