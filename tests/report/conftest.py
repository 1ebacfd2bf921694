"""A segmentation with its page, and a browser to look at it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import kpt_dask
from atlas_store import AtlasStore
from kpt_dask.report.viewer import VARIABLE

Browse = Callable[..., Any]
"""Open a page, run a script in it, and give what that returns."""

PROBE = """
<script>
window.failures = [];
window.addEventListener("error", (event) => failures.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => failures.push(event.blockedURI));
</script>
"""
ANSWER = """
<script>
(async () => {
  let answer;
  try { answer = await (async () => { SCRIPT })(); } catch (error) { failures.push(String(error)); }
  const resources = performance.getEntriesByType("resource").map((one) => one.name.slice(0, 40));
  const told = JSON.stringify({ answer, failures, resources });
  document.body.innerHTML = "";
  const element = document.createElement("pre");
  element.id = "answer";
  element.textContent = told;
  document.body.append(element);
})();
</script>
"""
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    # No name is found: a request that left the machine would fail, and be seen.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=60000",
)


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
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("Chromium is missing: install Debian's package chromium")
    return found


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Browse:
    def look(page: Path, script: str, *switches: str) -> Any:
        text = page.read_text("utf-8")
        head, body = text.split("<head>", 1)
        copy = tmp_path / page.name
        rest, end, after = body.rpartition("</body>")
        parts = (head, "<head>", PROBE, rest, ANSWER.replace("SCRIPT", script), end, after)
        copy.write_text("".join(parts), "utf-8")
        done = subprocess.run(
            [
                chromium,
                *SWITCHES,
                f"--user-data-dir={tmp_path / 'profile'}",
                *switches,
                "--dump-dom",
                copy.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        told = json.loads(unescape(found.group(1)))
        assert told["failures"] == []
        # Pictures within the page are no requests.
        assert [name for name in told["resources"] if not name.startswith(("data:", "blob:"))] == []
        return told["answer"]

    return look
