"""Which organ of a store a name of somebody else's means: ``Kidney L`` is ``kidney_left``."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

from atlas_store import Organ, OrganTable

Words = tuple[str, ...]

LONGEST = 64
"""Letters of a name that are looked at."""

# Letters of other scripts are words too, and so is what could not be decoded: "Liver опухоль" is a
# tumour, not the liver.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|(?:[^\W\d_A-Za-z]|\ufffd)+")
_SHORT = {
    "l": "left",
    "lt": "left",
    "r": "right",
    "rt": "right",
    "oesophagus": "esophagus",
    "clavicle": "clavicula",
    "vertebra": "vertebrae",
}
_FILLERS = {"the", "of", "structure", "organ", "mask", "seg"}

_SAME = (
    ("bladder", "urinary_bladder"),
    ("spinal_cord", "spinalcord", "cord", "myelon"),
    ("inferior_vena_cava", "postcava", "ivc", "vena_cava_inferior"),
    ("gallbladder", "gall_bladder"),
    ("parotid", "parotid_gland"),
    ("adrenal_gland", "adrenal", "suprarenal_gland"),
    ("brainstem", "brain_stem"),
    ("small_bowel", "small_intestine"),
    ("portal_vein_and_splenic_vein", "portal_and_splenic_veins"),
    ("prostate", "prostate_uterus"),
    ("hip", "os_coxae"),
)
"""Names of one organ, without its side."""

_PARTS = {
    "lung_upper_lobe_left": "lung_left",
    "lung_lower_lobe_left": "lung_left",
    "lung_upper_lobe_right": "lung_right",
    "lung_middle_lobe_right": "lung_right",
    "lung_lower_lobe_right": "lung_right",
}
"""Parts of an organ, for stores that know the whole only."""


def printable_name(name: object) -> str:
    """Make a name that others gave fit for a sentence: one line, `LONGEST` letters at most."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    return " ".join(text.split())[:LONGEST]


def words_of(name: str) -> Words:
    """Split a name into its words, in an order of their own, sides spelled out, without accents."""
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    words = (word.lower() for word in _WORD.findall("".join(letters)))
    spelled = (_SHORT.get(word, word) for word in words)
    return tuple(sorted(word for word in spelled if word not in _FILLERS))


_KNOWN: dict[Words, str] = {words_of(name): names[0] for names in _SAME for name in names}


def _canonical(name: str) -> Words:
    """Give the words of a name that means the same, and its side."""
    words = words_of(name)
    sides = [word for word in words if word in ("left", "right")]
    rest = tuple(word for word in words if word not in ("left", "right"))
    return tuple(sorted([*words_of(_KNOWN.get(rest, "")), *sides])) if rest in _KNOWN else words


def organ_named(name: str, organs: OrganTable) -> Organ | None:
    """Find the organ of a store that a name means; None if there is none, or several.

    Examples
    --------
    >>> from atlas_store import load_organs
    >>> organ_named("Left Kidney", load_organs("visceral")).name
    'kidney_left'
    >>> organ_named("lung_upper_lobe_left", load_organs("visceral")).name
    'lung_left'
    """
    if name in organs:
        return organs.by_name(name)
    for asked in (name, _PARTS.get(name.lower())):
        if asked is None:
            continue
        found = [organ for organ in organs if _canonical(organ.name) == _canonical(asked)]
        if len(found) == 1:
            return found[0]
    return None


def match_names(
    names: Iterable[str], organs: OrganTable
) -> tuple[Mapping[str, Organ], tuple[str, ...]]:
    """Match names with the organs of a store.

    Returns
    -------
    known : mapping of str to Organ
    unknown : tuple of str
        Names that mean no organ of the store.
    """
    given = list(names)
    found = {name: organ for name in given if (organ := organ_named(name, organs)) is not None}
    return found, tuple(name for name in given if name not in found)


def same_organ(names: Iterable[str], known: Mapping[str, Organ]) -> tuple[str, str] | None:
    """Find two names that mean one organ and are not different parts of it; None if none do.

    Parameters
    ----------
    names : iterable of str
        Names of masks, segments or regions; one that is given twice means one organ twice.
    known : mapping of str to Organ
        From `match_names`.

    Examples
    --------
    >>> from atlas_store import load_organs
    >>> names = ["Kidney L", "left kidney", "lung_upper_lobe_left", "lung_lower_lobe_left"]
    >>> same_organ(names, match_names(names, load_organs("visceral"))[0])
    ('Kidney L', 'left kidney')
    """
    seen: dict[str, list[str]] = {}
    for name in names:
        if name not in known:
            continue
        others = seen.setdefault(known[name].name, [])
        part = name.lower()
        for other in others:
            if not (part in _PARTS and other.lower() in _PARTS and part != other.lower()):
                return other, name
        others.append(name)
    return None
