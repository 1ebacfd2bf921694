#!/usr/bin/env python
"""How fast keypoints are extracted, in how much memory, and how far from the machine's limit.

Phantoms of the sizes of the paper's volumes are streamed to Zarr in a temporary folder. All
figures come from one run; times are medians, with their range. Takes some minutes and, for
the volume four times as long, about 1 GB of disk.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from confined import Confined, client
from scipy import ndimage

from atlas_store.arrays.regions import write_region
from kpt_dask.demo.phantom import phantom_grid, phantom_slab
from kpt_dask.keypoints.descriptors import BINS, PATCH, STEP, describe, sample_patch
from kpt_dask.keypoints.extraction import extract
from kpt_dask.keypoints.octaves import Octave
from kpt_dask.keypoints.sweep import Sweep
from kpt_dask.keypoints.sweep_plan import BATCH
from kpt_dask.runtime import cluster
from kpt_dask.volumes.blur import blur_planes, blur_scratch
from kpt_dask.volumes.omezarr import CHUNKS
from kpt_dask.volumes.pyramid import fill_pyramid
from kpt_dask.volumes.scale_space import (
    FIRST_TAPS,
    LEVEL_TAPS,
    LEVELS,
    SIGMA0,
    level_sigma,
    octave_shapes,
)
from kpt_dask.volumes.volume import Volume, create_volume, open_volume

Shape = tuple[int, int, int]
Times = list[float]

C: Shape = (349, 200, 200)
W: Shape = (695, 217, 217)
MEMORY = 512 << 20

CHILD = """
import time
from kpt_dask.keypoints.extraction import extract
from kpt_dask.volumes.volume import open_volume
import sys, json

def kib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

volume, base = open_volume(sys.argv[1]), kib("VmRSS")
extract(open_volume(sys.argv[2]), memory=int(sys.argv[3]))
ready = time.time()
n = extract(volume, memory=int(sys.argv[3])).sizes["keypoint"]
print(json.dumps({"seconds": time.time() - ready, "keypoints": n, "ready": ready,
                  "mib": (kib("VmHWM") - base) / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny volumes, once: a smoke test")
    options = parser.parse_args()
    shapes, repeats = {"C": C, "W": W}, options.repeats
    if options.quick:
        shapes, repeats = {"C": (70, 60, 64), "W": (140, 60, 64)}, 1
    shapes["4W"] = (4 * shapes["W"][0], *shapes["W"][1:])
    with tempfile.TemporaryDirectory() as folder:
        volumes = {}
        for name, shape in shapes.items():
            print(f"Making {name}, {' × '.join(map(str, shape))} voxels …", file=sys.stderr)
            volumes[name] = make_volume(Path(folder) / f"{name}.zarr", shape)
        figures = measure(volumes, Path(folder), repeats)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def make_volume(path: Path, shape: Shape) -> Volume:
    grid = phantom_grid(shape)
    volume = create_volume(path, grid, grid, name=path.name)
    for z in range(0, shape[0], CHUNKS[0]):
        stop = min(z + CHUNKS[0], shape[0])
        image, _ = phantom_slab(1, shape, 2.0, z, stop)
        region = (slice(z, stop), slice(0, shape[1]), slice(0, shape[2]))
        write_region(volume.levels[0], region, image.astype(np.float32))
    with cluster.local(os.cpu_count() or 1) as client:
        fill_pyramid(volume.levels, client=client)
    return open_volume(path)


def extraction(path: Path) -> tuple[float, float]:
    """Seconds, and the share of all cores' time in which none computed for us."""
    volume = open_volume(path)
    extract(volume, client=client())
    start, cpu = time.perf_counter(), time.process_time()
    extract(volume, client=client())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, max(1 - cpu / seconds / len(os.sched_getaffinity(0)), 0.0)


def timed(function: Callable[[], Any], repeats: int) -> Times:
    """Seconds of each run after the first, which warms caches."""
    function()
    return [clock(function) for _ in range(repeats)]


def clock(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(volumes: dict[str, Volume], folder: Path, repeats: int) -> dict[str, Any]:
    c = volumes["C"]
    level = np.asarray(c.levels[0][:])
    pyramid = [np.asarray(one[:]) for one in c.levels]
    rows: list[tuple[str, Times]] = []

    def row(name: str, times: Times) -> float:
        rows.append((name, times))
        return statistics.median(times)

    # In turn, so that whatever else the machine does meets all of them.
    cores = sorted(os.sched_getaffinity(0))[:2]
    one, two = Confined(cores[:1]), Confined(cores)
    runs: dict[str, list[tuple[float, float]]] = {"1": [], "2": [], "W": []}
    with cluster.local(1) as single:
        keypoints = extract(c, client=single)
        free: Times = []
        for server in (one, two):
            server.run(extraction, folder / "C.zarr")
        for _ in range(repeats):
            runs["1"].append(one.run(extraction, folder / "C.zarr"))
            runs["2"].append(two.run(extraction, folder / "C.zarr"))
            runs["W"].append(two.run(extraction, folder / "W.zarr"))
            free.append(clock(lambda: extract(c, client=single)))
    one.close()
    two.close()
    times = {name: [seconds for seconds, _ in own] for name, own in runs.items()}
    one_core = row("C: extraction, 1 core", times["1"])
    one_thread = row("C: extraction, 1 thread, reading on any core", free)
    two_core = row("C: extraction, 2 cores", times["2"])
    w_seconds = row("W: extraction, 2 cores", times["W"])
    idle = statistics.median(share for _, share in runs["2"])
    scipy = row("C: scipy, no descriptors, 1 thread", timed(lambda: scipy_dog(level), repeats))
    other = np.empty_like(level)
    copy = row("C: memory copy", timed(lambda: np.copyto(other, level), repeats))
    reading = row("C: reading, 1 thread", timed(lambda: read(c), repeats))
    gaussians = row("C: Gaussians, 1 thread", timed(lambda: blur_all(pyramid), repeats))
    first = row("C: Gaussians of octave 0, 1 thread", timed(lambda: blur_all(pyramid[:1]), repeats))
    patches = row(
        "C: descriptors, 1 thread", timed(lambda: describe_all(pyramid, keypoints, c), repeats)
    )
    sweeps = row("C: sweeps from memory, 1 thread", timed(lambda: sweep_all(pyramid), repeats))
    tiny = folder / "tiny.zarr"
    make_volume(tiny, (24, 24, 24))
    child(tiny, tiny)
    fresh = {n: [child(folder / f"{n}.zarr", tiny) for _ in range(repeats)] for n in ("W", "4W")}
    for name, all_of in fresh.items():
        row(f"{name}: extraction, process of its own, 512 MiB", [r["seconds"] for r in all_of])
    starts = [r["ready"] for all_of in fresh.values() for r in all_of]
    warm = row("first block of a fresh process, warm numba cache", starts)
    with tempfile.TemporaryDirectory() as empty:
        cold = row(
            "first block of a fresh process, cold cache", [child(tiny, tiny, empty)["ready"]]
        )

    extrema = max(sweeps - gaussians - patches, 0.0)
    work = reading + sweeps
    madds, moved = floor(c)
    limit_madds, limit_bytes = madds / madd_rate(), moved / (2 * level.nbytes / copy)
    limit = max(limit_madds, limit_bytes)
    voxels = {name: math.prod(v.grid.shape) for name, v in volumes.items()}
    peak = {n: max(r["mib"] for r in all_of) for n, all_of in fresh.items()}
    seconds = {n: statistics.median(r["seconds"] for r in all_of) for n, all_of in fresh.items()}
    figures: dict[str, Any] = {
        "speedup_over_scipy_C": scipy / two_core,
        "two_core_speedup": one_core / two_core,
        "two_thread_speedup_reading_on_any_core": one_thread / two_core,
        "throughput_W_over_C": (voxels["W"] / w_seconds) / (voxels["C"] / two_core),
        "peak_mib_W": peak["W"],
        "peak_mib_4W": peak["4W"],
        "time_4W_over_W": seconds["4W"] / seconds["W"],
        "cold_start_seconds": warm,
        "cold_numba_cache_seconds": cold,
        "seconds_C_1_core": one_core,
        "seconds_C_2_cores": two_core,
        "seconds_W_2_cores": w_seconds,
        "gaussians_over_memory_copy": first / copy,
        "share_reading": reading / work * (1 - idle),
        "share_gaussians": gaussians / work * (1 - idle),
        "share_extrema": extrema / work * (1 - idle),
        "share_descriptors": patches / work * (1 - idle),
        "share_idle": idle,
        "floor_multiply_adds": madds,
        "floor_bytes": moved,
        "floor_seconds": limit,
        "times_the_floor": two_core / limit,
        "keypoints_C": keypoints.sizes["keypoint"],
        "repeats": repeats,
    }
    report(rows, figures, copy, scipy)
    print(
        f"\nFloor on C: {madds / 1e9:.1f} G multiply-adds ({limit_madds:.3f} s at the rate of a"
        f" matrix product on all cores), {moved / 1e9:.2f} GB moved if every Gaussian is written"
        f" and read once ({limit_bytes:.3f} s at that of a memory copy). Extraction takes"
        f" {two_core / limit:.1f} times the larger.\n"
        "One core: a process confined to it, reading and scheduling included. The one thread that"
        " may read on any core makes use of a second one."
    )
    return figures | {
        "rows": {name: {"median": statistics.median(t), "all": t} for name, t in rows}
    }


def report(rows: list[tuple[str, Times]], figures: dict[str, Any], copy: float, sc: float) -> None:
    width = max(len(name) for name, _ in rows)
    print(f"{'':{width}}  median s   (min – max)         × copy   scipy is slower by")
    for name, times in rows:
        middle = statistics.median(times)
        line = f"{name:{width}}  {middle:8.3f}   ({min(times):.3f} – {max(times):.3f})"
        if name.startswith("C:"):
            line = f"{line:{width + 33}} {middle / copy:8.1f}   {sc / middle:8.2f}"
        print(line)
    print()
    for name, value in figures.items():
        print(f"{name:32} {value:.4g}")


def child(path: Path, tiny: Path, cache: str | None = None) -> dict[str, float]:
    """Extract in a fresh process, which is ready once it has done a tiny volume."""
    environment = os.environ | ({"NUMBA_CACHE_DIR": cache} if cache else {})
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(tiny), str(MEMORY)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures | {"ready": figures["ready"] - start}


def scipy_dog(level: np.ndarray) -> int:
    """Three octaves of three levels with scipy alone; no sub-voxel position, no descriptors."""
    found = 0
    current = ndimage.gaussian_filter(level, math.sqrt(SIGMA0**2 - 0.25), truncate=3)
    for _ in range(3):
        stack = [current]
        for i in range(LEVELS + 2):
            step = math.sqrt(level_sigma(i + 1) ** 2 - level_sigma(i) ** 2)
            stack.append(ndimage.gaussian_filter(stack[-1], step, truncate=3))
        dogs = np.stack([b - a for a, b in pairwise(stack)])
        high, low = ndimage.maximum_filter(dogs, 3), ndimage.minimum_filter(dogs, 3)
        found += int(((dogs == high) | (dogs == low))[1:-1, 1:-1, 1:-1, 1:-1].sum())
        current = np.ascontiguousarray(stack[LEVELS][::2, ::2, ::2])
    return found


def read(volume: Volume) -> None:
    for o, level in enumerate(volume.levels):
        z, y, x = level.shape
        for slab in Octave(level, o == 0, False).slabs(0, z, ((0, y), (0, x))):
            slab()


def blur_all(pyramid: list[np.ndarray]) -> None:
    """All Gaussians of all octaves, a batch of planes at a time, as a sweep makes them."""
    for octave, level in enumerate(pyramid):
        source, target = level, np.empty_like(level)
        n = level.shape[0]
        for taps in (*([FIRST_TAPS] if octave == 0 else []), *LEVEL_TAPS):
            scratch = blur_scratch(BATCH, level.shape[2], taps.size - 1)
            for z in range(0, n, BATCH):
                count = min(BATCH, n - z)
                blur_planes(source, z, count, n, taps, scratch, target)
            # Which voxels a blur reads does not change what it costs.
            source, target = target, (np.empty_like(level) if source is level else source)


def describe_all(pyramid: list[np.ndarray], keypoints: xr.Dataset, volume: Volume) -> None:
    patch = np.empty((PATCH + 2,) * 3, np.float32)
    ranks = np.empty(BINS, np.uint8)
    voxels = volume.grid.to_index(keypoints.position.values)
    scales = keypoints.scale.values / float(volume.grid.spacing[0])
    octaves = keypoints.octave.values
    for voxel, scale, octave in zip(voxels, scales, octaves, strict=True):
        level = pyramid[octave]
        own = voxel / 2.0**octave
        index = np.rint(own).astype(np.int64)
        step = STEP * float(scale) / 2.0**octave
        sample_patch(level, level.shape[0], index, own - index, step, patch)
        describe(patch, ranks)


def sweep_all(pyramid: list[np.ndarray]) -> None:
    for octave, level in enumerate(pyramid):
        z, y, x = level.shape
        sweep = Sweep(((0, z), (0, y), (0, x)), (y, x), z, octave == 0)
        for first in range(0, z, CHUNKS[0]):
            sweep.feed(level[first : first + CHUNKS[0]])
        sweep.finish()


def floor(volume: Volume) -> tuple[float, float]:
    """Multiply-adds and bytes that all Gaussians of a volume cost at least."""
    madds = moved = 0.0
    for octave, shape in enumerate(octave_shapes(volume.grid.shape)):
        taps = (*([FIRST_TAPS] if octave == 0 else []), *LEVEL_TAPS)
        madds += math.prod(shape) * sum(3 * t.size for t in taps)
        moved += math.prod(shape) * 8 * len(taps)
    return madds, moved


def madd_rate() -> float:
    """Float32 multiply-adds per second of a matrix product on all cores."""
    a = np.random.default_rng(0).random((1024, 1024), np.float32)
    return float(1024**3 / min(timed(lambda: a @ a, 9)))


if __name__ == "__main__":
    main()
