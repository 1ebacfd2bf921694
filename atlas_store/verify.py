"""Verification of a whole store: every object is read again, and every problem reported.

Safe while other processes add, replace and remove: concurrent changes are not problems.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from atlas_store.arrays import chunk_io
from atlas_store.atlas import Atlas
from atlas_store.draft import digests_of, is_abandoned, is_running_here
from atlas_store.errors import AtlasStoreError, StoreFormatError, StoreUnreachableError
from atlas_store.keypoints import first_labels
from atlas_store.layout import (
    ATLASES,
    MARKERS,
    NOTES,
    REMOVED,
    ROOT,
    data_folder,
    marker_key,
    parse_folder,
    removed_key,
)
from atlas_store.marker import (
    AtlasInfo,
    differences,
    is_id,
    natural_order,
    parse_json,
    table_digest,
)
from atlas_store.notes import delete_content, read_note
from atlas_store.organs import OrganTable
from atlas_store.storage.cache import forget, index_folder, recall
from atlas_store.storage.digests import Json, digest
from atlas_store.storage.objects import MAX_DOCUMENT, PARTIAL_SUFFIX, Objects
from atlas_store.trash import is_marked, marked_uuid, read_removed, tells_removal

INSTANT = 2.0
"""Seconds, generous, that a running add takes from making its folder to writing an object."""

_ADD_AGAIN = "remove the atlas and add it again"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a store.

    Attributes
    ----------
    atlas : str or None
        The atlas concerned.
    what : str
        Description of the fault.
    remedy : str
        Advice to the user.
    repaired : bool
        Whether it was removed by this call.

    Examples
    --------
    >>> from atlas_store import AtlasStore, Problem
    >>> AtlasStore.open("atlases").verify()
    []
    >>> print(Problem("a", "its image is damaged", "remove the atlas and add it again"))
    atlas 'a': its image is damaged: remove the atlas and add it again.
    """

    atlas: str | None
    what: str
    remedy: str
    repaired: bool = False

    def __str__(self) -> str:
        """Format the problem as one sentence."""
        subject = f"atlas {self.atlas!r}: " if self.atlas is not None else ""
        return f"{subject}{self.what}: {'removed' if self.repaired else self.remedy}."


def verify_store(
    objects: Objects, organs: OrganTable, parameters: Mapping[str, Json], *, repair: bool = False
) -> list[Problem]:
    """Read everything in a store again and report what is wrong.

    Parameters
    ----------
    objects, organs, parameters
        The store.
    repair : bool
        Remove what interrupted adds and removals left. The data of an atlas is never removed,
        nor complete data without a marker, nor that of an add that may still run: its process
        runs on this machine, or it started on another one less than
        `atlas_store.draft.ABANDONED_AFTER` ago.

    Returns
    -------
    list of Problem
        Problems of the atlases in natural order, then leftovers.
    """
    # Notes before the data that they are about. Folders before markers: an add that commits
    # meanwhile is then named by its marker.
    notes = objects.names(NOTES)
    folders = objects.names(ATLASES)
    markers = objects.names(MARKERS)
    ids = [name.removesuffix(".json") for name in markers if name.endswith(".json")]
    problems: list[Problem] = []
    named: set[str | None] = set()
    for atlas_id in sorted(filter(is_id, ids), key=natural_order):
        faults, path = _verify_atlas(objects, organs, parameters, atlas_id)
        problems += faults
        named.add(path)
    removed = objects.names(REMOVED)
    problems += _verify_removed(objects, organs, parameters, removed)
    entries = [name.removesuffix(".json") for name in removed]
    named |= {f"{ATLASES}/{name}" for name in entries if parse_folder(name)}
    data = {f"{ATLASES}/{name}" for name in folders if parse_folder(name)}
    listed = ((ATLASES, folders), (MARKERS, markers), (NOTES, notes), (REMOVED, removed))
    partial = {f"{of}/{name}" for of, names in listed for name in names if _is_partial(name)}
    alone = {
        f"{NOTES}/{name}"
        for name in notes
        if parse_folder(stem := name.removesuffix(".json"))
        and f"{ATLASES}/{stem}" not in data | named
    }
    left = _abandoned(objects, (data - named) | partial | alone)
    problems += [_leftover(objects, path, repair) for path in left]
    problems += [
        Problem(None, f"{objects.url}/{MARKERS}/{name} is no marker of an atlas", "delete it")
        for name in sorted(markers)
        if not name.endswith((".json", PARTIAL_SUFFIX)) or not is_id(name.rpartition(".")[0])
    ]
    return problems


def verify_index(store_uuid: str, *, repair: bool = False) -> list[Problem]:
    """Find damaged parts of a store's index in the user's cache; `repair` removes them."""
    problems = []
    for path in sorted(index_folder(store_uuid).glob("*")):
        if path.suffix != PARTIAL_SUFFIX and recall(path) is None and path.exists():
            if repair:
                forget(path)
            what = f"{path}, a part of the index in your cache, is damaged"
            problems.append(Problem(None, what, "delete it, it is made anew", repair))
    return problems


def _verify_atlas(
    objects: Objects,
    organs: OrganTable,
    parameters: Mapping[str, Json],
    atlas_id: str,
) -> tuple[list[Problem], str | None]:
    """Find what is wrong with an atlas, and which folder its marker names."""
    key = marker_key(atlas_id)
    try:
        data = objects.read(key, MAX_DOCUMENT)
        if data is None:
            return [], None
        info = AtlasInfo.load(data, atlas_id, f"{objects.url}/{key}")
    except StoreFormatError as error:
        return [Problem(atlas_id, str(error).rstrip("."), _ADD_AGAIN)], None
    except OSError as error:
        return [_unreadable(atlas_id, error)], None
    atlas = Atlas(info, organs, objects)
    problems = []
    try:
        for fault in _faults(atlas, parameters):
            problems.append(Problem(atlas_id, fault, _ADD_AGAIN))
        read_note(objects, info)
    except StoreFormatError as error:
        problems.append(_as_problem(atlas_id, error))
    except OSError as error:
        problems.append(_unreadable(atlas_id, error))
    changed = objects.read(key) != data
    return [] if changed else problems, atlas.path


def _verify_removed(
    objects: Objects, organs: OrganTable, parameters: Mapping[str, Json], names: Iterable[str]
) -> Iterator[Problem]:
    """Find what is wrong with atlases that can be restored, by the names of their entries."""
    for name in sorted(names):
        folder = parse_folder(name.removesuffix(".json"))
        if folder is None or _is_partial(name):
            continue
        try:
            found = read_removed(objects, f"{REMOVED}/{name}")
        except StoreFormatError as error:
            yield _as_problem(folder[0], error)
            continue
        if found is None or is_marked(objects, *folder):
            continue
        faults = list(_faults(Atlas(found[0].info, organs, objects), parameters))
        entry = objects.read(f"{REMOVED}/{name}")
        if entry is not None:  # nobody prunes it
            for fault in faults:
                yield Problem(
                    folder[0], f"it was removed, and {fault}", "prune it, or add it again"
                )
            if not tells_removal(entry) and not objects.exists(key := marker_key(folder[0])):
                yield Problem(folder[0], f"{objects.url}/{key} is missing", "restore the atlas")


def _unreadable(atlas_id: str, error: OSError) -> Problem:
    """Describe what its disk or its permissions do not let be read."""
    if isinstance(error, StoreUnreachableError):
        raise error
    what = f"{error.filename or 'its data'} cannot be read ({error.strerror or error})"
    return Problem(atlas_id, what, "check its permissions and the disk")


def _as_problem(atlas_id: str, error: StoreFormatError) -> Problem:
    """Describe an error as a problem: what, and after its last colon the remedy."""
    what, _, remedy = str(error).rstrip(".").rpartition(": ")
    return Problem(atlas_id, what, remedy)


def _is_partial(name: str) -> bool:
    return name.endswith(PARTIAL_SUFFIX)


def _faults(atlas: Atlas, parameters: Mapping[str, Json]) -> Iterator[str]:
    info, organs = atlas.info, atlas.organ_table
    if info.organ_table != table_digest(organs):
        yield "it was made with another organ table than the store has now"
    for name in sorted({*info.annotated, *info.organs} - set(organs.names)):
        yield f"its marker names the organ {name!r}, which the store does not know"
    for phrase in differences(dict(parameters), dict(info.parameters)):
        yield f"it was made with other parameters, {phrase}"
    try:
        damaged = list(_damaged_arrays(atlas))
        yield from damaged
        if damaged:
            # Reading damaged arrays would only fail again.
            return
        labels = first_labels(atlas.keypoint_arrays())
        voxels = _voxels(atlas)
    except AtlasStoreError as error:
        yield str(error).rstrip(".")
        return
    if len(labels) != info.keypoints or any(
        np.count_nonzero(labels == organ.value) != info.organs[organ.name].keypoints
        for organ in organs
        if organ.name in info.organs
    ):
        yield "its marker counts other keypoints than it has"
    if voxels != {name: organ.voxels for name, organ in info.organs.items()}:
        yield "its marker counts other voxels of organs than its label map has"


def _voxels(atlas: Atlas) -> dict[str, int]:
    """Count the voxels of each organ that the label map shows, a layer of chunks at a time."""
    labels = atlas.labels
    (depth, height, width), step = labels.shape, labels.chunks[0]
    counts = np.zeros(1 << 16, np.int64)
    for z in range(0, depth, step):
        region = slice(z, min(z + step, depth)), slice(0, height), slice(0, width)
        part = chunk_io.read(labels, region)
        known = part[part < len(counts)] if part.dtype.itemsize > 2 else part.ravel()
        counts += np.bincount(known.astype(np.uint16), minlength=len(counts))
    return {organ.name: n for organ in atlas.organ_table if (n := int(counts[organ.value]))}


def _damaged_arrays(atlas: Atlas) -> Iterator[str]:
    """Compare every object of an atlas with the digest it had when it was added."""
    where = f"{atlas.objects.url}/{atlas.path}"
    sealed = atlas.objects.read(f"{atlas.path}/{ROOT}", MAX_DOCUMENT)
    if sealed is None:
        yield "its data is missing"
        return
    if digest(sealed) != atlas.info.digest:
        yield f"{where}/{ROOT} is damaged"
        return
    try:
        expected = dict(parse_json(sealed, f"{where}/{ROOT}")["attributes"]["digests"])
    except (KeyError, TypeError, ValueError):
        yield f"{where}/{ROOT} holds no digests"
        return
    actual = digests_of(atlas.objects, atlas.path)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for key in expected.keys() | actual.keys():
        if key not in actual:
            fault = "missing"
        elif key not in expected:
            fault = "not part of what was added"
        elif actual[key] != expected[key]:
            fault = "damaged"
        else:
            continue
        counts[key.partition("/c/")[0], fault] += 1
    for (array, fault), count in sorted(counts.items()):
        yield f"{where}/{array} has {count} object(s) that are {fault}"


def _abandoned(objects: Objects, paths: Iterable[str]) -> list[str]:
    """Paths of interrupted adds and removals among these, and complete data, sorted."""
    now = datetime.now(UTC)
    abandoned: list[str] = []
    unknown: list[str] = []
    complete: list[str] = []
    for path in sorted(paths):
        started = _started(objects, path)
        if started is None:
            unknown.append(path)
        elif is_abandoned(started, now):
            abandoned.append(path)
        elif _is_sealed(objects, path) and not is_running_here(started):
            complete.append(path)
    if unknown or complete:
        # A running add describes its folder, or writes its marker, within this time.
        time.sleep(INSTANT)
        present = {
            f"{folder}/{name}"
            for folder in (ATLASES, MARKERS, NOTES, REMOVED)
            for name in objects.names(folder)
        }
        abandoned += [p for p in unknown if p in present and _started(objects, p) is None]
        abandoned += [p for p in complete if _is_sealed(objects, p)]
    # Markers are read last: an add may have committed and ended since they were listed, and an
    # add that has ended cannot commit any more.
    return sorted(path for path in abandoned if not _is_named(objects, path))


def _is_named(objects: Objects, path: str) -> bool:
    """Whether a marker names this data, or that of this note, or is damaged and may have."""
    folder = parse_folder(path.rpartition("/")[2].removesuffix(".json"))
    if folder is None:
        return False
    try:
        return objects.exists(removed_key(*folder)) or is_marked(objects, *folder, damaged=True)
    except StoreUnreachableError:
        raise
    except OSError:
        # A marker that cannot be read may name it.
        return True


def _started(objects: Objects, path: str) -> Mapping[str, Json] | None:
    """Get the attributes of the group that an add is filling; None if there is none yet."""
    try:
        data = objects.read(f"{path}/{ROOT}")
        if data is None:
            return None
        attributes = parse_json(data, path).get("attributes")
    except StoreFormatError:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def unmarked(objects: Objects) -> list[str]:
    """Ids without a marker of which there is complete data, in natural order."""
    # Folders first: an add that ends meanwhile is then named by its marker.
    folders = [folder for name in objects.names(ATLASES) if (folder := parse_folder(name))]
    marked = set(objects.names(MARKERS))
    suspect = [folder for folder in folders if f"{folder[0]}.json" not in marked]
    if not suspect:
        return []
    entries = objects.read_many(removed_key(*one) for one in suspect)
    lost = {
        atlas_id
        for (atlas_id, uuid), entry in zip(suspect, entries, strict=True)
        if not tells_removal(entry)
        and _is_sealed(objects, path := data_folder(atlas_id, uuid))
        and not is_running_here(_started(objects, path) or {})
        and not objects.exists(marker_key(atlas_id))  # restored meanwhile
    }
    return sorted(lost, key=natural_order)


def _is_sealed(objects: Objects, path: str) -> bool:
    """Whether the data of an atlas is complete: it holds its digests, perhaps damaged."""
    try:
        return b'"digests"' in (objects.read(f"{path}/{ROOT}", MAX_DOCUMENT) or b"")
    except StoreFormatError:
        return False


def _is_superseded(objects: Objects, atlas_id: str) -> bool:
    """Whether a marker names other data, which is there."""
    try:
        uuid = marked_uuid(objects, atlas_id)
    except StoreFormatError:
        return False
    return uuid is not None and objects.exists(f"{data_folder(atlas_id, uuid)}/{ROOT}")


def _leftover(objects: Objects, path: str, repair: bool) -> Problem:
    """Describe what was left, and remove it; but no complete data of which there is no other."""
    folder = parse_folder(path.removeprefix(f"{ATLASES}/"))
    if folder and _is_sealed(objects, path) and not _is_superseded(objects, folder[0]):
        # Perhaps its marker is lost, or an add was interrupted just before it wrote one.
        return Problem(
            folder[0],
            f"{objects.url}/{path} is complete and has no marker",
            f"restore {marker_key(folder[0])} from a copy of the store, or add the atlas again, or"
            " delete this folder if nobody needs it",
        )
    problem = Problem(
        folder[0] if folder else None,
        f"{objects.url}/{path} was left by an add or another change that was interrupted",
        "verify with repair to remove it",
    )
    if not repair:
        return problem
    try:
        if folder:
            delete_content(objects, *folder)
        else:
            objects.delete(path)
    except OSError as error:
        return replace(problem, remedy=f"it cannot be deleted ({error}), delete it by hand")
    return replace(problem, repaired=True)
