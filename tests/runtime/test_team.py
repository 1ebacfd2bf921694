"""Threads that share work: nothing is lost, nobody waits for ever, and stages keep their order."""

import threading
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt_dask.kernels.jit import kernel
from kpt_dask.runtime.team import Jobs, done, each, later, may_begin, turns, work_off


@kernel
def step_on(turn: np.ndarray, stage: int, step: int, log: np.ndarray) -> bool:
    """Write down what a stage does, if it is its turn; without atomic steps this would be lost."""
    if not may_begin(turn, stage, step):
        return False
    log[stage] = 3 * log[stage] + step
    done(turn, stage, step + 1)
    return True


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_each_stage_does_batch_after_batch(threads: int, stages: int, batches: int) -> None:
    turn, log = turns(stages, 0), np.zeros(stages, np.int64)

    def batch(step: int) -> None:
        for stage in range(stages):
            while not step_on(turn, stage, step, log):
                time.sleep(0)

    work_off((partial(batch, step) for step in range(batches)), threads)
    expected = 0
    for step in range(batches):
        expected = 3 * expected + step
    np.testing.assert_array_equal(log, expected)
    np.testing.assert_array_equal(turn, batches)


def test_a_turn_that_does_not_come_is_given_up() -> None:
    assert not step_on(turns(1, 0), 0, 1, np.zeros(1, np.int64))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_job_is_done_once_and_asked_for_by_one_thread_at_a_time(threads: int) -> None:
    did: list[int] = []
    asking = threading.Lock()

    def jobs() -> Jobs:
        for i in range(200):
            assert asking.acquire(blocking=False)
            time.sleep(0)
            asking.release()
            yield partial(did.append, i)

    work_off(jobs(), threads)
    assert sorted(did) == list(range(200))


def test_two_threads_work_side_by_side() -> None:
    both = threading.Barrier(2, timeout=30)
    work_off((both.wait for _ in range(2)), 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_fails_is_raised_and_nothing_new_begins(threads: int) -> None:
    did: list[int] = []

    def fail() -> None:
        raise OSError("gone")

    def jobs() -> Jobs:
        yield fail
        for i in range(1000):
            yield partial(did.append, i)
            time.sleep(0.001)

    with pytest.raises(OSError, match="gone"):
        work_off(jobs(), threads)
    assert len(did) < 1000


def test_who_waits_gets_what_a_job_returned_or_raised() -> None:
    job, result = later(lambda: 7)
    threading.Timer(0.05, job).start()
    assert result() == 7
    job, result = later(lambda: 1 // 0)
    job()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            result()


def test_each_task_gives_its_result_in_order() -> None:
    tasks = [(k, 0.001 * (k % 3)) for k in range(40)]

    def late(k: int, seconds: float) -> int:
        time.sleep(seconds)
        if k == 50:
            raise OSError("gone")
        return k * k

    assert each(late, tasks) == [k * k for k in range(40)]
    assert each(late, []) == []
    with pytest.raises(OSError, match="gone"):
        each(late, [*tasks, (50, 0)])
