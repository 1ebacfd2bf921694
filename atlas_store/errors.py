"""Errors of a store, one class for each kind that a caller may want to catch.

::

    AtlasStoreError                    base of all
    ├── StoreNotFoundError             FileNotFoundError
    ├── StoreUnreachableError          ConnectionError
    ├── StoreExistsError               FileExistsError
    ├── StoreFormatError               ValueError
    │   └── KeypointsFormatError
    ├── EmptyStoreError                ValueError
    ├── AtlasIdError                   ValueError
    ├── AtlasNotFoundError             KeyError
    ├── AtlasExistsError               FileExistsError
    ├── ParameterMismatchError         ValueError
    ├── OrganTableError                ValueError
    ├── MissingChunkError              ValueError
    └── DamagedChunkError              ValueError

Each class also inherits the builtin on its right. Every message is one sentence that names the
store or file, says what is wrong and what to do.
"""


class AtlasStoreError(Exception):
    """Base of every error that the user of a store can do something about.

    Examples
    --------
    >>> from atlas_store import AtlasStore, AtlasStoreError
    >>> try:
    ...     AtlasStore.open("nowhere")
    ... except AtlasStoreError as error:
    ...     print(type(error).__name__)
    StoreNotFoundError
    """


class StoreWarning(UserWarning):
    """Something in a store is damaged, and the rest can be used."""


class StoreUnreachableError(AtlasStoreError, ConnectionError):
    """The URL of a store cannot be read or written: no network, bucket, right or library.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> AtlasStore.open("attic://bucket/store")
    Traceback (most recent call last):
        ...
    atlas_store.errors.StoreUnreachableError: attic://bucket/store has a scheme that is not ...
    """


class StoreNotFoundError(AtlasStoreError, FileNotFoundError):
    """There is no store at this place.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> AtlasStore.open("nowhere")
    Traceback (most recent call last):
        ...
    atlas_store.errors.StoreNotFoundError: ...: check the path, or create one there.
    """


class StoreExistsError(AtlasStoreError, FileExistsError):
    """A store cannot be created where something is already.

    Examples
    --------
    >>> from atlas_store import AtlasStore, load_organs
    >>> AtlasStore.create("atlases", load_organs(), {})
    Traceback (most recent call last):
        ...
    atlas_store.errors.StoreExistsError: ...: use another path, or remove what is there.
    """


class StoreFormatError(AtlasStoreError, ValueError):
    """The path holds no store, or one that is damaged or was written by a newer version.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> AtlasStore.open("body_4.zarr")
    Traceback (most recent call last):
        ...
    atlas_store.errors.StoreFormatError: ...use the path of an atlas store, or create one.
    """


class EmptyStoreError(AtlasStoreError, ValueError):
    """The store holds no atlas yet.

    Examples
    --------
    >>> from atlas_store import AtlasKeypoints, AtlasStore, load_organs
    >>> AtlasKeypoints.load(AtlasStore.create("empty", load_organs(), {}))
    Traceback (most recent call last):
        ...
    atlas_store.errors.EmptyStoreError: ...has no atlas to use: add one.
    """


class AtlasIdError(AtlasStoreError, ValueError):
    """A name that cannot be the id of an atlas.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> store.draft("a/b", store.parameters)
    Traceback (most recent call last):
        ...
    atlas_store.errors.AtlasIdError: ...a letter or digit first.
    """


class AtlasNotFoundError(AtlasStoreError, KeyError):
    """The store holds no such atlas (any more).

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> store["nobody"]
    Traceback (most recent call last):
        ...
    atlas_store.errors.AtlasNotFoundError: ...has no atlas 'nobody': use an id that it lists.
    """

    def __str__(self) -> str:
        """Give the plain sentence; `KeyError` would put it in quotation marks."""
        return str(self.args[0]) if self.args else ""


class AtlasExistsError(AtlasStoreError, FileExistsError):
    """The store holds an atlas of this id already and replacing was not asked for.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> with store.draft("body_1", store.parameters):
    ...     pass
    Traceback (most recent call last):
        ...
    atlas_store.errors.AtlasExistsError: ...
    """


class ParameterMismatchError(AtlasStoreError, ValueError):
    """An atlas was made with other parameters than the atlases of the store.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> store = AtlasStore.open("atlases")
    >>> store.draft("body_5", {"spacing": 1.0})
    Traceback (most recent call last):
        ...
    atlas_store.errors.ParameterMismatchError: ...use those of the store, or create another store.
    """


class OrganTableError(AtlasStoreError, ValueError):
    """An organ table cannot be found, cannot be read, or contradicts itself.

    Examples
    --------
    >>> from atlas_store import load_organs
    >>> load_organs("nowhere.toml")
    Traceback (most recent call last):
        ...
    atlas_store.errors.OrganTableError: nowhere.toml does not exist: ...
    """


class KeypointsFormatError(StoreFormatError):
    """Keypoints do not have the variables, dimensions, types or values they must have.

    Examples
    --------
    >>> import zarr
    >>> from atlas_store import read_keypoints
    >>> read_keypoints(zarr.open_group("body_4.zarr", mode="r"))
    Traceback (most recent call last):
        ...
    atlas_store.errors.KeypointsFormatError: ...are no kpt-keypoints: extract them again.
    """


class MissingChunkError(AtlasStoreError, ValueError):
    """A part of an array that was written is not there any more."""


class DamagedChunkError(AtlasStoreError, ValueError):
    """A part of an array cannot be decompressed."""
