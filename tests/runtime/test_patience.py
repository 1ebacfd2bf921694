"""Clusters that do not work: what is waited for is said, and it ends."""

import operator
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dask.config
import psutil
import pytest
from distributed import Client, LocalCluster

from kpt_dask.errors import ClusterError, ParameterError
from kpt_dask.runtime import cluster, patience


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(patience, "SOON", 0.2)
    monkeypatch.setattr(patience, "ASKED_EVERY", 0.1)
    with dask.config.set({"kpt.wait": "1s"}):
        yield


@pytest.fixture(scope="module")
def one() -> Iterator[LocalCluster]:
    """A scheduler whose workers come and go, one at the most."""
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0") as made:
        yield made


@pytest.fixture
def client(one: LocalCluster) -> Iterator[Client]:
    with Client(one, set_as_default=False) as client:
        yield client


def test_a_scheduler_without_workers(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"there is no worker at tcp://\S+, see their logs"):
        list(cluster.run(client, operator.add, [(1, 2)], "Adding"))
    assert time.monotonic() - start < 10
    assert "waiting (ends after 1 s; --wait sets it)" in caplog.text


def test_a_worker_that_comes_in_time(one: LocalCluster, client: Client) -> None:
    one.scale(1)
    with dask.config.set({"kpt.wait": "60s"}):
        assert dict(cluster.run(client, operator.add, [(1, 2)], "Adding")) == {0: 3}
    one.scale(0)
    while client.nthreads():
        time.sleep(0.05)


def test_all_workers_die_for_good(one: LocalCluster, client: Client) -> None:
    one.scale(1)
    client.wait_for_workers(1, timeout=60)
    with dask.config.set({"kpt.wait": "8s"}):
        results = cluster.run(client, time.sleep, [(0.0,)] + [(0.1,)] * 400, "Sleeping")
        next(results)
        one.scale(0)
        expected = r"^(Sleeping|Looking for workers): there is no worker"
        with pytest.raises(ClusterError, match=expected):
            list(results)


def test_a_worker_that_is_paused(one: LocalCluster, client: Client) -> None:
    one.scale(1)
    client.wait_for_workers(1, timeout=60)

    def pause(dask_worker: object) -> None:
        from distributed.core import Status

        dask_worker.memory_manager.memory_limit = None  # type: ignore[attr-defined]
        dask_worker.status = Status.paused  # type: ignore[attr-defined]

    client.run(pause)
    with pytest.raises(ClusterError, match=r"none works: 1 paused for lack of memory"):
        list(cluster.run(client, operator.add, [(1, 2)], "Adding"))
    one.scale(0)


def test_long_tasks_are_no_silence(one: LocalCluster, client: Client) -> None:
    one.scale(1)
    with dask.config.set({"kpt.wait": "60s"}):
        client.wait_for_workers(1, timeout=60)
    with dask.config.set({"kpt.wait": "5s"}):
        assert dict(cluster.run(client, time.sleep, [(7.0,)], "Sleeping")) == {0: None}
    one.scale(0)


def test_a_mute_port(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with (
            pytest.raises(ClusterError, match=f"No Dask scheduler answers at {address}"),
            cluster.session(scheduler=address),
        ):
            pass
    assert f"waiting for a Dask scheduler at {address} (ends after 1 s" in caplog.text


def test_a_worker_is_no_scheduler(one: LocalCluster, client: Client) -> None:
    one.scale(1)
    client.wait_for_workers(1, timeout=60)
    [address] = client.nthreads()
    with (
        pytest.raises(ClusterError, match=f"No Dask scheduler answers at {address}"),
        cluster.session(scheduler=address),
    ):
        pass
    one.scale(0)


@pytest.mark.parametrize("wait", ["soon", "-3s", 0, None])
def test_no_span_of_time(wait: object) -> None:
    with (
        dask.config.set({"kpt.wait": wait}),
        pytest.raises(ParameterError, match="no span of time to wait"),
    ):
        patience.wait_seconds()


def test_a_scheduler_that_is_killed() -> None:
    """With its process, as a node dies."""
    code = "import sys; from distributed.cli.dask_scheduler import main; main(sys.argv[1:])"
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-jupyter"]
    scheduler = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True
    )
    assert scheduler.stderr is not None
    address = next(line.split()[-1] for line in scheduler.stderr if "Scheduler at:" in line)
    worker_code = "import sys; from distributed.cli.dask_worker import main; main(sys.argv[1:])"
    worker = subprocess.Popen(
        [sys.executable, "-c", worker_code, address, "--nthreads", "1", "--no-nanny"],
        stderr=subprocess.DEVNULL,
    )
    try:
        with (
            dask.config.set({"kpt.wait": "30s"}),
            cluster.session(scheduler=address) as client,
        ):
            results = cluster.run(client, time.sleep, [(0.0,)] + [(0.2,)] * 50, "Sleeping")
            next(results)
            scheduler.kill()
            expected = r"^(Sleeping|Looking for workers): the connection .* was lost"
            with pytest.raises(ClusterError, match=expected):
                list(results)
    finally:
        for process in (scheduler, worker):
            process.send_signal(signal.SIGKILL)
            process.wait()
        scheduler.stderr.close()


def test_a_local_run_listens_on_loopback_alone() -> None:
    own = psutil.Process()
    before = {(c.laddr.ip, c.laddr.port) for c in own.net_connections() if c.status == "LISTEN"}
    with cluster.local(1):
        now = {(c.laddr.ip, c.laddr.port) for c in own.net_connections() if c.status == "LISTEN"}
        assert {ip for ip, _ in now - before} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    "settings",
    [
        {"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:1"},
        {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"},
        {"DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls"},
        {"DASK_DISTRIBUTED__WORKER__PRELOAD": "no_such_module"},
        {"DASK_DISTRIBUTED__SCHEDULER__PRELOAD": "no_such_module"},
        {"DASK_TEMPORARY_DIRECTORY": "/proc/nowhere"},
        {"DASK_CONFIG": "tiny"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_clusters_do_not_break_a_local_run(
    settings: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(
        "scheduler: synchronous\n"
        "distributed: {worker: {memory: {pause: 0.01, terminate: 0.02, spill: 0.001}}}\n"
    )
    code = """
import operator
from kpt_dask.runtime import cluster
with cluster.session() as client:
    print(dict(cluster.run(client, operator.add, [(1, 2)], "Adding")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.stdout, done.stderr) == ("{0: 3}\n", "")
