"""A batch of scans as one SLURM job that submits its worker jobs.

The command submits itself: inside the job it runs again, starts a Dask scheduler and submits the
worker jobs through dask-jobqueue. Settings of a site (modules to load, a network interface, a
quality of service) come from Dask's configuration, `jobqueue.slurm`, and go into both kinds of job.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import dask.config
from dask.utils import parse_bytes
from dask_jobqueue.slurm import SLURMCluster, slurm_format_bytes_ceil
from distributed import Client

from kpt_dask.batches import check_outcomes, outputs, segment_batch
from kpt_dask.cli.common import names
from kpt_dask.errors import USER_ERRORS, ClusterError, ParameterError, some_of
from kpt_dask.options import MODES, TransferOptions
from kpt_dask.runtime import notices
from kpt_dask.runtime.patience import wait_seconds

log = logging.getLogger("kpt_dask.cli.slurm")

EXAMPLES = """\b
Example:
  scripts/submit_slurm scans/*.nii.gz atlases.zarr results \\
      --workers 8 --cores 16 --memory 32GB --walltime 02:00:00 --partition standard

What every job of your site needs (modules to load, a network interface, a quality of
service) belongs in Dask's configuration, ~/.config/dask/jobqueue.yaml:

\b
  jobqueue:
    slurm:
      interface: ib0
      job-script-prologue: ["module load python"]
      job-extra-directives: ["--qos=long"]
"""

HEAD_CORES = 2
"""Threads of the leading job: for the scheduler, and for reading and writing scans."""

WAIT = "2h"
"""Limit of the worker jobs' time in SLURM's queue."""

TOLD_EVERY = 60.0
"""Seconds between two lines of the log that report the waiting."""

RENEWED_EVERY = 30.0
"""Seconds between two looks whether worker jobs have ended."""

RENEWALS = 3
"""How often every worker job is submitted again at most while no scan is completed."""

TOLD_FIRST = 5.0
"""Seconds until the first line: until then the jobs are being submitted."""

# Compiled kernels are kept on the node: shared home folders are slow and lock badly. A folder
# that somebody else made there first could bring foreign code with it.
NUMBA_CACHE = """\
cache="${TMPDIR:-/tmp}/kpt-numba-$(id -u)"
mkdir -p -m 700 "$cache"
if [ ! -O "$cache" ] || [ -L "$cache" ]; then cache=$(mktemp -d); fi
export NUMBA_CACHE_DIR="$cache"
"""


@dataclass(frozen=True)
class Resources:
    """Resources requested from SLURM.

    Attributes
    ----------
    workers : int
        Number of worker jobs.
    cores : int
        Threads of a worker.
    memory : str
        Memory of a worker, such as "16GB".
    head_memory : str
        Memory of the job that leads the workers.
    head_cores : int
        Threads of that job.
    walltime : str
        Limit of every job, in SLURM's notation.
    partition, account : str, optional
        The site's defaults unless given.
    """

    workers: int
    cores: int
    memory: str
    head_memory: str
    walltime: str
    partition: str | None = None
    account: str | None = None
    head_cores: int = HEAD_CORES


def job_script(command: Sequence[str], logs: Path, resources: Resources) -> str:
    """Write the script of the job that leads: its resources, then `command`.

    Parameters
    ----------
    command : sequence of str
        Program and arguments, as they are; quoting is done here.
    logs : Path
        Folder for the log.
    resources : Resources
        Resources to request.
    """
    directives = [
        "--job-name=kpt-segment",
        _log_directive(logs, "segment"),
        "--ntasks=1",
        f"--cpus-per-task={resources.head_cores}",
        f"--mem={slurm_format_bytes_ceil(parse_bytes(resources.head_memory))}",
        f"--time={shlex.quote(resources.walltime)}",
    ]
    for option, value in (("partition", resources.partition), ("account", resources.account)):
        if value is None:
            value = _configured(option if option == "account" else "queue", None)
        if value is not None:
            directives.append(f"--{option}={shlex.quote(value)}")
    directives += _configured("job-extra-directives", [])
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {directive}" for directive in directives), ""]
    lines += [*_configured("job-script-prologue", []), NUMBA_CACHE]
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


@contextmanager
def worker_cluster(logs: Path, resources: Resources) -> Iterator[SLURMCluster]:
    """Start a scheduler here whose workers will be SLURM jobs; none is asked for yet.

    Only who has the certificates of this run can talk to it: a scheduler runs the code that it
    is sent. They lie in `logs`, readable by the user alone, until the cluster is closed.
    """
    # Any free port: several batches may run on one node.
    private = {"dashboard_address": "127.0.0.1:0", "dashboard": False}
    logs.mkdir(parents=True, exist_ok=True)
    cluster = SLURMCluster(
        protocol="tls://",
        security=True,
        shared_temp_directory=str(logs),
        job_name="kpt-worker",
        processes=1,
        cores=resources.cores,
        memory=resources.memory,
        walltime=resources.walltime,
        queue=resources.partition,
        account=resources.account,
        python=shlex.quote(sys.executable),
        job_script_prologue=[*_configured("job-script-prologue", []), NUMBA_CACHE],
        job_extra_directives=[
            *_configured("job-extra-directives", []),
            _log_directive(logs, "worker"),
        ],
        worker_extra_args=[
            *_configured("worker-extra-args", []),
            *("--dashboard-address", "127.0.0.1:0", "--no-dashboard"),
        ],
        scheduler_options={**private, **_configured("scheduler-options", {})},
    )
    # dask-jobqueue writes paths into the job script as they are.
    security = cluster._job_kwargs["security"]
    for name in ("tls_ca_file", "tls_worker_cert", "tls_worker_key"):
        setattr(security, name, shlex.quote(getattr(security, name)))
    try:
        with cluster:
            yield cluster
    finally:
        # Otherwise they would last as long as the object.
        for key in ("ca_file", "cert", "key"):
            getattr(cluster, f"_job_{key}").close()


class WorkerJobs:
    """The worker jobs of a batch: those that end are submitted again.

    Parameters
    ----------
    cluster : SLURMCluster
        From `worker_cluster`.
    client : distributed.Client
        Its client.
    logs : Path
        Folder for the logs.
    resources : Resources
        Resources to request.
    """

    def __init__(
        self, cluster: SLURMCluster, client: Client, logs: Path, resources: Resources
    ) -> None:
        self.client = client
        self._cluster = cluster
        self._logs = logs
        self._resources = resources
        self._ended: list[str] = []
        self._lock = threading.Lock()

    def ready(self) -> None:
        """Wait for a worker, once all jobs that are wanted are in the queue.

        Raises
        ------
        ClusterError
            If jobs end again and again, or none has begun within the limit of
            `kpt_dask.runtime.patience`.
        """
        self.renew()
        if self.client.nthreads():
            self._ended.clear()
        _await_first(self._cluster, self.client, self._resources)

    def renew(self) -> None:
        """Submit jobs for those that have ended.

        Raises
        ------
        ClusterError
            If they end again and again.
        """
        with self._lock:
            self._check()
            queued = _in_queue()
            if queued is None:
                return
            connected = {
                str(one["name"]) for one in self._cluster.scheduler_info["workers"].values()
            }
            wanted = self._cluster.worker_spec
            # No job is held here: Dask asserts that those that it dropped are freed.
            numbers = {name: job.job_id for name, job in list(self._cluster.workers.items())}
            for name, number in numbers.items():
                known = not number or number in queued or str(name) in connected
                if known or name not in wanted:
                    continue
                self._ended.append(number)
                log.warning("worker job %s ended: see %s", number, self._log(number))
                # Under another name, as Dask cancels what has that of a lost worker, some time
                # later.
                wanted[f"{name}-again"] = wanted.pop(name)
            self._check()
            self._cluster.scale(jobs=self._resources.workers)

    def _log(self, job_id: str) -> Path:
        return self._logs / f"worker-{job_id}.log"

    def _check(self) -> None:
        if len(self._ended) > RENEWALS * self._resources.workers:
            raise ClusterError(
                f"Worker jobs {some_of(self._ended)} ended one after another: see"
                f" {self._log(self._ended[-1])}, then submit the same again to go on."
            )


@contextmanager
def workers(logs: Path, resources: Resources) -> Iterator[WorkerJobs]:
    """Submit the worker jobs, wait for the first to arrive, and end them all at the end.

    Raises
    ------
    ParameterError
        If SLURM refuses the worker jobs.
    ClusterError
        If none has begun within the limit of `kpt_dask.runtime.patience`.
    """
    with (
        worker_cluster(logs, resources) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # Submitted here first, because dask-jobqueue neither reports refused jobs nor recovers.
        _sbatch(cluster.job_script(), "--test-only")
        cluster.scale(jobs=resources.workers)
        _await_first(cluster, client, resources)
        jobs = WorkerJobs(cluster, client, logs, resources)
        done = threading.Event()
        # While a scan is segmented, too: it goes on with the new workers.
        thread = threading.Thread(target=_watch, args=(jobs, done), name="renewing", daemon=True)
        thread.start()
        try:
            yield jobs
        finally:
            done.set()
            thread.join()


def _watch(jobs: WorkerJobs, done: threading.Event) -> None:
    while not done.wait(RENEWED_EVERY):
        try:
            jobs.renew()
        except ClusterError as error:
            log.error("%s", error)
            # The scan that waits for workers would wait as long as it may.
            jobs.client.close()
            return


def _in_queue() -> set[str] | None:
    """Numbers of the user's jobs in SLURM's queue; None if it does not tell."""
    answer = _squeue("%A", f"--user={os.getuid()}")
    return set(answer.stdout.split()) if answer and answer.returncode == 0 else None


def _squeue(form: str, *which: str) -> subprocess.CompletedProcess[str] | None:
    """List jobs of SLURM's queue; None if it cannot be asked."""
    try:
        return subprocess.run(
            ["squeue", "--noheader", f"--format={form}", *which],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _await_first(cluster: SLURMCluster, client: Client, resources: Resources) -> None:
    """Wait for the first worker job, and log why it does not begin."""
    wait, start = wait_seconds(), time.monotonic()
    asked = f"{resources.workers} jobs of {resources.cores} cores and {resources.memory}"
    next_told = start + min(TOLD_FIRST, wait / 2)
    while not client.nthreads():
        now = time.monotonic()
        if now >= next_told:
            next_told = now + TOLD_EVERY
            log.warning(
                "waiting for the first of %s: %s (ends after %g s; --wait sets it)",
                *(asked, _queue(cluster), wait),
            )
        if now - start > wait:
            raise ClusterError(
                f"None of the {asked} has begun within {wait:g} s ({_queue(cluster)}): ask for "
                "less by --cores, --memory or --head-cores, or wait longer by --wait."
            )
        time.sleep(min(1.0, wait / 10))


def _queue(cluster: SLURMCluster) -> str:
    """Describe the worker jobs as SLURM reports them."""
    jobs = [worker.job_id for worker in list(cluster.workers.values()) if worker.job_id]
    if not jobs:
        return "not submitted yet"
    answer = _squeue("%T (%r)", "--jobs", ",".join(jobs))
    if answer is None:
        return "submitted"
    states = sorted({line.strip() for line in answer.stdout.splitlines() if line.strip()})
    return f"SLURM says {', '.join(states)}" if states else "not in SLURM's queue any longer"


def submit(script: str) -> str:
    """Submit a job script to SLURM.

    Returns
    -------
    message : str
        SLURM's answer, which has the job's number.

    Raises
    ------
    ParameterError
        If SLURM is not installed or refuses the job.
    """
    return _sbatch(script)


def _sbatch(script: str, *options: str) -> str:
    try:
        answer = subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise ParameterError(
            "sbatch is not here: submit from a login node of a SLURM cluster, or see the job "
            "script with --dry-run."
        ) from error
    except subprocess.CalledProcessError as error:
        raise ParameterError(f"SLURM refused the job: {error.stderr.strip()}") from error
    return answer.stdout.strip()


def _configured(key: str, default: Any) -> Any:
    value = dask.config.get(f"jobqueue.slurm.{key}", None)
    return default if value is None else value


def _log_directive(logs: Path, kind: str) -> str:
    folder = str(logs).replace("%", "%%")
    return f"--output={shlex.quote(f'{folder}/{kind}-%j.log')}"


def _memory(context: click.Context, option: click.Parameter, value: str) -> str:
    try:
        parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no amount of memory, such as 16GB.") from error
    return value


def _span(context: click.Context, option: click.Parameter, value: str) -> str:
    with dask.config.set({"kpt.wait": value}):
        try:
            wait_seconds()
        except ParameterError as error:
            raise click.BadParameter(str(error)) from error
    return value


@click.command(epilog=EXAMPLES)
@click.argument(
    "scans",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, resolve_path=True, path_type=Path),
)
@click.argument("store")
@click.argument("out", type=click.Path(file_okay=False, resolve_path=True, path_type=Path))
@click.option(
    "--workers",
    "n_workers",
    default=4,
    type=click.IntRange(min=1),
    show_default=True,
    help="Worker jobs.",
)
@click.option(
    "--cores",
    default=8,
    type=click.IntRange(min=1),
    show_default=True,
    help="Cores of each worker.",
)
@click.option(
    "--memory", default="16GB", show_default=True, callback=_memory, help="Memory of each worker."
)
@click.option(
    "--head-memory",
    default="8GB",
    show_default=True,
    callback=_memory,
    help="Memory of the job that leads the workers.",
)
@click.option(
    "--head-cores",
    default=HEAD_CORES,
    type=click.IntRange(min=1),
    show_default=True,
    help="Cores of that job; on a node of as many, no worker finds room.",
)
@click.option(
    "--wait",
    default=WAIT,
    show_default=True,
    callback=_span,
    help="How long workers may wait in SLURM's queue, and be away later.",
)
@click.option("--walltime", default="04:00:00", show_default=True, help="Time limit of every job.")
@click.option("--partition", "--queue", help="SLURM partition.  [default: the site's]")
@click.option("--account", help="SLURM account.  [default: yours]")
@click.option(
    "--mode",
    default="local",
    type=click.Choice(list(MODES)),
    show_default=True,
    help="As of kpt segment.",
)
@click.option("--fast", is_flag=True, help="As of kpt segment.")
@click.option(
    "--series", help="DICOM series of scans that hold several: UID, or words of its description."
)
@click.option(
    "--organs", callback=names, multiple=True, metavar="NAME,…", help="As of kpt segment."
)
@click.option("--dry-run", is_flag=True, help="Print the job script and submit nothing.")
@click.option("--inside", is_flag=True, hidden=True)
def main(
    scans: tuple[Path, ...],
    store: str,
    out: Path,
    n_workers: int,
    cores: int,
    memory: str,
    head_memory: str,
    head_cores: int,
    wait: str,
    walltime: str,
    partition: str | None,
    account: str | None,
    mode: str,
    fast: bool,
    series: str | None,
    organs: tuple[str, ...] | None,
    dry_run: bool,
    inside: bool,
) -> None:
    """Segment SCANS with the atlases of STORE on a SLURM cluster.

    Submits one job. It leads --workers further jobs, in which the work is done, scan after
    scan, submits again those that end, and ends them at the end. For each scan the folder OUT
    gets NAME.zarr (as of kpt segment) and NAME.nii.gz (the label map on the scan's own grid);
    logs go to OUT/logs. A scan that cannot be segmented does not stop the others; the end of
    the log lists it. To go on after an interruption, or after mending a scan, submit the same
    again: what is complete is skipped, whatever options it was made with; delete it to make it
    anew. All paths must be visible from the compute nodes.
    """
    if "://" not in store:
        if not Path(store).is_dir():
            raise click.BadParameter(f"{store} is no atlas store.", param_hint="STORE")
        store = str(Path(store).resolve())
    resources = Resources(
        n_workers, cores, memory, head_memory, walltime, partition, account, head_cores
    )
    logs = out / "logs"
    options: dict[str, Any] = {"mode": mode, "options": TransferOptions(fast=fast)}
    options["organs"] = organs or ()
    try:
        outputs(scans, out)
        if inside:
            with dask.config.set({"kpt.wait": wait}):
                _work(scans, store, out, resources, series=series, **options)
            return
        # Imported here: `--help` needs no store.
        from atlas_store import AtlasStore
        from kpt_dask.segmentation import choose

        # Now, or a place in the queue is spent on what is known already.
        choose(AtlasStore.open(store), **options)
        command = [sys.executable, "-P", "-m", "kpt_dask.cli.slurm", "--inside"]
        command += [f"--workers={n_workers}", f"--cores={cores}", f"--memory={memory}"]
        command += [f"--walltime={walltime}", f"--wait={wait}", f"--mode={mode}"]
        command += [f"--partition={partition}"] if partition is not None else []
        command += [f"--account={account}"] if account is not None else []
        command += ["--fast"] if fast else []
        command += [f"--series={series}"] if series is not None else []
        command += [f"--organs={','.join(organs)}"] if organs is not None else []
        command += ["--", *map(str, scans), store, str(out)]
        script = job_script(command, logs, resources)
        if dry_run:
            click.echo(script, nl=False)
            return
        logs.mkdir(parents=True, exist_ok=True)
        click.echo(submit(script))
    except USER_ERRORS as error:
        raise click.ClickException(str(error)) from error


def _work(
    scans: Sequence[Path], store: str, out: Path, resources: Resources, **options: Any
) -> None:
    # SLURM says so before it kills; leaving properly ends the worker jobs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("kpt_dask").setLevel(logging.INFO)
    outcomes = []
    with (
        workers(out / "logs", resources) as jobs,
        notices.shown(partial(log.warning, "%s")),
    ):
        for outcome in segment_batch(scans, store, out, jobs.client, jobs.ready, **options):
            log.info("%s", outcome)
            outcomes.append(outcome)
    check_outcomes(outcomes)


if __name__ == "__main__":
    main(prog_name="scripts/submit_slurm")
