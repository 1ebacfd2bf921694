"""NIfTI files packed in pieces: one gzip member, the same bytes, whoever packs."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from kpt_dask.scans import nifti_writer
from kpt_dask.scans.label_header import header_like
from kpt_dask.scans.nifti_writer import NiftiWriter, pack, planes_at_once

_nib: Any = nibabel
SHAPE = (7, 6, 5)
LABELS = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti_writer, "PIECE_BYTES", 2 * LABELS[0].nbytes)


def header(kind: str = "Nifti1Header") -> Any:
    made = getattr(_nib, kind)()
    made.set_data_shape(SHAPE[::-1])
    made.set_sform(np.diag([-0.75, -0.75, 2.5, 1]), code=1)
    return made


def write(path: Path, like: Any) -> bytes:
    step = planes_at_once(SHAPE, LABELS.dtype)
    assert step == 2
    with NiftiWriter(path, header_like(like, SHAPE, LABELS.dtype)) as file:
        for z in range(0, len(LABELS), step):
            file.write(pack(LABELS[z : z + step]))
        file.description = "said at the end"
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["Nifti1Header", "Nifti2Header"])
@pytest.mark.parametrize("name", ["labels.nii", "labels.nii.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str, kind: str) -> None:
    written = write(tmp_path / name, header(kind))
    image = _nib.load(tmp_path / name)
    assert type(image.header).__name__ == kind
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, LABELS)
    np.testing.assert_array_equal(image.affine, np.diag([-0.75, -0.75, 2.5, 1]))
    assert image.header["descrip"].item() == b"said at the end"
    if name.endswith(".gz"):
        plain = write(tmp_path / "plain.nii", header(kind))
        assert gzip.decompress(written) == plain


def test_there_is_one_member_as_some_readers_stop_after_the_first(tmp_path: Path) -> None:
    reader = zlib.decompressobj(31)
    reader.decompress(write(tmp_path / "labels.nii.gz", header()))
    assert reader.eof
    assert reader.unused_data == b""


def test_missing_planes_are_an_error(tmp_path: Path) -> None:
    file = NiftiWriter(tmp_path / "labels.nii.gz", header_like(header(), SHAPE, LABELS.dtype))
    with pytest.raises(ValueError, match="2 planes were given for a file of 7"), file:
        file.write(pack(LABELS[:2]))


def test_a_full_disk_is_told_with_the_file() -> None:
    for many in (1, 1000):
        shape = (many, *SHAPE[1:])
        labels = np.random.default_rng(0).integers(0, 9999, shape).astype(np.uint16)
        file = NiftiWriter(Path("/dev/full"), header_like(header(), shape, labels.dtype))
        with pytest.raises(OSError, match=r"No space left.*'/dev/full'"), file:
            file.write(pack(labels))
