#!/usr/bin/env python
"""Try to break a segmentation: kill it, interrupt it, delete what it writes, fill its disk.

Each round segments a phantom over the outputs of the round before, in one of two ways whose
answers are known, and something happens at a random moment or as the outputs are put in their
places. Afterwards both outputs must be there, whole, of one run, and one of the two known; who
ended with 0 must have left the right one; who was interrupted nothing else. Rounds follow on two
workers of which one is killed, and with a store whose third atlas others remove and replace
meanwhile; with root's rights, also on a disk that is too small.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from threading import Event, Thread
from typing import Any

import zarr
from distributed import LocalCluster

from atlas_store import AtlasStore, load_organs
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.output.commit import sweep
from kpt_dask.runtime import cluster
from kpt_dask.scans.label_header import run_of

SHAPE, SPACING = (80, 65, 80), 4.0
WAYS = (("--mode", "organ"), ("--mode", "local", "--fast"))
HANGS = 300.0
"""Seconds after which a run counts as hung."""
EVENTS = ("KILL", "INT", "chunk", "TERM", "INT INT", "folder", "HUP", "USR1", "nothing")

Answer = dict[str, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make(place)
        campaign = Campaign(place, rng)
        campaign.interrupt(options.rounds)
        few = -(-options.rounds // 6)
        campaign.kill_workers(few)
        campaign.move_store(few)
        full = full_disks(place)
    told = f"{options.rounds} rounds, {few} with workers, {few} with a moving store, {full}"
    print(f"{told}: {dict(campaign.faults) or 'no fault'}")
    sys.exit(bool(campaign.faults))


def make(place: Path) -> None:
    """Make a store of two phantoms, a third, which is segmented, and a fourth, which moves."""
    store = AtlasStore.create(place / "store", load_organs("visceral"), store_parameters(SPACING))
    with cluster.session() as client:
        for seed in (1, 2, 3, 4):
            files = [place / f"{seed}_{what}.nii.gz" for what in ("ct", "seg")]
            write_phantom(files[0], files[1], seed, SHAPE, SPACING)
            if seed < 3:
                add_atlas(store, files[0], files[1], atlas_id=str(seed), client=client)


class Campaign:
    """Segmentations that are disturbed, and what went wrong.

    Attributes
    ----------
    faults : Counter
        How often, by kind.
    """

    def __init__(self, place: Path, rng: random.Random) -> None:
        self.faults: Counter[str] = Counter()
        self._place, self._rng, self._out = place, rng, place / "out"
        self._answers = []
        for way in WAYS:
            start = time.perf_counter()
            assert start_run(place, self._out, way).wait(HANGS) == 0
            self._long = time.perf_counter() - start
            self._answers.append(content(self._out))

    def interrupt(self, rounds: int) -> None:
        """Kill, interrupt, and delete what is written."""
        for turn in range(rounds):
            event, way = EVENTS[turn % len(EVENTS)], self._rng.randrange(2)
            before = content(self._out)
            process = start_run(self._place, self._out, WAYS[way])
            wait_for_moment(process, self._out, self._long, self._rng)
            happen(event, process, self._out, self._rng)
            self._judge(process, event, before, self._answers[way])

    def kill_workers(self, rounds: int) -> None:
        """Kill a worker of two, in place of which another is started."""
        with LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as workers:
            for _ in range(rounds):
                way = self._rng.randrange(2)
                before = content(self._out)
                options = (*WAYS[way], "--scheduler", workers.scheduler_address)
                process = start_run(self._place, self._out, options)
                wait_for_moment(process, self._out, self._long, self._rng)
                worker = self._rng.choice(list(workers.workers.values()))
                if worker.pid:
                    os.kill(worker.pid, signal.SIGKILL)
                self._judge(process, "a worker's death", before, self._answers[way])

    def move_store(self, rounds: int) -> None:
        """Segment while others remove and replace an atlas."""
        store = AtlasStore.open(self._place / "store")
        files = [self._place / f"4_{what}.nii.gz" for what in ("ct", "seg")]
        known = [self._answers[0]["o.nii.gz"]]
        enough = Event()

        def move() -> None:
            with cluster.session() as client:
                while not enough.is_set():
                    add_atlas(store, files[0], files[1], atlas_id="4", replace=True, client=client)
                    if self._rng.random() < 0.5:
                        store.remove("4")

        with cluster.session() as client:
            add_atlas(store, files[0], files[1], atlas_id="4", client=client)
        assert start_run(self._place, self._out, WAYS[0]).wait(HANGS) == 0
        known.append(content(self._out)["o.nii.gz"])
        mover = Thread(target=move)
        mover.start()
        try:
            for _ in range(rounds):
                process = start_run(self._place, self._out, WAYS[0])
                if process.wait(HANGS) != 0:
                    self.faults["ended by others who changed the store"] += 1
                elif content(self._out)["o.nii.gz"] not in known:
                    self.faults["silently wrong"] += 1
        finally:
            enough.set()
            mover.join()

    def _judge(
        self, process: "subprocess.Popen[bytes]", event: str, before: Answer, right: Answer
    ) -> None:
        try:
            code = process.wait(HANGS)
        except subprocess.TimeoutExpired:
            self.faults["hung"] += 1
            process.kill()
            code = process.wait()
        names = sorted(os.listdir(self._out))
        if code != -signal.SIGKILL and names != ["o.nii.gz", "o.zarr"]:
            self.faults[f"litter after {event}"] += 1
        sweep(self._out)
        if sorted(os.listdir(self._out)) != ["o.nii.gz", "o.zarr"]:
            self.faults["litter, or lost"] += 1
            return
        found = content(self._out)
        said: Any = zarr.open_group(self._out / "o.zarr", mode="r").attrs["kpt"]
        if run_of(self._out / "o.nii.gz") != said["run"]:
            self.faults["mismatched"] += 1
        if code == 0 and found != right:
            self.faults["silently wrong"] += 1
        if code != 0 and found not in (before, right):
            self.faults["half-written"] += 1


def start_run(place: Path, out: Path, way: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    """Start a segmentation."""
    command = [sys.executable, "-m", "kpt_dask", "segment", place / "3_ct.nii.gz", place / "store"]
    command += [out / "o.zarr", "--labels", out / "o.nii.gz", "--overwrite", *way]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for_moment(
    process: "subprocess.Popen[bytes]", out: Path, long: float, rng: random.Random
) -> None:
    """Wait for a random moment of a run, or until it puts its outputs in their places."""
    if rng.random() < 0.3:
        while process.poll() is None and not any(
            read(lock).count(b"\n") > 1 for lock in locks(out)
        ):
            time.sleep(0.0005)
        return
    while process.poll() is None and not list(locks(out)):
        time.sleep(0.001)
    until = time.perf_counter() + rng.uniform(0, long / 2)
    while process.poll() is None and time.perf_counter() < until:
        time.sleep(0.001)


def locks(out: Path) -> list[Path]:
    """List the locks of runs; one may vanish before it is read."""
    found = []
    for path in out.glob(".kpt-*.lock"):
        try:
            path.read_bytes()
        except FileNotFoundError:
            continue
        found.append(path)
    return found


def happen(event: str, process: "subprocess.Popen[bytes]", out: Path, rng: random.Random) -> None:
    """Do to a run what the event says."""
    if event in ("chunk", "folder"):
        # Only what is still being written: once it is in its place it is the user's.
        partials = list(out.glob(".kpt-*.partial.zarr"))
        if not partials or any(read(lock).count(b"\n") > 1 for lock in locks(out)):
            return
        if event == "folder":
            shutil.rmtree(partials[0], ignore_errors=True)
            return
        chunks = sorted(p for p in partials[0].glob("[0-9]/c/*/*/*") if p.is_file())
        if chunks:
            rng.choice(chunks).unlink(missing_ok=True)
    elif event != "nothing":
        for name in event.split():
            process.send_signal(getattr(signal, f"SIG{name}"))
            time.sleep(rng.uniform(0, 0.05))


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def full_disks(place: Path) -> str:
    """Segment onto disks with too little room, or too few files."""
    small = place / "small"
    small.mkdir()
    tried = 0
    for size in ("size=64k", "size=1m", "nr_inodes=12", "nr_inodes=40"):
        mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(small)]
        if subprocess.run(mount, capture_output=True).returncode:
            return "disks that are full SKIPPED: tmpfs cannot be mounted"
        try:
            code = start_run(place, small, WAYS[0]).wait(HANGS)
            assert code == 1, (size, code)
            assert os.listdir(small) == [], (size, os.listdir(small))
        finally:
            subprocess.run(["umount", str(small)], check=True)
        tried += 1
    return f"{tried} full disks"


def content(out: Path) -> Answer:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


if __name__ == "__main__":
    main()
