"""Bodies that differ in size as people do: the field through their matches finds it."""

from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from atlas_store import AtlasKeypoints, AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import PERIOD, make_phantom, write_phantom
from kpt_dask.demo.phantom.subject import make_subject
from kpt_dask.keypoints.extraction import extract
from kpt_dask.matching.displacement import Field
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.second_pass import rematch
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert

SHAPE, SPACING = (150, 80, 96), 4.0
SPREAD = 0.12
SEEDS = 2, 4, 8
"""Of the atlases; the scan is seed 1."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, one_process: Client) -> AtlasStore:
    folder = tmp_path_factory.mktemp("sizes")
    made = AtlasStore.create(folder / "s", load_organs("visceral"), store_parameters(SPACING))
    for seed in SEEDS:
        scan, labels = folder / f"{seed}_ct.nii.gz", folder / f"{seed}_seg.nii.gz"
        write_phantom(scan, labels, seed, SHAPE, SPACING, size_spread=SPREAD)
        add_atlas(made, scan, labels, atlas_id=f"body_{seed}", client=one_process)
    return made


def test_the_field_brings_organs_of_other_bodies_to_where_they_lie(
    tmp_path: Path, store: AtlasStore, one_process: Client
) -> None:
    write_phantom(
        tmp_path / "ct.nii.gz", tmp_path / "seg.nii.gz", 1, SHAPE, SPACING, size_spread=SPREAD
    )
    volume = convert(open_scan(tmp_path / "ct.nii.gz"), tmp_path / "ct.zarr", spacing=SPACING)
    keypoints = extract(volume, client=one_process)
    atlases = AtlasKeypoints.load(store)
    matches = match(keypoints, atlases, client=one_process)
    again = rematch(keypoints, atlases, matches, client=one_process)
    _, labels, grid = make_phantom(1, SHAPE, SPACING, size_spread=SPREAD)
    height = SHAPE[0] * SPACING
    scan = make_subject(1, height, SPREAD).motion
    x = grid.to_mm(np.argwhere(labels > 0)[::97])
    # Above this height the next body begins.
    x = x[scan.to_template(x)[:, 0] < PERIOD]
    for a, seed in enumerate(SEEDS):
        # The same place of the template in both bodies.
        true = x - make_subject(seed, height, SPREAD).motion.to_world(scan.to_template(x))
        own = matches.atlas.values == a
        translation = np.median(matches.translation.values[own], axis=0)
        before = np.linalg.norm(true - translation, axis=1)
        own = again.atlas.values == a
        field = Field.of(
            keypoints.position.values[again.keypoint.values[own]], again.translation.values[own]
        )
        after = np.linalg.norm(true - field.at(x)[:, :3], axis=1)
        assert np.median(before) > 15
        assert np.median(after) < 8
        assert np.percentile(after, 90) < 14
