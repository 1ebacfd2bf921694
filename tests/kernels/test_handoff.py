"""Stages handed over between threads: every batch in order, nothing lost, no endless wait."""

import time
from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.kernels.handoff import first_steps, pass_turn, wait_for_turn
from kpt_dask.kernels.jit import kernel
from kpt_dask.runtime.team import run_jobs


@kernel
def step_on(next_step: np.ndarray, stage: int, step: int, log: np.ndarray) -> bool:
    """Write down what a stage does, if it is its turn; without atomic steps this would be lost."""
    if not wait_for_turn(next_step, stage, step):
        return False
    log[stage] = 3 * log[stage] + step
    pass_turn(next_step, stage, step + 1)
    return True


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_each_stage_does_batch_after_batch(threads: int, stages: int, batches: int) -> None:
    next_step, log = first_steps(stages, 0), np.zeros(stages, np.int64)

    def batch(step: int) -> None:
        for stage in range(stages):
            while not step_on(next_step, stage, step, log):
                time.sleep(0)

    run_jobs((partial(batch, step) for step in range(batches)), threads)
    expected = 0
    for step in range(batches):
        expected = 3 * expected + step
    np.testing.assert_array_equal(log, expected)
    np.testing.assert_array_equal(next_step, batches)


def test_a_turn_that_does_not_come_is_given_up() -> None:
    assert not step_on(first_steps(1, 0), 0, 1, np.zeros(1, np.int64))
