"""What the C library's allocator does with memory between steps."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Have the C library keep what tensors leave for the next ones; whether it can (glibc only).

    Otherwise it gives blocks of some MiB back to the system at once, and each step asks for them again, page by page.
    Only the largest still go back: kept, they would soon be in pieces, and the next step would take others."""
    # One arena: those of other threads than the first consist of pieces, which go back to the system all the same.
    return _set({MMAP_THRESHOLD: 1 << 28, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20, ARENA_MAX: 1})


def give_back_freed_memory() -> bool:
    """Undo :func:`keep_freed_memory`: blocks of a MiB and more go back to the system when they are freed.

    Weights that are gathered, layer by layer, leave gaps of many sizes, which the next ones would not fill."""
    return _set({MMAP_THRESHOLD: 1 << 20, TRIM_THRESHOLD: 1 << 20, TOP_PAD: 0})


def _set(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
