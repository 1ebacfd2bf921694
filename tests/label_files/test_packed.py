"""Label maps packed in pieces: the same bytes, whoever packs."""

import gzip
import io
import zlib

import numpy as np
import pytest

from kpt_dask.label_files.packed import PackedLabels
from kpt_dask.scans import nifti_writer
from kpt_dask.scans.nifti_writer import pack, planes_at_once

SHAPE = (7, 6, 5)
LABELS = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti_writer, "PIECE_BYTES", 2 * LABELS[0].nbytes)


def whole(step: int = 7) -> PackedLabels:
    slabs = (LABELS[z : z + step] for z in range(0, 7, step))
    return PackedLabels.of(SHAPE, LABELS.dtype, slabs)


def test_slabs_give_the_same_pieces_however_they_are_cut() -> None:
    assert planes_at_once(SHAPE, LABELS.dtype) == 2
    assert len(whole().pieces) == 4
    assert len({whole(step).pieces for step in (1, 2, 3, 7)}) == 1
    assert whole().pieces[1] == pack(LABELS[2:4])


def test_what_is_packed_is_unpacked() -> None:
    slabs = list(whole().slabs())
    assert [len(slab) for slab in slabs] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(slabs), LABELS)
    counts = np.bincount(LABELS.ravel(), minlength=3000)
    assert whole().counts(3000)[1:].tolist() == counts[1:].tolist()


def test_other_readers_inflate_it() -> None:
    streams = {name: io.BytesIO() for name in ("gzip", "zlib")}
    whole().write_gzip(streams["gzip"])
    whole().write_zlib(streams["zlib"])
    data = LABELS.astype("<u2").tobytes()
    assert gzip.decompress(streams["gzip"].getvalue()) == data
    assert zlib.decompress(streams["zlib"].getvalue()) == data
    assert len(streams["zlib"].getvalue()) == whole().zlib_size


def test_missing_planes_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 planes were given for a label map of 7"):
        PackedLabels(SHAPE, LABELS.dtype, (pack(LABELS[:2]),))
    with pytest.raises(ValueError, match="does not fit"):
        PackedLabels.of(SHAPE, LABELS.dtype, [LABELS.astype(np.uint8)])
