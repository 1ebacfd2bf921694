"""What answers look like, and that nothing about where they go ends the work."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from atlas_store import AtlasStore

PRINTS = """
import sys
from kpt_dask.cli.common import columns, console, print_json, table
from kpt_dask.cli.streams import keep_streams_open
keep_streams_open()
import click
{body}
open(sys.argv[1], "w").write("work done")
"""
TABLE = """
made = table("organ", "volume (mL)", "between", "mean HU", "votes", "confidence", "border")
name = "portal_vein_and_splenic_vein"
made.add_row(name, "1250.3", "1101.9 – 1388.2", "-712", "1234", "0.97", "yes")
made.add_row("liver", "1.0", "0.1 – 2.2", "60", "3", "0.50", "")
console().print(made)
"""
LIST = """
row = ("some_patient_0001", "all but urinary_bladder", "12345", "2345", "512 × 512 × 700",
       "2026-01-01 10:00", "some_patient_0001_ct.nii.gz")
print(columns(tuple("abcdefg"), [row, row], (0, 1)))
"""
LETTERS = 'print_json({"name": "Müller – ν"}); click.echo("ν – Müller"); ' + TABLE


def start(body: str, folder: Path, env: dict[str, str], suffix: str = "") -> str:
    script, mark = folder / "prints.py", folder / "mark"
    script.write_text(PRINTS.format(body=body))
    command = f"{sys.executable} {script} {mark} {suffix}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=os.environ | env,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert mark.read_text() == "work done"
    assert done.stderr == b""
    return done.stdout.decode(env.get("PYTHONIOENCODING", "utf-8"), errors="replace")


def on_terminal(body: str, folder: Path, width: int) -> list[str]:
    script = folder / "prints.py"
    script.write_text(PRINTS.format(body=body))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "", "PYTHONUTF8": "1"}
    with subprocess.Popen(
        [sys.executable, script, folder / "mark"], stdout=theirs, env=environment
    ):
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return said.decode().splitlines()


@pytest.mark.parametrize("body", [TABLE, LIST], ids=["table", "list"])
def test_tables_fit_80_columns_and_lose_nothing(tmp_path: Path, body: str) -> None:
    lines = on_terminal(body, tmp_path, 80)
    assert max(map(len, lines)) <= 80
    text = "".join("".join(lines).split())
    wanted = (
        ["1101.9–1388.2", "1250.3", "1234"] if body == TABLE else ["2026-01-0110:00", "ct.nii.gz"]
    )
    assert all(word in text for word in wanted)


def test_short_names_are_not_folded_at_80_columns(tmp_path: Path) -> None:
    body = TABLE.replace("portal_vein_and_splenic_vein", "gluteus_maximus_left")
    assert any("gluteus_maximus_left" in line for line in on_terminal(body, tmp_path, 80))


def test_a_row_is_a_line_where_it_is_piped(tmp_path: Path) -> None:
    assert any(
        line.split()[:2] == ["portal_vein_and_splenic_vein", "1250.3"] and line.split()[-1] == "yes"
        for line in start(TABLE, tmp_path, {}).splitlines()
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_an_encoding_lacks_end_nothing(tmp_path: Path, encoding: str) -> None:
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    said = start(LETTERS, tmp_path, environment)
    assert json.loads(said[: said.index("}") + 1]) == {"name": "Müller – ν"}


@pytest.mark.parametrize(
    ("suffix", "body"),
    [
        (">&-", LETTERS),
        ("2>&-", LETTERS),
        (">&- 2>&- <&-", LETTERS),
        ("| head -n 1 >/dev/null", "for _ in range(99999): click.echo('some line')"),
        ("| true", LETTERS),
    ],
)
def test_output_that_nobody_reads_ends_nothing(tmp_path: Path, suffix: str, body: str) -> None:
    start(body, tmp_path, {}, suffix=suffix)


def test_a_full_disk_under_standard_output_is_named(tmp_path: Path) -> None:
    script = tmp_path / "prints.py"
    script.write_text(PRINTS.format(body="click.echo('a')"))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script} {tmp_path / 'mark'} >/dev/full"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "standard output" in done.stderr


@pytest.mark.parametrize("arguments", ["--help", "atlas info {}", "atlas info {} --json"])
def test_a_full_disk_under_standard_output_is_one_line(
    body_store: AtlasStore, arguments: str
) -> None:
    command = f"{sys.executable} -m kpt_dask {arguments.format(body_store.url)} >/dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    said = "kpt: standard output: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_the_program_itself_ends_well_without_an_output(body_store: AtlasStore) -> None:
    for suffix in (">&-", "| true"):
        command = f"{sys.executable} -m kpt_dask atlas info {body_store.url} {suffix}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert (done.returncode, done.stderr) == (0, ""), suffix
