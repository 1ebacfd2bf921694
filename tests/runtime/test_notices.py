import warnings

import pytest

from kpt_dask.errors import KptWarning
from kpt_dask.runtime import notices


def test_a_doubt_is_recorded_once_and_shown_once() -> None:
    shown: list[str] = []
    with notices.shown(shown.append), notices.recorded() as outer:
        notices.warn("First.")
        with notices.recorded() as inner:
            notices.warn("Second.")
            notices.warn("Second.")
    assert outer == shown == ["First.", "Second."]
    assert inner == ["Second."]


def test_a_library_gets_warnings_of_python() -> None:
    with pytest.warns(KptWarning, match="Doubtful"), notices.recorded() as told:
        notices.warn("Doubtful.")
    assert told == ["Doubtful."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with notices.shown(lambda _: None):
            notices.warn("Doubtful.")
