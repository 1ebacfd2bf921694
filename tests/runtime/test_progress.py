"""Stages: silent unless asked, timed when asked, never in the way of results."""

import io
import threading
import time

import pytest
from rich.console import Console

from kpt_dask.runtime import progress


def console_to(stream: io.StringIO, terminal: bool) -> Console:
    return Console(file=stream, force_terminal=terminal, width=100)


def test_nothing_is_shown_in_a_library(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.stage("Reading scan", total=2) as advance:
        advance(2)
    assert capfd.readouterr() == ("", "")


def test_the_command_line_writes_to_standard_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "VISIBLE_AFTER", 0.0)
    with progress.shown(), progress.stage("Reading scan", total=1) as advance:
        advance(1)
        print("the result")
    out, err = capfd.readouterr()
    assert out == "the result\n"
    assert err == "Reading scan: 0.0 s\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_only_stages_that_last_are_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "VISIBLE_AFTER", 0.2)
    stream = io.StringIO()
    with (
        progress.shown(console_to(stream, terminal)),
        progress.stage("Long [one]", total=3) as advance,
    ):
        advance(1)
        time.sleep(0.5)
        with progress.stage("Short one"):
            pass
    shown = stream.getvalue()
    assert "Long [one]: 0." in shown
    assert "Short one" not in shown
    assert ("1/3" in shown) == terminal


def test_display_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "VISIBLE_AFTER", 0.0)
    stream = io.StringIO()
    with progress.shown(console_to(stream, False)):
        pass
    with progress.stage("Reading scan"):
        pass
    assert stream.getvalue() == ""


def test_seconds_add_up_by_name() -> None:
    with progress.recorded() as seconds:
        for _ in range(2):
            with progress.stage("Reading scan"):
                time.sleep(0.05)
        with progress.stage("Voting"):
            pass
    with progress.stage("Afterwards"):
        pass
    assert list(seconds) == ["Reading scan", "Voting"]
    assert 0.1 <= seconds["Reading scan"] < 1
    assert 0 <= seconds["Voting"] < 0.05


def test_recordings_nest() -> None:
    with progress.recorded() as outer:
        with progress.stage("First"):
            pass
        with progress.recorded() as inner, progress.stage("Second"):
            pass
    assert list(outer) == ["First", "Second"]
    assert list(inner) == ["Second"]


def test_a_failing_stage_is_timed_but_not_called_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "VISIBLE_AFTER", 0.0)
    stream = io.StringIO()
    with (
        progress.recorded() as seconds,
        progress.shown(console_to(stream, False)),
        pytest.raises(ValueError, match="no"),
        progress.stage("Reading scan"),
    ):
        raise ValueError("no")
    assert "Reading scan" in seconds
    assert stream.getvalue() == ""


def test_any_thread_may_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "VISIBLE_AFTER", 0.0)
    stream = io.StringIO()
    with (
        progress.shown(console_to(stream, True)),
        progress.stage("Counting", total=400) as advance,
    ):
        threads = [
            threading.Thread(target=lambda: [advance(1) for _ in range(100)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(0.25)
    assert "400/400" in stream.getvalue()
