"""Which organs there are: label value, name, ν, colour, SNOMED CT code.

A table is a TOML file with one ``[[organ]]`` block per organ. The paper's ten organs
(`visceral`) and those of the OpenKBP scans (`openkbp`) come with the package. The table a
store was created with is kept in the store, so it stays what it was.
"""

import colorsys
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, Self

from atlas_store.errors import OrganTableError

NAMED_TABLES = ("visceral", "openkbp")
"""Tables that come with the package; the first is the default."""

MAX_VALUE = 65535
"""Largest label value: label maps are uint16."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_SNOMED_CODE = re.compile(r"[1-9][0-9]{5,17}")
LEAST_NU, LARGEST_NU = 1e-3, 1e6
"""HU: beyond, single precision knows no difference."""

_NEEDED, _OPTIONAL = {"value", "name", "nu"}, {"colour", "snomed"}

_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Organ:
    """One organ.

    Attributes
    ----------
    value : int
        Its value in label maps, 1 to 65535.
    name : str
        Letters, digits and underscores, for instance ``lung_right`` or ``vertebrae_L1``.
    nu : float
        ν of eq. 11: standard deviation of the intensity likelihood, HU.
    colour : tuple of int
        Red, green and blue, 0 to 255.
    snomed : tuple of str, optional
        SNOMED CT code and its meaning. It need not tell the side; the name does.

    Raises
    ------
    OrganTableError
        If an attribute is out of range.

    Examples
    --------
    >>> from atlas_store import Organ
    >>> Organ(value=1, name="liver", nu=50.0, colour=(180, 90, 60)).name
    'liver'
    """

    value: int
    name: str
    nu: float
    colour: tuple[int, int, int]
    snomed: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise OrganTableError(
                f"the organ name {self.name!r} cannot be used: use up to 64 letters, "
                "digits and underscores, a letter first."
            )
        if not _is_int(self.value) or not 1 <= self.value <= MAX_VALUE:
            raise OrganTableError(
                f"organ {self.name!r} has the label value {self.value!r}: "
                f"use a whole number from 1 to {MAX_VALUE}."
            )
        if not _is_number(self.nu) or not LEAST_NU <= self.nu <= LARGEST_NU:
            raise OrganTableError(
                f"organ {self.name!r} has nu = {self.nu!r}: use a positive number of HU, from"
                f" {LEAST_NU:g} to {LARGEST_NU:g}."
            )
        if len(self.colour) != 3 or not all(_is_int(c) and 0 <= c <= 255 for c in self.colour):
            raise OrganTableError(
                f"organ {self.name!r} has the colour {self.colour!r}: "
                "use red, green and blue, each from 0 to 255."
            )
        if self.snomed is not None:
            code, meaning = self.snomed
            if not _SNOMED_CODE.fullmatch(code) or not 1 <= len(meaning) <= 64:
                raise OrganTableError(
                    f"organ {self.name!r} has the SNOMED CT code {code!r} ({meaning!r}): "
                    "use 6 to 18 digits and a meaning of up to 64 characters, or leave it out."
                )

    def to_json(self) -> dict[str, Any]:
        """Describe the organ in JSON types, with the fields of a TOML table."""
        entry: dict[str, Any] = {
            "value": self.value,
            "name": self.name,
            "nu": self.nu,
            "colour": list(self.colour),
        }
        if self.snomed is not None:
            entry["snomed"] = {"code": self.snomed[0], "meaning": self.snomed[1]}
        return entry

    @classmethod
    def from_json(cls, entry: object) -> Self:
        """Make an organ of what a table says of it; `OrganTableError` if that is malformed."""
        if not isinstance(entry, Mapping):
            raise OrganTableError(f"an organ is described by {entry!r}: use a block of fields.")
        label = f"organ {entry['name']!r}" if "name" in entry else "an organ without a name"
        fields = _NEEDED | _OPTIONAL
        missing, unknown = sorted(_NEEDED - set(entry)), sorted(set(entry) - fields)
        if missing:
            raise OrganTableError(f"{label} lacks {', '.join(missing)}: add it.")
        if unknown:
            raise OrganTableError(
                f"{label} has the unknown field {', '.join(unknown)}: "
                f"remove it or use one of {', '.join(sorted(fields))}."
            )
        colour = entry.get("colour")
        if colour is None:
            colour = colour_of(entry["value"]) if _is_int(entry["value"]) else (0, 0, 0)
        elif not isinstance(colour, list):
            raise OrganTableError(
                f"{label} has the colour {colour!r}: use a list of red, green and blue."
            )
        return cls(
            value=entry["value"],
            name=entry["name"],
            nu=float(entry["nu"]) if _is_number(entry["nu"]) else entry["nu"],
            colour=tuple(colour),
            snomed=_snomed(entry.get("snomed"), label),
        )


@dataclass(frozen=True)
class OrganTable:
    """The organs of a store, in the order of their table.

    Iterating gives the organs; ``name in table`` asks for a name.

    Raises
    ------
    OrganTableError
        If there is no organ, or two have the same label value, or names that are the same but for
        upper and lower case: people confuse these, and some file systems do.

    Examples
    --------
    >>> from atlas_store import Organ, OrganTable
    >>> table = OrganTable((Organ(1, "liver", 50.0, (180, 90, 60)),))
    >>> table.by_value(1).name, "spleen" in table
    ('liver', False)
    """

    organs: tuple[Organ, ...]

    def __post_init__(self) -> None:
        """Refuse an empty table and what stands twice."""
        if not self.organs:
            raise OrganTableError("the table has no organ: add an [[organ]] block for each.")
        names = tuple(name.lower() for name in self.names)
        for what, items in (("name", names), ("label value", self.values)):
            item, times = Counter(items).most_common(1)[0]
            if times > 1:
                raise OrganTableError(
                    f"the {what} {item!r} stands twice: give every organ its own."
                )

    def __iter__(self) -> Iterator[Organ]:
        """Iterate over the organs."""
        return iter(self.organs)

    def __len__(self) -> int:
        """Count the organs."""
        return len(self.organs)

    def __contains__(self, name: object) -> bool:
        """Whether an organ has this name."""
        return name in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of the table."""
        return tuple(organ.name for organ in self.organs)

    @property
    def values(self) -> tuple[int, ...]:
        """Label values, in the order of the table."""
        return tuple(organ.value for organ in self.organs)

    def only(self, names: Iterable[str]) -> "OrganTable":
        """Keep the organs of these names, in the order of the table.

        Raises
        ------
        OrganTableError
            If none is left, or a name is unknown.
        """
        wanted = {self.by_name(name).name for name in names}
        return OrganTable(tuple(organ for organ in self if organ.name in wanted))

    def by_name(self, name: str) -> Organ:
        """Get the organ of this name; `OrganTableError` if there is none."""
        for organ in self.organs:
            if organ.name == name:
                return organ
        raise OrganTableError(
            f"the organ table has no organ {name!r}: use one of {', '.join(self.names)}."
        )

    def by_value(self, value: int) -> Organ:
        """Get the organ of this label value; `OrganTableError` if there is none."""
        for organ in self.organs:
            if organ.value == value:
                return organ
        raise OrganTableError(
            f"the organ table has no label {value}: it has {', '.join(map(str, self.values))}."
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Describe the table in JSON types; `from_json` gives it back."""
        return [organ.to_json() for organ in self.organs]

    @classmethod
    def from_json(cls, entries: object) -> Self:
        """Make a table of what `to_json` gave; `OrganTableError` if it is malformed."""
        if not isinstance(entries, list):
            raise OrganTableError("the organ table is no list of organs: write [[organ]] blocks.")
        if len(entries) > MAX_VALUE:
            raise OrganTableError(f"the table has more than {MAX_VALUE} organs: use fewer.")
        return cls(tuple(Organ.from_json(entry) for entry in entries))


def load_organs(name_or_path: str | PathLike[str] = NAMED_TABLES[0]) -> OrganTable:
    """Load an organ table.

    Parameters
    ----------
    name_or_path : str or path
        ``visceral``, ``openkbp``, or the path of a TOML file with one ``[[organ]]`` block per
        organ: ``value``, ``name``, ``nu`` (HU) and, if wanted, ``colour`` (``[red, green, blue]``;
        else that of `colour_of`) and ``snomed = { code = "…", meaning = "…" }``.

    Raises
    ------
    OrganTableError
        If there is no such table or file, or the file is malformed.

    Examples
    --------
    >>> from atlas_store import load_organs
    >>> "liver" in load_organs("visceral")
    True
    """
    if name_or_path in NAMED_TABLES:
        text = (files("atlas_store") / "tables" / f"{name_or_path}.toml").read_text("utf-8")
        return _parse(text)
    path = Path(name_or_path)
    try:
        return _parse(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise OrganTableError(
            f"{path} does not exist: use the path of a TOML file or the name of a table "
            f"({', '.join(NAMED_TABLES)})."
        ) from None
    except OSError as error:
        raise OrganTableError(
            f"{path} cannot be read ({error.strerror}): use a TOML file."
        ) from error
    except UnicodeDecodeError as error:
        raise OrganTableError(f"{path} is no UTF-8 text: save it as a TOML file.") from error
    except OrganTableError as error:
        raise OrganTableError(f"{path}: {error}") from error


def colour_of(value: int) -> tuple[int, int, int]:
    """Choose a colour for a label value, far from those of the values next to it."""
    hue, pale = value * _GOLDEN_RATIO % 1, value % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.5, 0.9)[pale], (0.95, 0.85, 0.7)[pale])
    return round(255 * red), round(255 * green), round(255 * blue)


def _parse(text: str) -> OrganTable:
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OrganTableError(f"this is no TOML ({error}): correct it.") from error
    unknown = sorted(set(document) - {"organ"})
    if unknown:
        raise OrganTableError(
            f"{unknown[0]!r} means nothing here: write one [[organ]] block per organ."
        )
    return OrganTable.from_json(document.get("organ", []))


def _snomed(entry: object, label: str) -> tuple[str, str] | None:
    if entry is None:
        return None
    if (
        not isinstance(entry, Mapping)
        or set(entry) != {"code", "meaning"}
        or not all(isinstance(text, str) for text in entry.values())
    ):
        raise OrganTableError(
            f"{label} has snomed = {entry!r}: "
            'write { code = "10200004", meaning = "Liver" } with both in quotation marks.'
        )
    return entry["code"], entry["meaning"]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
