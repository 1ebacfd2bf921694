"""Chunks without Zarr's event loop, against Zarr itself."""

import json
import resource
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import Blosc
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.registry import register_codec
from zarr.storage import MemoryStore

from atlas_store.arrays import chunk_io
from atlas_store.arrays.chunk_layout import layout_of
from atlas_store.arrays.chunk_rows import describe_mismatch

LZ4 = BloscCodec(cname="lz4", shuffle="shuffle")


def files(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make(store: Any, shape: Any, chunks: Any, dtype: Any, **more: Any) -> "zarr.Array[Any]":
    more = {"compressors": LZ4, "fill_value": 0, **more}
    return zarr.create_array(store, shape=shape, chunks=chunks, dtype=dtype, **more)


axes = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1)),
    min_size=1,
    max_size=3,
)


@given(
    axes, st.sampled_from(["int16", "int32", "float32", "uint8"]), st.booleans(), st.integers(0, 9)
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_written_and_read_is_what_zarr_writes_and_reads(
    tmp_path_factory: pytest.TempPathFactory, axes: Any, dtype: str, every: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("direct")
    rng = np.random.default_rng(seed)
    shape, chunks = [n for n, *_ in axes], [min(c, n) for n, c, *_ in axes]
    data = (rng.integers(-3, 4, shape) * (rng.random(shape) > 0.7)).astype(dtype)
    region = []
    for (n, _, a, b), c in zip(axes, chunks, strict=True):
        first = int(a * (n - 1)) // c * c
        region.append(slice(first, min(first + (1 + int(b * n / c)) * c, n)))
    where = tuple(region)
    config: Any = {"write_empty_chunks": every}
    ours = make(str(folder / "ours"), shape, chunks, dtype, config=config)
    theirs = make(str(folder / "theirs"), shape, chunks, dtype, config=config)
    for values in (data, np.zeros_like(data) if seed % 3 == 0 else data[::1] + data):
        chunk_io.write(ours, where, values[where])
        theirs[where] = values[where]
        assert files(folder / "ours") == files(folder / "theirs")
    part = tuple(
        slice(int(a * (n - 1)), int(a * (n - 1)) + 1 + int(b * (n - 1 - int(a * (n - 1)))))
        for n, _, a, b in axes
    )
    found = chunk_io.read(ours, part)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(theirs[part]))


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.data()),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.integers(0, 9),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shards_are_what_zarr_reads_and_hold_what_was_written_last(
    tmp_path_factory: pytest.TempPathFactory, axes: Any, every: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("direct")
    rng = np.random.default_rng(seed)
    shape, chunks = [n for n, *_ in axes], [c for _, c, *_ in axes]
    shards = [c * k for _, c, k, _ in axes]
    data = (rng.integers(-3, 4, shape) * (rng.random(shape) > 0.7)).astype(np.float32)

    def region() -> Any:
        firsts = [draw.draw(st.integers(0, n - 1)) for n, *_, draw in axes]
        ends = [
            draw.draw(st.integers(first + 1, n))
            for first, (n, *_, draw) in zip(firsts, axes, strict=True)
        ]
        return tuple(map(slice, firsts, ends))

    config: Any = {"write_empty_chunks": every}
    ours = make(str(folder / "ours"), shape, chunks, np.float32, shards=shards, config=config)
    expected = np.zeros_like(data)
    for where in (region(), region()):
        chunk_io.write(ours, where, data[where])
        touched = (
            slice(p.start // s * s, -(-p.stop // s) * s) for p, s in zip(where, shards, strict=True)
        )
        expected[tuple(touched)] = 0
        expected[where] = data[where]
        np.testing.assert_array_equal(np.asarray(ours[...]), expected)
    theirs = make(str(folder / "theirs"), shape, chunks, np.float32, shards=shards, config=config)
    theirs[...] = data
    part = region()
    np.testing.assert_array_equal(chunk_io.read(theirs, part), data[part])
    np.testing.assert_array_equal(chunk_io.read(ours, part), expected[part])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_what_is_written_together_shares_its_shards(
    tmp_path: Path, local: bool, known: bool
) -> None:
    store = str(tmp_path / "a") if local else MemoryStore()
    array = make(store, (3, 9, 20), (1, 4, 4), np.float32, shards=(3, 4, 8))
    rng = np.random.default_rng(0)
    regions = [
        (slice(2, 3), slice(3, 9), slice(5, 20)),
        (slice(0, 1), slice(0, 6), slice(1, 9)),
        (slice(1, 2), slice(0, 1), slice(0, 1)),
    ]
    expected = np.zeros(array.shape, np.float32)
    with chunk_io.writing(array) as writer:
        for region in regions:
            data = rng.random([part.stop - part.start for part in region], np.float32)
            data[:, 1:2] = 0
            expected[region] = data
            writer.add(region, data, data.any(axis=-1) if known else None)
            # What was packed is kept.
            data[...] = 7 if local else data
    np.testing.assert_array_equal(np.asarray(array[...]), expected)
    everywhere = tuple(slice(0, n) for n in array.shape)
    np.testing.assert_array_equal(chunk_io.read(array, everywhere), expected)
    if local:
        assert len(files(tmp_path / "a")) == 1 + 9


def test_nothing_is_written_of_shards_when_packing_fails(tmp_path: Path) -> None:
    array = make(str(tmp_path / "a"), (2, 4), (1, 4), np.float32, shards=(2, 4))
    part = (slice(0, 1), slice(0, 4))

    def fail() -> None:
        with chunk_io.writing(array) as writer:
            writer.add(part, np.ones((1, 4), np.float32))
            writer.add(part, np.array(["no", "number", "at", "all"])[None])

    with pytest.raises(ValueError, match="could not convert string to float"):
        fail()
    assert list(files(tmp_path / "a")) == [Path("zarr.json")]


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    array = make(str(tmp_path / "a"), (8,), (4,), np.int32, shards=(8,))
    chunk_io.write(array, (slice(0, 8),), np.arange(1, 9))
    shard = tmp_path / "a/c/0"
    packed = shard.read_bytes()
    for damaged in (b"", packed[:-1], packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="a shard's index is damaged"):
            chunk_io.read(array, (slice(0, 8),))
    shard.write_bytes(packed[16:])
    with pytest.raises(ValueError, match=r"a chunk unpacks|beyond its end"):
        chunk_io.read(array, (slice(0, 8),))


@dataclass(frozen=True)
class Flipped(BytesBytesCodec):
    """A codec that this project cannot know."""

    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: Any) -> "Flipped":
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"name": "flipped", "configuration": {"bits": [1, 2], "nested": {"codecs": None}}}

    def compute_encoded_size(self, length: int, _: Any) -> int:
        return length

    async def _decode_single(self, data: Any, spec: Any) -> Any:
        flipped = bytes(255 - byte for byte in data.to_bytes())
        return spec.prototype.buffer.from_bytes(flipped)

    _encode_single = _decode_single


register_codec("flipped", Flipped)


@pytest.mark.parametrize(
    "other",
    [
        {"compressors": ZstdCodec()},
        {"compressors": GzipCodec()},
        {"compressors": Flipped()},
        {"compressors": [LZ4, Flipped()]},
        {"compressors": [Flipped(), LZ4]},
        {"compressors": [LZ4, Crc32cCodec()]},
        {"compressors": None},
        {"filters": TransposeCodec(order=(1, 0))},
        {"filters": TransposeCodec(order=(1, 0)), "shards": (4, 6)},
        {"compressors": Flipped(), "shards": (4, 6)},
        {"serializer": BytesCodec(endian="big")},
        {"fill_value": 7},
        {"dtype": "complex64"},
        {"dtype": "bool"},
        {"shards": {"shape": (4, 6), "index_location": "start"}},
        {
            "compressors": None,
            "chunks": (4, 6),
            "serializer": ShardingCodec(
                chunk_shape=(2, 3), codecs=[BytesCodec(), LZ4], index_codecs=[BytesCodec()]
            ),
        },
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
        {"zarr_format": 2, "compressors": Blosc(), "order": "F"},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_laid_out_otherwise_is_left_to_zarr(
    tmp_path: Path, other: dict[str, Any], order: Any
) -> None:
    data = np.arange(35).reshape(5, 7)
    other = {"chunks": (2, 3), "dtype": np.int32, **other}
    with zarr.config.set({"array.order": order}):
        for store in (str(tmp_path / "a"), MemoryStore()):
            array = make(store, (5, 7), **other)
            assert not chunk_io.can_bypass_zarr(array)
            whole = (slice(0, 5), slice(0, 7))
            values = data.astype(array.dtype)
            chunk_io.write(array, whole, values)
            np.testing.assert_array_equal(np.asarray(array[...]), values)
            part = chunk_io.read(array, (slice(1, 4), slice(2, 7)))
            assert part.flags.c_contiguous
            np.testing.assert_array_equal(part, values[1:4, 2:])


@pytest.mark.parametrize("shards", [None, (4, 6)])
def test_attributes_names_and_separators_change_nothing(tmp_path: Path, shards: Any) -> None:
    data = np.arange(35, dtype=np.int32).reshape(5, 7)
    array = make(
        str(tmp_path / "a"),
        (5, 7),
        (2, 3),
        np.int32,
        shards=shards,
        attributes={"codecs": [{"name": "zstd"}], "endian": "big", "order": "F"},
        dimension_names=("big", None),
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    assert chunk_io.can_bypass_zarr(array)
    whole = (slice(0, 5), slice(0, 7))
    chunk_io.write(array, whole, data)
    np.testing.assert_array_equal(np.asarray(array[...]), data)
    np.testing.assert_array_equal(chunk_io.read(array, whole), data)


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Copy a document with something else, or more, at a place."""
    copy = deepcopy(document)
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return copy


def places(document: Any) -> Iterator[tuple[Any, ...]]:
    """Yield where a document holds anything, and where it could hold more."""
    if isinstance(document, dict):
        yield ("unknown",)
    steps = document.items() if isinstance(document, dict) else enumerate(document)
    for step, inner in steps:
        yield (step,)
        if isinstance(inner, dict | list):
            yield from ((step, *rest) for rest in places(inner))


@pytest.mark.parametrize("shards", [None, (4, 6)])
def test_nothing_unknown_is_taken_for_known(tmp_path: Path, shards: Any) -> None:
    """Whatever a description says in any place, it is known or left to Zarr, without an error."""
    make(str(tmp_path / "a"), (5, 7), (2, 3), np.int32, shards=shards)
    document = json.loads((tmp_path / "a/zarr.json").read_bytes())
    assert layout_of(document) is not None
    others: list[Any] = [None, True, -1, 2.5, "other", [], {}, ["other"], {"name": "other"}]
    free = {("attributes",), ("attributes", "unknown"), ("dimension_names",)}
    for path in places(document):
        for value in others:
            layout = layout_of(changed(document, path, value))
            harmless = path == ("storage_transformers",) and not value
            harmless |= path == ("chunk_key_encoding", "configuration") and value == {}
            assert path in free or harmless or layout is None, (path, value)


def test_damaged_chunks_are_refused(tmp_path: Path) -> None:
    array = make(str(tmp_path / "a"), (8,), (4,), np.int32)
    array[:] = np.arange(8)
    chunk = tmp_path / "a/c/1"
    packed = chunk.read_bytes()
    bomb = packed[:4] + (1 << 30).to_bytes(4, "little") + packed[8:]
    for damaged in (b"", packed[:-1], bomb):
        chunk.write_bytes(damaged)
        with pytest.raises(ValueError, match="a chunk unpacks"):
            chunk_io.read(array, (slice(0, 8),))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    make(str(tmp_path / "a"), (6, 4), (2, 4), np.int32)
    document = json.loads((tmp_path / "a/zarr.json").read_bytes())
    whole: tuple[Any, ...] = (6, 4), (2, 4), np.dtype(np.int32)
    assert describe_mismatch(document, *whole) is None
    assert "shape [6, 4]" in str(describe_mismatch(document, (6, 5), *whole[1:]))
    assert "data_type 'int32'" in str(describe_mismatch(document, *whole[:2], np.dtype(np.int16)))
    for wrong in (None, []):
        assert describe_mismatch(wrong, *whole) == "no description"
    for codecs in ([], None, ["bytes", "blosc"], document["codecs"][::-1]):
        assert "the codecs" in str(describe_mismatch({**document, "codecs": codecs}, *whole))
    document["codecs"][0]["configuration"]["endian"] = "big"
    assert "the codecs" in str(describe_mismatch(document, *whole))


def test_shards_of_very_many_chunks_are_written(tmp_path: Path) -> None:
    array = make(str(tmp_path / "a"), (3000,), (1,), np.int32, shards=(3000,))
    data = np.arange(1, 3001, dtype=np.int32)
    chunk_io.write(array, (slice(0, 3000),), data)
    np.testing.assert_array_equal(np.asarray(array[...]), data)


def test_nothing_is_in_place_of_what_could_not_be_written(tmp_path: Path) -> None:
    array = make(str(tmp_path / "a"), (64, 64), (16, 64), np.float32, shards=(64, 64))
    whole = slice(0, 64), slice(0, 64)
    data = np.random.default_rng(0).random((64, 64), np.float32)
    # Kernels are compiled, and cached in files, before these are limited.
    chunk_io.write(
        make(str(tmp_path / "b"), (64, 64), (16, 64), np.float32, shards=(64, 64)), whole, data
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As if the disk were full in the middle of the second chunk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            chunk_io.write(array, whole, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not np.asarray(array[...]).any()
    chunk_io.write(array, whole, data)
    np.testing.assert_array_equal(np.asarray(array[...]), data)


def test_data_may_lie_in_memory_as_they_like(tmp_path: Path) -> None:
    array = make(str(tmp_path / "a"), (6, 8), (2, 3), np.int32, shards=(6, 9))
    whole = np.arange(1, 49, dtype=np.int32).reshape(6, 8)
    pairs = np.zeros((6, 8), [("a", np.int8), ("b", np.int32)])
    pairs["b"] = whole
    everywhere = slice(0, 6), slice(0, 8)
    same = np.broadcast_to(whole[:1], (6, 8))
    for data in (whole[::-1], whole[:, ::-1], whole.reshape(8, 6).T, pairs["b"], same):
        chunk_io.write(array, everywhere, data)
        np.testing.assert_array_equal(np.asarray(array[...]), data)
