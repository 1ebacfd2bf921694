"""Conditions and orders of a list of atlases: ``kpt atlas list --where --sort``."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from atlas_store.marker import natural_order
from kpt_dask.errors import ParameterError

if TYPE_CHECKING:
    from atlas_store import AtlasInfo, OrganTable

COLUMNS: dict[str, Callable[["AtlasInfo"], Any]] = {
    "id": lambda info: info.id,
    "organs": lambda info: len(info.annotated),
    "keypoints": lambda info: info.keypoints,
    "in_organs": lambda info: sum(organ.keypoints for organ in info.organs.values()),
    "added": lambda info: moment(info),
    "from": lambda info: ", ".join(info.source[:1]),
}
"""What atlases are listed by, as the list shows it."""

NUMBERS = ("organs", "keypoints", "in_organs")

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "~": lambda value, part: part in value,
    "!~": lambda value, part: part not in value,
}
_IN_SPAN: dict[str, Callable[[datetime, datetime, datetime], bool]] = {
    "=": lambda at, first, after: first <= at < after,
    "!=": lambda at, first, after: not first <= at < after,
    "<": lambda at, first, after: at < first,
    "<=": lambda at, first, after: at < after,
    ">": lambda at, first, after: at >= after,
    ">=": lambda at, first, after: at >= first,
}
"""Comparisons of a moment with a span of time, such as a day: from `first` to before `after`."""

_CONDITION = re.compile(r"\s*(\w+)\s*(=|!=|<=|>=|<|>|~|!~)\s*(.*?)\s*")
_DATE = re.compile(
    r"(\d{4})(?:-(\d{2})(?:-(\d{2})(?:[ T](\d{2})(?::(\d{2})(?::(\d{2}))?)?)?)?)?", re.ASCII
)
_LONG = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)


def moment(info: "AtlasInfo") -> str:
    """Say when an atlas was added, to the minute (UTC)."""
    return info.added.replace("T", " ")[:16]


def filtered(
    infos: Iterable["AtlasInfo"], where: Sequence[str], sort: str | None, organs: "OrganTable"
) -> list["AtlasInfo"]:
    """Keep the atlases that satisfy all conditions, in an order.

    Parameters
    ----------
    infos : iterable of AtlasInfo
    where : sequence of str
        Conditions, such as ``keypoints<500``: a column, one of ``= != < <= > >=``, or ``~`` and
        ``!~`` for text that a column contains, and a value. ``organ=liver`` holds for atlases that
        annotate the liver, ``organ!=liver`` for the others. A date may be a year, a month, a day,
        an hour, a minute or a second: ``added<=2026-12-01`` holds until the end of that day.
    sort : str, optional
        A column; with ``-`` before it, the largest first. Atlases that are equal stay in order.
    organs : OrganTable
        Organs of the store.

    Raises
    ------
    ParameterError
        If a condition or an order makes no sense.
    OrganTableError
        If a condition names an organ that the store does not know.
    """
    conditions = [_condition(text, organs) for text in where]
    kept = [info for info in infos if all(holds(info) for holds in conditions)]
    if sort is None:
        return kept
    name = sort.removeprefix("-")
    if name not in COLUMNS:
        raise ParameterError(f"--sort {sort!r} is no column; use one of {', '.join(COLUMNS)}.")
    return sorted(kept, key=lambda info: _order(name, info), reverse=sort.startswith("-"))


def _order(name: str, info: "AtlasInfo") -> Any:
    if name == "added":
        return _added(info)
    value = COLUMNS[name](info)
    return value if name in NUMBERS else natural_order(value)


def _condition(text: str, organs: "OrganTable") -> Callable[["AtlasInfo"], bool]:
    match = _CONDITION.fullmatch(text)
    name, sign, value = match.groups() if match else ("", "", "")
    if name == "organ" and sign in ("=", "!="):
        organ = organs.by_name(value).name
        return lambda info: (organ in info.annotated) == (sign == "=")
    column = COLUMNS.get(name)
    numeric = name in NUMBERS
    if column is None or (numeric and ("~" in sign or not re.fullmatch(r"\d+", value))):
        raise ParameterError(
            f"--where {text!r} is no condition; write for instance keypoints<500, organ=liver,"
            f" added>=2026-01 or from~ct. Columns are organ, {', '.join(COLUMNS)}."
        )
    compare = _COMPARISONS[sign]
    if numeric:
        return lambda info: compare(column(info), int(value))
    if "~" in sign:
        return lambda info: compare(column(info), value)
    if name == "added":
        span = _span(text, value)
        return lambda info: _IN_SPAN[sign](_added(info), *span)
    wanted = natural_order(value)
    return lambda info: compare(natural_order(column(info)), wanted)


def _added(info: "AtlasInfo") -> datetime:
    """When an atlas was added; the beginning of time if its marker does not say it."""
    try:
        added = datetime.fromisoformat(info.added)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return added if added.tzinfo else added.replace(tzinfo=UTC)


def _span(text: str, value: str) -> tuple[datetime, datetime]:
    """First moment of what a date names, and the first one after it (UTC)."""
    match = _DATE.fullmatch(value)
    parts = [int(part) for part in match.groups() if part is not None] if match else [0]
    try:
        # datetime needs a month and a day.
        first = datetime(*[*parts, 1, 1][: max(len(parts), 3)], tzinfo=UTC)  # type: ignore[misc,arg-type]
        if len(parts) == 1:
            return first, first.replace(year=first.year + 1)
        if len(parts) == 2:
            return first, (first + timedelta(days=31)).replace(day=1)
        return first, first + _LONG[len(parts) - 3]
    except (ValueError, OverflowError):
        raise ParameterError(
            f"--where {text!r} gives no date; write it as the list does, 2026-12-01 11:14 (UTC), or"
            " its beginning, such as 2026-12-01 or 2026-12."
        ) from None
