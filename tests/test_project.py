"""The repository itself: it sets itself up anywhere, and holds no trace of where it was made."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["check", "check_versions", "demo", "submit_slurm", "test"]

# In pieces, so that this file is not a find of its own.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("py" + "pi", "org"),
        ("python" + "hosted", "org"),
        ("anaconda", "org"),
        ("npm" + "js", "org"),
        ("npm" + "js", "com"),
        ("crates", "io"),
        ("deb", "debian", "org"),
    )
]
MACHINE_PATHS = [f"/{folder}/" for folder in ("root", "work")] + [
    rf"/{home}/\w" for home in ("home", "Users")
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Give the content of every text file that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            found[name] = content.decode()
    return found


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in pinned)
    names = [canonical(line.partition("==")[0]) for line in pinned]
    assert len(set(names)) == len(names)
    return dict(zip(names, (line.partition("==")[2] for line in pinned), strict=True))


def test_every_dependency_is_pinned(pins: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project.get("optional-dependencies", {}).values():
        wanted += extra
    names = {canonical(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted}
    assert names - set(pins) == set()
    assert not {"pip", "setuptools", "kpt-dask"} & set(pins)


def test_no_file_names_a_package_registry(texts: dict[str, str]) -> None:
    finds = [(name, host) for name in texts for host in REGISTRIES if host in texts[name].lower()]
    assert finds == []


def test_no_file_names_a_place_on_a_machine(texts: dict[str, str]) -> None:
    pattern = re.compile("|".join(rf"(?<![\w.}}]){path}" for path in MACHINE_PATHS))
    finds = [(name, found.group()) for name in texts for found in pattern.finditer(texts[name])]
    assert finds == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / "scripts" / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", path], check=True)


def test_readme_names_scripts_that_exist() -> None:
    named = set(re.findall(r"\bscripts/(\w+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named
    missing = [name for name in named if not list((ROOT / "scripts").glob(f"{name}*"))]
    assert missing == []


@pytest.mark.parametrize(("check", "versions"), [(0, 0), (3, 0), (0, 4)])
def test_ci_runs_what_a_developer_runs(tmp_path: Path, check: int, versions: int) -> None:
    """It fails where either check does, and shows what the wheels gave."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name, text in (
        ("environment", ""),
        ("check", 'echo checked; exit "$CHECK"'),
        ("check_versions", 'echo compared; exit "$VERSIONS"'),
    ):
        script = tmp_path / "scripts" / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env=os.environ | {"CHECK": str(check), "VERSIONS": str(versions)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (check or versions)
    assert done.stdout == ("checked\n" if check else "checked\ncompared\n")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy what setting up needs; its Python makes environments in which pip only notes calls."""
    copy = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copy(ROOT / "pyproject.toml", copy)
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1" = -c ]; then exec python3 "$@"; fi\n'
        'venv="${@: -1}"; mkdir -p "$venv/bin"\n'
        'printf \'#!/bin/sh\\necho "$@" >> "$0.calls"\\n[ ! -e "$0.fail" ]\\n\' '
        '> "$venv/bin/python"\n'
        'printf \'#!/bin/sh\\necho "pytest in $PWD"\\n\' > "$venv/bin/pytest"\n'
        'chmod +x "$venv/bin/python" "$venv/bin/pytest"\n'
    )
    python.chmod(0o755)
    return copy


def run_test_script(project: Path, python: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [project / "scripts" / "test"],
        cwd=project.parent,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_is_made_once(project: Path) -> None:
    calls = project / ".venv" / "bin" / "python.calls"
    for _ in range(2):
        done = run_test_script(project, project.parent / "python")
        assert (done.returncode, done.stdout) == (0, f"pytest in {project}\n")
        assert len(calls.read_text().splitlines()) == 1
    with (project / "scripts" / "constraints.txt").open("a") as file:
        file.write("more==1\n")
    run_test_script(project, project.parent / "python")
    assert len(calls.read_text().splitlines()) == 2


def test_interrupted_set_up_is_done_again(project: Path) -> None:
    fail = project / ".venv" / "bin" / "python.fail"
    fail.parent.mkdir(parents=True)
    fail.touch()
    assert run_test_script(project, project.parent / "python").returncode != 0
    fail.unlink()
    assert run_test_script(project, project.parent / "python").returncode == 0


@pytest.mark.parametrize(
    ("lacks", "sentence"),
    [
        ("sys.version_info", "needs Python 3.11 or newer"),
        ("ensurepip", "cannot make environments: install its venv"),
    ],
)
def test_unfit_python_is_explained(project: Path, lacks: str, sentence: str) -> None:
    python = project.parent / "unfit"
    python.write_text(f'#!/bin/sh\ncase "$2" in *{lacks}*) exit 1;; esac\n')
    python.chmod(0o755)
    done = run_test_script(project, python)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert not (project / ".venv").exists()
