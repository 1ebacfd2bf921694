"""Adding an atlas: fill a folder that no marker names yet, then write the marker."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import TracebackType
from typing import Self
from uuid import uuid4

import numpy as np
import xarray as xr
import zarr

from atlas_store.arrays.chunk_io import check_complete
from atlas_store.atlas import Atlas, check_labels
from atlas_store.errors import (
    AtlasExistsError,
    AtlasNotFoundError,
    KeypointsFormatError,
    MissingChunkError,
    StoreFormatError,
)
from atlas_store.keypoints import check_keypoints, first_labels, write_keypoints
from atlas_store.layout import KEYPOINTS, LABELS, ROOT, data_folder, marker_key
from atlas_store.marker import (
    ENCODING_TYPE,
    ENCODING_VERSION,
    AtlasInfo,
    OrganInfo,
    parse_json,
    table_digest,
)
from atlas_store.notes import delete_content, read_note, write_note
from atlas_store.organs import OrganTable
from atlas_store.storage.digests import Json, digest, digest_of_file
from atlas_store.storage.full_disk import naming
from atlas_store.storage.objects import MAX_DOCUMENT, MAX_OBJECT, Objects, finish_writes
from atlas_store.trash import keep_marker, keep_own_marker, was_removed

ABANDONED_AFTER = timedelta(hours=24)
"""Age after which an unfinished add of another machine counts as interrupted."""

_HASHING_THREADS = 4


KnownSource = tuple[str, str | None]
"""Name of a file that an atlas was made from, and its SHA-256 if that is known."""


class _State(Enum):
    OPEN = auto()
    PUBLISHING = auto()
    LOST = auto()
    COMMITTED = auto()


class Draft:
    """An atlas that is being added; `AtlasStore.draft` makes them.

    A context manager: if it ends without `commit`, the data is removed. A killed process leaves
    data without a marker, which no reader sees and `AtlasStore.verify` finds.

    Attributes
    ----------
    note : str
        Note that the atlas begins with; empty unless set.
    group : zarr.Group
        Group to fill with ``image/``, an OME-Zarr image with the label map
        ``image/labels/organs``. `commit` writes ``keypoints/``.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> with store.draft("body_5", store.parameters) as draft:
    ...     image = draft.group.create_group("image")
    >>> "body_5" in store  # left without a commit
    False
    """

    group: zarr.Group

    def __init__(
        self,
        objects: Objects,
        organs: OrganTable,
        parameters: Mapping[str, Json],
        atlas_id: str,
        *,
        replace: bool | AtlasInfo,
    ) -> None:
        self.id = atlas_id
        self.note = ""
        self._objects = objects
        self._organs = organs
        self._parameters = parameters
        self._replace = replace
        self._old: bytes | None = None
        self._described: dict[str, Json] = {}
        self._keeps_note = False
        self._uuid = uuid4().hex
        self._folder = data_folder(atlas_id, self._uuid)
        self._state = _State.OPEN

    def __enter__(self) -> Self:
        """Make the folder; refuse an id that is taken, or whose atlas is not the one to replace."""
        key = marker_key(self.id)
        if not self._replace and self._objects.exists(key):
            raise self._taken()
        if self._replace:
            self._old = self._objects.read(key)
        if isinstance(self._replace, AtlasInfo):
            old = self._old_info()
            if old is None or old.uuid != self._replace.uuid:
                raise self._changed()
        self._described = {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            "process": os.getpid(),
        }
        try:
            self.group = zarr.create_group(
                self._objects.store, path=self._folder, attributes=self._described
            )
        except BaseException as error:
            # The folder may be there, and nobody leaves this context.
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the data unless it was committed."""
        # After an interruption while publishing, the marker may exist or not. Data without a
        # marker is harmless, a marker without data is not.
        if self._state in (_State.OPEN, _State.LOST):
            finish_writes()
            delete_content(self._objects, self.id, self._uuid)
        if isinstance(error, OSError):
            with naming(self._objects.url):
                raise error

    def keep_note(self) -> None:
        """Keep the note on the atlas that is replaced, as it is at the commit.

        Raises
        ------
        StoreFormatError
            If it is damaged; so does the commit.
        """
        self._keeps_note = True
        self.note = self._old_note()

    def commit(
        self,
        keypoints: xr.Dataset,
        *,
        annotated: Iterable[str],
        organs: Mapping[str, OrganInfo],
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        origin: tuple[float, float, float],
        source: Iterable[str | os.PathLike[str] | KnownSource],
        scan_digest: str | None = None,
    ) -> AtlasInfo:
        """Write the keypoints and make the atlas visible.

        Parameters
        ----------
        keypoints : xarray.Dataset
            The variables of `atlas_store.keypoints.VARIABLES`, ``label`` included.
        annotated : iterable of str
            Names of the organs that the annotator looked for.
        organs : mapping of str to OrganInfo
            The organs that the label map shows; their keypoints are counted here.
        shape, spacing, origin : tuple
            The working grid, (z, y, x): voxels, mm, centre of voxel (0, 0, 0) in mm.
        source : iterable of str or path
            The files it was made from, or a name with its SHA-256; the names are kept, and the
            SHA-256 of files given as `pathlib.Path`.
        scan_digest : str, optional
            SHA-256, hexadecimal, that identifies the scan whatever its file is called.

        Returns
        -------
        AtlasInfo
            Content of the marker.

        Raises
        ------
        AtlasExistsError
            If another process added this id meanwhile.
        AtlasNotFoundError
            If another process added, replaced or removed the atlas that is replaced.
        StoreFormatError
            If the group has no label map of this shape, or a number makes no sense.
        OrganTableError
            If an organ is not in the table of the store.
        KeypointsFormatError
            If the keypoints lack a variable, or one has a wrong shape, type or value.
        """
        wanted = {self._organs.by_name(name).name for name in annotated}
        known = [_known(one) for one in source]
        shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        check_labels(self.group.get(LABELS), shape, f"{self._objects.url}: atlas {self.id!r}")
        total, counted = self._count(keypoints, organs)
        write_keypoints(self.group.create_group(KEYPOINTS), keypoints)
        info = AtlasInfo(
            id=self.id,
            uuid=self._uuid,
            annotated=tuple(name for name in self._organs.names if name in wanted),
            organs=counted,
            keypoints=total,
            shape=shape,
            spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            origin=(float(origin[0]), float(origin[1]), float(origin[2])),
            source=tuple(name for name, _ in known),
            added=datetime.now(UTC).isoformat(timespec="seconds"),
            software=_software(),
            parameters=self._parameters,
            organ_table=table_digest(self._organs),
            digest=self._seal(),
            scan_digest=scan_digest,
            source_digests=tuple(sha256 for _, sha256 in known),
        )
        self._publish(info)
        return info

    def commit_copy(self, atlas: Atlas) -> AtlasInfo:
        """Copy the data of an atlas of another store, and make it visible.

        Raises
        ------
        AtlasExistsError
            If another process added this id meanwhile.
        StoreFormatError
            If the atlas is damaged.
        """
        source = atlas.sealed

        def copy(key: str) -> None:
            data = source.read(f"{atlas.path}/{key}", MAX_OBJECT)
            assert data is not None  # a missing object is refused by `read`
            self._objects.write(f"{self._folder}/{key}", data)

        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            list(threads.map(copy, source.contents()))
        seal = self._seal(source.contents())
        info = replace(atlas.info, id=self.id, uuid=self._uuid, digest=seal)
        self._publish(info)
        return info

    def _count(
        self, keypoints: xr.Dataset, organs: Mapping[str, OrganInfo]
    ) -> tuple[int, dict[str, OrganInfo]]:
        """Check the keypoints, and count them and those of each organ."""
        labels = first_labels(check_keypoints(keypoints, self._organs.values))
        values, counts = np.unique(labels, return_counts=True)
        count_of = dict(zip(values.tolist(), counts.tolist(), strict=True))
        count_of.pop(0, None)
        counted = {
            name: replace(info, keypoints=count_of.pop(self._organs.by_name(name).value, 0))
            for name, info in organs.items()
        }
        if count_of:
            raise KeypointsFormatError(
                f"{self._objects.url}: keypoints of the atlas {self.id!r} have the label "
                f"{min(count_of)}, which its label map does not show: extract them again."
            )
        return len(labels), counted

    def _seal(self, expected: Iterable[str] = ()) -> str:
        """Store the digest of every object in the group; return the digest of the group.

        `StoreFormatError` if it was deleted, in whole or in part, or lacks an `expected` object.
        """
        self._check_whole()
        # Before the digests, which tell that data is complete; syncing them alone takes no time.
        self._objects.settle(self._folder)
        digests = digests_of(self._objects, self._folder)
        if not digests.keys() >= set(expected):
            raise self._deleted()
        self.group.attrs.update({"digests": digests})
        sealed = self._objects.read(f"{self._folder}/zarr.json")
        if sealed is None:
            raise self._deleted()
        return digest(sealed)

    def _check_whole(self) -> None:
        """Refuse a group that was deleted, and perhaps made again by what was written later."""
        root = f"{self._folder}/{ROOT}"
        data = self._objects.read(root, MAX_DOCUMENT)
        found = {} if data is None else parse_json(data, f"{self._objects.url}/{root}")
        if not self._described.items() <= found.get("attributes", {}).items():
            raise self._deleted()
        for _, member in self.group.members(max_depth=None):
            if isinstance(member, zarr.Array):
                try:
                    check_complete(member)
                except MissingChunkError as error:
                    raise self._deleted() from error

    def _deleted(self) -> StoreFormatError:
        return StoreFormatError(
            f"{self._objects.url}: the data of the atlas {self.id!r} was deleted while it was"
            " added: add it again."
        )

    def _publish(self, info: AtlasInfo) -> None:
        key, data = marker_key(self.id), info.dump()
        AtlasInfo.load(data, self.id, f"{self._objects.url}/{key}")
        # Data is synced before the marker: after a loss of power no marker may lack its data.
        self._objects.settle(f"{self._folder}/{ROOT}")
        if self._keeps_note:
            self.note = self._old_note()
        if self.note:
            write_note(self._objects, info, self.note)
        if self._old is not None and (old := self._old_info()):
            keep_marker(self._objects, old, self._old)
        # Whoever changed the atlas meanwhile was told so: nothing undoes that in silence.
        if self._replace and self._objects.read(key) != self._old:
            raise self._changed()
        self._state = _State.PUBLISHING
        if self._old is not None:
            self._objects.write(key, data)
        elif not self._objects.write_new(key, data):
            self._state = _State.LOST
            raise self._changed() if self._replace else self._taken()
        self._objects.settle(key)
        self._state = _State.COMMITTED
        # Another change of this id may be about to write its marker, and never saw this one.
        if self._old is not None or was_removed(self._objects, self.id):
            keep_own_marker(self._objects, info, data)

    def _old_info(self) -> AtlasInfo | None:
        """Marker of the atlas that is replaced; None if there is none, or it is damaged."""
        if self._old is None:
            return None
        try:
            return AtlasInfo.load(self._old, self.id, f"{self._objects.url}/{marker_key(self.id)}")
        except StoreFormatError:
            # `verify` removes the data of a damaged marker, once another marker is in its place.
            return None

    def _old_note(self) -> str:
        old = self._old_info()
        return "" if old is None else read_note(self._objects, old)

    def _changed(self) -> AtlasNotFoundError:
        return AtlasNotFoundError(
            f"{self._objects.url}: the atlas {self.id!r} was added, replaced or removed while"
            " another was made in its place: look at what is there now, and run this again if it"
            " is still wanted."
        )

    def _taken(self) -> AtlasExistsError:
        return AtlasExistsError(
            f"{self._objects.url} has an atlas {self.id!r} already: use another id, or replace it."
        )


def _known(source: str | os.PathLike[str] | KnownSource) -> KnownSource:
    """Name of a source, and its SHA-256."""
    if isinstance(source, tuple):
        return source
    # A name may not be UTF-8, which JSON requires.
    name = os.fsencode(PurePath(source).name).decode("utf-8", "replace")
    return name, digest_of_file(source)


def digests_of(objects: Objects, folder: str) -> dict[str, str]:
    """SHA-256 of every object in the folder of an atlas except its own ``zarr.json``, by key."""
    keys = [key for key in objects.keys(folder) if key != "zarr.json"]

    def hashed(key: str) -> str | None:
        data = objects.read(f"{folder}/{key}")
        return None if data is None else digest(data)

    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        digests = zip(keys, threads.map(hashed, keys), strict=True)
        return {key: value for key, value in digests if value is not None}


def is_abandoned(attributes: Mapping[str, Json], now: datetime) -> bool:
    """Whether an add was interrupted, by the attributes of its group.

    True if its process ran on this machine and has ended, or if it ran on another one and started
    longer than `ABANDONED_AFTER` ago.
    """
    process = _process_here(attributes)
    if process is not None:
        # Whatever the clock says: an add may take days, or the clock may have been set.
        return not _is_running(process)
    try:
        return now - datetime.fromisoformat(attributes["started"]) > ABANDONED_AFTER
    except (KeyError, TypeError, ValueError):
        return True


def is_running_here(attributes: Mapping[str, Json]) -> bool:
    """Whether the process of an add runs on this machine, by the attributes of its group."""
    process = _process_here(attributes)
    return process is not None and _is_running(process)


def _process_here(attributes: Mapping[str, Json]) -> int | None:
    """Process of an add, running or ended; None if it is one of another machine."""
    process = attributes.get("process")
    same_machine = attributes.get("machine") == _machine() is not None
    return process if same_machine and type(process) is int and process > 0 else None


def _machine() -> str | None:
    """Identity of the boot and the PID namespace, hashed; None where the system has none.

    Not the host name: containers may share it without seeing each other's processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return digest(f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}".encode())
    except OSError:
        return None


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _software() -> str:
    try:
        return f"kpt-dask {version('kpt-dask')}"
    except PackageNotFoundError:
        return "kpt-dask"
