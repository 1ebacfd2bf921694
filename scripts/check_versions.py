#!/usr/bin/env python3
"""Check that the wheel installs, runs and gives the same bytes elsewhere than in .venv.

With the newest libraries on every other Python of `PYTHONS` that this machine has, and with the
oldest that pyproject.toml allows on the first of them: each in an environment of its own, outside
of the source tree. What .venv gives, with pinned libraries, is what all must give.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
SHAPE, SPACING = (75, 44, 54), 6.0
"""A phantom that shows all organs of the demo."""
NEEDED = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"


def main() -> int:
    """Check all environments, and give the exit code."""
    lowest = "\n".join(lowest_versions((ROOT / "pyproject.toml").read_text()))
    found = {version: find_python(version) for version in PYTHONS}
    for version in [version for version, python in found.items() if python is None]:
        print(f"!!! NOT CHECKED: this machine has no Python {version} that makes environments.")
    environments = {
        f"Python {version}, newest libraries": (python, "")
        for version, python in found.items()
        if python and version != "{}.{}".format(*sys.version_info)
    }
    if python := found[PYTHONS[0]]:
        environments[f"Python {PYTHONS[0]}, lowest versions"] = python, lowest
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        wheel = build_wheel(Path(folder))
        check = partial(check_environment, Path(folder), wheel)
        others = {name: threads.submit(check, name, *how) for name, how in environments.items()}
        # Last, because tests that run meanwhile compile its kernels.
        pinned = threads.submit(run_demo, sys.executable, Path(folder) / "pinned")
        failed = [name for name, other in others.items() if not tell(name, other, pinned)]
    return 1 if failed else 0


def tell(name: str, found: "Future[str]", pinned: "Future[str]") -> bool:
    """Say how an environment did, and whether it did well."""
    expected = pinned.result()
    try:
        result = found.result()
    except subprocess.CalledProcessError as error:
        result = f"{error.stdout[-3000:]}{error.stderr[-3000:]}"
    good = result == expected
    what = "the same bytes" if good else f"FAILED, {result}\ninstead of {expected}"
    print(f"{name}: {what}", flush=True)
    return good


def lowest_versions(pyproject: str) -> Iterator[str]:
    """Pin each dependency to the lowest version that is allowed."""
    for requirement in tomllib.loads(pyproject)["project"]["dependencies"]:
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise SystemExit(f"pyproject.toml allows any version of {requirement}: give the lowest")
        yield "{}=={}".format(*match.groups())


def find_python(version: str) -> str | None:
    """Find a Python that makes environments, on the path or among those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for path in filter(None, paths):
        done = subprocess.run([path, "-c", NEEDED], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return str(path)
    return None


def build_wheel(folder: Path) -> Path:
    """Build what `pip install .` would install."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*pip, folder, ROOT], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def check_environment(folder: Path, wheel: Path, name: str, python: str, pins: str) -> str:
    """Install the wheel in an environment of its own, and run the demo in it."""
    place = folder / re.sub(r"\W+", "-", name)
    constraints = folder / f"{place.name}.txt"
    constraints.write_text(pins)
    own = str(place / "bin" / "python")
    quiet = ["--quiet", "--disable-pip-version-check"]
    install = [own, "-m", "pip", "install", *quiet, "--constraint", str(constraints), str(wheel)]
    for command in ([python, "-m", "venv", str(place)], install):
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return run_demo(own, folder / f"{place.name}-demo")


def run_demo(python: str, out: Path) -> str:
    """Give what `demo` prints under a Python."""
    # Isolated: neither PYTHONPATH nor the current folder shows it the sources.
    command = [python, "-I", __file__, str(out)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=True)
    # Libraries may print lines of their own before it.
    return done.stdout.splitlines(keepends=True)[-1]


def demo(out: Path) -> None:
    """Import every module, make a store of phantoms, segment one, print digests of the result."""
    import numpy as np
    import zarr

    import atlas_store
    import kpt_dask
    from kpt_dask.demo.run import demo as run

    for package in (atlas_store, kpt_dask):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found = run(out, shape=SHAPE, spacing=SPACING)
    if min(found.dice.values()) < 0.5:
        raise SystemExit(f"organs were not found: {dict(found.dice)}")
    group = zarr.open_group(str(found.segmentation.path), mode="r")
    digests = {}
    for name in ("0", "keypoints/position", "labels/organs/0", "probability"):
        values = np.ascontiguousarray(group[name][...])
        digests[name] = hashlib.sha256(values.tobytes()).hexdigest()[:16]
    print(json.dumps(digests))


if __name__ == "__main__":
    if sys.argv[1:]:
        demo(Path(sys.argv[1]))
    else:
        sys.exit(main())
