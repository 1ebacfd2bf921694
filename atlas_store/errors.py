"""What can go wrong with a store, one class for each kind a caller may want to catch.

Every message is one sentence that names the store or file, says what is wrong and what to
do. Each class also inherits the builtin that a Python programmer would expect.
"""


class AtlasStoreError(Exception):
    """Base of every error that the user of a store can do something about."""


class StoreNotFoundError(AtlasStoreError, FileNotFoundError):
    """There is no store at this place."""


class StoreExistsError(AtlasStoreError, FileExistsError):
    """A store cannot be created where something is already."""


class StoreFormatError(AtlasStoreError, ValueError):
    """What is there is no store, is damaged, or was written by a newer version."""


class EmptyStoreError(AtlasStoreError, ValueError):
    """The store holds no atlas yet."""


class AtlasIdError(AtlasStoreError, ValueError):
    """A name that cannot be the id of an atlas."""


class AtlasNotFoundError(AtlasStoreError, KeyError):
    """The store holds no such atlas (any more)."""

    def __str__(self) -> str:
        """Give the plain sentence; `KeyError` would put it in quotation marks."""
        return str(self.args[0]) if self.args else ""


class AtlasExistsError(AtlasStoreError, FileExistsError):
    """The store holds an atlas of this id already and replacing was not asked for."""


class ParameterMismatchError(AtlasStoreError, ValueError):
    """An atlas was made with other parameters than the atlases of the store."""


class OrganTableError(AtlasStoreError, ValueError):
    """An organ table cannot be found, cannot be read, or contradicts itself."""


class KeypointsFormatError(StoreFormatError):
    """Keypoints do not have the variables, dimensions, types or values they must have."""


class MissingChunkError(AtlasStoreError, ValueError):
    """A part of an array that was written is not there any more."""


class DamagedChunkError(AtlasStoreError, ValueError):
    """A part of an array cannot be unpacked."""
