#!/usr/bin/env python
"""How long `kpt convert` takes for a large .nii.gz, against merely decompressing it.

A phantom of 512 × 512 × 1200 voxels with noise is written once to a temporary folder (about
0.4 GB, some minutes); then Python's gzip and the whole conversion, octaves included, take turns,
each in a process of its own. The two share nothing but the file.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from kpt_dask.demo.phantom import phantom_slab

Shape = tuple[int, int, int]

SHAPE: Shape = (1200, 512, 512)
SPACING = (1.0, 0.8, 0.8)
SLAB = 16
NOISE = 12.0
"""HU, of a scan with thin slices after a smooth kernel."""

DECOMPRESS = """
import gzip, sys, time
start = time.perf_counter()
with gzip.open(sys.argv[1]) as file:
    while file.read(1 << 20):
        pass
print(time.perf_counter() - start)
"""

CONVERT = """
import json, sys, time
from kpt_dask import convert, open_scan
from kpt_dask.runtime.cluster import session

def kib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

def run(scan, out):
    convert(open_scan(scan), out, client=client)

with session() as client:
    run(sys.argv[2], sys.argv[3] + ".warm")
    base, start = kib("VmRSS"), time.perf_counter()
    run(sys.argv[1], sys.argv[3])
    seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "mib": (kib("VmHWM") - base) / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny scan, once: a smoke test")
    options = parser.parse_args()
    shape: Shape = (48, 64, 64) if options.quick else SHAPE
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan, tiny = folder / "scan.nii.gz", folder / "tiny.nii.gz"
        print(f"Making {' × '.join(map(str, shape[::-1]))} voxels …", file=sys.stderr)
        make_scan(scan, shape)
        make_scan(tiny, (24, 32, 32))
        unzip: list[float] = []
        runs: list[dict[str, float]] = []
        for i in range(repeats):
            unzip.append(float(child(DECOMPRESS, scan)))
            runs.append(json.loads(child(CONVERT, scan, tiny, folder / f"{i}.zarr")))
    seconds = [run["seconds"] for run in runs]
    figures: dict[str, Any] = {
        "convert_over_gunzip": statistics.median(seconds) / statistics.median(unzip),
        "peak_mib_convert": max(run["mib"] for run in runs),
        "seconds_gunzip": unzip,
        "seconds_convert": seconds,
    }
    for key, value in figures.items():
        print(f"{key:20} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def make_scan(path: Path, shape: Shape) -> None:
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    header = nib.Nifti1Header()  # type: ignore[no-untyped-call]
    header.set_data_dtype(np.int16)  # type: ignore[no-untyped-call]
    header.set_data_shape(shape[::-1])  # type: ignore[no-untyped-call]
    header.set_sform(affine, code=1)  # type: ignore[no-untyped-call]
    header["vox_offset"] = 352
    with gzip.open(path, "wb", compresslevel=zlib.Z_BEST_SPEED) as file:
        file.write(header.binaryblock + bytes(4))
        for slab in slabs(shape):
            file.write(slab.tobytes())


def slabs(shape: Shape) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for z in range(0, shape[0], SLAB):
        stop = min(z + SLAB, shape[0])
        image, _ = phantom_slab(1, shape, SPACING[1], z, stop)
        noise = random.standard_normal(image.shape, np.float32)
        yield np.rint(image + NOISE * noise).astype("<i2")


def child(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


if __name__ == "__main__":
    main()
