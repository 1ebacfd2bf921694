"""Untrusted text, escaped so that it cannot control the terminal.

Names, notes and sentences may come from a store or a file that somebody else wrote. Control
characters move the cursor, change the title or the colours, and reverse the order of letters.
"""

_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: control, format, lone surrogate, separators of lines and paragraphs."""


def printable(text: str, keep: str = "") -> str:
    r"""Write control characters as Python does in a string, such as ``\x1b``.

    Parameters
    ----------
    text : str
        Any text.
    keep : str
        Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if c not in keep and _steers(c) else c for c in text
    )


def printable_json(text: str) -> str:
    """Write control characters as JSON does; a JSON document holds them in strings only."""
    if text.isprintable():
        return text
    return "".join(
        "".join(f"\\u{unit:04x}" for unit in _units(c)) if c != "\n" and _steers(c) else c
        for c in text
    )


def _steers(character: str) -> bool:
    # Imported here, because most answers do not need it.
    from unicodedata import category

    return category(character) in _STEERING


def _units(character: str) -> list[int]:
    data = character.encode("utf-16-le", "surrogatepass")
    return [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
