"""The pyramid's blocks against the whole volume, blurred at once."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client

from kpt_dask.volumes.omezarr import CHUNKS, create_levels
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.scale_space import next_octave_taps, octave_shapes
from tests.helpers import blurred, integer_noise
from tests.naive import keypoints


@pytest.mark.parametrize("shape", [(159, 27, 30), (258, 24, 25), (26, 265, 24)])
def test_pyramid_in_blocks_is_the_whole(
    shape: tuple[int, int, int], one_process: Client, tmp_path: Path
) -> None:
    """Bytes of the whole volume blurred at once; and the float64 reference."""
    assert shape[0] > 2 * CHUNKS[0] or shape[1] > 2 * CHUNKS[1]
    group = zarr.create_group(str(tmp_path / "volume.zarr"), zarr_format=3)
    levels = create_levels(group, octave_shapes(shape), np.float32)
    assert len(levels) >= 2
    levels[0][:] = integer_noise(shape, 4)
    fill_pyramid(levels, client=one_process)
    for octave, (fine, coarse) in enumerate(pairwise(levels)):
        source = np.asarray(fine[:])
        whole = blurred(source, next_octave_taps(octave), 16)[::2, ::2, ::2]
        assert np.asarray(coarse[:]).tobytes() == whole.tobytes()
        expected = keypoints.next_octave(source, octave == 0)
        np.testing.assert_allclose(coarse[:], expected, atol=2e-3)
