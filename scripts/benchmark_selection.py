#!/usr/bin/env python
"""What a search in graphs misses, on real patients.

Each atlas of a store in turn is the scan, and the others are its atlases. Twenty are selected after
an exact search and after a search in graphs, which are built whether or not that pays. `recall` is
the fraction of those of the exact search that the other selects too. With `--segment`, scans whose
atlases differ are segmented both ways, in mode local; `dice_difference` is what graphs change of
the mean Dice of all scans, which is nothing where the atlases are the same.

The index is kept in a cache of its own for the run.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from distributed import Client
from rich.progress import track

from atlas_store import AtlasKeypoints, AtlasStore, Snapshot
from atlas_store.index.search import AtlasIndex
from kpt_dask.evaluation.overlap import dice
from kpt_dask.matching.first_pass import match
from kpt_dask.matching.selection import USUAL, propose_atlases, select_atlases
from kpt_dask.runtime import cluster
from kpt_dask.segmentation import segment_volume, temporary_image
from kpt_dask.volumes.volume import open_volume

EXACT, GRAPH = WAYS = "exact", "pynndescent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", help="store of the atlases, more than 60")
    parser.add_argument("--scans", type=int, help="number of atlases to take as scans: the first")
    parser.add_argument("--segment", action="store_true", help="segment scans of other atlases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    store = Snapshot(AtlasStore.open(options.store))
    names = store.ids()[: options.scans]
    with tempfile.TemporaryDirectory() as cache, cluster.session() as client:
        os.environ["XDG_CACHE_HOME"] = cache
        figures, differing = compare(store, names, client)
        if options.segment:
            differences = [
                segmented(store, name, GRAPH, client) - segmented(store, name, EXACT, client)
                for name in track(differing, "Segmenting")
            ]
            figures["largest_dice_difference"] = max(map(abs, differences), default=0.0)
            figures["dice_difference"] = sum(differences) / len(names)
    for name, value in figures.items():
        print(f"{name:28}{value:10.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def compare(
    store: AtlasStore, names: list[str], client: Client
) -> tuple[dict[str, float], list[str]]:
    """Select atlases after both searches; also name the scans for which they differ."""
    list(AtlasIndex.open(store, GRAPH).build_graphs())
    recall, proposed_too, seconds = {}, [], dict.fromkeys(WAYS, 0.0)
    for name in track(names, "Selecting"):
        scan = store[name].keypoints()
        proposed, chosen = {}, {}
        for way in WAYS:
            start = time.perf_counter()
            proposed[way] = propose_atlases(scan, store, others(store, name), USUAL, index=way)
            seconds[way] += time.perf_counter() - start
            atlases = AtlasKeypoints.load(store, proposed[way])
            matches = match(scan, atlases, client=client)
            best = select_atlases(matches, scan, atlases, store, USUAL)
            chosen[way] = [atlases.ids[i] for i in best]
        recall[name] = shared(chosen[EXACT], chosen[GRAPH])
        proposed_too.append(shared(proposed[EXACT], proposed[GRAPH]))
    figures = {
        "scans": len(recall),
        "recall": float(np.mean(list(recall.values()))),
        "lowest_recall": min(recall.values()),
        "scans_of_the_same_atlases": list(recall.values()).count(1.0),
        "recall_of_proposed": float(np.mean(proposed_too)),
    }
    figures |= {f"propose_s_{way}": seconds[way] / len(recall) for way in WAYS}
    return figures, [name for name, value in recall.items() if value < 1.0]


def others(store: AtlasStore, name: str) -> list[str]:
    return [other for other in store.ids() if other != name]


def shared(expected: Sequence[str], found: Sequence[str]) -> float:
    return len(set(expected) & set(found)) / len(expected)


def segmented(store: AtlasStore, name: str, way: str, client: Client) -> float:
    """Mean Dice of a scan that is segmented by the others."""
    atlas = store[name]
    volume = open_volume(atlas.image)
    with temporary_image(store, client, atlas.image) as group:
        found = segment_volume(volume, group, store, others(store, name), index=way, client=client)
        parts = [atlas.labels[...]], [np.asarray(found.labels[...])]
        return float(np.mean(list(dice(*parts, atlas.annotated, store.organs).values())))


if __name__ == "__main__":
    main()
