"""Kernels are compiled once, and anew when what they are made of changes, in whatever file."""

import shutil
import subprocess
import sys
from pathlib import Path

from kpt_dask.kernels import jit

INNER = """
from package.kernels.jit import kernel

FACTOR = {factor}

@kernel
def inner(x):
    return FACTOR * x
"""
OUTER = """
from package.inner import inner
from package.kernels.jit import kernel

@kernel
def outer(x):
    return inner(x) + 1
"""
RUN = "from package.outer import outer\nprint(outer(3), sum(outer.stats.cache_hits.values()))"


def run(folder: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, check=True, capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


def test_a_change_in_another_file_compiles_a_kernel_anew(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "kernels").mkdir()
    shutil.copy(jit.__file__, package / "kernels" / "jit.py")
    (package / "__init__.py").touch()
    (package / "outer.py").write_text(OUTER)
    (package / "inner.py").write_text(INNER.format(factor=2))
    assert run(tmp_path) == [7, 0]
    assert run(tmp_path) == [7, 1]
    (package / "inner.py").write_text(INNER.format(factor=4))
    assert run(tmp_path) == [13, 0]


def test_a_change_in_a_file_without_kernels_compiles_nothing(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    shutil.copy(jit.__file__, package / "kernels" / "jit.py")
    (package / "cli.py").write_text("HELP = 'short'\n")
    (package / "__init__.py").write_text("from package import cli\n")
    (package / "outer.py").write_text(OUTER)
    (package / "inner.py").write_text(INNER.format(factor=2))
    assert run(tmp_path) == [7, 0]
    (package / "cli.py").write_text("HELP = 'a longer one'\n")
    assert run(tmp_path) == [7, 1]
