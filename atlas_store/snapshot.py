"""The atlases that a store had at one moment, for a run that takes longer than that."""

from collections.abc import Iterable

from atlas_store.atlas import Atlas
from atlas_store.errors import AtlasNotFoundError
from atlas_store.store import AtlasStore


class Snapshot(AtlasStore):
    """A store as it was when this was made: what is added or replaced later is not seen.

    Nothing is locked, so an atlas can be removed or replaced before its data is read. Then
    `AtlasNotFoundError` says so, and `gone` which they are. Data that was read is what was added,
    or `StoreFormatError` says that it is not.

    Examples
    --------
    >>> from atlas_store import AtlasStore, Snapshot
    >>> snapshot = Snapshot(AtlasStore.open("atlases"))
    >>> snapshot.ids()
    ['body_1', 'body_2', 'body_3']
    >>> snapshot.gone(["body_1"])
    []
    """

    def __init__(self, store: AtlasStore) -> None:
        super().__init__(store.objects, store.uuid, store.organs, store.parameters)
        self._uuids = store.uuids()
        self._found: dict[str, Atlas] = {}

    def ids(self) -> list[str]:
        """Ids of the atlases, in natural order."""
        return list(self._uuids)

    def uuids(self) -> dict[str, str]:
        """Uuid of the data of every atlas by id."""
        return dict(self._uuids)

    def __contains__(self, atlas_id: object) -> bool:
        """Whether there was an atlas of this id."""
        return atlas_id in self._uuids

    def __getitem__(self, atlas_id: str) -> Atlas:
        """Get an atlas; `AtlasNotFoundError` if it never was there, was removed or replaced."""
        found = self._found.get(atlas_id)
        if found is None:
            found = super().__getitem__(atlas_id)
            if found.info.uuid != self._uuids.get(atlas_id):
                raise AtlasNotFoundError(
                    f"{self.url}: the atlas {atlas_id!r} was added or replaced meanwhile: run this"
                    " again."
                )
            self._found[atlas_id] = found
        return found

    def atlases(self, ids: Iterable[str] | None = None) -> list[Atlas]:
        """Get many atlases; without `ids` all that are still there."""
        if ids is not None:
            return [self[atlas_id] for atlas_id in ids]
        there = (atlas for atlas in super().atlases() if self._uuids.get(atlas.id))
        found = {a.id: a for a in there if a.info.uuid == self._uuids[a.id]} | self._found
        return [found[atlas_id] for atlas_id in self._uuids if atlas_id in found]

    def gone(self, ids: Iterable[str]) -> list[str]:
        """Find which of some atlases were removed or replaced since."""
        gone = []
        for atlas_id in ids:
            try:
                if super().__getitem__(atlas_id).info.uuid == self._uuids.get(atlas_id):
                    continue
            except AtlasNotFoundError:
                pass
            gone.append(atlas_id)
        return gone
