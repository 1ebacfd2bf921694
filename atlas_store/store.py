"""A store of atlases: a plain Zarr group on a local path or an object store.

Atlases are added one by one, by any number of processes, and read lazily; see
`atlas_store.layout` for the layout and why no lock is needed.
"""

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from os import PathLike
from typing import Self
from uuid import uuid4

from atlas_store.atlas import Atlas
from atlas_store.draft import Draft
from atlas_store.errors import (
    AtlasNotFoundError,
    OrganTableError,
    ParameterMismatchError,
    StoreExistsError,
    StoreFormatError,
    StoreNotFoundError,
)
from atlas_store.layout import ATLASES, MARKERS, ROOT, marker_key, parse_folder
from atlas_store.marker import (
    AtlasInfo,
    check_encoding,
    check_id,
    differences,
    is_id,
    natural_order,
    parse_json,
    table_digest,
)
from atlas_store.notes import read_note, write_note
from atlas_store.organs import OrganTable
from atlas_store.storage.digests import Json, canonical
from atlas_store.storage.objects import MAX_DOCUMENT, Objects
from atlas_store.trash import RemovedAtlas, prune, restore, throw_away, thrown_away
from atlas_store.verify import Problem, unmarked, verify_index, verify_store

ENCODING_TYPE = "kpt-atlas-store"
ENCODING_VERSION = "1"


class AtlasStore:
    """A store of atlases; make one with `create` or `open`.

    Iteration yields ids in natural order, ``store[id]`` is an atlas; ``id in store`` and
    ``len(store)`` work as for a dict. Nothing is cached: every call reads the current state.

    Attributes
    ----------
    url : str
        Local path or fsspec URL of the store.
    uuid : str
        Identity of the store, which moving and copying keep.
    organs : OrganTable
        Organ table of its label maps.
    parameters : mapping
        Parameters that all its atlases were made with.

    Examples
    --------
    >>> from atlas_store import AtlasStore, load_organs
    >>> store = AtlasStore.create("new", load_organs("visceral"), {"spacing": 2.0})
    >>> len(store)
    0
    >>> AtlasStore.open("atlases").ids()
    ['body_1', 'body_2', 'body_3']
    """

    def __init__(
        self, objects: Objects, uuid: str, organs: OrganTable, parameters: Mapping[str, Json]
    ) -> None:
        self.objects = objects
        self.url = objects.url
        self.uuid = uuid
        self.organs = organs
        self.parameters = parameters
        self._table = table_digest(organs)

    def __repr__(self) -> str:
        """Show the URL."""
        return f"AtlasStore({self.url!r})"

    @classmethod
    def create(
        cls,
        url: str | PathLike[str],
        organs: OrganTable,
        parameters: Mapping[str, Json],
    ) -> Self:
        """Create an empty store.

        Parameters
        ----------
        url : str or path
            A local path that does not exist or is an empty folder, or an fsspec URL.
        organs : OrganTable
            Organ table of its label maps.
        parameters : mapping
            Parameters its atlases will be made with, in JSON types; opaque to the store.

        Raises
        ------
        StoreExistsError
            If the path is not empty.
        ValueError, TypeError
            If the parameters are not JSON.
        """
        objects = Objects.at(url)
        attributes = {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "uuid": uuid4().hex,
            "organs": organs.to_json(),
            "parameters": json.loads(canonical(parameters)),
        }
        if not objects.is_vacant() or not objects.write_new(ROOT, _group(attributes)):
            raise StoreExistsError(
                f"{objects.url} exists already: use another path, or remove what is there."
            )
        objects.write_new(f"{ATLASES}/{ROOT}", _group({}))
        return cls._load(objects)

    @classmethod
    def open(cls, url: str | PathLike[str]) -> Self:
        """Open a store.

        Raises
        ------
        StoreNotFoundError
            If the path does not exist or is empty.
        StoreFormatError
            If it is no store, is damaged, or was written by a newer version.
        """
        return cls._load(Objects.at(url))

    @staticmethod
    def of(store: "AtlasStore | str | PathLike[str]") -> "AtlasStore":
        """Take a store as it is, and open the store of a path or URL; errors as of `open`.

        Examples
        --------
        >>> from atlas_store import AtlasStore
        >>> store = AtlasStore.of("atlases")
        >>> AtlasStore.of(store) is store
        True
        """
        return store if isinstance(store, AtlasStore) else AtlasStore.open(store)

    @classmethod
    def _load(cls, objects: Objects) -> Self:
        data = objects.read(ROOT, MAX_DOCUMENT)
        if data is None:
            if objects.is_vacant():
                raise StoreNotFoundError(
                    f"{objects.url} holds no atlas store: check the path, or create one there."
                )
            raise StoreFormatError(
                f"{objects.url} is no atlas store: use the path of one, or create one elsewhere."
            )
        attributes = parse_json(data, f"{objects.url}/{ROOT}").get("attributes")
        if not isinstance(attributes, dict):
            attributes = {}
        check_encoding(attributes, ENCODING_TYPE, ENCODING_VERSION, f"{objects.url}/{ROOT}")
        try:
            organs = OrganTable.from_json(attributes.get("organs"))
        except OrganTableError as error:
            raise StoreFormatError(
                f"{objects.url} is damaged, {error} Restore {ROOT} from a copy."
            ) from error
        uuid, parameters = attributes.get("uuid"), attributes.get("parameters")
        if not isinstance(uuid, str) or not isinstance(parameters, dict):
            raise StoreFormatError(
                f"{objects.url} is damaged, it lacks its uuid or parameters: "
                f"restore {ROOT} from a copy."
            )
        return cls(objects, uuid, organs, parameters)

    def documents(self) -> list[tuple[Objects, str]]:
        """Objects, by store and key, that identify this store and never change."""
        return [(self.objects, ROOT)]

    def ids(self) -> list[str]:
        """Ids of the atlases, in natural order: pt_3 before pt_13."""
        names = self.objects.names(MARKERS)
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(filter(is_id, stems), key=natural_order)

    def uuids(self) -> dict[str, str]:
        """Uuid of the data of every atlas by id, without reading a marker where possible."""
        folders: dict[str, list[str]] = {}
        for name in self.objects.names(ATLASES):
            if folder := parse_folder(name):
                folders.setdefault(folder[0], []).append(folder[1])
        uuid_of = {}
        # Markers are listed after folders: an atlas with a marker has its folder listed, or was
        # added or replaced meanwhile, and then its marker is read.
        for atlas_id in self.ids():
            uuids = folders.get(atlas_id, [])
            try:
                uuid_of[atlas_id] = uuids[0] if len(uuids) == 1 else self[atlas_id].info.uuid
            except AtlasNotFoundError:
                continue
        return uuid_of

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids, in natural order."""
        return iter(self.ids())

    def __len__(self) -> int:
        """Count the atlases."""
        return len(self.ids())

    def __contains__(self, atlas_id: object) -> bool:
        """Whether there is an atlas of this id."""
        return is_id(atlas_id) and self.objects.exists(marker_key(str(atlas_id)))

    def __getitem__(self, atlas_id: str) -> Atlas:
        """Get an atlas; `AtlasNotFoundError` if there is none of this id."""
        return self._atlas(atlas_id, self._marker(atlas_id))

    def atlases(self, ids: Iterable[str] | None = None) -> list[Atlas]:
        """Get many atlases, faster than one by one.

        Parameters
        ----------
        ids : iterable of str, optional
            Ids of the atlases; by default all, in natural order.

        Raises
        ------
        AtlasNotFoundError
            If the store has no atlas of a given id.
        """
        if ids is not None:
            return [self[atlas_id] for atlas_id in ids]
        known = AtlasStore.ids(self)
        markers = self.objects.read_many(map(marker_key, known), MAX_DOCUMENT)
        # A marker may vanish between listing and reading: its atlas was just removed.
        with _uncollected():
            return [
                self._atlas(atlas_id, data)
                for atlas_id, data in zip(known, markers, strict=True)
                if data is not None
            ]

    def draft(
        self, atlas_id: str, parameters: Mapping[str, Json], *, replace: bool | AtlasInfo = False
    ) -> Draft:
        """Begin to add an atlas; use it as a context manager, fill its group and commit.

        Parameters
        ----------
        atlas_id : str
            Up to 128 letters, digits, dots, underscores and hyphens.
        parameters : mapping
            Parameters it will be made with; must be those of the store.
        replace : bool or AtlasInfo
            Whether to replace an existing atlas of this id, or the marker of the very one to
            replace; it stays until the commit, and can then be restored until it is pruned.

        Raises
        ------
        AtlasIdError
            If the id cannot be used.
        ParameterMismatchError
            If the parameters differ from those of the store.
        AtlasExistsError
            On entering or committing, if there is an atlas of this id.
        AtlasNotFoundError
            On entering or committing, if the atlas to replace is another one by then, or gone.
        """
        check_id(atlas_id)
        differing = differences(self.parameters, json.loads(canonical(parameters)))
        if differing:
            raise ParameterMismatchError(
                f"{self.url} holds atlases made with other parameters ({'; '.join(differing)}): "
                "use those of the store, or create another store."
            )
        return Draft(self.objects, self.organs, self.parameters, atlas_id, replace=replace)

    def remove(self, atlas_id: str) -> bool:
        """Remove an atlas; `restore` brings it back until `prune` deletes its data.

        Returns
        -------
        bool
            Whether it can be restored; an atlas with a damaged marker cannot.

        Raises
        ------
        AtlasNotFoundError
            If there is no atlas of this id, or it was replaced meanwhile.
        """
        return throw_away(self.objects, atlas_id, self._marker(atlas_id))

    def removed(self) -> list[RemovedAtlas]:
        """List removed and replaced atlases that can be restored.

        In natural order, of each id the last removed first.

        Those whose description is damaged are left out, each with a warning.
        """
        found = sorted(thrown_away(self.objects), key=lambda one: one.removed, reverse=True)
        return sorted(found, key=lambda one: natural_order(one.info.id))

    def restore(self, atlas_id: str, *, version: str = "", replace: bool = False) -> Atlas:
        """Restore an atlas, the last removed or replaced of its id unless `version` names another.

        Parameters
        ----------
        atlas_id : str
            Its id.
        version : str
            The uuid of its data, as `removed` gives it, or enough of its first letters.
        replace : bool
            Whether to replace an atlas of this id that there is, which can be restored in turn.

        Raises
        ------
        AtlasNotFoundError
            If none of this id, or not one `version` of it, was removed or replaced, or its data
            was pruned; or if the atlas to replace was replaced or removed meanwhile.
        AtlasExistsError
            If there is an atlas of this id, unless `replace`.
        StoreFormatError
            If what describes it, or its data, is damaged or missing.

        Examples
        --------
        >>> from atlas_store import AtlasStore
        >>> store = AtlasStore.open("atlases")
        >>> first = store["body_1"].info
        >>> store.remove("body_1")
        True
        >>> store.restore("body_1", version=first.uuid[:8]).info == first
        True
        """
        info = restore(self.objects, atlas_id, version=version, replace=replace)
        # What was restored, though another process may have replaced it by now.
        return self._atlas(atlas_id, info.dump())

    def prune(self, older_than: timedelta = timedelta(0)) -> list[str]:
        """Delete the data of atlases that were removed or replaced some time ago.

        That of atlases whose description is damaged stays, each with a warning.

        Parameters
        ----------
        older_than : timedelta
            Time that has passed since, at least; 0 for all, whatever the clock said.

        Returns
        -------
        list of str
            Their ids.
        """
        return prune(self.objects, older_than)

    def note(self, atlas_id: str) -> str:
        """Read the note on an atlas; empty if there is none.

        Raises
        ------
        AtlasNotFoundError
            If there is no atlas of this id.
        StoreFormatError
            If the note is damaged.
        """
        return read_note(self.objects, self[atlas_id].info)

    def set_note(self, atlas_id: str, note: str) -> None:
        """Note something about an atlas, in place of its note; an empty one is deleted.

        Raises
        ------
        AtlasNotFoundError
            If there is no atlas of this id.
        ValueError
            If the note is longer than `atlas_store.notes.LONGEST` characters.

        Examples
        --------
        >>> from atlas_store import AtlasStore
        >>> store = AtlasStore.open("atlases")
        >>> store.set_note("body_1", "left kidney drawn with its cyst")
        >>> store.note("body_1")
        'left kidney drawn with its cyst'
        """
        write_note(self.objects, self[atlas_id].info, note)

    def copy_from(self, atlas: Atlas, atlas_id: str | None = None) -> Atlas:
        """Copy an atlas of another store, and its note; its content is compared with its SHA-256.

        Parameters
        ----------
        atlas : Atlas
            Atlas of a store with the same organ table and parameters.
        atlas_id : str, optional
            Its id here; by default the same.

        Raises
        ------
        ParameterMismatchError
            If the stores have other parameters or organ tables.
        AtlasExistsError
            If there is an atlas of this id.
        StoreFormatError
            If the atlas is damaged.

        Examples
        --------
        >>> from atlas_store import AtlasStore
        >>> source = AtlasStore.open("atlases")
        >>> target = AtlasStore.create("copy", source.organs, source.parameters)
        >>> target.copy_from(source["body_1"]).id
        'body_1'
        """
        if atlas.info.organ_table != self._table:
            raise ParameterMismatchError(
                f"{self.url} has another organ table than {atlas.objects.url}: make a store with"
                " the same table, or add the scan with its labels again."
            )
        atlas_id = atlas.id if atlas_id is None else atlas_id
        with self.draft(atlas_id, atlas.info.parameters) as draft:
            draft.note = read_note(atlas.objects, atlas.info)
            draft.commit_copy(atlas)
        return self[atlas_id]

    def verify(self, *, repair: bool = False) -> list[Problem]:
        """Read everything again and report what is wrong; see `atlas_store.verify`."""
        problems = verify_store(self.objects, self.organs, self.parameters, repair=repair)
        return problems + verify_index(self.uuid, repair=repair)

    def without_marker(self) -> list[str]:
        """List ids that have complete data and no marker, in natural order; none if all is well.

        The marker was lost, as by a copy that stopped half-way, or an add was interrupted just
        before it wrote one.
        """
        return unmarked(self.objects)

    def _marker(self, atlas_id: str) -> bytes:
        data = self.objects.read(marker_key(atlas_id), MAX_DOCUMENT) if is_id(atlas_id) else None
        if data is None:
            raise AtlasNotFoundError(
                f"{self.url} has no atlas {atlas_id!r}: use an id that it lists."
            )
        return data

    def _atlas(self, atlas_id: str, data: bytes) -> Atlas:
        where = f"{self.url}/{marker_key(atlas_id)}"
        info = AtlasInfo.load(data, atlas_id, where)
        unknown = sorted({*info.annotated, *info.organs} - set(self.organs.names))
        if unknown:
            raise StoreFormatError(
                f"{where} names the organ {unknown[0]!r}, which the store does not know: "
                "remove the atlas and add it again."
            )
        # Label values have another meaning under another organ table.
        if info.organ_table != self._table:
            raise StoreFormatError(
                f"{where} names another organ table than {ROOT} of the store holds: restore {ROOT} "
                "from a copy, or remove the atlas and add it again."
            )
        if info.parameters != self.parameters:
            differing = differences(dict(self.parameters), dict(info.parameters))
            raise StoreFormatError(
                f"{where} was made with other parameters ({'; '.join(differing)}): restore {ROOT} "
                "of the store from a copy, or remove the atlas and add it again."
            )
        return Atlas(info, self.organs, self.objects)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector: with many new objects it takes longer than making them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _group(attributes: Mapping[str, Json]) -> bytes:
    """Describe a Zarr group in one document, which is written atomically."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()
