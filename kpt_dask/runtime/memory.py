"""How much memory a process may take: what the machine has free, and what a container allows."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kpt_dask.options import MEMORY, check_count

ROOT = Path("/")
"""Where the system's files are looked for."""

_GROUPS = (
    # Version 2 of control groups, then 1: folder, limit, usage, reclaimable part.
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def budget(memory: int | None = None) -> int:
    """Bytes that the large arrays of a process may take.

    Parameters
    ----------
    memory : int, optional
        What the user wants. Without it, half of what is free on the machine or in the process's
        control group (container, SLURM job), at most `kpt_dask.options.MEMORY`.

    Raises
    ------
    ParameterError
        If it is no positive whole number.
    """
    check_count("The memory in bytes", memory)
    if memory is not None:
        return memory
    return max(min([MEMORY, *(free // 2 for free in _free())]), 1)


def _free() -> Iterator[int]:
    # Systems other than Linux do not say; nor have they control groups.
    if (available := _stat(ROOT / "proc/meminfo", "MemAvailable:")) is not None:
        yield available * 1024
    for mount, limit, use, cached in _GROUPS:
        base = ROOT / mount
        for path in _own_groups(base):
            most = _number(path / limit)
            used = _number(path / use)
            if most is None or used is None:  # no limit
                continue
            # Page cache that the kernel frees on demand.
            yield max(most - used + min(_stat(path / "memory.stat", cached) or 0, used), 0)


def _own_groups(base: Path) -> Iterator[Path]:
    """Folders of the process's control group and of those around it, whose limits count too."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    version_1 = base.name == "memory"
    for line in lines:
        _, controllers, name = (*line.split(":", 2), "", "")[:3]
        if ("memory" in controllers.split(",")) == version_1 and (version_1 or not controllers):
            own = PurePosixPath(name.lstrip("/") or ".")
            # A container may see its own group as the outermost.
            yield from (base / group for group in dict.fromkeys((own, *own.parents)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max", or not there
        return None


def _stat(path: Path, key: str) -> int | None:
    """Read the number that follows a word at the beginning of a line."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        return next((int(row[1]) for row in rows if row[0] == key), None)
    except (OSError, ValueError, IndexError):
        return None
