"""A batch on a SLURM of this machine alone, where slurm-wlm and munge are installed."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from atlas_store import AtlasStore
from kpt_dask.cli.main import kpt
from kpt_dask.cli.slurm import main

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
KillWait=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
PartitionName=only Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start SLURM; gives the folder with its logs."""
    if missing := [name for name in DAEMONS if shutil.which(name, path=PATH) is None]:
        pytest.skip(f"{missing[0]} is not installed: apt-get install slurm-wlm munge")
    # The path of a socket must be short.
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=folder, host=host, user=user, ports=free_ports(2))
        )
        munged = ["munged", "--foreground", "--force", f"--key-file={folder}/key"]
        munged += [
            f"--{what}={folder}/munge.{what.partition('-')[0]}"
            for what in ("socket", "pid-file", "seed-file", "log-file")
        ]
        commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
        running = []
        try:
            for command in commands:
                with open(folder / f"{command[0]}.out", "wb") as log:
                    running.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(1.0)
            try:
                wait_until(lambda: "idle" in ask("sinfo", "--noheader", "--format=%T"), 60.0)
            except TimeoutError:
                pytest.skip(f"SLURM does not start here: see {folder}")
            yield folder
        finally:
            subprocess.run(["scancel", "--user", user], check=False)
            for one in reversed(running):
                one.terminate()
            for one in running:
                one.wait(30)


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.2)


@pytest.mark.timeout(1500)
def test_a_batch_goes_on_though_its_workers_are_cancelled(
    slurm: Path, bodies: Path, body_store: AtlasStore, tmp_path: Path
) -> None:
    scans = [tmp_path / f"scan_{i}.nii.gz" for i in range(3)]
    for scan in scans:
        shutil.copy(bodies / "body_4_ct.nii.gz", scan)
    scans[1].write_bytes(b"not a scan")
    out = tmp_path / "out"
    options = ["--workers=2", "--cores=1", "--memory=2GB", "--head-memory=2GB", "--walltime=10"]
    arguments = [*options, *map(str, scans), body_store.url, str(out)]

    def submit() -> Path:
        submitted = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert submitted.exit_code == 0, submitted.output
        return out / "logs" / f"segment-{submitted.output.split()[-1]}.log"

    log = submit()
    wait_until(lambda: len(queued("--name=kpt-worker", "--states=R")) == 2, 300.0)
    first = queued("--name=kpt-worker")
    wait_until((out / "scan_0.zarr").exists, 400.0)
    subprocess.run(["scancel", *first], check=True)
    wait_until(lambda: not queued(), 400.0)
    told = log.read_text()
    assert "scan_0.zarr: done in" in told
    assert f"{scans[1]}: failed: " in told
    if not (out / "scan_2.zarr").exists():
        # Its workers were cancelled while it was segmented.
        assert f"{scans[2]}: failed: " in told
        log = submit()
        wait_until(lambda: not queued(), 400.0)
    assert "1 of 3 scans failed" in log.read_text()
    assert not list((out / "logs").glob(".dask-jobqueue.worker.*"))

    alone = tmp_path / "alone"
    done = CliRunner().invoke(kpt, ["batch", str(scans[0]), body_store.url, str(alone)])
    assert done.exit_code == 0, done.output
    expected = voxels(alone / "scan_0.nii.gz")
    assert expected.any()
    for name in ("scan_0", "scan_2"):
        np.testing.assert_array_equal(voxels(out / f"{name}.nii.gz"), expected)


def queued(*which: str) -> list[str]:
    """Numbers of the jobs in the queue."""
    return ask("squeue", "--noheader", "--format=%A", *which).split()


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)
