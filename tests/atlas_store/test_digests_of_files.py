"""Digests of the files that an atlas was made from."""

import hashlib
from pathlib import Path

from atlas_store.storage.digests import digest_of_file


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"one")
    assert digest_of_file(tmp_path / "1.dcm") == hashlib.sha256(b"one").hexdigest()
    assert digest_of_file(tmp_path) is None
    assert digest_of_file(tmp_path / "gone") is None
    assert digest_of_file("s3://bucket/scan.nii.gz") is None
