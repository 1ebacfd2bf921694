"""How much memory is taken unless told otherwise."""

from pathlib import Path

import pytest

from kpt_dask.options import MEMORY
from kpt_dask.runtime import memory
from kpt_dask.runtime.memory import budget

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 64 GiB free and no limits."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    put(tmp_path / "proc/meminfo", f"MemTotal: 9 kB\nMemAvailable:   {64 << 20} kB\n")
    put(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_no_more_than_the_usual_is_taken(machine: Path) -> None:
    assert budget() == MEMORY == 1 << 30


def test_what_is_asked_for_is_taken(machine: Path) -> None:
    assert budget(5 << 30) == 5 << 30


def test_half_of_what_the_machine_has_free(machine: Path) -> None:
    put(machine / "proc/meminfo", "MemFree: 1 kB\nMemAvailable:   614400 kB\n")
    assert budget() == 300 * MIB


@pytest.mark.parametrize("group", ["", "job", "job/step"])
def test_half_of_what_a_group_of_version_2_has_left(machine: Path, group: str) -> None:
    folder = machine / "sys/fs/cgroup" / group
    put(machine / "sys/fs/cgroup/job/step/memory.max", "max\n")
    put(folder / "memory.max", f"{512 * MIB}\n")
    put(folder / "memory.current", f"{300 * MIB}\n")
    put(folder / "memory.stat", f"anon 7\nfile 8\ninactive_file {88 * MIB}\n")
    assert budget() == 150 * MIB


def test_half_of_what_a_group_of_version_1_has_left(machine: Path) -> None:
    put(machine / "proc/self/cgroup", "3:cpu,cpuacct:/x\n2:memory:/slurm/job_7\n0::/\n")
    folder = machine / "sys/fs/cgroup/memory/slurm/job_7"
    put(folder / "memory.limit_in_bytes", f"{400 * MIB}\n")
    put(folder / "memory.usage_in_bytes", f"{100 * MIB}\n")
    assert budget() == 150 * MIB


def test_a_group_that_is_full_leaves_something(machine: Path) -> None:
    put(machine / "sys/fs/cgroup/memory.max", "100\n")
    put(machine / "sys/fs/cgroup/memory.current", "200\n")
    assert budget() == 1


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert budget() == MEMORY
