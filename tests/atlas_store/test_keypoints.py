import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store import KeypointsFormatError, read_keypoints, write_keypoints
from atlas_store.keypoints import VARIABLES


@pytest.fixture
def written(tmp_path: Path, synthetic: SimpleNamespace) -> Path:
    write_keypoints(zarr.create_group(tmp_path / "k"), synthetic.keypoints(30))
    return tmp_path / "k"


def read(path: Path, **options: Any) -> xr.Dataset:
    return read_keypoints(zarr.open_group(path, mode="r"), **options)


@given(count=st.integers(0, 50), seed=st.integers(0, 99), label=st.booleans())
@settings(max_examples=12, deadline=None)
def test_keypoints_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    synthetic: SimpleNamespace,
    count: int,
    seed: int,
    label: bool,
) -> None:
    keypoints = synthetic.keypoints(count, seed, label)
    path = tmp_path_factory.mktemp("keypoints") / "k"
    write_keypoints(zarr.create_group(path), keypoints)
    back = read(path)
    xr.testing.assert_equal(back, keypoints)
    group = zarr.open_group(path, mode="r")
    for name, values in keypoints.data_vars.items():
        assert back[name].dtype == values.dtype
        assert back[name].attrs["units"] == VARIABLES[str(name)].units
        # Any other Zarr reader sees the same.
        np.testing.assert_array_equal(group[str(name)][...], values)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda k: k.drop_vars("scale"), "lack the variable 'scale'"),
        (lambda k: k.assign(weight=k.scale), "unknown variable 'weight'"),
        (lambda k: k.assign(scale=k.scale.astype(float)), "'scale' of keypoints is float64"),
        (lambda k: k.assign(sign=k.position.astype("i1")), "'sign' of keypoints is int8"),
        (lambda k: k.isel(axis=slice(2)), "'position' has the shape"),
        (lambda k: k.assign(position=k.position / 0), "not finite"),
        (lambda k: k.assign(scale=k.scale * 0), "not positive"),
        (lambda k: k.assign(sign=k.sign * 0), "other than -1 and 1"),
        (lambda k: k.assign(descriptor=k.descriptor + np.uint8(1)), "ranks of 64 or more"),
        (lambda k: k.assign(frame=k.frame * np.float32(1.1)), "no rotations"),
        (lambda k: k.assign(frame=k.frame * np.float32(1e30)), "no rotations"),
    ],
)
def test_what_is_no_keypoints_is_not_written(
    tmp_path: Path,
    synthetic: SimpleNamespace,
    change: Callable[[xr.Dataset], xr.Dataset],
    complaint: str,
) -> None:
    group = zarr.create_group(tmp_path / "k")
    with np.errstate(all="ignore"):
        keypoints = change(synthetic.keypoints(30))
    with pytest.raises(KeypointsFormatError, match=complaint):
        write_keypoints(group, keypoints)
    assert not list(group)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("array", "change", "complaint"),
    [
        (".", lambda d: d["attributes"].update({"encoding-type": "kpt-volume"}), "no kpt-keyp"),
        (".", lambda d: d["attributes"].update({"encoding-version": "3"}), "update the program"),
        (".", lambda d: d["attributes"].update(variables=["position"]), "lack the variable"),
        (".", lambda d: d["attributes"].update(variables=["../../x"]), "announce the variables"),
        (".", lambda d: d["attributes"].update(variables=7), "announce the variables 7"),
        (".", lambda d: d.pop("attributes"), "no kpt-keypoints"),
        ("position", lambda d: d.update(shape=[10**12, 3]), "announce 1000000000000"),
        ("position", lambda d: d.update(shape=[-1, 3]), "announce -1"),
        ("position", lambda d: d.update(shape="many"), "shape 'many'"),
        ("descriptor", lambda d: d.update(shape=[30, 65]), "'descriptor' has shape"),
        ("scale", lambda d: d.update(data_type="float64"), "'scale' has data_type"),
        ("scale", lambda d: d.update(chunk_grid=None), "'scale' has chunk_grid"),
        ("scale", lambda d: d.update(codecs=[{"name": "bytes"}, {"name": "gzip"}]), "codecs"),
        ("scale", lambda d: d.update(codecs=None), "codecs"),
        ("scale", lambda d: d["codecs"][0]["configuration"].update(endian="big"), "codecs"),
    ],
)
def test_a_description_that_lies_is_refused(
    written: Path, array: str, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit(written / array / "zarr.json", change)
    with pytest.raises(KeypointsFormatError, match=complaint):
        read(written)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '"x"', "\x00", "{"])
def test_a_description_that_is_no_description_is_refused(written: Path, text: str) -> None:
    (written / "scale" / "zarr.json").write_text(text)
    with pytest.raises(KeypointsFormatError):
        read(written)


def test_values_that_unpack_to_more_than_announced_are_refused(written: Path) -> None:
    chunk = written / "scale" / "c" / "0"
    data = bytearray(chunk.read_bytes())
    struct.pack_into("<I", data, 4, 2**31 - 1)
    chunk.write_bytes(data)
    with pytest.raises(KeypointsFormatError, match="'scale' have another size"):
        read(written)


@pytest.mark.parametrize("name", ["octave", "descriptor"])
def test_missing_values_are_damage_even_where_all_were_zero(written: Path, name: str) -> None:
    next(path for path in (written / name / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(KeypointsFormatError, match=f"values of {name!r} are missing"):
        read(written)


def test_labels_are_checked_where_they_are_known(written: Path, tmp_path: Path, synthetic) -> None:
    assert set(np.unique(read(written, labels=[1, 7]).label)) == {0, 1, 7}
    with pytest.raises(KeypointsFormatError, match="unknown organ 7"):
        read(written, labels=[1, 2])
    write_keypoints(zarr.create_group(tmp_path / "scan"), synthetic.keypoints(label=False))
    with pytest.raises(KeypointsFormatError, match="lack the variable 'label'"):
        read(tmp_path / "scan", labels=[1])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_damaged_byte_does_worse_than_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, synthetic: SimpleNamespace, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    if not path.exists():
        write_keypoints(zarr.create_group(path), synthetic.keypoints(9))
    file = data.draw(st.sampled_from(sorted(p for p in path.rglob("*") if p.is_file())))
    whole = file.read_bytes()
    changed = bytearray(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    group = zarr.open_group(path, mode="r")
    try:
        file.write_bytes(changed)
        back = read_keypoints(group)
    except KeypointsFormatError:
        pass
    else:
        assert back.sizes["keypoint"] == 9
        assert np.isfinite(back.position).all()
        assert (back.descriptor < 64).all()
    finally:
        file.write_bytes(whole)
