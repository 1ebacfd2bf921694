#!/usr/bin/env python
"""Accuracy and time beside multi-atlas registration, with the same atlases and the same scans.

Every atlas is registered to every scan by SyN (ANTs' defaults; extra `baselines`), on the voxels
of the files, and its labels are fused by majority and by locally weighted votes. `kpt segment`, in
a process of its own with everything that it starts, segments the same scan from the same atlases;
so does `kpt_dask.segment` in this process ("in series"), which has started already, as it has for
registration.
Dice is that of the scan's own voxels, mean over scans and annotated organs. Times are medians over
scans. Registrations are kept in --cache: run it again, and only what is missing is made. One
registration at the spacing of the store, which is what this program works on, is timed too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom

from atlas_store import AtlasStore, OrganTable, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.baselines.fusion import WarpedAtlas, locally_weighted, majority
from kpt_dask.baselines.syn import Image, Registered, register
from kpt_dask.evaluation.overlap import dice
from kpt_dask.options import TransferOptions
from kpt_dask.scans.pairs import Pair, find_pairs
from kpt_dask.segmentation import segment

OURS = {
    "local": ("local", False),
    "local --fast": ("local", True),
    "organ": ("organ", False),
}
"""Settings of `kpt segment` by name: the mode, and whether it is the fast one."""


class Case(NamedTuple):
    """A scan in memory, axes (superior, anterior, right) up to sign."""

    image: Image
    labels: NDArray[np.uint16]
    annotated: frozenset[int]


class Measured(NamedTuple):
    """Dice of one scan by organ, and how long it took."""

    dice: dict[str, float]
    seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="{id}_ct.nii.gz, {id}_seg.nii.gz")
    parser.add_argument("--organs", default="openkbp", metavar="TABLE")
    parser.add_argument("--scans", type=int, default=8, help="the first of the folder")
    parser.add_argument("--atlases", type=int, default=10, help="those after the scans")
    parser.add_argument("--cache", type=Path, default=Path("registrations"), metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    pairs = find_pairs(options.folder)[: options.scans + options.atlases]
    scans, atlases = pairs[: options.scans], pairs[options.scans :]
    organs = load_organs(options.organs)
    found: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name), atlases, organs)
        loaded = {pair.id: load(pair, organs) for pair in pairs}
        for pair in scans:
            results = ours(pair, store, loaded[pair.id], Path(name), organs)
            results |= registered(
                loaded[pair.id], [loaded[a.id] for a in atlases], options.cache, organs
            )
            for method, measured in results.items():
                found.setdefault(method, []).append(measured)
                print(
                    f"{pair.id} {method:22} {statistics.fmean(measured.dice.values()):.3f}",
                    file=sys.stderr,
                )
        spacing = float(store.parameters["spacing"])
        fine = register_at(spacing, loaded[scans[0].id], loaded[atlases[0].id], options.cache)
    figures = summary(found, organs)
    figures["syn_seconds_one_atlas_at_store_spacing"] = fine.seconds
    figures["syn_cpu_seconds_one_atlas_at_store_spacing"] = fine.cpu_seconds
    syn = figures["SyN, majority"]
    for method in (name for name in found if not name.startswith("SyN")):
        cpu = figures[method]["cpu_seconds"]
        figures[method]["syn_over_it"] = syn["seconds"] / figures[method]["seconds"]
        figures[method]["syn_over_it_cpu"] = syn["cpu_seconds"] / cpu
        figures[method]["syn_at_store_spacing_over_it_cpu"] = len(atlases) * fine.cpu_seconds / cpu
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def make_store(folder: Path, atlases: list[Pair], organs: OrganTable) -> AtlasStore:
    store = AtlasStore.create(folder / "atlases", organs, store_parameters())
    for pair in atlases:
        add_atlas(store, pair.scan, pair.labels, atlas_id=pair.id)
    return store


def load(pair: Pair, organs: OrganTable) -> Case:
    image, affine = read(pair.scan)
    labels, _ = read(pair.labels)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())
    origin = tuple(affine[:3, 3][::-1].tolist())
    present = frozenset(np.unique(labels).tolist()) & set(organs.values)
    return Case(Image(image, spacing, origin), labels.astype(np.uint16), frozenset(present))


def read(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (z, y, x) along the axes of the body, and the affine of (x, y, z)."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    if nibabel.affines.obliquity(image.affine).max() > 1e-3:
        sys.exit(f"{path} is oblique; this benchmark reads scans along the axes of the body only.")
    return np.asarray(image.dataobj).T, image.affine


def ours(
    pair: Pair, store: AtlasStore, case: Case, folder: Path, organs: OrganTable
) -> dict[str, Measured]:
    """Segment by the command, in every setting."""
    results = {}
    out, labels = folder / f"{pair.id}.zarr", folder / f"{pair.id}.nii.gz"
    for method, (mode, fast) in OURS.items():
        command = [sys.executable, "-m", "kpt_dask", "segment", pair.scan, store.url, out]
        command += ["--labels", labels, "--overwrite", "--mode", mode, *["--fast"] * fast]
        # Once to warm caches of files and kernels.
        for _ in range(2):
            before, start = os.times(), time.perf_counter()
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
            seconds, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system
        cpu -= before.children_user + before.children_system
        found, _ = read(labels)
        scores = overlap(case, found, organs)
        results[method] = Measured(scores, seconds, cpu)
        # Once to start what a process starts once.
        for _ in range(2):
            start, used = time.perf_counter(), time.process_time()
            chosen = TransferOptions(fast=fast)
            segment(pair.scan, store, out, mode=mode, options=chosen, labels=labels, overwrite=True)
            seconds, cpu = time.perf_counter() - start, time.process_time() - used
        results[f"{method}, in series"] = Measured(scores, seconds, cpu)
    return results


def registered(
    case: Case, atlases: list[Case], cache: Path, organs: OrganTable
) -> dict[str, Measured]:
    """Register all atlases, and fuse their labels."""
    warped, seconds, cpu_seconds = [], 0.0, 0.0
    for atlas in atlases:
        one = register(case.image, atlas.image, atlas.labels, cache)
        warped.append(WarpedAtlas(one.image, one.labels, atlas.annotated))
        seconds += one.seconds
        cpu_seconds += one.cpu_seconds
    image = np.asarray(case.image.voxels, np.float32)
    fused = {
        "SyN, majority": lambda: majority(warped),
        "SyN, locally weighted": lambda: locally_weighted(image, warped),
    }
    results = {}
    for method, fuse in fused.items():
        start = time.process_time()
        scores = overlap(case, fuse(), organs)
        own = time.process_time() - start
        results[method] = Measured(scores, seconds + own, cpu_seconds + own)
    return results


def register_at(spacing: float, scan: Case, atlas: Case, cache: Path) -> Registered:
    """Register one atlas with both brought to a spacing, mm."""
    fixed, moving = at_spacing(scan.image, spacing, 1), at_spacing(atlas.image, spacing, 1)
    labels = at_spacing(atlas.image._replace(voxels=atlas.labels), spacing, 0)
    return register(fixed, moving, labels.voxels, cache)


def at_spacing(image: Image, spacing: float, order: int) -> Image:
    factors = [own / spacing for own in image.spacing]
    voxels = zoom(image.voxels, factors, order=order)
    return Image(voxels, (spacing, spacing, spacing), image.origin)


def overlap(case: Case, found: NDArray[Any], organs: OrganTable) -> dict[str, float]:
    """Dice of each annotated organ."""
    names = [organs.by_value(value).name for value in sorted(case.annotated)]
    return dice([case.labels], [found], names, organs)


def summary(found: dict[str, list[Measured]], organs: OrganTable) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for method, results in found.items():
        by_organ = {
            name: statistics.fmean(r.dice[name] for r in results if name in r.dice)
            for name in organs.names
            if any(name in r.dice for r in results)
        }
        every = [value for result in results for value in result.dice.values()]
        figures[method] = {
            "mean_dice": statistics.fmean(every),
            "dice_by_organ": by_organ,
            "seconds": statistics.median(r.seconds for r in results),
            "cpu_seconds": statistics.median(r.cpu_seconds for r in results),
        }
    return figures


if __name__ == "__main__":
    main()
