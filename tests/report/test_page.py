"""The page in a browser: what is seen at known voxels, which side is left, and what can be done."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import zarr
from scipy import ndimage

from atlas_store import AtlasStore, load_organs
from atlas_store.arrays import chunk_io
from kpt_dask.report.viewer import find_viewer
from kpt_dask.report.writing import write_report
from tests.report.conftest import Browse

ORGANS = load_organs("visceral")

LOOK = """
await kptPage.ready;
const opacity = document.getElementById("opacity");
opacity.value = 100;
opacity.dispatchEvent(new Event("input"));
const pixel = (panel) => {
  const at = kptPage.place;
  const data = panel.canvas.getContext("2d").getImageData(
    at[panel.columns], panel.row(at[panel.rows]), 1, 1).data;
  return [...data.slice(0, 3)];
};
const at = async (mm) => {
  const { origin, spacing } = kptPage.data;
  kptPage.go(mm.map((c, a) => Math.round((c - origin[a]) / spacing)), "");
  await Promise.all(kptPage.panels.map((panel) => panel.draw()));
  return kptPage.panels.map(pixel);
};
"""


def inner_points(out: Path) -> dict[str, list[float]]:
    """A voxel well inside each organ, (z, y, x) in mm: the deepest of the label map."""
    group = zarr.open_group(str(out), mode="r")
    labels = np.asarray(group["labels/organs/0"])
    ome: Any = group.attrs["ome"]
    scale, shift = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    points = {}
    for organ in ORGANS:
        depth = ndimage.distance_transform_edt(labels == organ.value)
        if depth.max() > 2:
            deepest = np.unravel_index(depth.argmax(), depth.shape)
            points[organ.name] = [
                float(n * s + t)
                for n, s, t in zip(deepest, scale["scale"], shift["translation"], strict=True)
            ]
    assert len(points) >= 6
    return points


def test_pixels_at_known_voxels_have_the_organs_colour_and_right_is_left(
    segmented: Path, browse: Browse
) -> None:
    points = inner_points(segmented / "out.zarr")
    script = f"""{LOOK}
    const points = {points!r};
    const seen = {{}}, places = {{}}, hidden = {{}};
    for (const [name, mm] of Object.entries(points)) {{
      seen[name] = await at(mm);
      places[name] = [...kptPage.place];
    }}
    document.getElementById("none").click();
    for (const [name, mm] of Object.entries(points)) hidden[name] = await at(mm);
    document.getElementById("all").click();
    const side = (letter) => [...document.querySelectorAll("[data-view='0'] .letter")]
      .find((one) => one.textContent === letter).getBoundingClientRect().left;
    await kptPage.turntable.draw();
    const solid = document.querySelector("#turntable canvas");
    const data = solid.getContext("2d").getImageData(0, 0, solid.width, solid.height).data;
    let light = 0;
    for (let i = 0; i < data.length; i += 4) light += data[i] + data[i + 1] + data[i + 2] > 60;
    light /= data.length;
    return {{ seen, places, hidden, right: side("R"), left: side("L"), light }};
    """
    answer = browse(segmented / "out.html", script)
    # As they lie on the canvas, for kidneys are a pair: columns count from the left.
    columns = {name: place[2] for name, place in answer["places"].items()}
    for name in points:
        assert answer["seen"][name] == [list(ORGANS.by_name(name).colour)] * 3, name
        for red, green, blue in answer["hidden"][name]:
            assert red == green == blue, name
    assert columns["kidney_right"] < columns["kidney_left"]
    assert columns["lung_right"] < columns["lung_left"]
    assert points["kidney_right"][2] < points["kidney_left"][2]  # LPS: x grows to the left
    assert answer["right"] < answer["left"]
    assert answer["light"] > 0.02


def test_it_can_be_used_by_keys_and_by_ear(segmented: Path, browse: Browse) -> None:
    script = """
    await kptPage.ready;
    const focusable = "button, input, select, summary, a[href], [tabindex='0']";
    const nameless = [...document.querySelectorAll(focusable)].filter((one) => !(
      one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length));
    const silent = [...document.querySelectorAll("img:not([alt]), canvas:not([aria-label])")];
    const heads = [...document.querySelectorAll("th:not([scope])")];
    const slider = document.querySelector("[data-view='0'] input");
    const before = [slider.getAttribute("aria-valuetext"), kptPage.place[0]];
    slider.value = Number(slider.value) - 3;
    slider.dispatchEvent(new Event("input"));
    await Promise.all(kptPage.panels.map((panel) => panel.draw()));
    const after = [slider.getAttribute("aria-valuetext"), kptPage.place[0]];
    const canvas = kptPage.panels[0].canvas, box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new PointerEvent("pointerdown", {
      clientX: box.left + box.width / 4, clientY: box.top + box.height / 2, bubbles: true }));
    const pointed = kptPage.place.map((index, axis) => index / kptPage.data.shape[axis]);
    const rows = [...document.querySelectorAll("tr[data-number]")];
    const confidence = rows.map((row) => parseFloat(row.cells[2].textContent));
    const last = rows[rows.length - 1];
    last.querySelector(".go").click();
    const said = document.getElementById("said").textContent;
    const organ = kptPage.data.organs.find((one) => one.number === Number(last.dataset.number));
    return {
      nameless: nameless.length, silent: silent.length, heads: heads.length, before, after,
      confidence, said, organ, pointed, place: kptPage.place,
      open: [...document.querySelectorAll("details[open]")].map((one) => one.id),
      wide: document.documentElement.scrollWidth, window: innerWidth,
      patches: document.querySelectorAll(".pair img").length,
    };
    """
    answer = browse(segmented / "out.html", script, 500)
    assert (answer["nameless"], answer["silent"], answer["heads"]) == (0, 0, 0)
    assert answer["before"] != answer["after"]
    assert answer["after"][1] < answer["before"][1]
    assert answer["pointed"][1:] == pytest.approx([0.5, 0.25], abs=0.02)
    assert answer["confidence"] == sorted(answer["confidence"])
    assert answer["place"] == answer["organ"]["centre"]
    assert answer["said"].startswith(answer["organ"]["label"])
    assert answer["open"] == [f"why-{answer['organ']['number']}"]
    assert answer["patches"] >= 20
    # Nothing sticks out to the right of a narrow window.
    assert answer["wide"] <= answer["window"]


class Addresses(HTMLParser):
    """What the elements of a page refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "srcset", "action", "data", "poster")
        self.found += [value or "" for name, value in attrs if name in names]


def test_a_page_refers_to_nothing_outside_of_it(segmented: Path) -> None:
    text = (segmented / "out.html").read_text("utf-8")
    page = Addresses()
    page.feed(text)
    assert page.found
    assert [one for one in page.found if not one.startswith(("data:image/", "#"))] == []
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert "npm pack @niivue/niivue" in text


def test_a_page_made_later_is_the_same_but_for_the_volumes(
    segmented: Path, body_store: AtlasStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(segmented / "cache"))
    monkeypatch.delenv("KPT_VIEWER", raising=False)
    out = segmented / "out.zarr"
    for name in ("a.html", "b.html"):
        write_report(out, tmp_path / name, store=body_store)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    run = re.compile(r"Volumes on the .*")
    one, other = (
        run.sub("", path.read_text("utf-8"))
        for path in (tmp_path / "a.html", segmented / "out.html")
    )
    # The grids are the same here, so only the words differ.
    assert one == other
    write_report(out, tmp_path / "alone.html")
    alone = (tmp_path / "alone.html").read_text("utf-8")
    assert "name their store by kpt report --store" in alone
    assert "around the matched keypoint" not in alone


def test_names_from_outside_are_shown_and_do_nothing(segmented: Path, tmp_path: Path) -> None:
    shutil.copytree(segmented / "out.zarr", tmp_path / "out.zarr")
    group = zarr.open_group(str(tmp_path / "out.zarr"), mode="r+")
    about: Any = group.attrs["kpt"]
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    about["source"]["file"] = evil
    about["segmentation"]["atlases"][0] = evil
    about["warnings"] = [evil]
    group.update_attributes({"kpt": about})
    write_report(tmp_path / "out.zarr", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text
    assert "<script>alert" not in text


def test_a_scan_without_organs_and_keypoints_has_a_page_too(
    segmented: Path, browse: Browse, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    shutil.copytree(segmented / "out.zarr", out)
    group = zarr.open_group(str(out), mode="r+")
    about: Any = group.attrs["kpt"]
    nothing = {"volume_ml": 0.0, "interval_ml": [0.0, 0.0], "at_border": False, "confidence": 0.0}
    nothing |= {"mean_hu": None, "centroid": None, "extent": None, "votes": 0, "spread_mm": None}
    made = about["segmentation"]
    made["organs"] = dict.fromkeys(made["organs"], nothing)
    made["weights"] = {name: [0.0] * len(made["atlases"]) for name in made["weights"]}
    group.update_attributes({"kpt": about})
    for name in ("keypoints", "matches", "votes"):
        table: Any = group[name]
        for array, found in list(table.arrays()):
            empty = np.zeros((0, *found.shape[1:]), found.dtype)
            table.create_array(array, data=empty, chunks=(1, *found.shape[1:]), overwrite=True)
    image: Any = group["labels/organs"]
    for _, labels in image.arrays():
        chunk_io.write_empty(labels)
    write_report(out, tmp_path / "page.html", picture=tmp_path / "picture.png")
    script = "await kptPage.ready; return document.querySelectorAll('tr[data-number]').length;"
    assert browse(tmp_path / "page.html", script) == 0
    assert "Not found: liver, spleen" in (tmp_path / "page.html").read_text("utf-8")


def test_the_picture_fits_a_slide_and_shows_the_organs(segmented: Path) -> None:
    picture = matplotlib.image.imread(segmented / "out.png")[..., :3]
    assert picture.shape == (900, 1600, 3)
    for name in ("liver", "lung_left", "kidney_right"):
        colour = np.array(ORGANS.by_name(name).colour) / 255
        assert (np.abs(picture - colour).max(axis=-1) < 0.01).sum() > 100, name
    # The body fills it: some of its grey lies near the upper and the lower edge.
    lit = np.flatnonzero((picture.max(axis=-1) > 0.3).any(axis=1))
    assert lit[-1] - lit[0] > 0.8 * 900


def test_pictures_are_shown_where_the_viewer_cannot_be(
    segmented: Path, browse: Browse, tmp_path: Path
) -> None:
    viewer = tmp_path / "niivue.umd.js"
    viewer.write_text("self.niivue = {};")
    write_report(segmented / "out.zarr", tmp_path / "page.html", viewer=viewer)
    script = """
    await kptViewer;
    await kptPage.ready;
    const seen = (element) => element.getBoundingClientRect().height > 50;
    const slider = document.querySelector("[data-view='0'] input");
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    return {
      viewer: seen(document.getElementById("viewer")),
      pictures: [...document.querySelectorAll(".stage")].map(seen),
      note: document.getElementById("no-viewer").textContent,
      place: kptPage.place[0],
    };
    """
    answer = browse(tmp_path / "page.html", script)
    assert not answer["viewer"]
    assert answer["pictures"] == [True] * 4
    assert "these are pictures" in answer["note"]
    assert answer["place"] == 0


VIEWED = """
await kptViewer;
const shown = (id) => {
  const gl = document.getElementById(id);
  const canvas = document.createElement("canvas");
  canvas.width = gl.width;
  canvas.height = gl.height;
  const context = canvas.getContext("2d");
  kptScenes[id].drawScene();
  context.drawImage(gl, 0, 0);
  return context.getImageData(0, 0, gl.width, gl.height);
};
const like = (image, [r, g, b]) => {
  let n = 0, column = 0;
  for (let i = 0; i < image.data.length; i += 4) {
    const p = image.data[i], q = image.data[i + 1], s = image.data[i + 2];
    // By hue: light falls on it, and the scan shines through.
    const size = Math.hypot(p, q, s) * Math.hypot(r, g, b);
    if (Math.max(p, q, s) > 60 && (p * r + q * g + s * b) / size > 0.99) {
      n += 1;
      column += (i / 4) % image.width;
    }
  }
  return [n, column / n / image.width];
};
"""


def test_niivue_shows_the_organs_in_planes_and_in_3d(
    segmented: Path, body_store: AtlasStore, browse: Browse, tmp_path: Path
) -> None:
    viewer = find_viewer()
    if viewer is None:
        pytest.skip("NiiVue is missing: run npm pack @niivue/niivue, and name it by KPT_VIEWER")
    page = tmp_path / "page.html"
    write_report(segmented / "out.zarr", page, store=body_store)
    assert page.stat().st_size < 15e6
    points = inner_points(segmented / "out.zarr")
    colours = {name: list(ORGANS.by_name(name).colour) for name in points}
    script = f"""{VIEWED}
    const opacity = document.getElementById("opacity");
    opacity.value = 100;
    opacity.dispatchEvent(new Event("input"));
    const colours = {colours!r}, points = {points!r};
    const {{ origin, spacing }} = kptPage.data;
    const answer = {{}};
    for (const name of ["liver", "spleen", "lung_right", "lung_left"]) {{
      kptPage.go(points[name].map((c, a) => Math.round((c - origin[a]) / spacing)), "");
      answer[name] = [like(shown("planes"), colours[name]), like(shown("solid"), colours[name])];
    }}
    document.getElementById("none").click();
    answer.hidden = like(shown("planes"), colours.lung_left);
    return answer;
    """
    answer = browse(page, script, 720, 600)
    for name in ("liver", "lung_right", "lung_left"):
        planes, solid = answer[name]
        assert planes[0] > 200, name
        assert solid[0] > 100, name
    assert answer["liver"][1][1] < answer["spleen"][1][1]
    assert answer["lung_right"][1][1] < answer["lung_left"][1][1]
    assert answer["hidden"][0] < 20
