"""Dask arrays of an output: the same values, and never another output's, or none for some."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from zarr.codecs import BloscCodec

from atlas_store.arrays import chunk_io
from atlas_store.errors import MissingChunkError
from kpt_dask.errors import ScanNotFoundError
from kpt_dask.volumes.lazy import lazy_array

SHAPE = 3, 9, 10, 11
OURS = BloscCodec(cname="lz4", shuffle="shuffle")
"""Other codecs are left to Zarr."""


def make(path: Path, run: str, values: np.ndarray, compressors: Any = OURS) -> zarr.Group:
    group = zarr.create_group(str(path), attributes={"kpt": {"run": run}})
    array = group.create_array(
        "probability",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, 2, 5, 6),
        shards=(1, 4, 10, 12),
        compressors=compressors,
        attributes={chunk_io.COMPLETE: True},
    )
    array[...] = values
    return zarr.open_group(str(path), mode="r")


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(3).random(SHAPE, np.float32)


@pytest.fixture
def group(tmp_path: Path, values: np.ndarray) -> zarr.Group:
    return make(tmp_path / "out.zarr", "one", values)


def lazy(group: zarr.Group) -> Any:
    array = group["probability"]
    assert isinstance(array, zarr.Array)
    return lazy_array(group, array, (1, 4, 10, 12))


@pytest.mark.parametrize(
    "index",
    [
        (slice(None),),
        (1, 2, 3, 4),
        (slice(0, 2), 8, slice(3, 9), slice(None)),
        (slice(None), slice(1, 9, 3), slice(None, None, -2), [4, 0, 7]),
        (2, slice(4, 4), slice(None), -1),
    ],
)
def test_values_are_those_that_were_written(
    group: zarr.Group, values: np.ndarray, index: Any
) -> None:
    read = lazy(group)
    assert read.chunks == ((1, 1, 1), (4, 4, 1), (10,), (11,))
    np.testing.assert_array_equal(read[index].compute(scheduler="sync"), values[index])


def test_it_travels_to_workers(
    group: zarr.Group, values: np.ndarray, two_processes: Client
) -> None:
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(lazy(group))), values)
    assert two_processes.compute(lazy(group).max()).result() == values.max()


@pytest.mark.parametrize("compressors", [OURS, "auto"], ids=["ours", "read by Zarr"])
def test_what_was_deleted_is_not_zero(tmp_path: Path, values: np.ndarray, compressors: Any) -> None:
    read = lazy(make(tmp_path / "out.zarr", "one", values, compressors))
    (tmp_path / "out.zarr" / "probability" / "c" / "1" / "2" / "0" / "0").unlink()
    assert read[1, :8].compute(scheduler="sync").all()
    with pytest.raises(MissingChunkError, match="probability/c/1/2/0/0 is gone"):
        read.compute(scheduler="sync")
    shutil.rmtree(tmp_path / "out.zarr")
    with pytest.raises(ScanNotFoundError, match=r"^/.*out\.zarr was deleted or replaced"):
        read.compute(scheduler="sync")


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 4, 5)])
def test_another_run_in_its_place_is_refused(
    group: zarr.Group, tmp_path: Path, values: np.ndarray, shape: tuple[int, ...]
) -> None:
    read = lazy(group)
    shutil.rmtree(tmp_path / "out.zarr")
    other = np.ones(shape, np.float32)
    again = lazy(make(tmp_path / "out.zarr", "two", other))
    # Dask keeps results by name.
    assert again.name != read.name
    np.testing.assert_array_equal(again.compute(scheduler="sync"), other)
    with pytest.raises(ScanNotFoundError, match="open it again"):
        read[0].compute(scheduler="sync")
    shutil.rmtree(tmp_path / "out.zarr")
    make(tmp_path / "out.zarr", "one", values)
    np.testing.assert_array_equal(read.compute(scheduler="sync"), values)
