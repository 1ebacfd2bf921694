"""What the documents say: their commands and code run, their links lead somewhere, they stay short.

Blocks of `sh` and `python` run in order in one folder per document, which holds what a reader
would have: `scan.nii.gz`, more in `scans`, and annotated ones in `examples`. What needs a whole
machine (setting up, the test suite, SLURM) is only looked up.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_store import load_organs

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({ROOT / "README.md", *ROOT.glob("[!.]*/README.md")})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?!http)([^)#]+)\)")
LOOKED_UP = ("scripts/", "pip ", "git ", "python -m ")


def blocks(document: Path) -> list[tuple[str, str]]:
    return FENCE.findall(document.read_text())


@pytest.fixture
def reader(bodies: Path, tmp_path: Path) -> Path:
    """Give a folder with a scan, one more, and annotated examples."""
    examples = tmp_path / "examples"
    shutil.copytree(bodies, examples)
    shutil.move(examples / "body_4_ct.nii.gz", tmp_path / "scan.nii.gz")
    (tmp_path / "scans").mkdir()
    shutil.copy(tmp_path / "scan.nii.gz", tmp_path / "scans")
    shutil.move(examples / "body_4_seg.nii.gz", tmp_path / "truth.nii.gz")
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_code_run(document: Path, reader: Path) -> None:
    programs = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(reader / "cache"),
    }
    for language, text in blocks(document):
        assert language in ("sh", "python", "toml", "text"), f"a block of {language!r}"
        if language == "toml":
            table = reader / "organs.toml"
            table.write_text(text)
            assert len(load_organs(table)) > 0
        elif language == "sh":
            lines = text.replace("\\\n", " ").splitlines()
            commands = [line for line in lines if not line.startswith(LOOKED_UP)]
            for line in lines:
                if line.startswith("scripts/"):
                    assert (ROOT / shlex.split(line, comments=True)[0]).is_file(), line
            run(["bash", "-e", "-c", "\n".join(commands)], reader, environment)
        elif language == "python":
            # In a process of its own, as a reader's script: it must not need a main guard.
            run([sys.executable, "-c", text], reader, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    missing = [
        link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()
    ]
    assert missing == []


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_map_names_every_room() -> None:
    """The picture of the architecture and the folders agree."""
    drawn = (ROOT / "kpt_dask" / "README.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "kpt_dask").glob("*/__init__.py")]
    assert [room for room in rooms if f"`{room}`" not in drawn and f" {room}" not in drawn] == []
