"""What this process holds in memory, for benchmarks."""

from pathlib import Path


def resident_mib(line: str = "VmRSS") -> float:
    """Read from its status what it holds now, or with ``VmHWM`` the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(own.split()[1]) for own in lines if own.startswith(line)) / 1024
