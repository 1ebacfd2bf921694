"""Batches, and the SLURM jobs that run them.

`slurm` below stands in for SLURM: its sbatch runs job scripts at once, on this machine.
"""

import asyncio
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import dask.config
import psutil
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster, Security
from distributed.comm.core import connect

from atlas_store import AtlasStore
from kpt_dask.batches import Outcome, outputs, segment_batch
from kpt_dask.cli.slurm import Resources, job_script, main, submit, worker_cluster, workers
from kpt_dask.errors import ClusterError, ParameterError, ScanFormatError
from kpt_dask.options import DEFAULTS, TransferOptions
from kpt_dask.runtime import cluster

RESOURCES = Resources(3, 16, "32GB", "4GB", "02:30:00", "long jobs", "radiology")
PRINT_ARGUMENTS = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]

SBATCH = """\
#!/usr/bin/env bash
# Reads a job script from a file or from standard input, runs it, and tells its number.
if [ "${1-}" = --test-only ]; then exit; fi
script=$(mktemp -p "$SPOOL" job-XXXXXX)
cat "$@" > "$script"
setsid bash "$script" > "$script.log" 2>&1 < /dev/null &
echo $! >> "$SPOOL.numbers"
echo "Submitted batch job $!"
"""
SQUEUE = """\
#!/usr/bin/env bash
# Lists the numbers of jobs that run.
for number in $(cat "$SPOOL.numbers"); do kill -0 "-$number" 2> /dev/null && echo "$number"; done
exit 0
"""
SCANCEL = """\
#!/usr/bin/env bash
kill -- "-$1" 2> /dev/null
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in for SLURM on the PATH; gives the folder of submitted job scripts."""
    programs = tmp_path / "programs"
    spool = tmp_path / "spool"
    programs.mkdir()
    spool.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SPOOL", str(spool))
    return spool


@pytest.fixture(scope="module")
def processes() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as two,
        Client(two, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def segmentation(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand in for the segmentation, which has its own tests; gives the scans it was asked for."""
    asked: list[Path] = []

    def segment(
        scan: Path,
        store: str,
        out: Path,
        *,
        mode: str = "local",
        options: TransferOptions = DEFAULTS,
        series: str | None = None,
        organs: Sequence[str] = (),
        labels: Path,
        overwrite: bool,
        client: Client,
    ) -> Any:
        asked.append(scan)
        assert not overwrite
        if "bad" in scan.name:
            raise ScanFormatError(f"{scan} is not a NIfTI file.")
        if "odd" in scan.name:
            raise ZeroDivisionError("nobody expected this")
        answers = dict(cluster.run(client, os.getpid, [()] * 8, "Segmenting"))
        out.mkdir(parents=True, exist_ok=True)
        labels.write_text(f"{store} {mode} {len(answers)}")
        return SimpleNamespace(organs={}, warnings=(), seconds=1.0)

    module = ModuleType("kpt_dask.segmentation")
    module.segment = segment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def directives(script: str) -> dict[str, str]:
    """Give the options of a job script, read as SLURM reads them: quotes are a shell's."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH "))
            option, _, value = words[0].partition("=")
            found[option] = value or " ".join(words[1:])
    return found


def assert_is_shell(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_outputs_carry_the_name_of_the_scan() -> None:
    scans = [Path("a/ct.nii.gz"), Path("a/ct.1.nii"), Path("b/series 3")]
    named = outputs(scans, Path("out"))
    assert [output.segmentation.name for output in named.values()] == [
        "ct.zarr",
        "ct.1.zarr",
        "series 3.zarr",
    ]
    assert named[scans[0]].labels == Path("out/ct.nii.gz")


def test_folders_tell_scans_of_one_name_apart() -> None:
    scans = [Path("all/a/s1/ct.nii.gz"), Path("all/a/s2/ct.nii.gz"), Path("all/b/ct.nii.gz")]
    named = [output.segmentation.name for output in outputs(scans, Path("out")).values()]
    assert named == ["a-s1-ct.zarr", "a-s2-ct.zarr", "b-ct.zarr"]


def test_two_scans_of_one_name_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"a/ct\.nii\.gz and a/ct\.nii would both become"):
        outputs([Path("a/ct.nii.gz"), Path("a/ct.nii")], Path("out"))


def reasons(outcomes: Iterator[Outcome]) -> dict[Path, str]:
    """Why scans could not be segmented."""
    return {one.scan: one.error for one in outcomes if one.error is not None}


def test_batch_goes_on_after_a_bad_scan(
    processes: Client, segmentation: list[Path], tmp_path: Path
) -> None:
    scans = [Path("one.nii.gz"), Path("bad.nii.gz"), Path("odd.nii.gz"), Path("two.nii")]
    failed = reasons(segment_batch(scans, "store", tmp_path, processes, mode="organ"))
    assert list(failed) == scans[1:3]
    assert failed[scans[1]] == "bad.nii.gz is not a NIfTI file."
    assert failed[scans[2]].startswith("ZeroDivisionError: nobody expected this")
    assert (tmp_path / "one.nii.gz").read_text() == "store organ 8"
    assert (tmp_path / "two.zarr").is_dir()


def test_a_scan_given_twice_is_segmented_once() -> None:
    scans = [Path("a/ct.nii.gz"), Path("a/../a/ct.nii.gz"), Path("a/ct.nii.gz").absolute()]
    assert list(outputs(scans, Path("out"))) == scans[:1]


def test_job_script_asks_for_what_was_said(tmp_path: Path) -> None:
    script = job_script(["true"], tmp_path / "my 100% logs", RESOURCES)
    assert_is_shell(script)
    assert directives(script) == {
        "--job-name": "kpt-segment",
        "--output": f"{tmp_path}/my 100%% logs/segment-%j.log",
        "--ntasks": "1",
        "--cpus-per-task": "2",
        "--mem": "4G",
        "--time": "02:30:00",
        "--partition": "long jobs",
        "--account": "radiology",
    }


def test_arguments_arrive_as_they_are(tmp_path: Path) -> None:
    arguments = ["my scan.nii.gz", "it's", '"$HOME"', "*", "a\\b", "", "50%", "`id`", "µ\n2"]
    script = job_script([*PRINT_ARGUMENTS, *arguments], tmp_path, RESOURCES)
    assert_is_shell(script)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True)
    assert done.stdout == f"{arguments}\n"


@pytest.mark.parametrize("before", ["nothing", "ours", "a link"])
def test_kernels_are_cached_on_the_node(tmp_path: Path, before: str) -> None:
    usual = tmp_path / f"kpt-numba-{os.getuid()}"
    if before == "ours":
        usual.mkdir(mode=0o700)
    elif before == "a link":
        (tmp_path / "elsewhere").mkdir()
        usual.symlink_to(tmp_path / "elsewhere")
    script = job_script(["printenv", "NUMBA_CACHE_DIR"], tmp_path, RESOURCES)
    done = subprocess.run(
        ["bash"],
        input=script,
        text=True,
        capture_output=True,
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    folder = Path(done.stdout.strip())
    assert (folder == usual) == (before != "a link")
    assert not folder.is_symlink()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_worker_script_asks_for_what_was_said(tmp_path: Path) -> None:
    with worker_cluster(tmp_path / "my logs", RESOURCES) as workers:
        script = workers.job_script()
    assert_is_shell(script)
    asked = directives(script)
    assert asked["--cpus-per-task"] == "16"
    assert asked["--mem"] == "30G"
    assert asked["-t"] == "02:30:00"
    assert asked["-A"] == "radiology"
    assert asked["--output"] == f"{tmp_path}/my logs/worker-%j.log"
    command = shlex.split(script.splitlines()[-1])
    assert command[0] == sys.executable
    assert command[command.index("--nthreads") + 1] == "16"
    assert "--nworkers" not in command
    assert "export NUMBA_CACHE_DIR=" in script


async def knock(address: str, security: Security) -> None:
    comm = await connect(address, timeout=2, **security.get_connection_args("client"))
    await comm.write({"op": "identity", "reply": True})
    await comm.read()


def test_a_client_without_the_certificate_is_refused(slurm: Path, tmp_path: Path) -> None:
    """A scheduler runs whatever code it is sent; on a cluster, everybody can reach it."""
    with workers(tmp_path, Resources(1, 1, "1GB", "1GB", "1:00:00")) as jobs:
        client = jobs.client
        address = client.scheduler.address
        assert address.startswith("tls://")
        assert dict(cluster.run(client, os.getpid, [()], "Asking")).keys() == {0}
        for foreign in (address, address.replace("tls://", "tcp://")):
            for security in (Security(), Security.temporary()):
                with pytest.raises((OSError, TypeError, RuntimeError)):
                    asyncio.run(knock(foreign, security))
        keys = list(tmp_path.glob(".dask-jobqueue.worker.*"))
        assert len(keys) == 3
        assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert not list(tmp_path.glob(".dask-jobqueue.worker.*"))


def test_nothing_but_the_scheduler_is_seen_from_elsewhere(tmp_path: Path) -> None:
    own = psutil.Process()
    before = {c.laddr for c in own.net_connections() if c.status == "LISTEN"}
    with worker_cluster(tmp_path, RESOURCES) as leading:
        now = {c.laddr for c in own.net_connections() if c.status == "LISTEN"}
        outside = {a.port for a in now - before if a.ip not in ("127.0.0.1", "::1")}
        assert outside == {int(leading.scheduler_address.rsplit(":", 1)[1])}
        command = shlex.split(leading.job_script().splitlines()[-1])
        assert command[command.index("--dashboard-address") + 1] == "127.0.0.1:0"


def test_waiting_in_the_queue_is_told_and_ends(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node whose cores the leading job has itself."""
    programs = tmp_path / "programs"
    (programs / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    (programs / "squeue").write_text("#!/bin/sh\necho 'PENDING (Resources)'\n")
    told: list[str] = []
    monkeypatch.setattr(
        "kpt_dask.cli.slurm.log.warning", lambda text, *args: told.append(text % args)
    )
    expected = r"^None of the 3 jobs of 16 cores and 32GB has begun within 2 s .*--head-cores"
    with (
        dask.config.set({"kpt.wait": "2s"}),
        pytest.raises(ClusterError, match=expected),
        workers(tmp_path, RESOURCES),
    ):
        pass
    [line] = told
    assert line.startswith("waiting for the first of 3 jobs of 16 cores and 32GB: ")
    assert line.endswith("(ends after 2 s; --wait sets it)")


def test_worker_jobs_that_end_are_submitted_again(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpt_dask.cli.slurm.RENEWED_EVERY", 0.5)
    with workers(tmp_path, Resources(1, 1, "1GB", "1GB", "1:00:00")) as jobs:
        numbers = dict(cluster.run(jobs.client, end_first, [(tmp_path,)] * 3, "Asking"))
        assert len(numbers) == 3
        assert len(Path(f"{slurm}.numbers").read_text().split()) == 2
        jobs.ready()
    assert not (tmp_path / "ended").read_text()


def end_first(folder: Path) -> None:
    """End the first job that asks, as scancel does: the whole of it."""
    if not (folder / "ended").exists():
        (folder / "ended").touch()
        os.killpg(0, signal.SIGKILL)


def test_a_batch_whose_worker_jobs_always_end_ends_soon(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpt_dask.cli.slurm.RENEWED_EVERY", 0.5)
    scans = [tmp_path / name for name in ("one.nii.gz", "two.nii.gz")]
    end = r"Worker jobs \d+, .* ended one after another: see .*/worker-\d+\.log, then submit"
    with workers(tmp_path, Resources(1, 1, "1GB", "1GB", "1:00:00")) as jobs:
        (tmp_path / "programs" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
        for number in Path(f"{slurm}.numbers").read_text().split():
            os.killpg(int(number), signal.SIGKILL)
        with pytest.raises(ClusterError, match="the connection to the Dask scheduler was lost"):
            list(cluster.run(jobs.client, os.getpid, [()], "Asking"))
        failed = reasons(segment_batch(scans, "store", tmp_path, jobs.client, jobs.ready))
    assert list(failed) == scans
    for reason in failed.values():
        assert re.match(end, reason)


def test_the_site_has_its_say(tmp_path: Path) -> None:
    site = {
        "queue": "everyone",
        "job-script-prologue": ["module load python"],
        "job-extra-directives": ["--qos=long"],
    }
    resources = Resources(1, 2, "2GB", "2GB", "1:00:00")
    with dask.config.set({"jobqueue.slurm": dask.config.get("jobqueue.slurm") | site}):
        leading = job_script(["true"], tmp_path, resources)
        with worker_cluster(tmp_path, resources) as workers:
            working = workers.job_script()
    for script in (leading, working):
        assert directives(script)["--qos"] == "long"
        assert "module load python\n" in script
    few = Resources(1, 2, "2GB", "2GB", "1:00:00", head_cores=1)
    assert directives(job_script(["true"], tmp_path, few))["--cpus-per-task"] == "1"
    assert directives(leading)["--partition"] == directives(working)["-p"] == "everyone"


def test_command_submits_one_job(
    slurm: Path, body_store: AtlasStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scan, store = tmp_path / "my scan.nii.gz", tmp_path / "my store"
    scan.touch()
    store.symlink_to(body_store.url)
    arguments = [scan.name, store.name, "my results", "--workers", "2", "--account", "me"]
    arguments += ["--organs", "liver", "--organs", "spleen,aorta", "--fast"]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"], catch_exceptions=False)
    assert dry.exit_code == 0
    assert_is_shell(dry.output)
    assert not (tmp_path / "my results").exists()
    assert not list(slurm.iterdir())
    command = shlex.split(dry.output.splitlines()[-1])
    assert command[:5] == ["exec", sys.executable, "-P", "-m", "kpt_dask.cli.slurm"]
    assert {"--inside", "--workers=2", "--cores=8", "--memory=16GB", "--account=me"} < {*command}
    assert {"--organs=liver,spleen,aorta", "--fast"} < {*command}
    assert command[-4:] == ["--", str(scan), body_store.url, str(tmp_path / "my results")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.nii", "store", "out"], "'missing.nii' does not exist"),
        (["scan.nii", "nowhere", "out"], "nowhere is no atlas store"),
        (["scan.nii", "scan.nii.gz", "store", "out"], "would both become"),
        (["scan.nii", "store", "out", "--memory", "lots"], "'lots' is no amount of memory"),
        (["scan.nii", "store", "out", "--wait", "soon"], "'soon' is no span of time"),
        (["scan.nii", "store", "out", "--workers", "0"], "0 is not in the range x>=1"),
        (["scan.nii", "store", "out", "--cores", "-2"], "-2 is not in the range x>=1"),
        (["scan.nii", "store", "out", "--mode", "locl"], "'locl' is not one of"),
        (["scan.nii", "store", "out", "--organs", "livr"], "livr"),
        (["scan.nii", "store", "out", "--mode", "organ", "--fast"], "--fast is for mode local"),
        (["scan.nii", "folder", "out"], "folder is no atlas store"),
        (["scan.nii", "empty", "out"], "has no atlas to use"),
        (["scan.nii", "store", "out"], "sbatch is not here"),
    ],
)
def test_command_explains_what_is_wrong(
    arguments: list[str],
    sentence: str,
    body_store: AtlasStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("scan.nii").touch()
    Path("scan.nii.gz").touch()
    Path("store").symlink_to(body_store.url)
    Path("folder").mkdir()
    Path("folder/notes.txt").touch()
    AtlasStore.create("empty", body_store.organs, body_store.parameters)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_job_segments_with_workers_of_its_own(
    slurm: Path, segmentation: list[Path], tmp_path: Path, ends_on_sigterm: None
) -> None:
    scans = [tmp_path / name for name in ("bad.nii.gz", "odd.nii.gz", "my scan.nii.gz")]
    for scan in scans:
        scan.touch()
    store, out = tmp_path / "store", tmp_path / "my results"
    store.mkdir()
    options = ["--inside", "--workers=2", "--cores=1", "--memory=1GB"]
    result = CliRunner().invoke(main, [*options, "--", *map(str, [*scans, store, out])])
    assert result.exit_code == 1
    assert "2 of 3 scans failed" in result.output
    assert f"\n  {scans[0]}: {scans[0]} is not a NIfTI file." in result.output
    assert f"\n  {scans[1]}: ZeroDivisionError: nobody expected this" in result.output
    *rest, answers = (out / "my scan.nii.gz").read_text().split()
    assert rest == [str(store), "local"]
    assert answers == "8"
    assert len([job for job in slurm.iterdir() if job.suffix != ".log"]) == 2


@pytest.fixture
def ends_on_sigterm() -> Iterator[None]:
    """Undo what the job does to this process's signals."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is not handler
    signal.signal(signal.SIGTERM, handler)


def test_refused_jobs_are_explained(slurm: Path, tmp_path: Path) -> None:
    refusal = "#!/bin/sh\necho 'sbatch: error: invalid partition specified' >&2; exit 1\n"
    (tmp_path / "programs" / "sbatch").write_text(refusal)
    with pytest.raises(ParameterError, match=r"^SLURM refused the job: .* invalid partition"):
        submit(job_script(["true"], tmp_path, RESOURCES))
    with pytest.raises(ParameterError, match="SLURM refused"), workers(tmp_path, RESOURCES):
        pass
