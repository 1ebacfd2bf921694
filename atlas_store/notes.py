"""Notes on atlases: what people want to remember of them, beside data that never changes.

A note belongs to the content that it was written about: an atlas that replaces another of the same
id has none, one that is removed and restored keeps its own.
"""

import json
from datetime import UTC, datetime

from atlas_store.errors import StoreFormatError
from atlas_store.layout import ROOT, data_folder, note_key
from atlas_store.marker import AtlasInfo, check_encoding, parse_json
from atlas_store.storage.objects import MAX_DOCUMENT, Objects

ENCODING = {"encoding-type": "kpt-atlas-note", "encoding-version": "1"}
LONGEST = 10_000
"""Length of a note, characters, at most."""


def read_note(objects: Objects, info: AtlasInfo) -> str:
    """Read the note on an atlas; empty if there is none.

    Raises
    ------
    StoreFormatError
        If it is damaged.
    """
    key = note_key(info.id, info.uuid)
    data = objects.read(key, MAX_DOCUMENT)
    if data is None:
        return ""
    where = f"{objects.url}/{key}"
    content = parse_json(data, where)
    check_encoding(content, ENCODING["encoding-type"], ENCODING["encoding-version"], where)
    note = content.get("note")
    if not isinstance(note, str):
        raise StoreFormatError(f"{where} is damaged (it holds no note): write the note again.")
    return note


def delete_content(objects: Objects, atlas_id: str, uuid: str) -> None:
    """Delete what belongs to the content of an atlas: its data, and then the note on it."""
    folder = data_folder(atlas_id, uuid)
    # First the digests: data of which a part was deleted must not look complete.
    objects.delete(f"{folder}/{ROOT}")
    objects.delete_folder(folder)
    objects.delete(note_key(atlas_id, uuid))


def write_note(objects: Objects, info: AtlasInfo, note: str) -> None:
    """Write the note on an atlas, in place of one that there is; an empty one is deleted.

    Raises
    ------
    ValueError
        If it is longer than `LONGEST`, or cannot be written as UTF-8.
    """
    key = note_key(info.id, info.uuid)
    if not note:
        objects.delete(key)
        return
    if len(note) > LONGEST:
        raise ValueError(f"A note has at most {LONGEST} characters, not {len(note)}; shorten it.")
    written = datetime.now(UTC).isoformat(timespec="seconds")
    content = ENCODING | {"note": note, "written": written}
    objects.write(key, json.dumps(content, ensure_ascii=False).encode())
    objects.settle(key)
