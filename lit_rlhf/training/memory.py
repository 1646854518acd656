"""Memory of a process: now, and at most."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux alone


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status("VmRSS")


def machine_bytes() -> int:
    """Memory that processes may take: the machine's, or less where a control group (a container) allows less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    machine = psutil.virtual_memory().total
    return min(machine, int(allowed)) if allowed.isdigit() else machine


class Peak:
    """The most memory held since this object was made, and what was held then, in bytes.

    Of a GPU where torch has used one, else of the process in RAM. Where the system cannot measure a process's peak
    anew (other than Linux), the peak in RAM is the one since the process began.
    """

    def __init__(self) -> None:
        self._resident, self._allocated = resident_bytes(), 0
        if torch.cuda.is_available():
            self._allocated = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        try:
            CLEAR.write_text("5")
            self.anew = True
        except OSError:
            self.anew = False

    def measure(self) -> tuple[int, int]:
        """Bytes held when this object was made, and the most since then."""
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return self._allocated, torch.cuda.max_memory_allocated()
        # Linux counts a new peak from a rougher sum than the memory now: it can begin some pages below it.
        return self._resident, max(self._resident, _status("VmHWM"))

    def mib(self) -> dict[str, float]:
        """The measurement in MiB, as a run's files have it."""
        before, peak = self.measure()
        return {"before_mib": before / 2**20, "peak_mib": peak / 2**20}


def _status(name: str) -> int:
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    held = psutil.Process().memory_info()
    if name == "VmRSS":
        return int(held.rss)
    if sys.platform == "win32":
        return int(held.peak_wset)
    import resource  # of POSIX alone

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind some tensors on ``meta``, shared memory counted once."""
    return sum({s: s.nbytes() for s in (t.untyped_storage() for t in tensors if t.is_meta)}.values())
