"""The benchmarks are scripts: they import each other from their own folder."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def ended():
    """Waits until processes have ended, which need not be children of this one."""

    def there(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    def wait(*pids):
        begun = time.monotonic()
        while any(there(pid) for pid in pids):
            assert time.monotonic() - begun < 30
            time.sleep(0.1)

    return wait
