"""How this process gets memory from the system, and when it gives it back."""

import ctypes

_SETTINGS = {-8: 1, -3: 1 << 30, -1: 1 << 30}
"""glibc's M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD."""


def keep_memory() -> None:
    """Let every thread use again what another one gave back, and give little to the system.

    Else glibc keeps what a thread gives back for this thread alone, and gives large arrays to the
    system at once, so that a station begins with new memory: a segmentation takes a sixth more of
    it, and to fill what is new takes longer than to compute much of what is put there. For a
    process of our own, before it begins threads; nothing happens where there is no glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in _SETTINGS.items():
            libc.mallopt(parameter, value)
