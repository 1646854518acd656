import subprocess
import sys

import pytest

STEPS = """
import resource, sys, threading, torch
from lit_rlhf.models.kernels.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def step():
    for megabytes in (3, 50, 7):
        torch.ones(megabytes * 2**18)
def steps():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "main":
    steps()
else:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
"""


def faults(how, thread):
    """Pages that ten steps asked the system for."""
    done = subprocess.run([sys.executable, "-c", STEPS, how, thread], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("thread", ["main", "another"])
def test_steps_do_not_ask_the_system_for_the_same_memory_again(thread):
    assert faults("plain", thread) > 10_000
    assert faults("keep", thread) < 1_000
