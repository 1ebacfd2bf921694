"""Keypoints of a volume: their place and size, whatever memory and workers there are."""

from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from kpt_dask.errors import ParameterError
from kpt_dask.grid import Grid
from kpt_dask.keypoints.extraction import (
    extract,
)
from kpt_dask.runtime import progress
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.volume import Volume, create_volume
from tests.keypoints.common import found_in


@pytest.mark.parametrize("descriptor", ["upright", "invariant"])
def test_memory_and_workers_change_nothing(
    head: Volume, one_process: Client, two_processes: Client, descriptor: str
) -> None:
    whole = extract(head, descriptor=descriptor, client=one_process)
    assert whole.sizes["keypoint"] > 150
    assert whole.identical(
        extract(head, descriptor=descriptor, memory=40 << 20, client=one_process)
    )
    distributed = extract(head, descriptor=descriptor, memory=70 << 20, client=two_processes)
    assert whole.identical(distributed)
    for name in whole:
        assert whole[name].values.tobytes() == distributed[name].values.tobytes()


def test_too_little_memory_is_refused(head: Volume, one_process: Client) -> None:
    with pytest.raises(ParameterError, match="--memory"):
        extract(head, memory=1 << 20, client=one_process)


def test_dataset_says_where_and_how_large(
    crop: np.ndarray, tmp_path: Path, one_process: Client
) -> None:
    grid = Grid.isotropic(crop.shape, 2.5, (-100, 20, 33))
    volume = create_volume(tmp_path / "v.zarr", grid, grid, name="crop")
    rng = np.random.default_rng(0)
    for level in volume.levels:
        level[:] = rng.integers(-1000, 1000, level.shape)
    keypoints = extract(volume, client=one_process)
    assert {k: (v.dims, v.dtype.str) for k, v in keypoints.data_vars.items()} == {
        "position": (("keypoint", "axis"), "<f4"),
        "scale": (("keypoint",), "<f4"),
        "sign": (("keypoint",), "|i1"),
        "response": (("keypoint",), "<f4"),
        "octave": (("keypoint",), "|u1"),
        "descriptor": (("keypoint", "bin"), "|u1"),
        "frame": (("keypoint", "direction", "axis"), "<f4"),
    }
    np.testing.assert_array_equal(np.abs(keypoints.sign), 1)
    for octave, level in enumerate(volume.levels):
        own = keypoints.isel(keypoint=keypoints.octave.values == octave)
        found = found_in(np.asarray(level[:]), octave)
        voxels = (found.voxel + found.offset[:, :3]) * 2**octave
        np.testing.assert_allclose(own.position, voxels * 2.5 + (-100, 20, 33), atol=1e-4)
        sigma = 1.6 * 2 ** (octave + (found.level + found.offset[:, 3]) / 3)
        np.testing.assert_allclose(own.scale, 2.5 * sigma, rtol=1e-6)
        np.testing.assert_array_equal(own.response, found.response)
        np.testing.assert_array_equal(own.descriptor, found.descriptor)


@pytest.mark.parametrize("spread", [3.0, 4.5, 6.0, 8.5, 12.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_isolated_blob_is_found_at_its_centre_and_scale(
    spread: float, sign: int, tmp_path: Path, one_process: Client
) -> None:
    """Over two octaves; the difference of Gaussians of a 3-D Gaussian peaks at 0.727 spreads."""
    n = 97
    centre = np.array([48.3, 47.8, 48.0])
    squared = ((np.indices((n, n, n)).T - centre) ** 2).sum(axis=-1).T
    grid = Grid.isotropic((n, n, n), 1.0, (0, 0, 0))
    volume = create_volume(tmp_path / "v.zarr", grid, grid, name="blob")
    volume.levels[0][:] = -500 + sign * 400 * np.exp(-squared / (2 * spread**2))
    fill_pyramid(volume.levels, client=one_process)
    keypoints = extract(volume, client=one_process)
    strongest = keypoints.isel(keypoint=int(np.argmax(np.abs(keypoints.response.values))))
    np.testing.assert_allclose(strongest.position, centre, atol=0.1 * 2 ** int(strongest.octave))
    # A blob is a minimum of G(κσ) − G(σ) where it is bright.
    assert int(strongest.sign) == -sign
    assert float(strongest.scale) == pytest.approx(0.727 * np.sqrt(spread**2 - 0.25), rel=0.05)


@pytest.mark.parametrize("spread", [1.5, 2.0])
def test_a_small_blob_is_found_in_the_finer_octave(
    spread: float, tmp_path: Path, one_process: Client
) -> None:
    centre = np.array([16.3, 15.8, 16.0])
    squared = ((np.indices((33, 33, 33)).T - centre) ** 2).sum(axis=-1).T
    grid = Grid.isotropic((33, 33, 33), 2.0, (5, 6, 7))
    volume = create_volume(tmp_path / "v.zarr", grid, grid, name="blob")
    volume.levels[0][:] = 400 * np.exp(-squared / (2 * spread**2))
    fill_pyramid(volume.levels, client=one_process)
    keypoints = extract(volume, finer=True, client=one_process)
    strongest = keypoints.isel(keypoint=int(np.argmax(np.abs(keypoints.response.values))))
    assert int(strongest.octave) == 0
    np.testing.assert_allclose(strongest.position, 2 * centre + (5, 6, 7), atol=0.2)
    assert float(strongest.scale) == pytest.approx(1.454 * np.sqrt(spread**2 - 0.25), rel=0.06)
    whole = extract(volume, client=one_process)
    later = keypoints.isel(keypoint=keypoints.octave.values > 0)
    np.testing.assert_array_equal(later.position, whole.position)
    np.testing.assert_array_equal(later.scale, whole.scale)


def test_compiling_has_a_name_of_its_own(one_process: Client, head: Volume) -> None:
    with progress.recorded() as seconds:
        extract(head, client=one_process)
    assert "Compiling kernels, once on this machine" in seconds
