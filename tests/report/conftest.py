"""A segmentation with its page, and a browser to look at it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import kpt_dask
from atlas_store import AtlasStore
from kpt_dask.report.viewer import VARIABLE
from tests.report.browser import Browser

Browse = Callable[..., Any]
"""Open a page, run a script in it, and give what that returns."""


@pytest.fixture(scope="session")
def segmented(
    bodies: Path,
    body_store: AtlasStore,
    one_process: Client,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Give a folder with out.zarr, out.html, without a viewer, and out.png."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        kpt_dask.segment(
            bodies / "body_4_ct.nii.gz",
            body_store,
            folder / "out.zarr",
            mode="affine",
            labels=folder / "organs.nii.gz",
            report=folder / "out.html",
            picture=folder / "out.png",
            client=one_process,
        )
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is missing: install Debian's package chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def browse(browser: Browser) -> Browse:
    def look(page: Path, script: str, width: int = 1300, height: int = 900) -> Any:
        answer, requested = browser.run(page, script, (width, height))
        # The page itself, and pictures within it, which are no requests.
        outside = [url for url in requested if not url.startswith(("data:", "blob:"))]
        assert outside == [page.as_uri()]
        return answer

    return look
