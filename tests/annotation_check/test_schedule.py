"""Wrong annotations of real patients are found in a store, which stays as it is."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result
from distributed import Client
from matplotlib import image

from atlas_store import AtlasNotFoundError, AtlasStore
from kpt_dask.annotation_check.schedule import check_atlases, population
from kpt_dask.atlases.add import add_atlas
from kpt_dask.cli.main import kpt
from kpt_dask.errors import OutputExistsError
from kpt_dask.exports import export_atlas
from kpt_dask.scans.pairs import Pair, find_pairs
from tests.helpers import Array

ROOT = Path(__file__).parents[2]
SIDES = np.array([0, 1, 2, 4, 3, 5, 6, 7], np.uint8)
"""Values of the openkbp table with the parotids swapped."""


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(kpt, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def altered(pair: Pair, folder: Path, labels: Any = None, scan: Any = None) -> tuple[Path, Path]:
    """Write the scan and the labels of a patient, changed by functions of their voxels."""
    paths = []
    for source, change in ((pair.scan, scan), (pair.labels, labels)):
        given: Any = nibabel.load(source)
        values = np.asarray(given.dataobj)
        paths.append(folder / f"altered_{Path(source).name}")
        changed = values if change is None else change(values).astype(values.dtype)
        nibabel.save(given.__class__(changed, given.affine), paths[-1])
    return paths[0], paths[1]


def noisy(values: Array) -> Array:
    noise: Array = values + np.random.default_rng(0).normal(0, 15, values.shape)
    return noise.round()


def content(folder: str) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def wrong(
    openkbp: Path,
    patients: AtlasStore,
    tmp_path_factory: pytest.TempPathFactory,
    one_process: Client,
) -> AtlasStore:
    """Six patients, of whom the second has its sides swapped and the fourth is there twice."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(patients.url, folder / "store")
    store = AtlasStore.open(folder / "store")
    pairs = find_pairs(openkbp)
    scan, labels = altered(pairs[1], folder, labels=lambda values: SIDES[values])
    add_atlas(store, scan, labels, atlas_id=pairs[1].id, replace=True, client=one_process)
    scan, labels = altered(pairs[3], folder, scan=noisy)
    add_atlas(store, scan, labels, atlas_id="again", client=one_process)
    return store


def test_a_small_store_names_swapped_sides_and_patients_who_are_there_twice(
    wrong: AtlasStore, openkbp: Path, tmp_path: Path, one_process: Client
) -> None:
    before = content(wrong.url)
    pairs = find_pairs(openkbp)
    page = tmp_path / "doubts.html"
    told = run("atlas", "check", wrong.url, "--html", page, "--json", code=1)
    assert "should be looked at" in told.stderr
    answer = json.loads(told.stdout)
    found = {(one["atlas"], one["kind"]): one for one in answer["findings"]}
    expected = {(pairs[1].id, "swapped"), (pairs[3].id, "same_patient"), ("again", "same_patient")}
    assert set(found) == expected
    assert found[pairs[1].id, "swapped"]["organs"] == ["parotid_right", "parotid_left"]
    assert pairs[3].id in found["again", "same_patient"]["sentence"]
    assert "takes 10 to know what is usual" in answer["unchecked"][0]
    assert content(wrong.url) == before
    # A page for which a browser needs nothing else.
    html = page.read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == len(expected)
    assert not re.search(r'(src|href)="(?!data:)', html)
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(base64.b64decode(picture))
        pixels = image.imread(tmp_path / f"{number}.png")[..., :3]
        # Outlines are coloured, and the scan is grey.
        assert np.count_nonzero(np.ptp(pixels, axis=2) > 0.2) > 200
    with pytest.raises(OutputExistsError):
        check_atlases(wrong, page=page, client=one_process)


def test_an_atlas_that_is_not_there_is_an_error(body_store: AtlasStore) -> None:
    with pytest.raises(AtlasNotFoundError, match="no atlas nobody"):
        check_atlases(body_store, ["body_1", "nobody"])


def test_references_are_spread_over_the_store() -> None:
    ids = [str(i) for i in range(200)]
    chosen = population(["7"], ids)
    assert chosen[0] == "7"
    assert len(set(chosen)) == len(chosen) == 21
    assert {"0", "199"} <= set(chosen)
    assert population(ids, ids) == ids
    assert population(["a"], ["a", "b"]) == ["a", "b"]


def test_a_store_on_s3_is_checked_as_one_on_disk(
    body_store: AtlasStore, bucket: str, one_process: Client
) -> None:
    store = AtlasStore.create(f"{bucket}/checked", body_store.organs, body_store.parameters)
    for atlas in body_store.atlases():
        store.copy_from(atlas, atlas.id)
    there = check_atlases(store, client=one_process)
    assert (there.checked, there.findings) == (("body_1", "body_2", "body_3"), ())
    here = run("atlas", "check", body_store.url)
    assert "3 atlases checked, nothing unusual" in here.stdout
    assert there.unchecked[0].split(" has ")[1] in here.stdout


@pytest.fixture(scope="module")
def dozen(patients: AtlasStore, tmp_path_factory: pytest.TempPathFactory) -> AtlasStore:
    """Six patients, each of them twice."""
    url = tmp_path_factory.mktemp("dozen") / "store"
    shutil.copytree(patients.url, url)
    store = AtlasStore.open(url)
    for atlas in store.atlases():
        store.copy_from(atlas, f"{atlas.id}_again")
    return store


def test_a_new_atlas_is_doubted_when_it_is_added(
    dozen: AtlasStore, openkbp: Path, tmp_path: Path
) -> None:
    pair = find_pairs(openkbp)[12]
    scan, labels = altered(pair, tmp_path, labels=lambda values: SIDES[values])
    added = run("atlas", "add", dozen.url, scan, labels, "--id", "new", "--json")
    [doubt] = json.loads(added.stdout)["warnings"]
    assert doubt.startswith("new: left and right are swapped")
    assert f"kpt: warning: {doubt}" in added.stderr
    silent = run(
        "atlas", "add", dozen.url, scan, labels, "--id", "new", "--overwrite", "--no-check"
    )
    assert "warning" not in silent.stderr


def test_new_labels_are_doubted_as_a_new_atlas_is(dozen: AtlasStore, tmp_path: Path) -> None:
    name = dozen.ids()[-1]
    _, labels = export_atlas(dozen[name], tmp_path)
    given: Any = nibabel.load(labels)
    swapped = tmp_path / "swapped.nii.gz"
    nibabel.save(given.__class__(SIDES[np.asarray(given.dataobj)], given.affine), swapped)
    told = run("atlas", "relabel", dozen.url, name, swapped)
    assert f"kpt: warning: {name}: left and right are swapped" in told.stderr
    silent = run("atlas", "relabel", dozen.url, name, swapped, "--no-check")
    assert "left and right" not in silent.stderr


def test_a_part_of_the_campaign_of_wrong_annotations(patients: AtlasStore) -> None:
    script = ROOT / "scripts" / "campaign_annotations.py"
    faults = ["left and right swapped", "another table's numbers"]
    arguments = ["--store", patients.url, "--injections", "1", "--faults", *faults]
    told = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True
    ).stdout
    report = told.split("check, odd positions")[1].split("add, odd")[0]
    assert report.startswith(", limit 4.5: 0 false alarms in 3 atlases")
    for fault in faults:
        assert f"{fault}: 1 of 1" in report
    assert "same patient, noise and a shift: 1 of 1 found" in told
