"""Arrays of an output that are read where they are looked at, and never stand for another's."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import StorePath

from atlas_store.arrays import chunk_io
from kpt_dask.errors import ScanNotFoundError

if TYPE_CHECKING:
    import dask.array as da


def lazy_array(
    group: zarr.Group, array: "zarr.Array[Any]", chunks: tuple[int, ...] | None = None
) -> "da.Array":
    """Give an array of an output as a Dask array; reading it may raise what is said below.

    Parameters
    ----------
    group : zarr.Group
        Root of the output; the array is bound to the run that it tells now.
    array : zarr.Array
        Any array below it.
    chunks : tuple of int, optional
        Chunks of the Dask array; those of the Zarr array unless given.

    Raises
    ------
    ScanNotFoundError
        If the output is gone, or another run has replaced it.
    MissingChunkError
        If a chunk is missing that was written.
    """
    # Imported here, because only reading an output needs dask.array.
    import dask.array as da

    read: da.Array = da.from_array(
        _OfRun(group.store_path, _run_of(group), array),
        chunks=chunks or array.chunks,
        meta=np.empty((0,) * array.ndim, array.dtype),
        # Dask then merges only ranges and numbers into the reading.
        fancy=False,
    )
    return read


@dataclass(frozen=True, eq=False)
class _OfRun:
    """An array as long as the root of its output tells of the same run."""

    root: StorePath
    run: Any
    array: "zarr.Array[Any]"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def ndim(self) -> int:
        return self.array.ndim

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Name what is read: equal for two handles of one run, and for no others."""
        return str(self.root), self.run, self.array.path

    def __getitem__(self, index: tuple[slice | int, ...]) -> NDArray[Any]:
        region, within = [], []
        for part, n in zip(index, self.shape, strict=True):
            rows = range(n)[part if isinstance(part, slice) else slice(part, part + 1)]
            region.append(slice(min(rows, default=0), max(rows, default=-1) + 1))
            within.append(slice(None, None, rows.step) if isinstance(part, slice) else 0)
        try:
            chunk_io.check_objects(self.array, tuple(region))
            return chunk_io.read(self.array, tuple(region))[tuple(within)]
        finally:
            # Afterwards, as it may be replaced meanwhile; and that something is missing is then
            # no more than a consequence.
            self._check()

    def _check(self) -> None:
        try:
            same = _run_of(zarr.open_group(self.root, mode="r", zarr_format=3)) == self.run
        except (FileNotFoundError, NotADirectoryError, zarr.errors.BaseZarrError):
            same = False
        if not same:
            where = str(self.root).removeprefix("file://")
            raise ScanNotFoundError(
                f"{where} was deleted or replaced since it was opened; open it again."
            )


def _run_of(group: zarr.Group) -> Any:
    about = group.attrs.get("kpt")
    return about.get("run") if isinstance(about, dict) else None
