"""Small synthetic atlases, written with zarr alone.

Run as a program with the paths of a store and, perhaps, of another one, it forks a process for
every line it reads (`ID ID …`) that adds these atlases one after the other, and prints `started
PID`, `added ID` and `refused ID`, and in the end `done`, or `done nothing` where no id was given.
Instead of an id there may be `HOW:ID`: one of `CHANGES`, then prints `HOW ID`.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import xarray as xr
from zarr.codecs import BloscCodec

from atlas_store import (
    AtlasExistsError,
    AtlasInfo,
    AtlasNotFoundError,
    AtlasStore,
    Draft,
    OrganInfo,
    load_organs,
)

PARAMETERS = {"spacing": 2.0, "extraction": {"sigma": 1.6, "levels": 3}}
SHAPE = (12, 10, 8)


def keypoints(count: int = 40, seed: int = 0, label: bool = True) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    ranks = np.tile(np.arange(64, dtype=np.uint8), (count, 1))
    variables = {
        "position": (("keypoint", "axis"), rng.normal(size=(count, 3)).astype(np.float32)),
        "scale": ("keypoint", rng.uniform(3, 9, count).astype(np.float32)),
        "sign": ("keypoint", rng.choice([-1, 1], count).astype(np.int8)),
        "response": ("keypoint", rng.normal(size=count).astype(np.float32)),
        "descriptor": (("keypoint", "bin"), rng.permuted(ranks, axis=1)),
        "frame": (
            ("keypoint", "direction", "axis"),
            np.linalg.qr(rng.normal(size=(count, 3, 3)))[0].astype(np.float32),
        ),
        "octave": ("keypoint", np.zeros(count, np.uint8)),
    }
    if label:
        variables["label"] = ("keypoint", rng.choice([0, 0, 1, 7], count).astype(np.uint16))
    return xr.Dataset(variables)


def labels() -> np.ndarray:
    values = np.zeros(SHAPE, np.uint8)
    values[2:5, 3:6, 1:4] = 1
    values[7:9, 0:10, 5:8] = 7
    return values


def extents(values: np.ndarray) -> dict[str, OrganInfo]:
    found = {}
    for organ in load_organs("openkbp"):
        voxels = np.argwhere(values == organ.value)
        if len(voxels):
            box = tuple(zip(voxels.min(0).tolist(), (voxels.max(0) + 1).tolist(), strict=True))
            found[organ.name] = OrganInfo(len(voxels), box, tuple((2 * voxels.mean(0)).tolist()))
    return found


def fill(draft: Draft, seed: int = 0) -> None:
    image = draft.group.create_group("image")
    rng = np.random.default_rng(seed)
    how = {"chunks": (6, 10, 8), "compressors": BloscCodec(cname="lz4")}
    image.create_array("0", data=rng.normal(size=SHAPE).astype(np.float32), **how)
    image.create_array("labels/organs/0", data=labels(), **how)


def commit(draft: Draft, seed: int = 0, count: int = 40, **changes: object) -> AtlasInfo:
    arguments = {
        "annotated": ["mandible", "brainstem", "larynx"],
        "organs": extents(labels()),
        "shape": SHAPE,
        "spacing": (2, 2, 2),
        "origin": (-10, 0, 4.5),
        "source": ["/somewhere/private/pt_1_ct.nii.gz", Path("pt_1_seg.nii.gz")],
    }
    return draft.commit(keypoints(count, seed), **arguments | changes)


def add(
    store: AtlasStore, atlas_id: str, seed: int = 0, count: int = 40, replace: bool = False
) -> AtlasInfo:
    with store.draft(atlas_id, PARAMETERS, replace=replace) as draft:
        fill(draft, seed)
        return commit(draft, seed, count)


def relabel(store: AtlasStore, atlas_id: str) -> None:
    """Replace an atlas, and keep its note."""
    with store.draft(atlas_id, PARAMETERS, replace=store[atlas_id].info) as draft:
        draft.keep_note()
        fill(draft, 1)
        commit(draft, 1)


def copy(store: AtlasStore, atlas_id: str) -> None:
    source = AtlasStore.open(sys.argv[2])
    store.copy_from(source[source.ids()[0]], atlas_id)


CHANGES = {
    "added": lambda store, atlas_id: add(store, atlas_id, seed=os.getpid()),
    "copied": copy,
    "relabelled": relabel,
    "noted": lambda store, atlas_id: store.set_note(atlas_id, f"about {atlas_id}"),
    "removed": lambda store, atlas_id: store.remove(atlas_id),
    "restored": lambda store, atlas_id: store.restore(atlas_id),
    "pruned": lambda store, _: store.prune(),
}


def tell(what: str) -> None:
    # In one write: the processes share the pipe.
    os.write(1, f"{what}\n".encode())


def serve(path: str) -> None:
    # Nobody waits for the children, and one that waits to be waited for still counts as running.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    tell("ready")
    for line in sys.stdin:
        if os.fork() == 0:
            tell(f"started {os.getpid()}")
            store = AtlasStore.open(path)
            for word in line.split():
                how, _, atlas_id = word.rpartition(":")
                how = how or "added"
                try:
                    CHANGES[how](store, atlas_id)
                except (AtlasExistsError, AtlasNotFoundError):
                    tell(f"refused {atlas_id}")
                else:
                    tell(f"{how} {atlas_id}")
            tell("done" if line.split() else "done nothing")
            os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
