"""The one door to the modes: what is asked for is what is done."""

import pkgutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client

import kpt_dask
from atlas_store import AtlasKeypoints, AtlasStore
from kpt_dask.errors import ParameterError
from kpt_dask.options import MODES, TransferOptions
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.probability import TILING, create_probability
from kpt_dask.segmentation import segment
from kpt_dask.volumes.omezarr import create_label_image
from kpt_dask.volumes.volume import Volume
from tests.helpers import create_labels


@pytest.fixture(scope="module")
def volume(bodies: Path, tmp_path_factory: pytest.TempPathFactory) -> Volume:
    scan = kpt_dask.open_scan(bodies / "body_4_ct.nii.gz")
    return kpt_dask.convert(scan, tmp_path_factory.mktemp("modes") / "scan.zarr", spacing=4.0)


def transferred(
    volume: Volume,
    store: AtlasStore,
    path: Path,
    client: Client,
    mode: str,
    options: TransferOptions | None = None,
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Walk the stations by their public names; give the label map."""
    keypoints = kpt_dask.extract(volume, client=client)
    matches = kpt_dask.match(keypoints, AtlasKeypoints.load(store), client=client)
    votes = kpt_dask.vote(matches, keypoints.sizes["keypoint"], store.organs)
    group = zarr.create_group(str(path), attributes={"ome": volume.group.attrs["ome"]})
    probability = create_probability(group, volume.grid, store.organs, mode)
    labels = create_label_image(group, "organs", volume.grid, store.organs, TILING.shard)[0]
    options = options or TransferOptions()
    job = TransferJob(volume, store.organs, probability, labels, mode, options)
    evidence = Evidence(keypoints, matches, votes)
    kpt_dask.transfer(job, store.atlases(), evidence, client=client)
    return np.asarray(labels[...])


@pytest.mark.parametrize("mode", MODES)
def test_the_public_stations_do_what_segment_does(
    bodies: Path,
    body_store: AtlasStore,
    volume: Volume,
    tmp_path: Path,
    one_process: Client,
    mode: str,
) -> None:
    scan = bodies / "body_4_ct.nii.gz"
    whole = segment(scan, body_store, tmp_path / "whole.zarr", mode=mode, client=one_process)
    expected = zarr.open_array(str(whole.path / "labels/organs/0"), mode="r")
    found = transferred(volume, body_store, tmp_path / "stations.zarr", one_process, mode)
    np.testing.assert_array_equal(found, expected[...])
    assert np.any(found)


def test_what_cannot_be_done_is_refused(
    body_store: AtlasStore, volume: Volume, tmp_path: Path
) -> None:
    organs = body_store.organs
    group = zarr.create_group(str(tmp_path / "s.zarr"))
    probability = create_probability(group, volume.grid, organs, "local")
    labels = create_labels(group, volume.grid.shape)
    with pytest.raises(ParameterError, match="mode 'magic' is unknown"):
        TransferJob(volume, organs, probability, labels, "magic")
    across = TransferOptions(across={"spleen": ["liver"]})
    with pytest.raises(ParameterError, match="In mode local"):
        TransferJob(volume, organs, probability, labels, "local", across)


def test_public_names_stay_functions() -> None:
    """Importing a module sets its name in its package, over a function of the same name."""
    for name in kpt_dask.__all__:
        assert callable(getattr(kpt_dask, name)), name
    modules = {module.name for module in pkgutil.iter_modules(kpt_dask.__path__)}
    assert modules.isdisjoint(kpt_dask.__all__)
