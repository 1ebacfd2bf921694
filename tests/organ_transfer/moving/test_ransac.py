"""Affines that most matches agree with, against plain numpy over the same choices of four."""

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.organ_transfer.moving import ransac
from kpt_dask.organ_transfer.moving.ransac import LEAST, SCALES, TOLERANCE_MM, TRIALS, fit_affines


@given(
    st.integers(LEAST, 40),
    st.integers(0, 999),
    st.floats(0.6, 1.5),
    st.floats(0, 0.6),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_best_of_the_tries_is_found(
    n: int, seed: int, stretch: float, wrong: float, mirrored: bool
) -> None:
    rng = np.random.default_rng(seed)
    source = rng.uniform(-50, 50, (n, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn)) * (-1 if mirrored else 1)
    target = source @ (turn * stretch) + rng.normal(0, 1, (n, 3)) + 20
    bad = rng.random(n) < wrong
    target[bad] = rng.uniform(-50, 50, (bad.sum(), 3))
    rows = np.column_stack([source, np.ones(n)])
    counts = []
    for four in samples_of(n):
        tried, *_ = np.linalg.lstsq(rows[four], target[four], rcond=None)
        stretches = np.linalg.svd(tried[:3], compute_uv=False)
        plausible = SCALES[0] < stretches.min() and stretches.max() < SCALES[1]
        plausible &= np.linalg.det(tried[:3]) > 0 and abs(np.linalg.det(rows[four])) > 1
        apart = np.linalg.norm(rows @ tried - target, axis=1)
        counts.append((apart < TOLERANCE_MM).sum() if plausible else 0)
    out = np.empty((4, 3))
    by_axis = np.ascontiguousarray(source.T), np.ascontiguousarray(target.T)
    assert ransac._best(*by_axis, samples_of(n), out) == max(counts)
    if max(counts) > 0:
        assert (np.linalg.norm(rows @ out - target, axis=1) < TOLERANCE_MM).sum() == max(counts)
    # Beside another, and one that is empty.
    everything = np.concatenate([source, source + 3]), np.concatenate([target, target + 4])
    affines, agreeing = fit_affines(*everything, np.array([n, n, 2 * n]))
    assert np.isnan(affines[1]).all()
    found = None if np.isnan(affines[0]).any() else (affines[0], agreeing[:n])
    if max(counts) < LEAST:
        assert found is None
        return
    best = np.linalg.norm(rows @ out - target, axis=1) < TOLERANCE_MM
    expected, *_ = np.linalg.lstsq(rows[best], target[best], rcond=None)
    agree = np.linalg.norm(rows @ expected - target, axis=1) < TOLERANCE_MM
    stretches = np.linalg.svd(expected[:3], compute_uv=False)
    plausible = SCALES[0] < stretches.min() and stretches.max() < SCALES[1]
    plausible &= np.linalg.det(expected[:3]) > 0
    assert (found is not None) == (plausible and agree.sum() >= LEAST)
    if found is not None:
        np.testing.assert_allclose(found[0], expected.T, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found[1], agree)


def samples_of(n: int) -> Any:
    chosen = np.empty((TRIALS, 4), np.int64)
    return chosen[: ransac._choose(n, ransac._DRAWN, chosen)]


@pytest.mark.parametrize("n", [9, 12, 13, 100])
def test_no_match_is_chosen_twice(n: int) -> None:
    samples = samples_of(n)
    assert (np.diff(np.sort(samples, axis=1)) > 0).all()
    assert samples.min() == 0
    assert samples.max() == n - 1
    if comb(n, 4) <= TRIALS:
        assert samples.tolist() == list(map(list, combinations(range(n), 4)))
    else:
        assert len(samples) == TRIALS
    assert (samples == samples_of(n)).all()
