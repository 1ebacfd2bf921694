"""Conditions and orders of a list of atlases: ``kpt atlas list --where --sort``."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kpt_dask.errors import ParameterError

if TYPE_CHECKING:
    from atlas_store import AtlasInfo

COLUMNS: dict[str, Callable[["AtlasInfo"], Any]] = {
    "id": lambda info: info.id,
    "organs": lambda info: len(info.annotated),
    "keypoints": lambda info: info.keypoints,
    "in_organs": lambda info: sum(organ.keypoints for organ in info.organs.values()),
    "added": lambda info: info.added,
    "from": lambda info: " ".join(info.source),
}
"""What atlases are listed by."""

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
_CONDITION = re.compile(r"\s*(\w+)\s*(=|!=|<=|>=|<|>|~|!~)\s*(.*?)\s*")


def filtered(
    infos: Iterable["AtlasInfo"], where: Sequence[str], sort: str | None
) -> list["AtlasInfo"]:
    """Keep the atlases that satisfy all conditions, in an order.

    Parameters
    ----------
    infos : iterable of AtlasInfo
    where : sequence of str
        Conditions, such as ``keypoints<500``: a column, one of ``= != < <= > >=``, or ``~`` and
        ``!~`` for text that a column contains, and a value. ``organ=liver`` holds for atlases that
        annotate the liver, ``organ!=liver`` for the others.
    sort : str, optional
        A column; with ``-`` before it, the largest first. Atlases that are equal stay in order.

    Raises
    ------
    ParameterError
        If a condition or an order makes no sense.
    """
    conditions = [_condition(text) for text in where]
    kept = [info for info in infos if all(holds(info) for holds in conditions)]
    if sort is None:
        return kept
    name = sort.removeprefix("-")
    if name not in COLUMNS:
        raise ParameterError(f"--sort {sort!r} is no column; use one of {', '.join(COLUMNS)}.")
    return sorted(kept, key=COLUMNS[name], reverse=sort.startswith("-"))


def _condition(text: str) -> Callable[["AtlasInfo"], bool]:
    match = _CONDITION.fullmatch(text)
    name, sign, value = match.groups() if match else ("", "", "")
    if name == "organ" and sign in ("=", "!="):
        return lambda info: (value in info.annotated) == (sign == "=")
    column = COLUMNS.get(name)
    numeric = name in ("organs", "keypoints", "in_organs")
    if column is None or (numeric and ("~" in sign or not re.fullmatch(r"\d+", value))):
        raise ParameterError(
            f"--where {text!r} is no condition; write for instance keypoints<500, organ=liver,"
            f" added>=2026-01 or from~ct. Columns are organ, {', '.join(COLUMNS)}."
        )
    wanted: Any = int(value) if numeric else value
    compare = _COMPARISONS[sign]
    return lambda info: compare(column(info), wanted)
