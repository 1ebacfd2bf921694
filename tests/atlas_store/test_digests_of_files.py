"""Digests of the files that an atlas was made from."""

import hashlib
from pathlib import Path

import pytest

from atlas_store.storage import digests
from atlas_store.storage.digests import digest_of_file


def test_a_file_is_known_by_its_bytes_and_a_folder_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.dcm").write_bytes(b"one")
    (tmp_path / "a" / "2.dcm").write_bytes(b"two")
    assert digest_of_file(tmp_path / "a" / "1.dcm") == hashlib.sha256(b"one").hexdigest()
    known = digest_of_file(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest_of_file(tmp_path / "b") == known
    (tmp_path / "b" / "2.dcm").rename(tmp_path / "b" / "3.dcm")
    assert digest_of_file(tmp_path / "b") != known
    # A link to itself ends, and is no file.
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    assert digest_of_file(tmp_path / "b") is not None
    monkeypatch.setattr(digests, "LARGEST_FOLDER", 5)
    assert digest_of_file(tmp_path / "b") is None
    assert digest_of_file(tmp_path / "gone") is None
    assert digest_of_file("s3://bucket/scan.nii.gz") is None
