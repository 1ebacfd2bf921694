#!/usr/bin/env python
"""Try to break a store: kill those who add to it, and flip bytes of what is there.

`kill`: rounds in which several processes add atlases to one store and one or more of them are
killed with SIGKILL at a random moment. After every round each atlas whose add returned must be
whole and nothing half visible; in the end the interrupted adds are repeated. `flip`: change one
random byte after the other of one atlas; `verify` must name the atlas each time.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atlas_store import AtlasStore, load_organs

ROOT = Path(__file__).parents[1]
SYNTHETIC = ROOT / "tests" / "atlas_store" / "synthetic.py"
sys.path.insert(0, str(SYNTHETIC.parent))
import synthetic  # noqa: E402  (the atlases of the tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kill", "flip"])
    parser.add_argument("--rounds", type=int, default=200, help="of killing")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--bytes", type=int, default=1000, help="to flip")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        store = AtlasStore.create(f"{name}/store", load_organs("openkbp"), synthetic.PARAMETERS)
        if options.what == "kill":
            kill(store, options.rounds, options.processes, rng)
        else:
            flip(store, options.bytes, rng)


def kill(store: AtlasStore, rounds: int, processes: int, rng: random.Random) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, SYNTHETIC, store.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline().strip() == "ready"
    added: set[str] = set()
    wanted: set[str] = set()
    killed = left = 0

    def start(batches: list[str]) -> list[int]:
        """Start a process for each batch; what earlier ones wrote is read on the way."""
        assert server.stdin is not None
        server.stdin.write("".join(f"{batch}\n" for batch in batches))
        server.stdin.flush()
        started: list[int] = []
        while len(started) < len(batches):
            take(started)
        return started

    def take(started: list[int], done: list[str] | None = None) -> None:
        assert server.stdout is not None
        what, _, rest = server.stdout.readline().strip().partition(" ")
        if what == "started":
            started.append(int(rest))
        elif what == "added":
            added.add(rest)
        elif what == "done" and done is not None:
            done.append(rest)

    for turn in range(rounds):
        own = [[f"r{turn}_p{p}_{n}" for n in range(2)] for p in range(processes)]
        wanted.update(atlas_id for batch in own for atlas_id in batch)
        running = start([" ".join(batch) for batch in own])
        time.sleep(rng.uniform(0.0, 1.0))
        for process in rng.sample(running, rng.randint(1, processes)):
            try:
                os.kill(process, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        for process in running:
            wait_for_end(process)
        # A process that adds nothing: its lines come after all that the others wrote.
        start([""])
        done: list[str] = []
        while not done:
            take([], done)
        problems = store.verify()
        assert all("was left by" in problem.what for problem in problems), problems
        assert added <= set(store), added - set(store)
        left += len(problems)
        assert all(problem.repaired for problem in store.verify(repair=True))
        assert store.verify() == []
    missing = sorted(wanted - set(store))
    start([" ".join(missing)])
    done = []
    while not done:
        take([], done)
    server.communicate()
    assert set(store) == wanted
    assert store.verify() == []
    print(
        f"{rounds} rounds of {processes} processes: {killed} killed, {left} interrupted adds"
        f" found and removed, {len(missing)} repeated, {len(wanted)} atlases, none lost."
    )


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
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    # What describes the store itself is no atlas's; opening it says what is wrong with it.
    files = [p for p in files if p.parent not in (root, root / "atlases")]
    for _ in range(count):
        file = rng.choice(files)
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= rng.randint(1, 255)
        file.write_bytes(changed)
        problems = store.verify()
        file.write_bytes(whole)
        assert {problem.atlas for problem in problems} == {"pt_1"}, file
    assert store.verify() == []
    print(f"{count} bytes changed in {len(files)} files, each detected.")


if __name__ == "__main__":
    main()
