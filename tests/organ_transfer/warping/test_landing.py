"""What a block needs of the matches is all that has a say at its nodes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_store.arrays.boxes import shape_of
from kpt_dask.grid import Grid
from kpt_dask.matching.displacement import REACH, Field
from kpt_dask.organ_transfer.warping.landing import around, step_of

WIDTHS = 25.0, 10.0
GRID = Grid.isotropic((400, 200, 200), 2.0, (-310.5, 40.25, 7.0))


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*(st.tuples(st.integers(0, 20), st.integers(1, 3)) for _ in range(3))),
)
@settings(max_examples=40, deadline=None)
def test_fields_of_a_block_do_not_change_without_the_others(
    seed: int, ends: tuple[tuple[int, int], ...]
) -> None:
    rng = np.random.default_rng(seed)
    z, y, x = ((a, a + n) for a, n in ends)
    cells = z, y, x
    nodes = np.argwhere(np.ones([n + 1 for n in shape_of(cells)])) + [a for a, _ in cells]
    points = GRID.origin + GRID.spacing * step_of(GRID) * nodes
    position = rng.uniform(GRID.origin - 50, GRID.origin + np.array((850, 450, 450)), (400, 3))
    # Some just about as far as a match may be.
    reach = REACH * WIDTHS[0] + rng.normal(0, 1e-4, (60, 1))
    direction = rng.choice([-1.0, 0.0, 1.0], (60, 3), p=[0.2, 0.6, 0.2])
    position[:60] = points[rng.integers(0, len(points), 60)] + reach * direction
    found = Field.of(np.float32(position), np.float32(rng.normal(0, 8, position.shape)))
    near = around(found, cells, GRID, WIDTHS)
    everything = found.at(points, WIDTHS)
    np.testing.assert_array_equal(near.at(points, WIDTHS), everything)
    assert (everything[:, 3] > 0.01).any()
    assert len(near.position) < len(position)
