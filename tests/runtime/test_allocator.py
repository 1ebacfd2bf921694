"""What one thread gives back, another one uses again: counted by the system's page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys, threading
import numpy as np
from kpt_dask.runtime.allocator import share_freed_memory

def fill():
    np.ones(1 << 27, np.uint8)

def in_thread():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    share_freed_memory()
print(in_thread(), in_thread())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_a_thread_gave_back_is_used_again() -> None:
    first, second = {}, {}
    for how in ("kept", "not"):
        command = [sys.executable, "-c", FAULTS, how]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        first[how], second[how] = map(int, out.split())
    # 128 MiB in pages of 2 MiB, at least.
    assert min(first["kept"], first["not"], second["not"]) >= 60
    assert second["kept"] < 20
