"""What is shown: around the body, at a level that fits, and in its place when it is packed."""

import gzip
from base64 import b64decode
from typing import Any

import nibabel
import numpy as np
import pytest
import zarr
from scipy.spatial.transform import Rotation

from kpt_dask.grid import Grid
from kpt_dask.report import display as shown
from kpt_dask.report import page, viewer
from kpt_dask.report.slices import AXIAL, CORONAL, SAGITTAL, pictures_of, slice_of
from kpt_dask.report.turntable import turntable_of

Array = np.ndarray[Any, np.dtype[Any]]
ORIGIN = (-40.0, 12.0, 7.0)


def levels_of(array: Array, n: int = 4) -> list["zarr.Array[Any]"]:
    return [
        zarr.create_array({}, data=np.ascontiguousarray(array[:: 2**k, :: 2**k, :: 2**k]))
        for k in range(n)
    ]


@pytest.fixture(scope="module")
def scan() -> tuple[Array, Array, Grid]:
    """A body on a table, with two organs, at 2 mm."""
    z, y, x = np.ogrid[:80, :100, :120]
    hu = np.full((80, 100, 120), -1000, np.float32)
    hu[((y - 40) / 30) ** 2 + ((x - 60) / 45) ** 2 + 0 * z < 1] = 40
    hu[:, 90:92, 10:110] = 200  # the table: two planes thin
    hu[5:30, 30:40, 30:50] += 300
    labels = np.zeros(hu.shape, np.uint16)
    labels[5:30, 30:40, 30:50] = 7
    labels[40:60, 45:55, 70:90] = 300
    return hu, labels, Grid.isotropic((80, 100, 120), 2.0, ORIGIN)


def test_it_shows_the_body_without_the_table(scan: tuple[Array, Array, Grid]) -> None:
    hu, labels, grid = scan
    found = shown.display_of(levels_of(hu), levels_of(labels), grid, [300, 7])
    low, high = found.grid.to_mm([0, 0, 0]), found.grid.to_mm(np.array(found.grid.shape) - 1)
    body = np.argwhere(hu[:, :85] > -300)
    least, most = grid.to_mm(body.min(axis=0)), grid.to_mm(body.max(axis=0))
    assert (low <= least).all()
    assert (high >= most).all()
    assert high[1] < grid.to_mm([0, 90, 0])[1] + 1
    # Each voxel is that of the scan at its place; organs are numbered as they were given.
    index = np.rint(grid.to_index(found.grid.to_mm(np.indices(found.tones.shape).reshape(3, -1).T)))
    z, y, x = index.astype(int).T
    np.testing.assert_array_equal(
        found.organs.ravel(), np.select([labels[z, y, x] == 300, labels[z, y, x] == 7], [1, 2])
    )
    assert np.abs(shown.hu_of_tones()[found.tones].ravel() - hu[z, y, x]).max() <= 2


def test_tones_keep_soft_tissue_apart_and_have_an_inverse() -> None:
    hu = np.arange(-1000, 1501)
    back = shown.hu_of_tones()[shown.tones_of(hu)].astype(int)
    error = np.abs(back - hu)
    assert error[(hu >= -250) & (hu <= 350)].max() <= 2
    assert error.max() <= 11
    assert (np.diff(shown.tones_of(hu).astype(int)) >= 0).all()
    assert shown.tones_of(np.array([-3000.0, 9000.0])).tolist() == [0, 255]


class Refused:
    """An array of which no voxel may be read."""

    def __init__(self, array: Any) -> None:
        self.shape = array.shape

    def __getitem__(self, region: object) -> None:
        raise AssertionError("read")


def test_a_large_body_is_read_at_a_coarser_level(scan: tuple[Array, Array, Grid]) -> None:
    hu, labels, grid = scan
    fine, organs = levels_of(hu), levels_of(labels)
    limited: Any = [Refused(fine[0]), *fine[1:]]
    limited_labels: Any = [Refused(organs[0]), *organs[1:]]
    found = shown.display_of(limited, limited_labels, grid, [7, 300], most_voxels=200_000)
    assert found.tones.size <= 200_000
    assert found.grid.spacing[0] == 4.0
    mm = found.grid.to_mm(np.argwhere(found.organs == 1).mean(axis=0))
    expected = grid.to_mm(np.argwhere(labels == 7).mean(axis=0))
    assert np.abs(mm - expected).max() <= 2


def test_what_an_oblique_scan_does_not_show_is_air(scan: tuple[Array, Array, Grid]) -> None:
    hu, labels, grid = scan
    levels = levels_of(np.full_like(hu, 40)), levels_of(labels)
    turned = grid.affine.copy()
    turned[:3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix() @ turned[:3, :3]
    source = Grid(grid.shape, turned)
    for most_voxels in (10_000_000, 200_000):
        found = shown.display_of(*levels, grid, [7, 300], most_voxels, source)
        index = source.to_index(found.grid.to_mm(np.moveaxis(np.indices(found.tones.shape), 0, -1)))
        inside = ((index >= -0.5) & (index <= np.array(source.shape) - 0.5)).all(axis=-1)
        assert inside.any()
        assert not inside.all()
        np.testing.assert_array_equal(found.tones > 0, inside)


def test_slices_lie_as_radiologists_look_at_them() -> None:
    voxels = np.zeros((5, 6, 7), np.uint8)
    voxels[4, 0, 6] = 1  # head, front, the patient's left
    assert np.argwhere(slice_of(voxels, AXIAL, 4)).tolist() == [[0, 6]]
    assert np.argwhere(slice_of(voxels, CORONAL, 0)).tolist() == [[0, 6]]
    assert np.argwhere(slice_of(voxels, SAGITTAL, 6)).tolist() == [[0, 0]]


def test_pictures_go_from_end_to_end() -> None:
    shape = (50, 6, 7)
    display = shown.Display(
        Grid.isotropic(shape, 2.0, ORIGIN), np.zeros(shape, np.uint8), np.zeros(shape, np.uint16)
    )
    some = pictures_of(display, AXIAL, 8)
    assert (some.indices[0], some.indices[-1], len(some.indices)) == (0, 49, 8)
    assert pictures_of(display, SAGITTAL, 8).indices == list(range(7))
    assert set(some.organs) == {""}


def test_the_turntable_turns_all_around() -> None:
    organs = np.zeros((20, 30, 40), np.uint16)
    assert turntable_of(organs) is None
    organs[5:15, 3:9, 5:12] = 1  # front, the patient's right
    organs[5:15, 20:28, 25:35] = 300  # back, left
    turned = turntable_of(organs, turns=4)
    assert turned is not None
    assert len(set(turned.frames)) == 4
    columns = []
    for frame in turned.frames:
        pixels = decoded(frame)
        number = pixels[..., 0].astype(int) + 256 * pixels[..., 1].astype(int)
        assert set(np.unique(number)) <= {0, 1, 300}
        assert (pixels[..., 2][number > 0] >= 60).all()
        assert (pixels[..., 2][number == 0] == 0).all()
        columns.append([np.argwhere(number == n)[:, 1].mean() for n in (1, 300)])
    # From the front the right is left, from the back it is not; from his left the front is left.
    assert columns[0][0] < columns[0][1]
    assert columns[1][0] < columns[1][1]
    assert columns[2][0] > columns[2][1]
    assert columns[3][0] > columns[3][1]


def decoded(uri: str) -> Array:
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(b64decode(uri.partition(",")[2]))))


def opened(text: str) -> Any:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(b64decode(text)))


def test_the_viewers_volumes_lie_where_the_scan_does(
    scan: tuple[Array, Array, Grid],
) -> None:
    hu, labels, grid = scan
    display = shown.display_of(levels_of(hu), levels_of(labels), grid, [7, 300])
    image = opened(viewer.scan_nifti(display, 8))
    values = image.get_fdata()
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    for k, j, i in ((0, 0, 0), (10, 30, 40), (35, 40, 60)):
        z, y, x = display.grid.to_mm([k, j, i])
        np.testing.assert_allclose(image.affine @ (i, j, k, 1), (-x, -y, z, 1), atol=1e-4)
        expected = shown.hu_of_tones()[display.tones[k, j, i]]
        assert abs(values[i, j, k] - expected) <= 4
    numbers = opened(viewer.organs_nifti(display))
    assert numbers.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(numbers.dataobj).T, display.organs)
    small = shown.around_organs(display)
    where = opened(viewer.organs_nifti(small))
    first = np.argwhere(np.asarray(where.dataobj) == 2)[0]
    whole = np.argwhere(np.asarray(numbers.dataobj) == 2)[0]
    np.testing.assert_allclose(where.affine @ (*first, 1), numbers.affine @ (*whole, 1), atol=1e-3)
    assert small.organs.size < display.organs.size / 4


def test_a_volume_that_is_too_large_for_a_page_is_made_coarser(
    scan: tuple[Array, Array, Grid],
) -> None:
    hu, labels, grid = scan
    noisy = hu + np.random.default_rng(3).normal(0, 60, hu.shape).round().astype(np.float32)
    display = shown.display_of(levels_of(noisy), levels_of(labels), grid, [7, 300])
    volumes = page._volumes(display, 200_000)
    assert sum(map(len, volumes.values())) <= 200_010
    image = opened(volumes["scan_nifti"])
    assert volumes["viewer_spacing"] == f"{image.header.get_zooms()[0]:g}" == "3"
    organs = opened(volumes["organs_nifti"])
    voxels = np.asarray(organs.dataobj)
    for number, label in ((1, 7), (2, 300)):
        middle = organs.affine @ (*np.argwhere(voxels == number).mean(axis=0), 1)
        z, y, x = grid.to_mm(np.argwhere(labels == label).mean(axis=0))
        np.testing.assert_allclose(middle[:3], (-x, -y, z), atol=1.5)
        ratio = (voxels == number).sum() * 27 / ((labels == label).sum() * 8)
        assert ratio == pytest.approx(1, abs=0.25)
