"""Findings: what is unusual about an atlas, and what to do about it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Reason:
    """One measure that is far from what is usual in the store.

    Attributes
    ----------
    measure : str
        Its name, with the unit.
    value, usual : float
        Of this atlas, and the median over the store.
    deviation : float
        Robust standard deviations between them; see `kpt_dask.annotation_check.spread`.
    """

    measure: str
    value: float
    usual: float
    deviation: float


@dataclass(frozen=True)
class Finding:
    """One thing that is unusual about an atlas.

    Attributes
    ----------
    atlas : str
        Id of the atlas.
    kind : str
        ``duplicate`` (the scan is there twice), ``same_patient``, ``swapped`` (left and right),
        ``relabelled`` (labels of other organs), ``mirrored``, ``shifted``, ``misfit`` (the whole
        label map) or ``organ`` (one organ).
    organs : tuple of str
        The organs it concerns; empty for all of the atlas.
    sentence : str
        What is unusual.
    remedy : str
        What to do.
    reasons : tuple of Reason
        The measures behind it, the most unusual first.
    """

    atlas: str
    kind: str
    organs: tuple[str, ...]
    sentence: str
    remedy: str
    reasons: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        """Say it in a line of text."""
        return f"{self.atlas}: {self.sentence}; {self.remedy}."

    @property
    def whole(self) -> bool:
        """Whether the label map misleads those that are predicted from it."""
        return self.kind not in ("duplicate", "same_patient", "organ")

    def to_json(self) -> dict[str, Any]:
        """Give its attributes in JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class CheckResult:
    """Answer of a check.

    Attributes
    ----------
    checked : tuple of str
        Ids of the atlases that were checked.
    findings : tuple of Finding
        In the order of the atlases.
    unchecked : tuple of str
        What could not be checked, and why, one sentence each.
    """

    checked: tuple[str, ...]
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]


def told(number: float) -> str:
    """Write a number with three digits, or all that stand before the point.

    Examples
    --------
    >>> told(1234.5), told(12.345), told(-0.01234)
    ('1234', '12.3', '-0.0123')
    """
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"
