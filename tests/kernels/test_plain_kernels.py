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

MODES = "organ", "local"
"""Modes that need every piece: filters, strips, stages that are handed over."""

CHOSEN = (
    "from kpt_dask.kernels import handoff, row_filter, strip_sum\n"
    "print(row_filter.sum_row is row_filter.row_plain,"
    " strip_sum.add_strips is strip_sum.add_strips_plain, handoff.BETWEEN_THREADS)"
)

SEGMENT = """
import sys
from kpt_dask import segment

scan, store, folder, *modes = sys.argv[1:]
for mode in modes:
    out = f"{folder}/{mode}_plain"
    segment(scan, store, f"{out}.zarr", mode=mode, labels=f"{out}.nii.gz")
"""


@pytest.mark.parametrize("setting", ["1", "0"])
def test_the_environment_chooses(setting: str) -> None:
    environment = os.environ | {"KPT_PLAIN_KERNELS": setting}
    printed = subprocess.check_output(
        [sys.executable, "-c", CHOSEN], env=environment, text=True
    ).split()
    assert printed == (["True", "True", "False"] if setting == "1" else ["False", "False", "True"])


def test_plain_kernels_give_the_same_labels_and_probabilities(
    bodies: Path,
    body_store: AtlasStore,
    tmp_path: Path,
    one_process: Client,
    pytestconfig: pytest.Config,
) -> None:
    assert handoff.BETWEEN_THREADS
    assert row_filter.sum_row is row_filter.row_llvm
    assert strip_sum.add_strips is strip_sum_llvm.add_vectors
    scan = bodies / "body_4_ct.nii.gz"
    for mode in MODES:
        outputs = tmp_path / f"{mode}_fast.zarr", tmp_path / f"{mode}_fast.nii.gz"
        segment(scan, body_store, outputs[0], mode=mode, labels=outputs[1], client=one_process)
    # Of a kernel, a cache keeps what was compiled last: these would replace those of other tests.
    cache = pytestconfig.rootpath / ".pytest_cache" / "plain_kernels"
    subprocess.run(
        [sys.executable, "-c", SEGMENT, scan, body_store.url, tmp_path, *MODES],
        env=os.environ | {"KPT_PLAIN_KERNELS": "1", "NUMBA_CACHE_DIR": str(cache)},
        check=True,
        capture_output=True,
    )
    for mode in MODES:
        fast, plain = (tmp_path / f"{mode}_{kernels}" for kernels in ("fast", "plain"))
        assert fast.with_suffix(".nii.gz").read_bytes() == plain.with_suffix(".nii.gz").read_bytes()
        groups = [open_volume(path.with_suffix(".zarr")).group for path in (fast, plain)]
        for name in ("labels/organs/0", "probability"):
            one, other = (open_array(group, name) for group in groups)
            np.testing.assert_array_equal(one[...], other[...])
