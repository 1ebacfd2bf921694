"""The same work on threads, on processes, and while workers and schedulers go away."""

import asyncio
import json
import operator
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Worker, get_client

from kpt_dask.errors import ClusterError, ParameterError, ScanNotFoundError
from kpt_dask.runtime import cluster, connect, memory, patience, progress


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    with cluster.session() as client:
        yield client


@pytest.fixture(scope="module")
def processes() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as two,
        Client(two, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=["threads", "processes"])
def client(request: pytest.FixtureRequest) -> Client:
    client: Client = request.getfixturevalue(request.param)
    return client


def held_results(client: Client) -> int:
    def count(dask_worker: Worker) -> int:
        return len(dask_worker.data)

    return sum(client.run(count).values())


def test_every_task_is_answered_once(client: Client) -> None:
    tasks = [(k, 3) for k in range(60)]
    results = list(cluster.run(client, operator.mul, tasks, "Multiplying"))
    assert sorted(results) == [(k, 3 * k) for k in range(60)]


def test_equal_tasks_run_separately(client: Client) -> None:
    times = dict(cluster.run(client, time.monotonic, [()] * 5, "Looking"))
    assert len(set(times.values())) == 5


def test_tasks_begin_in_their_order() -> None:
    with Client(
        processes=False,
        n_workers=1,
        threads_per_worker=1,
        memory_limit=None,
        dashboard_address="127.0.0.1:0",
        set_as_default=False,
    ) as client:
        begun = dict(cluster.run(client, time.monotonic, [()] * 12, "Looking"))
    assert sorted(begun, key=begun.__getitem__) == list(range(12))


def test_memory_is_at_most_half_of_what_dask_holds_a_worker_to(
    threads: Client, processes: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MEMORY", 1 << 50)
    monkeypatch.setattr(memory, "_free", lambda: iter(()))
    limits = processes.run(lambda dask_worker: dask_worker.memory_manager.memory_limit)
    assert cluster.budget(processes) == min(limits.values()) // 2
    assert cluster.budget(processes, 1 << 40) == 1 << 40
    assert cluster.budget(threads) == 1 << 50


def test_an_asynchronous_client_is_refused_with_a_sentence() -> None:
    async def segment() -> None:
        client = Client(
            processes=False, asynchronous=True, dashboard_address="127.0.0.1:0", n_workers=1
        )
        async with client:
            with cluster.session():
                pass

    with pytest.raises(ParameterError, match=r"is asynchronous.* asyncio\.to_thread"):
        asyncio.run(segment())


def test_no_task_is_no_work(threads: Client) -> None:
    with progress.recorded() as seconds:
        assert list(cluster.run(threads, operator.mul, [], "Multiplying")) == []
    assert list(seconds) == ["Multiplying"]


def test_results_come_as_they_finish(processes: Client) -> None:
    finished = cluster.run(processes, time.sleep, [(1.0,), (0.0,)], "Sleeping")
    assert [index for index, _ in finished] == [1, 0]


def test_no_more_teams_work_than_there_are(threads: Client) -> None:
    """Each is told how many threads it has; more tasks at once would take more memory."""
    at_once, size = cluster.teams(CPU_COUNT)

    def work(_: int, own: int) -> tuple[int, float, float]:
        begun = time.monotonic()
        time.sleep(0.02)
        return own, begun, time.monotonic()

    tasks = [(number,) for number in range(8)]
    done = dict(cluster.run_in_teams(threads, work, tasks, "Working"))
    assert sorted(done) == list(range(8))
    assert {own for own, _, _ in done.values()} == {size}
    times = [times for _, *times in done.values()]
    assert max(sum(a <= begun < b for a, b in times) for begun, _ in times) <= at_once


def test_a_worker_with_one_thread_is_a_team(processes: Client) -> None:
    done = dict(cluster.run_in_teams(processes, operator.sub, [(9,), (7,)], "Subtracting"))
    assert done == {0: 8, 1: 6}


def test_sessions_leave_no_threads_behind() -> None:
    left = []
    for _ in range(4):
        with cluster.session() as client:
            assert len(dict(cluster.run_in_teams(client, operator.sub, [(9,)] * 4, "Working"))) == 4
        left.append(threading.active_count())
    assert left[1:] == left[:1] * 3


@pytest.mark.parametrize("error", [ScanNotFoundError("a.nii is not there."), KeyError("liver")])
def test_errors_arrive_as_they_were(client: Client, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        list(cluster.run(client, fail, [()], "Failing"))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("ending", ["a task fails", "the consumer stops"])
def test_nothing_runs_afterwards(client: Client, tmp_path: Path, ending: str) -> None:
    def write(folder: Path, k: int) -> None:
        if k == 0 and ending == "a task fails":
            raise ScanNotFoundError("no scan")
        time.sleep(0.3 if k else 0)
        folder.mkdir(exist_ok=True)
        (folder / str(k)).touch()

    folder = tmp_path / "out"
    results = cluster.run(client, write, [(folder, k) for k in range(1000)], "Writing")
    if ending == "a task fails":
        with pytest.raises(ScanNotFoundError):
            list(results)
    else:
        next(results)
        results.close()  # type: ignore[attr-defined]
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.5)
    assert not folder.exists()
    assert not client.futures


def test_only_a_few_results_wait_for_a_slow_consumer(threads: Client) -> None:
    limit = cluster.IN_FLIGHT_PER_THREAD * CPU_COUNT
    for index, _ in cluster.run(threads, bytearray, [(1000,)] * 10 * limit, "Allocating"):
        if index % limit == 0:
            # Dask lets go of a consumed result a moment later.
            eventually(lambda: len(threads.futures) <= limit)
            eventually(lambda: held_results(threads) <= limit)
    eventually(lambda: not threads.futures)
    eventually(lambda: held_results(threads) == 0)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_worker_costs_no_result(processes: Client, tmp_path: Path) -> None:
    def die_once(k: int, marker: Path) -> int:
        if k == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return k * k

    tasks = [(k, tmp_path / "died") for k in range(20)]
    assert dict(cluster.run(processes, die_once, tasks, "Dying")) == {k: k * k for k in range(20)}
    assert (tmp_path / "died").exists()


def test_workers_that_keep_dying_are_explained(processes: Client) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    scheduler = processes.cluster.scheduler
    allowed, scheduler.allowed_failures = scheduler.allowed_failures, 0
    with pytest.raises(ClusterError, match=r"^Dying: 1 workers? died .* memory"):
        list(cluster.run(processes, die, [()], "Dying"))
    scheduler.allowed_failures = allowed


def test_a_lost_scheduler_is_explained() -> None:
    with (
        LocalCluster(processes=False, n_workers=1, dashboard_address="127.0.0.1:0") as doomed,
        Client(doomed, set_as_default=False) as client,
    ):
        results = cluster.run(client, time.sleep, [(0.0,)] + [(0.2,)] * 50, "Sleeping")
        next(results)
        doomed.close()
        with pytest.raises(ClusterError, match=r"^Sleeping: the connection .* was lost"):
            list(results)


def test_a_scheduler_lost_while_values_are_sent_is_explained() -> None:
    with (
        LocalCluster(processes=False, n_workers=1, dashboard_address="127.0.0.1:0") as doomed,
        Client(doomed, set_as_default=False) as client,
    ):
        doomed.close()
        with pytest.raises(ClusterError, match=r"^Sending to workers: the connection .* was lost"):
            cluster.share(client, 1)


def test_session_leaves_a_given_client_open(threads: Client) -> None:
    with cluster.session(threads) as client:
        assert client is threads
    assert threads.status == "running"


def test_session_finds_the_current_client(threads: Client) -> None:
    with threads.as_current(), cluster.session() as client:
        assert client is threads
    assert threads.status == "running"


def add_on_the_same_cluster(n: int) -> dict[int, int]:
    with cluster.session(get_client()) as client:
        return dict(cluster.run(client, operator.add, [(n, 2)] * 3, "Adding"))


def test_a_task_may_use_the_cluster_that_it_runs_on(processes: Client) -> None:
    """It would wait for ever for the thread that it holds itself."""
    futures = processes.map(add_on_the_same_cluster, range(4), pure=False)
    found = processes.gather(futures)
    assert found == [dict.fromkeys(range(3), n + 2) for n in range(4)]


def test_sessions_side_by_side_do_not_share_what_one_of_them_closes() -> None:
    with cluster.session() as first, cluster.session() as second:
        assert first is not second


@pytest.mark.parametrize("kind", ["address", "file"])
def test_session_connects_to_a_running_cluster(
    processes: Client, tmp_path: Path, kind: str
) -> None:
    scheduler = processes.scheduler.address
    if kind == "file":
        (tmp_path / "scheduler.json").write_text(json.dumps({"address": scheduler}))
        scheduler = str(tmp_path / "scheduler.json")
    with cluster.session(scheduler=scheduler) as client:
        assert client.scheduler.address == processes.scheduler.address
        assert dict(cluster.run(client, operator.add, [(1, 2)], "Adding")) == {0: 3}
    assert client.status == "closed"


@pytest.mark.parametrize("scheduler", ["tcp://127.0.0.1:9", "somewhere", "missing.json"])
def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    monkeypatch.setattr(patience, "WAIT", "0.2s")
    before = set(threading.enumerate())
    with pytest.raises(ClusterError, match=rf"answers at {scheduler}: check the address"):
        cluster.session(scheduler=scheduler).__enter__()
    assert not {thread for thread in threading.enumerate() if thread not in before}


def test_a_file_that_is_no_scheduler_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("[1, 2]")
    with pytest.raises(ParameterError, match=r"notes\.json is not a scheduler file"):
        cluster.session(scheduler=str(path)).__enter__()


def test_a_session_of_its_own_ends_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connect, "_current", lambda: None)
    before = set(threading.enumerate())
    with cluster.session() as client:
        assert sum(client.nthreads().values()) == CPU_COUNT
        with pytest.raises(ZeroDivisionError):
            list(cluster.run(client, operator.truediv, [(1, 0)], "Dividing"))
    assert client.status == "closed"
    kept = {thread.name for thread in threading.enumerate() if thread not in before}
    assert kept <= {"Dask-Offload_0"}
    assert capfd.readouterr() == ("", "")
