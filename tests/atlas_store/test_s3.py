"""A store on S3, against a real server that speaks its protocol, with writers of its own."""

import os
import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import xarray as xr

from atlas_store import (
    AtlasExistsError,
    AtlasStore,
    StoreExistsError,
    StoreFormatError,
    StoreUnreachableError,
    load_organs,
)
from atlas_store.storage.objects import Objects

WRITERS = 2


def test_the_life_of_a_store_on_s3(bucket: str, synthetic: SimpleNamespace) -> None:
    store = AtlasStore.create(f"{bucket}/life", load_organs("openkbp"), synthetic.PARAMETERS)
    with pytest.raises(StoreExistsError):
        AtlasStore.create(f"{bucket}/life", load_organs("openkbp"), synthetic.PARAMETERS)
    for seed, atlas_id in enumerate(["pt_13", "pt_3"]):
        synthetic.add(store, atlas_id, seed)
    with pytest.raises(AtlasExistsError):
        synthetic.add(store, "pt_3", seed=9)
    synthetic.add(store, "pt_3", seed=9, replace=True)
    store.remove("pt_13")
    opened = AtlasStore.open(f"{bucket}/life")
    assert opened.ids() == ["pt_3"]
    assert opened.uuids() == {i: opened[i].info.uuid for i in opened}
    xr.testing.assert_equal(opened["pt_3"].keypoints(), synthetic.keypoints(seed=9))
    assert opened.verify() == []
    key = f"{opened['pt_3'].path}/image/0/c/0/0/0"
    data = opened.objects.read(key)
    assert data is not None
    opened.objects.write(key, bytes([data[0] ^ 1]) + data[1:])
    [problem] = opened.verify()
    assert problem.what.endswith("image/0 has 1 object(s) that are damaged")


def test_of_several_writers_of_a_new_object_on_s3_one_is_told_that_it_wrote(bucket: str) -> None:
    objects = Objects.at(f"{bucket}/new")
    assert objects.is_vacant()
    assert objects.write_new("a/marker.json", b"first")
    assert not objects.write_new("a/marker.json", b"second")
    assert objects.read_many(["a/marker.json", "a/other"]) == [b"first", None]


def test_processes_add_to_s3_at_once(bucket: str, synthetic: SimpleNamespace) -> None:
    store = AtlasStore.create(f"{bucket}/many", load_organs("openkbp"), synthetic.PARAMETERS)
    assert store.ids() == []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, synthetic.path, store.url],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
            for _ in range(WRITERS)
        ]
        for i, writer in enumerate(writers):
            assert writer.stdin is not None
            writer.stdin.write(f"pt_{i} shared\n")
            writer.stdin.close()
        seen = [line.strip() for writer in writers for line in writer.stdout or ()]
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert seen.count("added shared") == 1
    assert seen.count("refused shared") == WRITERS - 1
    assert set(store) == {f"pt_{i}" for i in range(WRITERS)} | {"shared"}
    assert store.verify() == []


def test_of_an_object_that_is_too_large_only_the_beginning_is_read(bucket: str) -> None:
    objects = Objects.at(f"{bucket}/large")
    objects.write("empty", b"")
    objects.write("ten", bytes(10))
    objects.write("eleven", bytes(11))
    asked = []
    get = objects.store.get

    async def recorded(*args: Any) -> Any:
        buffer = await get(*args)
        asked.append(0 if buffer is None else len(buffer))
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects.store, "get", recorded)
        assert objects.read_many(["empty", "ten", "none"], 10) == [b"", bytes(10), None]
        for read in (lambda: objects.read("eleven", 5), lambda: objects.read_many(["eleven"], 5)):
            with pytest.raises(StoreFormatError, match=r"large/eleven .* more than 5 bytes"):
                read()
    assert sorted(asked) == [0, 0, 6, 6, 10]


@pytest.mark.parametrize(
    ("url", "said", "create"),
    [
        ("s3://no-such-bucket/store", "there is no such bucket", True),
        ("foo://bucket/store", "a scheme that is not known", True),
        ("foo://bucket/store", "a scheme that is not known", False),
        ("http://localhost:9/store", "cannot be reached", False),
    ],
)
def test_a_url_that_cannot_be_reached_is_told_in_a_sentence(
    bucket: str, synthetic: SimpleNamespace, url: str, said: str, create: bool
) -> None:
    def use() -> AtlasStore:
        if create:
            return AtlasStore.create(url, load_organs("openkbp"), synthetic.PARAMETERS)
        return AtlasStore.open(url)

    with pytest.raises(StoreUnreachableError, match=said) as caught:
        use()
    assert str(caught.value).startswith(url)
