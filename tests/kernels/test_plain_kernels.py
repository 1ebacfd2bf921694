"""The whole program without what is written in LLVM's language: the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from atlas_store import AtlasStore
from atlas_store.arrays.regions import open_array
from kpt_dask import segment
from kpt_dask.kernels import handoff, row_filter, strip_sum, strip_sum_llvm
from kpt_dask.volumes.volume import open_volume

CHOSEN = (
    "from kpt_dask.kernels import handoff, row_filter, strip_sum\n"
    "print(row_filter.sum_row is row_filter.row_plain,"
    " strip_sum.add_strips is strip_sum.add_strips_plain, handoff.BETWEEN_THREADS)"
)


@pytest.mark.parametrize("setting", ["1", "0"])
def test_the_environment_chooses(setting: str) -> None:
    environment = os.environ | {"KPT_PLAIN_KERNELS": setting}
    printed = subprocess.check_output(
        [sys.executable, "-c", CHOSEN], env=environment, text=True
    ).split()
    assert printed == (["True", "True", "False"] if setting == "1" else ["False", "False", "True"])


def test_plain_kernels_give_the_same_labels_and_probabilities(
    bodies: Path, body_store: AtlasStore, tmp_path: Path, one_process: Client
) -> None:
    """Mode organ, which needs every piece: filters, strips, stages that are handed over."""
    assert handoff.BETWEEN_THREADS
    assert row_filter.sum_row is row_filter.row_llvm
    assert strip_sum.add_strips is strip_sum_llvm.add_vectors
    scan, labels = (
        bodies / "body_4_ct.nii.gz",
        [tmp_path / f"{n}.nii.gz" for n in ("fast", "plain")],
    )
    fast, plain = tmp_path / "fast.zarr", tmp_path / "plain.zarr"
    segment(scan, body_store, fast, mode="organ", labels=labels[0], client=one_process)
    command = [sys.executable, "-m", "kpt_dask", "segment", scan, body_store.url, plain]
    subprocess.run(
        [*map(str, command), "--mode", "organ", "--labels", str(labels[1])],
        env=os.environ | {"KPT_PLAIN_KERNELS": "1"},
        check=True,
        capture_output=True,
    )
    assert labels[0].read_bytes() == labels[1].read_bytes()
    for name in ("labels/organs/0", "probability"):
        one, other = (open_array(open_volume(path).group, name) for path in (fast, plain))
        np.testing.assert_array_equal(one[...], other[...])
