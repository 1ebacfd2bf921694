"""New labels for an atlas, whose scan stays."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from distributed import Client

from atlas_store import AtlasInfo, AtlasStore
from kpt_dask.atlases.add import add_atlas
from kpt_dask.errors import GridMismatchError
from kpt_dask.exports import export_atlas
from kpt_dask.runtime import notices


def relabel(
    store: AtlasStore | str | Path,
    atlas_id: str,
    labels: str | Path,
    *,
    annotated: Sequence[str] | None = None,
    memory: int | None = None,
    client: Client | None = None,
) -> AtlasInfo:
    """Replace the labels of an atlas by others; its scan, its id and its note stay.

    The atlas is made again beside the old one, which stays until the new one is complete, and can
    be restored until it is pruned.

    Parameters
    ----------
    store : AtlasStore, str or Path
    atlas_id : str
    labels : str or Path
        Labels as for `kpt_dask.add_atlas`, on the grid of the store: that of the files that
        `kpt_dask.exports.export_atlas` writes.
    annotated, memory, client
        As for `kpt_dask.add_atlas`.

    Returns
    -------
    AtlasInfo
        New marker of the atlas.

    Raises
    ------
    AtlasNotFoundError
        If there is no atlas of this id, or it was replaced or removed meanwhile.
    GridMismatchError
        If the labels lie on another grid.
    KptError, AtlasStoreError
        As from `kpt_dask.add_atlas`. The store is left as it was.

    Examples
    --------
    >>> from atlas_store import AtlasStore
    >>> from kpt_dask.exports import export_atlas
    >>> from kpt_dask.relabelling import relabel
    >>> store = AtlasStore.open("atlases")
    >>> scan, labels = export_atlas(store["body_1"], "drawn")
    >>> relabel(store, "body_1", labels, annotated=["liver"]).annotated
    ('liver',)
    """
    store = AtlasStore.of(store)
    old = store[atlas_id].info
    with tempfile.TemporaryDirectory(prefix="kpt-relabel-") as folder:
        scan, _ = export_atlas(store[atlas_id], folder)
        try:
            info = add_atlas(
                store,
                scan,
                labels,
                atlas_id=atlas_id,
                annotated=annotated,
                replace=True,
                relabelled=old,
                memory=memory,
                client=client,
            )
        except GridMismatchError as error:
            raise GridMismatchError(
                f"{labels} lies on another grid than that on which {store.url} keeps {atlas_id}:"
                f" draw on the files of kpt atlas export, or add the scan and its labels again"
                f" with kpt atlas add --overwrite."
            ) from error
    if lost := [name for name in old.annotated if name not in info.annotated]:
        notices.warn(
            f"{labels} shows no {', '.join(lost)}, which {atlas_id} had: not counted as annotated"
            " any more; name all organs that were looked for with --annotated."
        )
    return info
