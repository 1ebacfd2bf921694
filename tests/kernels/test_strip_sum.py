"""Strips that are added in registers, against plain numpy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding as llvm

from kpt_dask.kernels.jit import kernel
from kpt_dask.kernels.simd import HALF, LANES
from kpt_dask.kernels.strip_sum import add_strips_plain
from kpt_dask.kernels.strip_sum_llvm import add_vectors


@kernel
def added(share, scan, strips, likelihood):  # type: ignore[no-untyped-def]
    size = np.uint64(LANES)
    last = np.uint64(share.size) - size
    add_vectors(share, scan, (last,), strips, (np.uint64(0),), likelihood, LANES)
    at = np.uint64(0), size
    add_vectors(share, scan, at, strips, (size, size + size), likelihood, LANES)


@kernel
def added_plainly(share, scan, strips, likelihood):  # type: ignore[no-untyped-def]
    at = share.size - LANES, 0, LANES
    add_strips_plain(share, scan, at, strips, (0, LANES, 2 * LANES), likelihood, LANES)


@kernel
def added_in_halves(share, scan, strips, likelihood):  # type: ignore[no-untyped-def]
    at = np.uint64(16), np.uint64(0), np.uint64(8), np.uint64(share.size - HALF)
    of = np.uint64(0), np.uint64(8), np.uint64(16), np.uint64(24)
    add_vectors(share, scan, at, strips, of, likelihood, HALF)


@kernel
def added_singly(share, scan, strips, likelihood):  # type: ignore[no-untyped-def]
    at, of = (16, 0, 8, share.size - HALF), (0, 8, 16, 24)
    add_strips_plain(share, scan, at, strips, of, likelihood, HALF)


def check_halves() -> str:
    """Two in a vector give the bytes of the plain twin: these bytes."""
    rng = np.random.default_rng(1)
    strips = rng.integers(-300, 300, 4 * HALF).astype(np.int16)
    strips[rng.random(strips.size) < 0.1] = np.iinfo(np.int16).min
    scan = rng.integers(-300, 300, 5 * HALF).astype(np.int16)
    together = rng.random(scan.size).astype(np.float32)
    singly = together.copy()
    what = scan, strips, (np.float32(-1.3), np.float32(2.0**-11), np.float32(200.0**2))
    added_in_halves(together, *what)
    added_singly(singly, *what)
    assert together.tobytes() == singly.tobytes()
    return together.tobytes().hex()


def check_strips() -> None:
    """Powers that are exact before 2 is raised to them; beside the strips nothing changes."""
    rng = np.random.default_rng(0)
    slope, most = np.float32(2.0**-11), np.float32(200.0**2)
    for height in np.linspace(-60, 0, 61, dtype=np.float32):
        strips = rng.integers(-1000, 1000, 3 * LANES).astype(np.int16)
        strips[rng.random(strips.size) < 0.1] = np.iinfo(np.int16).min
        apart = rng.integers(-250, 251, strips.size)
        scan = np.zeros(2 * LANES + 5 + LANES, np.int16)
        where = np.r_[scan.size - LANES : scan.size, : 2 * LANES]
        scan[where] = np.clip(strips.astype(int) + apart, -2000, 2000)
        d = (scan[where].astype(int) - strips).astype(np.float64)
        power = np.where(d**2 < most, np.exp2(height - slope * d**2), 0)
        share = np.zeros(scan.size, np.float32)
        added(share, scan, strips, (height, slope, most))
        np.testing.assert_allclose(share[where], power, rtol=3e-7)
        assert not share[2 * LANES : -LANES].any()
        plain = np.zeros(scan.size, np.float32)
        added_plainly(plain, scan, strips, (height, slope, most))
        assert plain.tobytes() == share.tobytes()
        once = share.copy()
        added(share, scan, strips, (height, slope, most))
        np.testing.assert_allclose(share, 2 * once, rtol=3e-7)


def test_strips_are_added() -> None:
    check_strips()
    check_halves()


@pytest.mark.parametrize("processor", ["generic", "haswell"])
def test_machines_without_wide_registers_add_the_same(processor: str) -> None:
    """The same bytes if they have fused multiply-adds, else the same but for rounding."""
    features: dict[str, bool] = dict(llvm.get_host_cpu_features())
    if processor == "haswell" and not (features.get("avx2") and features.get("fma")):
        pytest.skip("this processor has no AVX2 with FMA")
    code = "from tests.kernels.test_strip_sum import *; check_strips(); print(check_halves())"
    environment = os.environ | {"NUMBA_CPU_NAME": processor}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, cwd=root, env=environment, text=True)
    assert printed.strip() == check_halves() or processor == "generic"
