#!/usr/bin/env python
"""Try to break a store: kill those who add to it, and flip bytes of what is there.

`kill`: rounds in which several processes add, copy, note and relabel atlases of one store, and
remove and restore those of the round before, in every second round prune them too, while all are
read; some of the processes are killed with SIGKILL at a random moment. Whatever is visible
meanwhile must be whole. After every round each atlas whose add or copy returned must be there with
its note, each that was removed and not pruned must be there or be restored, nothing else may be
wrong than that interrupted changes left data, which is removed, and the adds and copies that were
interrupted are repeated. `flip`: change one random
byte after the other of one atlas; `verify` must name the atlas, and the array, each time.
`read`: damage one object after the other of a store, and segment a scan with it, in modes local
and organ by turns; the answer must be the same bytes, or one sentence.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Thread

from distributed import Client

from atlas_store import (
    AtlasNotFoundError,
    AtlasStore,
    AtlasStoreError,
    Problem,
    load_organs,
    verify,
)
from kpt_dask.atlases.add import add_atlas, store_parameters
from kpt_dask.demo.phantom import write_phantom
from kpt_dask.errors import KptError
from kpt_dask.options import TransferOptions
from kpt_dask.runtime import cluster
from kpt_dask.segmentation import segment

ROOT = Path(__file__).parents[1]
SYNTHETIC = ROOT / "tests" / "atlas_store" / "synthetic.py"
sys.path.insert(0, str(SYNTHETIC.parent))
import synthetic  # noqa: E402  (the atlases of the tests)

EACH = 2
"""Atlases that a process adds in a round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kill", "flip", "read"])
    parser.add_argument("--rounds", type=int, default=200, help="of killing")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=1000, help="to flip")
    parser.add_argument("--damages", type=int, default=200, help="to read")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        if options.what == "read":
            read(Path(name), options.damages, rng)
            return
        store = AtlasStore.create(f"{name}/store", load_organs("openkbp"), synthetic.PARAMETERS)
        if options.what == "kill":
            kill(store, options.rounds, options.processes, rng)
        else:
            flip(store, options.bytes, rng)


class Adders:
    """Processes that change a store, and copy from another, forked by one that is warm."""

    def __init__(self, store: AtlasStore, source: AtlasStore) -> None:
        self._server = subprocess.Popen(
            [sys.executable, SYNTHETIC, store.url, source.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.added: set[str] = set()
        self.noted: set[str] = set()
        assert self._read() == ["ready"]

    def start(self, batches: Iterable[Iterable[str]]) -> list[int]:
        """Start a process for each batch of ids."""
        lines = [" ".join(batch) for batch in batches]
        assert self._server.stdin is not None
        self._server.stdin.write("".join(f"{line}\n" for line in lines))
        self._server.stdin.flush()
        started: list[int] = []
        while len(started) < len(lines):
            what, *rest = self._read()
            if what == "started":
                started.append(int(rest[0]))
        return started

    def finish(self, running: Iterable[int]) -> None:
        """Wait until these processes have ended, and take note of all that was added."""
        for process in running:
            wait_for_end(process)
        # A process that adds nothing: its lines come after all that the others wrote.
        for process in self.start([[]]):
            wait_for_end(process)
        while self._read() != ["done", "nothing"]:
            pass

    def close(self) -> None:
        """Let the process end that forks them."""
        self._server.communicate()

    def _read(self) -> list[str]:
        assert self._server.stdout is not None
        words = self._server.stdout.readline().split()
        if words[0] in ("added", "copied"):
            self.added.add(words[1])
        if words[0] == "noted":
            self.noted.add(words[1])
        return words


def kill(store: AtlasStore, rounds: int, processes: int, rng: random.Random) -> None:
    # Nobody adds while it is verified: no add has to be given time to show itself.
    verify.INSTANT = 0.0
    source = AtlasStore.create(f"{store.url}-source", store.organs, synthetic.PARAMETERS)
    synthetic.add(source, "original")
    adders = Adders(store, source)
    killed = left = repeated = read = 0
    start = time.perf_counter()
    adders.finish(adders.start(map(changes, ids_of(-1, processes))))
    # As long as a round takes when nobody is killed.
    long = time.perf_counter() - start
    before = store.ids()
    assert len(before) == EACH * processes
    for turn in range(rounds):
        adders.added.clear()
        adders.noted.clear()
        wanted = ids_of(turn, processes)
        mine, theirs = before[::EACH], before[1::EACH]
        prunes = turn % 2 == 1
        running = adders.start(
            changes(ids)
            + [f"{how}:{old}" for how in ("removed", "restored", "removed")]
            + ["pruned:all"] * prunes
            for ids, old in zip(wanted, theirs, strict=True)
        )
        remover = Thread(target=remove, args=(store, mine))
        remover.start()
        until = time.perf_counter() + rng.uniform(0.0, long)
        while time.perf_counter() < until:
            read += read_all(store)
        for process in rng.sample(running, rng.randint(1, processes)):
            try:
                os.kill(process, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        remover.join()
        adders.finish(running)
        problems = store.verify(repair=True)
        delete_unmarked(store, problems)
        assert all("was left by" in p.what for p in problems if p.repaired), problems
        assert adders.added - set(before) <= set(store), adders.added - set(store)
        assert all(store.note(one) == f"about {one}" for one in adders.noted), adders.noted
        left += len(problems)
        if not prunes:
            bring_back(store, theirs)
        read += read_all(store)
        clear(store, before)
        before = [atlas_id for batch in wanted for atlas_id in batch]
        missing = [atlas_id for atlas_id in before if atlas_id not in store]
        repeated += len(missing)
        adders.finish(adders.start([missing]))
        assert sorted(store) == sorted(before)
        store.prune()  # what was relabelled
        assert store.verify() == []
        assert_nothing_left(store)
        read += read_all(store)
    adders.close()
    print(
        f"{rounds} rounds of {processes} processes: {killed} killed, {left} interrupted changes"
        f" found and removed, {repeated} repeated, {rounds * processes * EACH} atlases, none"
        f" lost, {read} read whole meanwhile."
    )


def ids_of(turn: int, processes: int) -> list[list[str]]:
    return [[f"r{turn + 1}_p{p}_{n}" for n in range(EACH)] for p in range(processes)]


def changes(ids: Sequence[str]) -> list[str]:
    """Add the first, note something about it and relabel it; copy the others."""
    first, *others = ids
    return [first, f"noted:{first}", f"relabelled:{first}", *(f"copied:{one}" for one in others)]


def remove(store: AtlasStore, ids: Iterable[str]) -> None:
    for atlas_id in ids:
        store.remove(atlas_id)


def bring_back(store: AtlasStore, ids: Iterable[str]) -> None:
    """Restore atlases that were removed, and perhaps restored, by somebody who was killed."""
    for atlas_id in ids:
        if atlas_id not in store:
            store.restore(atlas_id)


def delete_unmarked(store: AtlasStore, problems: Iterable[Problem]) -> None:
    """Delete complete data whose marker its add, killed, did not write: verify keeps it."""
    for problem in problems:
        if not problem.repaired:
            assert "is complete and has no marker" in problem.what, problem
            shutil.rmtree(problem.what.partition(" is complete")[0])


def clear(store: AtlasStore, ids: Iterable[str]) -> None:
    """Remove atlases of which some are removed already, and delete their data."""
    remove(store, (atlas_id for atlas_id in ids if atlas_id in store))
    store.prune()
    assert store.removed() == []


def assert_nothing_left(store: AtlasStore) -> None:
    """Check that whatever is in a store belongs to an atlas that is there."""
    known = {f"{atlas.id}.{atlas.info.uuid}" for atlas in store.atlases()}
    for folder, whose in (("atlases", known), ("notes", known), ("removed", known)):
        there = {path.name.removesuffix(".json") for path in Path(store.url, folder).glob("*")}
        assert there - {"zarr"} <= whose, there - whose  # zarr.json: `atlases` is a Zarr group
    markers = {path.name for path in Path(store.url, "markers").glob("*")}
    assert markers == {f"{atlas_id}.json" for atlas_id in store}


def read_all(store: AtlasStore) -> int:
    """Read all that is visible, and count the atlases."""
    count = 0
    for atlas in store.atlases():
        try:
            assert len(atlas.keypoint_arrays()["label"]) == atlas.info.keypoints
            labels = atlas.labels[...]
            atlas.ensure_present()
        except AtlasNotFoundError:
            continue
        except AtlasStoreError:
            # Zarr read what was being deleted; that is no damage, if it was.
            if atlas.id in store and store[atlas.id].info.uuid == atlas.info.uuid:
                raise
            continue
        assert (labels == synthetic.labels()).all()
        count += 1
    return count


def wait_for_end(process: int) -> None:
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.005)


def flip(store: AtlasStore, count: int, rng: random.Random) -> None:
    synthetic.add(store, "pt_1")
    root = Path(store.url)
    data = root / store["pt_1"].path
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    # What describes the store itself is no atlas's; opening it says what is wrong with it.
    files = [p for p in files if p.parent not in (root, root / "atlases")]
    for _ in range(count):
        file = rng.choice(files)
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= rng.randint(1, 255)
        file.write_bytes(changed)
        problems = store.verify(repair=True)
        file.write_bytes(whole)
        assert {problem.atlas for problem in problems} == {"pt_1"}, file
        if file.parent != data and data in file.parents:
            array = file.relative_to(data).as_posix().partition("/c/")[0]
            assert any(f"/{array} " in problem.what for problem in problems), problems
    assert store.verify() == []
    print(f"{count} bytes changed in {len(files)} files, each detected.")


def read(folder: Path, count: int, rng: random.Random) -> None:
    store, scan = bodies(folder)
    files = sorted(p for p in Path(store).rglob("*") if p.is_file())
    refused = 0
    # Each refusal is a task that failed, which a worker logs at length.
    logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)
    with cluster.session() as client:
        whole = [answer(scan, store, folder / f"{mode}.zarr", mode, client) for mode in MODES]
        assert not any(isinstance(found, str) for found in whole), whole
        for n in range(count):
            file, how = rng.choice(files), rng.choice(list(DAMAGES))
            before = file.read_bytes()
            after = DAMAGES[how](before, rng, rng.choice(files).read_bytes())
            mode = n % len(MODES)
            file.unlink() if after is None else file.write_bytes(after)
            out = folder / f"{n}.zarr"
            try:
                found = answer(scan, store, out, MODES[mode], client)
            finally:
                file.write_bytes(before)
            if isinstance(found, str):
                assert not out.exists(), (file, how)
                assert store in found or "atlases/" in found, (file, how, found)
                refused += 1
            else:
                assert found == whole[mode], (file, how)
                shutil.rmtree(out)
    print(
        f"{count} damages to {len(files)} objects: {refused} refused in a sentence,"
        f" {count - refused} without effect, no other answer."
    )


MODES = ("local", "organ")


def flipped(data: bytes, rng: random.Random, _: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random, bytes], bytes | None]] = {
    "a byte is another": flipped,
    "the end is missing": lambda data, rng, _: data[: rng.randrange(len(data))],
    "all is missing": lambda data, rng, _: None,
    "it is another object": lambda data, rng, other: other,
    "it is zero": lambda data, rng, _: bytes(len(data)),
}


def bodies(folder: Path) -> tuple[str, Path]:
    """Make a store of two phantoms, and a scan of a third."""
    store = AtlasStore.create(folder / "bodies", load_organs("visceral"), store_parameters(4.0))
    for seed in range(1, 4):
        pair = folder / f"body_{seed}_ct.nii.gz", folder / f"body_{seed}_seg.nii.gz"
        write_phantom(*pair, seed, (110, 65, 80), 4.0)
        if seed < 3:
            add_atlas(store, *pair, atlas_id=f"body_{seed}")
    return store.url, folder / "body_3_ct.nii.gz"


def answer(scan: Path, store: str, out: Path, mode: str, client: Client) -> str | dict[str, bytes]:
    """Segment a scan: its label map and probabilities, or the sentence that says why not."""
    try:
        options = TransferOptions(fast=mode == "local")
        segment(scan, store, out, mode=mode, options=options, client=client)
    except (AtlasStoreError, KptError) as error:
        return str(error)
    folders = [out / "labels" / "organs" / "0", out / "probability"]
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    main()
