#!/usr/bin/env python
"""How long each station takes, and in how much memory: one real patient, and one phantom.

Each scan is segmented in fresh processes: cold with an empty numba cache, warm with the one
that the cold run has filled. Times are also given as ratios to that of Python's gzip reading
the scan's file in the same process. Memory is the peak while the station runs, above that of
the process once everything is imported.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr
from memory import resident_mib

from atlas_store import AtlasKeypoints, AtlasStore, load_organs, write_keypoints
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo import run as demo
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.keypoints.extraction import extract
from kpt_dask.label_files.nifti import write_nifti
from kpt_dask.label_files.request import LabelRequest
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.voting import vote
from kpt_dask.options import DEFAULTS
from kpt_dask.organ_transfer.delivery import Decision, decided
from kpt_dask.organ_transfer.job import Evidence, TransferJob
from kpt_dask.organ_transfer.modes import transfer
from kpt_dask.organ_transfer.probability import TILING, create_probability
from kpt_dask.resampling.labels_on_scan import Shares
from kpt_dask.runtime import cluster
from kpt_dask.scans.scan import open_scan
from kpt_dask.volumes.conversion import convert_into
from kpt_dask.volumes.omezarr import create_label_image, finish_label_image

DATA = Path(__file__).parents[2] / "shared" / "data" / "openkbp"
STATIONS = ("gunzip", "start", "convert", "extract", "match", "vote", "transfer", "write", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the openkbp patients")
    parser.add_argument("--atlases", type=int, default=8, help="atlases to segment from")
    parser.add_argument("--repeats", type=int, default=5, help="warm runs")
    parser.add_argument("--cold-repeats", type=int, default=3, help="cold runs; half a minute each")
    parser.add_argument("--quick", action="store_true", help="two atlases, a small phantom")
    parser.add_argument(
        "--child", nargs=3, metavar=("SCAN", "STORE", "OUT"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.child:
        print(json.dumps(stations(*map(Path, options.child))))
        return
    count = 2 if options.quick else options.atlases
    cold = 1 if options.quick else options.cold_repeats
    warm = 1 if options.quick else options.repeats
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        makers = {"phantom": lambda path: phantoms(path, count, options.quick)}
        if options.data.is_dir():
            makers["openkbp"] = lambda path: patients(path, count, options.data)
        else:
            print(f"{options.data} does not exist: only the phantom is measured.", file=sys.stderr)
        for name, make in makers.items():
            own = Path(folder) / name
            own.mkdir()
            print(f"Making the atlases of {name} …", file=sys.stderr)
            scan = make(own)
            cache = Path(folder) / "numba"
            for state in ["cold"] * cold + ["warm"] * warm:
                if state == "cold":
                    shutil.rmtree(cache, ignore_errors=True)
                runs.setdefault(f"{name}_{state}", []).append(child(scan, own, cache))
    figures = {
        f"{run}_{station}": summary([figures[station] for figures in several], several)
        for run, several in runs.items()
        for station in STATIONS
    }
    report(figures)
    if options.json:
        flat = {
            f"{name}_{what}": value for name, row in figures.items() for what, value in row.items()
        }
        options.json.write_text(json.dumps(flat, indent=2) + "\n")


def summary(
    station: list[dict[str, float]], runs: list[dict[str, dict[str, float]]]
) -> dict[str, float]:
    """Medians of a station over several runs, and the spread of its seconds."""
    seconds = [one["seconds"] for one in station]
    ratios = [
        one["seconds"] / run["gunzip"]["seconds"] for one, run in zip(station, runs, strict=True)
    ]
    return {
        "over_gunzip": statistics.median(ratios),
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_mib": statistics.median(one["peak_mib"] for one in station),
        "runs": len(station),
    }


def phantoms(folder: Path, count: int, quick: bool) -> Path:
    """Make a store of phantoms and a scan of another."""
    shape = (100, 80, 96) if quick else demo.SHAPE
    store = AtlasStore.create(
        folder / "atlases", load_organs(demo.ORGANS), store_parameters(demo.SPACING)
    )
    scan, labels = folder / "scan.nii.gz", folder / "labels.nii.gz"
    for seed in range(1, count + 1):
        write_phantom(scan, labels, seed, shape, demo.SPACING, overwrite=True)
        add_atlas(store, scan, labels, atlas_id=f"phantom_{seed}")
    write_phantom(scan, labels, count + 1, shape, demo.SPACING, overwrite=True)
    return scan


def patients(folder: Path, count: int, data: Path) -> Path:
    """Make a store of patients; the next one is the scan."""
    store = AtlasStore.create(folder / "atlases", load_organs("openkbp"), store_parameters())
    scans = sorted(data.glob("*_ct.nii.gz"))
    for scan in scans[:count]:
        add_atlas(store, scan, Path(str(scan).replace("_ct.nii.gz", "_seg.nii.gz")))
    return scans[count]


def child(scan: Path, folder: Path, cache: Path) -> dict[str, Any]:
    out = Path(tempfile.mkdtemp(dir=folder)) / "scan.zarr"
    start = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--child"),
            *(str(scan), str(folder / "atlases"), str(out)),
        ],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    wall = time.perf_counter() - start
    figures: dict[str, Any] = json.loads(done.stdout)
    shutil.rmtree(out.parent)
    measured = sum(one["seconds"] for one in figures.values())
    wall -= figures["gunzip"]["seconds"]
    measured -= figures["gunzip"]["seconds"]
    figures["start"] = {"seconds": wall - measured, "peak_mib": 0.0}
    figures["all"] = {
        "seconds": wall,
        "peak_mib": max(one["peak_mib"] for one in figures.values()),
    }
    return figures


def stations(scan: Path, store_path: Path, out: Path) -> dict[str, dict[str, float]]:
    """Go through the stations as `kpt_dask.segment` does, watching each."""
    figures: dict[str, dict[str, float]] = {}
    base = resident_mib()
    with watched(figures, "gunzip", base), gzip.open(scan) as file:
        while file.read(1 << 20):
            pass
    with cluster.session() as client:
        store = AtlasStore.open(store_path)
        used = store.ids()
        group = zarr.create_group(str(out), zarr_format=3)
        with watched(figures, "convert", base):
            source = open_scan(scan)
            volume = convert_into(source, group, spacing=store.parameters["spacing"], client=client)
        with watched(figures, "extract", base):
            keypoints = extract(volume, client=client)
        with watched(figures, "match", base):
            matches = match(keypoints, AtlasKeypoints.load(store, used), client=client)
        with watched(figures, "vote", base):
            votes = vote(matches, keypoints.sizes["keypoint"], store.organs)
        with watched(figures, "transfer", base):
            probability = create_probability(group, volume.grid, store.organs, "organ")
            levels = create_label_image(group, "organs", volume.grid, store.organs, TILING.shard)
            job = TransferJob(volume, store.organs, probability, levels[0], "organ")
            evidence = Evidence(keypoints, matches, votes)
            transfer(job, store.atlases(used), evidence, client=client)
        with watched(figures, "write", base):
            finish_label_image(group, "organs", levels, volume.grid, store.organs)
            write_keypoints(group.create_group("keypoints"), keypoints)
            for name, table in (("matches", matches), ("votes", votes.drop_vars("organ"))):
                table.to_zarr(group.store, group=name, zarr_format=3, consolidated=False)
            threshold = DEFAULTS.smallest_share("organ")
            shares = Shares(probability, store.organs.values, threshold, volume.grid)
            decision = Decision(shares, store.organs, store.organs.values, source.grid)
            label_map, _ = decided(decision, LabelRequest(), memory=None, client=client)
            write_nifti(out.with_suffix(".nii.gz"), replace(label_map, scan=source.file))
    return figures


@contextmanager
def watched(figures: dict[str, dict[str, float]], name: str, base: float) -> Iterator[None]:
    """Take the time, and look at the memory every few milliseconds."""
    peak, over = [resident_mib()], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], resident_mib())

    watcher = threading.Thread(target=look)
    watcher.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        over.set()
        watcher.join()
    figures[name] = {"seconds": seconds, "peak_mib": max(*peak, resident_mib()) - base}


def report(figures: dict[str, dict[str, float]]) -> None:
    print(f"{'':26}{'× gunzip':>10}{'median s':>10}   {'(min – max)':18}{'peak MiB':>9}{'runs':>6}")
    for name, row in figures.items():
        spread = f"({row['seconds_min']:.2f} – {row['seconds_max']:.2f})"
        print(
            f"{name:26}{row['over_gunzip']:10.2f}{row['seconds']:10.2f}   {spread:18}"
            f"{row['peak_mib']:9.0f}{row['runs']:6.0f}"
        )


if __name__ == "__main__":
    main()
