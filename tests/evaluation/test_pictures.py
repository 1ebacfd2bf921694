"""Pictures of judged scans: outlines against their masks, slices against the volume."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path as Polygon

from atlas_store import load_organs
from kpt_dask.evaluation.pictures import AROUND_MM, WINDOW, draw_scan, outline

ORGANS = load_organs("visceral")


def filled(path: str, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centres lie within an odd number of the rings of a path."""
    rows, columns = np.indices(shape)
    centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
    inside = np.zeros(centres.shape[0], bool)
    for ring in re.findall(r"M([^MZ]*)Z", path):
        points = np.array(ring.split(), float).reshape(-1, 2)
        inside ^= Polygon(np.vstack([points, points[:1]])).contains_points(centres)
    return inside.reshape(shape)


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9)))
@settings(max_examples=60, deadline=None)
def test_an_outline_holds_the_pixels_of_its_mask(mask: np.ndarray) -> None:
    assert (filled(outline(mask), mask.shape) == mask).all()


@given(st.integers(0, 2**16))
@settings(max_examples=5, deadline=None)
def test_slices_are_seen_as_radiologists_see_them(seed: int) -> None:
    """Each view is read back: pixels, and the masks of reference and result."""
    rng = np.random.default_rng(seed)
    shape, spacing = (60, 40, 50), 4.0
    image = rng.integers(-160, 240, shape).astype(np.float32)
    reference, found = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    liver = ORGANS.by_name("liver")
    reference[20:30, 12:20, 15:30] = liver.value
    found[22:33, 10:19, 15:31] = liver.value
    drawn = draw_scan(image, reference, found, [liver], spacing)
    margin = int(np.ceil(AROUND_MM / spacing))
    z, y, x = (
        slice(20 - margin, 33 + margin),
        slice(10 - margin, 20 + margin),
        slice(15 - margin, 31 + margin),
    )
    # All planes of the box show as much of the organ; the first is taken.
    expected = {
        "coronal": (z, 12, x),
        "sagittal": (z, y, 15),
        "axial": (20, y, x),
    }
    views = ElementTree.fromstring(f"<body>{drawn}</body>")
    for view, region in zip(views, expected.values(), strict=True):
        upside_down = region[0] != 20
        planes = [a[region][::-1] if upside_down else a[region] for a in (image, reference, found)]
        picture = view.find("image")
        assert picture is not None
        png = base64.b64decode(picture.attrib["href"].partition(",")[2])
        grey = matplotlib.image.imread(io.BytesIO(png))[..., 0]
        assert np.abs(grey - (planes[0] - WINDOW[0]) / np.ptp(WINDOW)).max() < 0.01
        paths = {path.attrib["class"]: path.attrib["d"] for path in view.findall("path")}
        assert (filled(paths["reference"], grey.shape) == (planes[1] > 0)).all()
        shown = filled(paths["found"], grey.shape) if "found" in paths else planes[2] * 0
        assert (shown == (planes[2] > 0)).all()
        name, letters = view.attrib["aria-label"], [text.text for text in view.findall("text")]
        assert letters == (["A", "P"] if "sagittal" in name else ["R", "L"]) + (
            ["A", "P"] if "axial" in name else ["H", "F"]
        )


def test_a_picture_without_organs_shows_the_middle() -> None:
    image = np.zeros((6, 5, 4), np.float32)
    nothing = np.zeros(image.shape, np.uint16)
    drawn = draw_scan(image, nothing, nothing, [ORGANS.by_name("liver")], 2.0)
    assert drawn.count("<image") == 3
    assert "<path" not in drawn
