#!/usr/bin/env python
"""How long the transfer takes in every mode, against extracting the same scan's keypoints.

Phantoms of the size of the paper's ceCT (C, ten organs, 19 atlases) are made in a temporary
folder; with a store of real patients (--store, from `kpt atlas add-folder`) a patient is
segmented by 19 and by 100 others too. All figures come from one run; times are medians. What
a mode does after the first matching counts as its transfer: `local` matches a second time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from benchmark_extraction import C, Shape, timed
from distributed import Client

from atlas_store import AtlasKeypoints, AtlasStore, load_organs
from kpt_dask import cluster, demo, local
from kpt_dask.atlases import add_atlas, store_parameters
from kpt_dask.keypoints import extract
from kpt_dask.matching import match
from kpt_dask.options import DEFAULTS, MODES
from kpt_dask.phantom import write_phantom
from kpt_dask.rematching import rematch
from kpt_dask.scan import open_scan
from kpt_dask.shares import create_probability
from kpt_dask.surroundings import surroundings_of
from kpt_dask.transfer import transfer
from kpt_dask.volume import Volume, convert, open_volume
from kpt_dask.voting import vote

FEW, MANY = 19, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--store", metavar="STORE", help=f"real patients, at least {MANY + 1}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two tiny atlases: a smoke test")
    options = parser.parse_args()
    shape: Shape = (100, 80, 96) if options.quick else C
    few, repeats = (2, 1) if options.quick else (FEW, options.repeats)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"Making {few} phantom atlases …", file=sys.stderr)
        store, volume = phantoms(folder, shape, few)
        ids = store.ids()
        seconds: dict[int, dict[str, float]] = {}
        for threads in (1, os.cpu_count() or 1):
            with cluster.local(threads) as client:
                seconds[threads] = measure(volume, store, ids, folder, repeats, client)
        one, all_cores = seconds[1], seconds[os.cpu_count() or 1]
        for mode in MODES:
            figures[f"{mode}_over_extraction_C"] = all_cores[mode] / all_cores["extraction"]
            figures[f"two_core_speedup_{mode}_C"] = one[mode] / all_cores[mode]
        figures["seconds_C"] = all_cores
        figures["seconds_C_1_thread"] = one
        touched = {"surroundings": surroundings(store, ids), "organs": organs(store, ids)}
        for mode in MODES:
            what = "surroundings" if mode == "local" else "organs"
            copied = seconds_to_copy(touched[what])
            figures[f"bytes_of_{what}_C"] = touched[what]
            figures[f"{mode}_over_copying_the_{what}"] = all_cores[mode] / copied
        if options.store:
            figures |= real(AtlasStore.open(options.store), folder, repeats)
    for key, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.3f}" for k, v in value.items())
        print(f"{key:38} {value if isinstance(value, str) else format(value, '.4g')}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def phantoms(folder: Path, shape: Shape, count: int) -> tuple[AtlasStore, Volume]:
    """Make a store, and the volume of another phantom."""
    organs = load_organs(demo.ORGANS)
    store = AtlasStore.create(folder / "atlases", organs, store_parameters())
    scan, labels = folder / "scan.nii.gz", folder / "labels.nii.gz"
    for seed in range(1, count + 1):
        write_phantom(scan, labels, seed, shape, 2.0, overwrite=True)
        add_atlas(store, scan, labels, atlas_id=f"phantom_{seed}")
    write_phantom(scan, labels, count + 1, shape, 2.0, overwrite=True)
    return store, convert(open_scan(scan), folder / "scan.zarr")


def real(store: AtlasStore, folder: Path, repeats: int) -> dict[str, Any]:
    """Segment the last atlas by few and by many of the others."""
    *others, name = store.ids()
    volume = open_volume(store[name].image)
    figures: dict[str, Any] = {}
    with cluster.local(os.cpu_count() or 1) as client:
        for n in (FEW, MANY):
            figures[f"seconds_openkbp_{n}"] = measure(
                volume, store, others[:n], folder, repeats, client
            )
    for mode in MODES:
        few, many = (figures[f"seconds_openkbp_{n}"][mode] for n in (FEW, MANY))
        figures[f"{mode}_{MANY}_over_{FEW}_openkbp"] = many / few
    return figures


def measure(
    volume: Volume,
    store: AtlasStore,
    ids: Sequence[str],
    folder: Path,
    repeats: int,
    client: Client,
) -> dict[str, float]:
    """Median seconds of extraction, of matching, and of each mode's transfer."""
    atlases = AtlasKeypoints.load(store, ids)
    keypoints = extract(volume, client=client)
    matches = match(keypoints, atlases, client=client)
    votes = vote(matches, keypoints.sizes["keypoint"], store.organs)

    def run(mode: str) -> None:
        # Removed with the folder, when nobody looks at the time.
        group = zarr.create_group(tempfile.mkdtemp(dir=folder, suffix=".zarr"))
        probability = create_probability(group, volume.grid, store.organs)
        if mode == "local":
            nearer: xr.Dataset = rematch(keypoints, atlases, matches, client=client)
            local.transfer(volume, store, ids, keypoints, nearer, probability, client=client)
        else:
            transfer(
                *(volume, store, ids, keypoints, matches, votes, probability),
                mode=mode,
                options=DEFAULTS,
                client=client,
            )

    seconds = {
        "extraction": median(lambda: extract(volume, client=client), repeats),
        "matching": median(lambda: match(keypoints, atlases, client=client), repeats),
    }
    for mode in MODES:
        seconds[mode] = median(lambda mode=mode: run(mode), repeats)  # type: ignore[misc]
    return seconds


def median(function: Callable[[], Any], repeats: int) -> float:
    return statistics.median(timed(function, repeats))


def surroundings(store: AtlasStore, ids: Sequence[str]) -> int:
    """Bytes of HU and labels around all atlases' organs: what mode `local` must touch."""
    boxes = [surroundings_of(atlas) for atlas in store.atlases(ids)]
    return sum(4 * int(np.prod([b - a for a, b in box])) for box in boxes)


def organs(store: AtlasStore, ids: Sequence[str]) -> int:
    """Bytes of HU of all atlases' organs: what the other modes must touch."""
    infos = [info for atlas in store.atlases(ids) for info in atlas.organs.values()]
    return sum(2 * info.voxels for info in infos)


def seconds_to_copy(size: int) -> float:
    source = np.ones(min(size, 1 << 28), np.uint8)
    target = np.empty_like(source)
    return median(lambda: np.copyto(target, source), 3) * size / source.size


if __name__ == "__main__":
    main()
