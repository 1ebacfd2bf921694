"""Chunks of anybody's arrays: what unpacks to more than it should is told before it is unpacked."""

import bz2
import gzip
import lzma
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import LocalStore

from atlas_store.errors import DamagedChunkError
from atlas_store.storage.bounded import Bounded, unpacks_to_more

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "blosc": lambda data: bytes(numcodecs.Blosc("lz4").encode(data)),
    "zstd": lambda data: bytes(numcodecs.Zstd().encode(data)),
}


@pytest.mark.parametrize("codec", PACK)
@pytest.mark.parametrize("size", [1, 255, 256, 300, 65535, 65536, 70000, 1 << 20])
@pytest.mark.parametrize("content", ["zeros", "noise"])
def test_what_a_chunk_becomes_is_known_exactly(codec: str, size: int, content: str) -> None:
    data = bytes(size) if content == "zeros" else os.urandom(size)
    packed = PACK[codec](data)
    assert not unpacks_to_more(packed, size)
    if len(packed) >= 18:
        assert unpacks_to_more(packed, size - 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_looked_at_without_an_error(data: bytes) -> None:
    for magic in (b"", b"\x1f\x8b", b"\x78\x9c", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"):
        unpacks_to_more(magic + data, 1 << 70)


@pytest.mark.parametrize("codec", ["gzip", "zlib", "bz2", "xz"])
def test_a_bomb_takes_no_memory(codec: str) -> None:
    packed = PACK[codec](bytes(64 << 20))
    tracemalloc.start()
    assert unpacks_to_more(packed, 32 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The dictionary of xz has 8 MiB.
    assert peak < 16 << 20


def test_arrays_read_as_before_and_large_files_not_at_all(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, (20, 30, 10)).astype(np.int16)
    for name, shards in (("plain", None), ("sharded", (20, 20, 10))):
        array = zarr.create_array(
            str(tmp_path / name), shape=values.shape, dtype="i2", chunks=(10, 10, 10), shards=shards
        )
        array[...] = values
        most = 2 * int(np.prod(shards or (10, 10, 10)))
        found = zarr.open_array(Bounded(LocalStore(tmp_path / name), most), mode="r")
        np.testing.assert_array_equal(found[...], values)
        np.testing.assert_array_equal(found[3, 4:9], values[3, 4:9])
    chunk = next(part for part in (tmp_path / "plain" / "c").rglob("*") if part.is_file())
    with chunk.open("r+b") as file:
        file.truncate(1 << 40)
    found = zarr.open_array(Bounded(LocalStore(tmp_path / "plain"), 2000), mode="r")
    with pytest.raises(DamagedChunkError, match="has more than"):
        found[...]
