import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atlas_store import Atlas, AtlasStore, StoreFormatError, organ_strips
from atlas_store.arrays.boxes import shape_of, slices
from atlas_store.crop import WIDE
from atlas_store.organ_strips import HEADER_COLUMNS, NOT_ORGAN, STRIP, Strips, read_strips
from kpt_dask.kernels.simd import LANES
from kpt_dask.organ_transfer.likelihood import VANISHING
from kpt_dask.organ_transfer.moving.kernels import Shifts, Slab, add_shifted_organ
from tests.atlas_store.resealed import reseal
from tests.helpers import ATLASES, ORGANS, data_of, make_store
from tests.naive.stations import AnnotatedImage


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AtlasStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organ_strips, "CHUNK", 7)
        patch.setattr(organ_strips, "PLANES", 3)
        return make_store(tmp_path_factory.mktemp("strips") / "s", ATLASES)


def dense(body: AnnotatedImage, atlas: Atlas, name: str) -> NDArray[np.int16]:
    box = slices(atlas.organs[name].bounding_box)
    own = body.labels[box] == ORGANS.by_name(name).value
    return np.where(own, np.rint(body.image[box]), NOT_ORGAN).astype(np.int16)


def test_an_organ_is_what_image_and_label_map_show(
    store: AtlasStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(organ_strips, "CHUNK", 7)
    for atlas, body in zip(store.atlases(store.ids()), ATLASES, strict=True):
        shapes = {name: shape_of(info.bounding_box) for name, info in atlas.organs.items()}
        for wanted in (
            {name: [(0, shape[0])] for name, shape in shapes.items()},
            {name: [(shape[0] // 3, shape[0] - shape[0] // 3)] for name, shape in shapes.items()},
            {name: [(0, 1), (shape[0] - 1, shape[0])] for name, shape in reversed(shapes.items())},
            {name: [(1, 1)] for name in shapes},
            {name: [] for name in shapes},
        ):
            [organs] = read_strips([(atlas, wanted)], ORGANS)
            assert organs.keys() == wanted.keys()
            for name, found in organs.items():
                expected = dense(body, atlas, name)
                for z in range(shapes[name][0]):
                    if not any(first <= z < stop for first, stop in wanted[name]):
                        expected[z] = NOT_ORGAN
                filled = found.dense(shapes[name])[..., : shapes[name][2]]
                np.testing.assert_array_equal(filled, expected)
                z = np.repeat(np.arange(shapes[name][0]), np.diff(found.planes))
                own = found.values[found.planes[0] : found.planes[-1]]
                np.testing.assert_array_equal(own[:, 0], z)
                # No strip begins outside of the organ, so none is in vain.
                assert (own[:, HEADER_COLUMNS] != NOT_ORGAN).all()


def test_atlases_of_earlier_versions_give_the_same(tmp_path: Path) -> None:
    made = make_store(tmp_path / "s", ATLASES[:2])
    wanted = []
    for atlas in made.atlases(made.ids()):
        depths = {name: shape_of(info.bounding_box)[0] for name, info in atlas.organs.items()}
        wanted += [
            (atlas, {name: [(1, depth)] for name, depth in depths.items()}),
            (atlas, {name: [(0, 1), (depth - 1, depth)] for name, depth in depths.items()}),
            (atlas, {name: [] for name in depths}),
        ]
    expected = read_strips(wanted, ORGANS)
    for strips_of in (tmp_path / "s" / "atlases").glob("*/strips"):
        shutil.rmtree(strips_of)
    for atlas_id in made.ids():
        reseal(made, atlas_id)
    wanted = [(made[atlas.id], planes) for atlas, planes in wanted]
    for organs, others in zip(read_strips(wanted, ORGANS), expected, strict=True):
        assert organs.keys() == others.keys()
        for name, own in organs.items():
            ends, other = (slice(o.planes[0], o.planes[-1]) for o in (own, others[name]))
            np.testing.assert_array_equal(own.values[ends], others[name].values[other])
            starts = others[name].planes - others[name].planes[0]
            np.testing.assert_array_equal(own.planes - own.planes[0], starts)


@pytest.mark.parametrize(
    "damage",
    ["missing", "folder", "short", "long", "place", "order", "planes", "shape", "empty", "version"],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_damage_is_named(tmp_path: Path, damage: str, sealed: bool) -> None:
    made = make_store(tmp_path / "s", ATLASES[:1])
    [atlas] = made.atlases(made.ids())
    array = zarr.open_group(str(data_of(tmp_path / "s")), mode="r+")["strips"]
    assert isinstance(array, zarr.Array)
    chunk = data_of(tmp_path / "s") / "strips/c/0/0"
    if damage == "missing":
        chunk.unlink()
    elif damage == "folder":
        chunk.unlink()
        chunk.mkdir()
    elif damage == "long":
        chunk.write_bytes(chunk.read_bytes() + bytes(1))
    elif damage == "short":
        chunk.write_bytes(chunk.read_bytes()[:10])
    elif damage == "place":
        array[0, 2] = 30_000
    elif damage == "order":
        array[:] = np.asarray(array[:])[::-1]
    elif damage == "planes":
        name = next(iter(atlas.organs))
        array.update_attributes({"planes": {name: [5, 3]}})
    elif damage == "shape":
        array.resize((3, HEADER_COLUMNS + STRIP))
    elif damage == "version":
        array.update_attributes({"encoding-version": "2"})
    else:
        array.resize((0, HEADER_COLUMNS + STRIP))
    wanted = {name: [(0, shape_of(info.bounding_box)[0])] for name, info in atlas.organs.items()}
    complaint = r"strips/(c/0/0|zarr\.json) of the atlas 'a0' is (missing|damaged)"
    if sealed:
        reseal(made, "a0")
        [atlas] = made.atlases()
        complaint = "strips of the atlas 'a0' cannot be read"
        if damage == "version":
            complaint = "strips has the encoding-version '2'.*update the program"
    with pytest.raises(StoreFormatError, match=complaint):
        read_strips([(atlas, wanted)], ORGANS)


@given(
    st.tuples(*[st.integers(1, 5)] * 2, st.integers(1, 40)),
    st.tuples(*[st.integers(1, 6)] * 2, st.integers(1, 50)),
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5), st.integers(-45, 45)), max_size=4),
    st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_moved_strips_add_up_like_moved_voxels(
    shape: tuple[int, int, int],
    box: tuple[int, int, int],
    offsets: list[tuple[int, int, int]],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    organ = rng.integers(-200, 200, shape).astype(np.int16)
    organ[rng.random(shape) < 0.3] = NOT_ORGAN
    scan = rng.integers(-200, 200, box).astype(np.int16)
    weights = rng.random(len(offsets)).astype(np.float32)
    nu = 60.0
    expected = np.zeros(box)
    for weight, offset in zip(weights, offsets, strict=True):
        for voxel in np.argwhere(organ != NOT_ORGAN):
            at = tuple(voxel + offset)
            if all(0 <= i < n for i, n in zip(at, box, strict=True)):
                d = float(scan[at]) - float(organ[tuple(voxel)])
                if abs(d) < VANISHING * nu:
                    expected[at] += weight * np.exp(-(d**2) / (2 * nu**2))
    packed = (np.where(organ == NOT_ORGAN, 0, organ).astype(np.int32) << 16) | (organ != NOT_ORGAN)
    values = organ_strips._ordered(organ_strips._cut_out(packed, WIDE, 0, 1))
    share = rng.random((*box[:2], box[2] + 2 * LANES), np.float32)
    first = (7, -8, 9)
    [found] = organ_strips._planes_of(values, [(0, len(values))], [shape])
    assert found is not None
    planes, short_strips = found
    where = np.array(offsets, np.int64).reshape(-1, 3) + first
    # Of two atlases; the first one shows nothing.
    strips = Strips(
        values, np.concatenate([[0, 0], planes]), np.concatenate([[0, 0], short_strips])
    )
    sizes = np.tile(np.array(shape, np.int64), (len(offsets), 1))
    shifts = Shifts(where, sizes, np.full(len(offsets), 2), weights)
    # The scan goes on beside the share's planes and rows.
    around = np.pad(scan, ((2, 0), (3, 1), (LANES, LANES)), constant_values=7)
    slab = Slab(share, around, (2, 3), first)
    add_shifted_organ(slab, (LANES, LANES + box[2]), strips, shifts, nu)
    np.testing.assert_allclose(share[..., LANES:-LANES], expected, atol=1e-6)
