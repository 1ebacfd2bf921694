#!/usr/bin/env python
"""How long the transfer takes in every mode, against extracting the same scan's keypoints.

Phantoms of the size of the paper's ceCT (C, ten organs, 19 atlases) are made in a temporary
folder; with a store of real patients (--store, from `kpt atlas add-folder`) a patient is
segmented by 19 and by 100 others too. All figures come from one run; times are medians, of rounds
in turn on one core and on two: processes confined to them, whatever they do. What a mode does
after the first matching counts as its transfer: `local` matches a second time. Memory is the
peak of one transfer that may take 256 MiB, above that of the process before; 4C is four of C on
top of one another.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
import zarr
from benchmark_extraction import C, Shape, timed
from confined import Confined, client
from memory import resident_mib

from atlas_store import AtlasKeypoints, AtlasStore, load_organs
from atlas_store.arrays.boxes import enclosing
from atlas_store.crop import NAME as CROP
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo import run as demo
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.grid import Grid
from kpt_dask.keypoints.extraction import extract
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.second_pass import rematch
from kpt_dask.matching.voting import vote
from kpt_dask.options import DEFAULTS, MODES, TransferOptions
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.modes import transfer
from kpt_dask.organ_transfer.probability import TILING, create_probability
from kpt_dask.organ_transfer.refinement.lattice import (
    FAST,
    FULL,
    fitting,
    lattices,
    typical_size,
)
from kpt_dask.organ_transfer.warping.landing import (
    by_atlas,
    in_grid,
    predicted_boxes,
    search_boxes_of,
    step_of,
)
from kpt_dask.runtime import progress
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert
from kpt_dask.volumes.omezarr import create_array
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.volume import Volume, create_volume, open_volume

FEW, MANY = 19, 100
MEMORY = 256 << 20
STATIONS = ("extraction", "matching", *MODES)
ARRAYS = 30
"""Floats that an iteration of the refinement reads or writes at a point, if each array goes through
memory once: the map and the moved image, products and sums, force, and the new map."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--store", metavar="STORE", help=f"real patients, at least {MANY + 1}")
    parser.add_argument("--repeats", type=int, default=7)
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
        cores = sorted(os.sched_getaffinity(0))[:2]
        one, two = Confined(cores[:1]), Confined(cores)
        scan = Scan(str(volume), store.url, tuple(ids), str(folder))
        single, both = in_turn((one, two), scan, repeats)
        for mode in MODES:
            figures[f"{mode}_over_extraction_C"] = both[mode] / both["extraction"]
            figures[f"two_core_speedup_{mode}_C"] = single[mode] / both[mode]
        figures["seconds_C"] = both
        figures["seconds_C_1_core"] = single
        touched = {"surroundings": surroundings(store, ids), "organs": organs(store, ids)}
        for mode in MODES:
            what = "surroundings" if mode == "local" else "organs"
            copied = seconds_to_copy(touched[what])
            figures[f"bytes_of_{what}_C"] = touched[what]
            figures[f"{mode}_over_copying_the_{what}"] = both[mode] / copied
        figures |= refinement(one, two, scan, repeats)
        figures["peak_mib_C"] = {mode: two.run(peak, scan, mode) for mode in MODES}
        longer = scan._replace(volume=str(stacked(volume, folder / "4C.zarr")))
        figures["peak_mib_4C"] = {mode: two.run(peak, longer, mode) for mode in MODES}
        if options.store:
            figures |= real(two, AtlasStore.open(options.store), folder, repeats)
        for server in (one, two):
            server.close()
    for key, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.3f}" for k, v in value.items())
        print(f"{key:38} {value if isinstance(value, str) else format(value, '.4g')}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


class Scan(NamedTuple):
    """A volume, the atlases that segment it, and where to."""

    volume: str
    store: str
    atlases: tuple[str, ...]
    folder: str


def phantoms(folder: Path, shape: Shape, count: int) -> tuple[AtlasStore, Path]:
    """Make a store, and the volume of another phantom."""
    organs = load_organs(demo.ORGANS)
    store = AtlasStore.create(folder / "atlases", organs, store_parameters())
    scan, labels = folder / "scan.nii.gz", folder / "labels.nii.gz"
    for seed in range(1, count + 1):
        write_phantom(scan, labels, seed, shape, 2.0, overwrite=True)
        add_atlas(store, scan, labels, atlas_id=f"phantom_{seed}")
    write_phantom(scan, labels, count + 1, shape, 2.0, overwrite=True)
    convert(open_scan(scan), folder / "scan.zarr")
    return store, folder / "scan.zarr"


def stacked(volume: Path, path: Path, times: int = 4) -> Path:
    """Make a volume of one on top of itself."""
    source = open_volume(volume)
    once = np.asarray(source.levels[0][...])
    shape = times * once.shape[0], once.shape[1], once.shape[2]
    grid = Grid.isotropic(shape, float(source.grid.spacing[0]), source.grid.origin.tolist())
    made = create_volume(path, grid, grid, name=path.name)
    made.levels[0][...] = np.concatenate(times * [once])
    fill_pyramid(made.levels)
    return path


def real(server: Confined, store: AtlasStore, folder: Path, repeats: int) -> dict[str, Any]:
    """Segment the last atlas by few and by many of the others."""
    *others, name = store.ids()
    volume = f"{store.url}/{store[name].path}/image"
    figures: dict[str, Any] = {}
    for n in (FEW, MANY):
        scan = Scan(volume, store.url, tuple(others[:n]), str(folder))
        [figures[f"seconds_openkbp_{n}"]] = in_turn([server], scan, repeats)
    for mode in MODES:
        few, many = (figures[f"seconds_openkbp_{n}"][mode] for n in (FEW, MANY))
        figures[f"{mode}_{MANY}_over_{FEW}_openkbp"] = many / few
    return figures


def refinement(one: Confined, two: Confined, scan: Scan, repeats: int) -> dict[str, float]:
    """How long the fields of mode `local` are refined, beside a pass over what that touches.

    The floor is what memory allows: `ARRAYS` float32 read or written for each point of the lattices
    and iteration. Only points near organs are visited, so the ratio may be below 1.
    """
    found: dict[str, float] = {}
    for name, fast in (("refine", False), ("refine_fast", True)):
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for server, own in zip((one, two), times, strict=True):
                own.append(server.run(refining, scan, fast))
        single, both = map(statistics.median, times)
        per_atlas = single / len(scan.atlases)
        found[f"{name}_seconds_per_atlas_C"] = per_atlas
        floor = seconds_to_copy(4 * ARRAYS * one.run(visited, scan, fast) // 2)
        found[f"{name}_over_memory_bound_C"] = per_atlas / floor
        found[f"two_core_speedup_{name}_C"] = single / both
    return found


def refining(scan: Scan, fast: bool) -> float:
    """Seconds of the stage that refines the fields, of all atlases."""
    with progress.recorded() as seconds_of:
        transferred(scan, "local", options=TransferOptions(fast=fast))
    return seconds_of["Refining"]


def visited(scan: Scan, fast: bool) -> int:
    """Count points of the lattices times iterations, of one atlas."""
    volume, store, atlases, keypoints, matches, _ = prepared(scan)
    nearer = rematch(keypoints, atlases, matches, client=client())
    found, grid = store.atlases(scan.atlases), volume.grid
    fields = by_atlas(keypoints, nearer, len(found))
    widths = DEFAULTS.sigma_x, DEFAULTS.sigma_t
    predicted = [
        predicted_boxes(atlas, field, store.organs, grid, widths)
        for atlas, field in zip(found, fields, strict=True)
    ]
    search_boxes = search_boxes_of(predicted, step_of(grid))
    whole = enclosing([search_box for search_box in search_boxes if search_box is not None])
    assert whole is not None
    levels = fitting(FAST if fast else FULL, typical_size(found))
    laid = lattices(in_grid(whole, grid, step_of(grid)), grid, levels)
    return sum(lattice.size * iterations for lattice, iterations in laid)


def in_turn(servers: Sequence[Confined], scan: Scan, repeats: int) -> list[dict[str, float]]:
    """Median seconds of extraction, of matching, and of each mode's transfer, on each server.

    In turn, so that whatever else the machine does meets all of them; after a first time, which
    warms caches.
    """
    found: list[dict[str, list[float]]] = [{w: [] for w in STATIONS} for _ in servers]
    for _ in range(repeats + 1):
        for server, times in zip(servers, found, strict=True):
            # In a segmentation no core sleeps before a station. One that slept while the other
            # process ran would begin slowly: two cores would lose some 20 ms, one would not.
            server.run(seconds, scan, "extraction")
            for what in STATIONS:
                times[what].append(server.run(seconds, scan, what))
    return [{w: statistics.median(t[1:]) for w, t in times.items()} for times in found]


def seconds(scan: Scan, what: str) -> float:
    """Do what is said to a scan, in this process."""
    volume, _, atlases, keypoints, *_ = prepared(scan)
    start = time.perf_counter()
    if what == "extraction":
        extract(volume, client=client())
    elif what == "matching":
        match(keypoints, atlases, client=client())
    else:
        transferred(scan, what)
    return time.perf_counter() - start


def peak(scan: Scan, mode: str) -> float:
    """MiB that a transfer takes at most, with `MEMORY`."""
    transferred(scan, mode, MEMORY)
    gc.collect()
    # What was given back counts as taken otherwise, and what is taken then as none.
    ctypes.CDLL(None).malloc_trim(0)
    # The peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib()
    transferred(scan, mode, MEMORY)
    return resident_mib("VmHWM") - before


def transferred(
    scan: Scan, mode: str, memory: int = 1 << 30, options: TransferOptions = DEFAULTS
) -> None:
    """Transfer organs to a scan, in this process; removed with the folder, when nobody waits."""
    volume, store, atlas_keypoints, keypoints, matches, votes = prepared(scan)
    group = zarr.create_group(tempfile.mkdtemp(dir=scan.folder, suffix=".zarr"))
    probability = create_probability(group, volume.grid, store.organs, mode)
    dtype = np.min_scalar_type(max(store.organs.values))
    labels = create_array(group, "labels", volume.grid.shape, dtype, TILING.shard)
    job = TransferJob(volume, store.organs, probability, labels, mode, options, memory)
    evidence = Evidence(keypoints, matches, votes)
    atlases = store.atlases(scan.atlases)
    transfer(job, atlases, evidence, atlas_keypoints=atlas_keypoints, client=client())


@cache
def prepared(
    scan: Scan,
) -> tuple[Volume, AtlasStore, AtlasKeypoints, xr.Dataset, xr.Dataset, xr.Dataset]:
    """Do what comes before the transfer."""
    volume, store = open_volume(scan.volume), AtlasStore.open(scan.store)
    atlases = AtlasKeypoints.load(store, scan.atlases)
    keypoints = extract(volume, client=client())
    matches = match(keypoints, atlases, client=client())
    votes = vote(matches, keypoints.sizes["keypoint"], store.organs)
    return volume, store, atlases, keypoints, matches, votes


def surroundings(store: AtlasStore, ids: Sequence[str]) -> int:
    """Bytes of HU and labels around all atlases' organs: what mode `local` must touch."""
    paths = (f"{store.url}/{atlas.path}/{CROP}" for atlas in store.atlases(ids))
    return sum(zarr.open_array(path, mode="r").nbytes for path in paths)


def organs(store: AtlasStore, ids: Sequence[str]) -> int:
    """Bytes of HU of all atlases' organs: what the other modes must touch."""
    infos = [info for atlas in store.atlases(ids) for info in atlas.organs.values()]
    return sum(2 * info.voxels for info in infos)


def seconds_to_copy(size: int) -> float:
    source = np.ones(min(size, 1 << 28), np.uint8)
    target = np.empty_like(source)
    copied = statistics.median(timed(lambda: np.copyto(target, source), 3))
    return copied * size / source.size


if __name__ == "__main__":
    main()
