"""The page of an evaluation: it is whole, leads nowhere else, and a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from kpt_dask.evaluation.folder import best_median_worst
from kpt_dask.evaluation.page import render
from kpt_dask.evaluation.pictures import draw_scan
from tests.evaluation.results import ORGANS, made_up

WHITE_HU = 1000.0
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Reader(HTMLParser):
    """What a page holds: ids, links, text; elements that are closed in another order fail."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "xlink:href"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def close(self) -> None:
        super().close()
        assert self._open == []


def read(page: str) -> tuple[Reader, str]:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader, " ".join(" ".join(reader.words).split())


@pytest.mark.parametrize(("scans", "full"), [(1, False), (2, False), (5, True)])
def test_a_page_needs_nothing_else(scans: int, full: bool) -> None:
    results = made_up(scans, full=full)
    shown = dict.fromkeys(best_median_worst(results["dice"]).values(), '<svg class="slice"></svg>')
    page = render(results, ORGANS, shown)
    reader, text = read(page)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert all(link.startswith("#") for link in reader.links)
    assert not {"script", "link", "iframe", "img"} & reader.tags
    assert "://" not in re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", page)
    assert page.count('<svg class="slice">') == min(scans, 3)
    # Names are text, whatever they hold.
    for name in results["dice"]:
        assert name in text
    assert "a store <1>" in text
    assert "doubtful whether 1 < 0." in text
    for section in ("Number of atlases", "Limited field of view"):
        assert (section in text) == full
    # Every scan has a row, to which its points lead.
    rows = {f"#scan-{i}" for i in range(scans)}
    assert rows <= set(reader.links)


def test_a_page_says_what_the_results_say() -> None:
    results = made_up()
    _, text = read(render(results, ORGANS, {}))
    assert "mean Dice 0.500 0.400 – 0.600" in text
    assert "SyN <1> 0.512 400 s per scan" in text
    assert "liver 5 0.500 0.400 – 0.600 0.300 – 0.50 0.40 – 0.60" in text
    assert "lung left 3.5 50 –" in text
    assert "background 60.0 90 80" in text
    assert "the segmentation gives 10.0 % of them to an organ." in text
    assert "40 20 0.500 0.400 – 0.600" in text
    assert "across 0.600 0.610 −0.010 −0.020 to 0.010" in text
    assert "around lung left, to a third" in text
    assert "a machine, 2 cores" in text
    scores = results["dice"]["scan <1> & 'x'"]
    shown = [f"{scores[organ.name]:.2f}" for organ in ORGANS if organ.name in scores]
    shown.append(f"{np.mean(list(scores.values())):.3f}")
    assert f"scan <1> & 'x' {' '.join(shown)}" in text


def test_best_median_and_worst_are_chosen_by_their_mean() -> None:
    dice = {"a": {"x": 0.2, "y": 0.4}, "b": {"x": 0.9}, "c": {"x": 0.5}, "none": {}}
    assert best_median_worst(dice) == {"best": "b", "median": "c", "worst": "a"}
    del dice["c"]
    assert best_median_worst(dice) == {"best": "b", "worst": "a"}
    del dice["a"]
    assert best_median_worst(dice) == {"best": "b"}


@pytest.mark.parametrize(("scheme", "paper"), [("1", (255, 255, 255)), ("0", (20, 24, 30))])
def test_a_browser_shows_organs_and_plots(
    tmp_path: Path, scheme: str, paper: tuple[int, int, int]
) -> None:
    """In light and dark; points of Dice have their colour, and organs theirs."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is missing (Debian package chromium)")
    image = np.full((30, 30, 30), WHITE_HU, np.float32)
    labels = np.zeros(image.shape, np.uint16)
    labels[8:22, 8:22, 8:22] = ORGANS.by_name("aorta").value
    picture = draw_scan(image, labels, labels, [ORGANS.by_name("aorta")], 2.0)
    results = made_up(full=False)
    chosen = best_median_worst(results["dice"])
    page, shot = tmp_path / "index.html", tmp_path / "shot.png"
    page.write_text(render(results, ORGANS, dict.fromkeys(chosen.values(), picture)), "utf-8")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1000,3200",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    pixels = np.rint(matplotlib.image.imread(shot)[..., :3] * 255).astype(int)
    assert tuple(pixels[2, 2]) == paper

    def number(colour: tuple[float, ...], within: int = 3) -> int:
        return int((np.abs(pixels - np.array(colour)).max(axis=-1) <= within).sum())

    red = np.array(ORGANS.by_name("aorta").colour)
    assert number(tuple(0.38 * red + 0.62 * 255)) > 3000
    # The text is readable: it has the colour of ink, which is far from that of the paper.
    ink = (28, 36, 48) if scheme == "1" else (227, 232, 239)
    assert number(ink) > 1000
