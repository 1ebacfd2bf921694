"""Threads that share jobs: each runs once, and whatever fails is raised."""

import threading
import time
from functools import partial

import pytest

from kpt_dask.runtime.team import Jobs, deferred, map_in_threads, run_jobs


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

    run_jobs(jobs(), threads)
    assert sorted(did) == list(range(200))


def test_two_threads_work_side_by_side() -> None:
    both = threading.Barrier(2, timeout=30)
    run_jobs((both.wait for _ in range(2)), 2)


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
        run_jobs(jobs(), threads)
    assert len(did) < 1000


def test_who_waits_gets_what_a_job_returned_or_raised() -> None:
    job, result = deferred(lambda: 7)
    threading.Timer(0.05, job).start()
    assert result() == 7
    job, result = deferred(lambda: 1 // 0)
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

    assert map_in_threads(late, tasks) == [k * k for k in range(40)]
    assert map_in_threads(late, []) == []
    with pytest.raises(OSError, match="gone"):
        map_in_threads(late, [*tasks, (50, 0)])
