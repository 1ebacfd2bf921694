"""Search for the atlases of a store that were made from a scan, whatever their ids."""

from collections.abc import Iterable

from atlas_store import Atlas, AtlasStoreError
from kpt_dask.volumes.identity import digest_of


class KnownScans:
    """Scans of some atlases, identified by digests of their voxels.

    Markers hold the digest. For atlases of earlier versions it is computed from the image, if that
    has the shape of the scan.
    """

    def __init__(self, atlases: Iterable[Atlas]) -> None:
        self._atlases = list(atlases)
        self._digests = {atlas.id: atlas.info.scan_digest for atlas in self._atlases}

    def of(self, digest: str, shape: tuple[int, int, int]) -> tuple[str, ...]:
        """Ids of the atlases that were made from a scan.

        Parameters
        ----------
        digest : str
            Digest of the scan's volume, from `kpt_dask.volumes.identity.digest_of`.
        shape : tuple of int
            (z, y, x) of that volume.
        """
        return tuple(
            atlas.id
            for atlas in self._atlases
            if atlas.info.shape == shape and self._digest(atlas) == digest
        )

    def _digest(self, atlas: Atlas) -> str:
        known = self._digests[atlas.id]
        if known is None:
            try:
                known = digest_of(atlas.image)
            except (AtlasStoreError, OSError, KeyError, TypeError, ValueError):
                # Removed meanwhile, or damaged: reported when the atlas is used.
                known = ""
            self._digests[atlas.id] = known
        return known
