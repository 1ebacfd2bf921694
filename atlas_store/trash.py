"""Removed and replaced atlases: their data stays until it is pruned, so that they can be restored.

``removed/<id>.<uuid>.json`` holds the marker of such an atlas and when it was removed or replaced.
It is written before the marker goes, and deleted before the data is: an interruption at any moment
leaves the atlas in the store, restorable, or data that `AtlasStore.verify` finds.

No store can replace a marker only if it is still a given one. Of two changes of an id at once, the
later may replace a marker that it never saw. So whoever puts a marker where another was keeps its
own in ``removed/`` too, before it reports success. While the marker is in place, this entry is
neither listed nor pruned.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from atlas_store.errors import AtlasExistsError, AtlasNotFoundError, StoreFormatError, StoreWarning
from atlas_store.layout import REMOVED, ROOT, data_folder, marker_key, parse_folder, removed_key
from atlas_store.marker import AtlasInfo, check_encoding, parse_json
from atlas_store.notes import delete_content
from atlas_store.storage.objects import MAX_DOCUMENT, Objects
from atlas_store.storage.sealed import Sealed

ENCODING = {"encoding-type": "kpt-removed-atlas", "encoding-version": "1"}
IN_PLACE = "in_place"
"""Key of whether the atlas was in the store when its entry was written."""


@dataclass(frozen=True, slots=True)
class RemovedAtlas:
    """An atlas that was removed or replaced, and can be restored.

    Attributes
    ----------
    info : AtlasInfo
        Content of its marker.
    removed : datetime
        When it was removed or replaced, UTC.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> AtlasStore.open("atlases").removed()
    []
    """

    info: AtlasInfo
    removed: datetime


def throw_away(objects: Objects, atlas_id: str, marker: bytes) -> bool:
    """Remove an atlas, given its marker; its data stays. Return whether it can be restored.

    Raises
    ------
    AtlasNotFoundError
        If it was replaced meanwhile.
    """
    try:
        info = AtlasInfo.load(marker, atlas_id, f"{objects.url}/{marker_key(atlas_id)}")
    except StoreFormatError:
        # Nothing tells what it was; `verify` finds its data, and keeps it.
        objects.delete(marker_key(atlas_id))
        return False
    keep_marker(objects, info, marker)
    # Syncing takes a while; what replaced it meanwhile has another marker, which stays.
    if objects.read(marker_key(atlas_id), MAX_DOCUMENT) not in (marker, None):
        raise AtlasNotFoundError(
            f"{objects.url}: the atlas {atlas_id!r} was replaced while it was removed: look at what"
            " is there now, and remove it again if it is not wanted either."
        )
    objects.delete(marker_key(atlas_id))
    return True


def keep_marker(
    objects: Objects, info: AtlasInfo, marker: bytes, *, in_place: bool = False
) -> None:
    """Keep the marker of an atlas that is about to be removed or replaced, to restore it."""
    # To the microsecond: of two that go in one second, the last is known.
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    content = ENCODING | {"removed": now, "marker": marker.decode(), IN_PLACE: in_place}
    key = removed_key(info.id, info.uuid)
    objects.write(key, json.dumps(content).encode())
    objects.settle(key)


def keep_own_marker(objects: Objects, info: AtlasInfo, marker: bytes) -> None:
    """Keep a marker that was just written: another change may replace it without seeing it."""
    in_place = is_marked(objects, info.id, info.uuid, damaged=True)
    keep_marker(objects, info, marker, in_place=in_place)


def tells_removal(entry: bytes | None) -> bool:
    """Whether what describes a removed atlas was written because it was removed or replaced."""
    return entry is not None and f'"{IN_PLACE}": true'.encode() not in entry


def thrown_away(objects: Objects) -> Iterator[RemovedAtlas]:
    """Read the atlases that were removed or replaced and are not in the store, in no order.

    Those whose description is damaged are left out, each with a `StoreWarning`.
    """
    for name, atlas_id, uuid in _entries(objects):
        # Before the entry is read, which is written anew just before the marker goes.
        if is_marked(objects, atlas_id, uuid):
            continue
        try:
            found = read_removed(objects, f"{REMOVED}/{name}")
        except StoreFormatError as error:
            warnings.warn(str(error), StoreWarning, stacklevel=2)
            continue
        if found is not None:
            yield found[0]


def _entries(objects: Objects) -> Iterator[tuple[str, str, str]]:
    """Names of what describes removed atlases, each with id and uuid of its atlas."""
    for name in objects.names(REMOVED):
        folder = parse_folder(name.removesuffix(".json"))
        if folder is not None and name.endswith(".json"):
            yield name, *folder


def was_removed(objects: Objects, atlas_id: str) -> bool:
    """Whether an atlas of this id was removed or replaced, and not pruned."""
    return any(whose == atlas_id for _, whose, _ in _entries(objects))


def restore(
    objects: Objects, atlas_id: str, *, version: str = "", replace: bool = False
) -> AtlasInfo:
    """Restore an atlas; see `AtlasStore.restore`."""
    key = marker_key(atlas_id)
    present = objects.read(key, MAX_DOCUMENT)
    if present is not None and not replace:
        raise _present(objects, atlas_id)
    removed = [
        found
        for name, whose, uuid in _entries(objects)
        if whose == atlas_id
        and not is_marked(objects, atlas_id, uuid)
        and (found := read_removed(objects, f"{REMOVED}/{name}"))
    ]
    missing = AtlasNotFoundError(
        f"{objects.url} has no removed atlas {atlas_id!r}: use an id that list --removed shows."
    )
    if not removed:
        raise missing
    removed = [entry for entry in removed if entry[0].info.uuid.startswith(version)]
    if not removed or (version and len(removed) > 1):
        raise AtlasNotFoundError(
            f"{objects.url} has {len(removed) or 'no'} removed versions {version!r} of the atlas"
            f" {atlas_id!r}: use one that list --removed shows."
        )
    last, marker = max(removed, key=lambda entry: (entry[0].removed, entry[0].info.added))
    info = last.info
    entry = removed_key(atlas_id, info.uuid)
    try:
        _check_data(objects, info)
    except StoreFormatError:
        # Perhaps another process prunes it.
        if objects.exists(entry):
            raise
        raise missing from None
    if present is not None:
        _replace_marker(objects, atlas_id, present, marker)
    elif not objects.write_new(key, marker):
        raise _present(objects, atlas_id)
    # Another process may prune it: that deletes the entry, and then looks for a marker.
    if not objects.exists(entry):
        if present is not None:
            objects.write(key, present)
        else:
            objects.delete(key)
        raise missing
    objects.settle(key)
    keep_own_marker(objects, info, marker)
    return info


def _present(objects: Objects, atlas_id: str) -> AtlasExistsError:
    return AtlasExistsError(
        f"{objects.url} has an atlas {atlas_id!r}: replace it by the one to restore, or remove it;"
        " both keep it until it is pruned."
    )


def _replace_marker(objects: Objects, atlas_id: str, old: bytes, new: bytes) -> None:
    """Put a marker in the place of another one, which is kept."""
    key = marker_key(atlas_id)
    # Of a damaged marker, nothing tells what it was; `verify` finds its data.
    with suppress(StoreFormatError):
        keep_marker(objects, AtlasInfo.load(old, atlas_id, f"{objects.url}/{key}"), old)
    if objects.read(key, MAX_DOCUMENT) != old:
        raise AtlasNotFoundError(
            f"{objects.url}: the atlas {atlas_id!r} was replaced or removed while another was"
            " restored: look at what is there now, and restore again if that is still wanted."
        )
    objects.write(key, new)


def _check_data(objects: Objects, info: AtlasInfo) -> None:
    """Refuse data of which an object is missing; what is damaged is found when it is read."""
    folder = data_folder(info.id, info.uuid)
    sealed = Sealed(objects, folder, info.digest, f"the removed atlas {info.id!r}")
    wanted = [ROOT, *sealed.contents()]
    if lost := set(wanted).difference(objects.keys(folder)):
        raise StoreFormatError(
            f"{objects.url}/{folder} lacks {len(lost)} of {len(wanted)} objects of the removed"
            f" atlas {info.id!r}: restore this folder from a copy, or add the atlas again."
        )


def prune(objects: Objects, older_than: timedelta) -> list[str]:
    """Delete the data of atlases that were removed or replaced some time ago; return their ids."""
    now = datetime.now(UTC)
    pruned = []
    for one in thrown_away(objects):
        info = one.info
        # By a clock that was ahead, it may have been removed in the future: 0 means all.
        if older_than and now - one.removed < older_than:
            continue
        objects.delete(removed_key(info.id, info.uuid))
        # It may have been restored meanwhile; a damaged marker may name it.
        if not is_marked(objects, info.id, info.uuid, damaged=True):
            delete_content(objects, info.id, info.uuid)
            pruned.append(info.id)
    return sorted(pruned)


def read_removed(objects: Objects, key: str) -> tuple[RemovedAtlas, bytes] | None:
    """Read what describes a removed atlas, and its marker; None if it is not there any more."""
    data = objects.read(key, 2 * MAX_DOCUMENT)
    if data is None:
        return None
    where = f"{objects.url}/{key}"
    content = parse_json(data, where)
    check_encoding(content, ENCODING["encoding-type"], ENCODING["encoding-version"], where)
    folder = parse_folder(key.removeprefix(f"{REMOVED}/").removesuffix(".json"))
    try:
        removed = datetime.fromisoformat(content["removed"]).astimezone(UTC)
        marker = str(content["marker"]).encode()
        info = AtlasInfo.load(marker, folder[0] if folder else "", where)
        if folder is None or info.uuid != folder[1]:
            raise ValueError("it is another atlas than its name says")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, StoreFormatError):
            raise
        raise StoreFormatError(
            f"{where} is damaged ({error}): restore it from a copy, or delete it."
        ) from error
    return RemovedAtlas(info, removed), marker


def marked_uuid(objects: Objects, atlas_id: str) -> str | None:
    """UUID of the data that the marker of an atlas names; None if there is no marker.

    Raises
    ------
    StoreFormatError
        If it is damaged.
    """
    key = marker_key(atlas_id)
    data = objects.read(key, MAX_DOCUMENT)
    return None if data is None else AtlasInfo.load(data, atlas_id, f"{objects.url}/{key}").uuid


def is_marked(objects: Objects, atlas_id: str, uuid: str, *, damaged: bool = False) -> bool:
    """Whether a marker names this data; `damaged` if it cannot be read."""
    try:
        return marked_uuid(objects, atlas_id) == uuid
    except StoreFormatError:
        return damaged
