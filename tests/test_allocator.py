"""What train.py sets for its process: memory that is kept costs no page faults, and threads that wait soon sleep."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import resource, torch
from training.allocator import keep_freed_memory

def faults():
    for _ in range(20):  # aligned blocks come to rest only after several
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB, 16,384 pages
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults

before = faults()
keep_freed_memory()
print(before, faults())
"""
glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def faults(**settings):
    """Before keep_freed_memory() and after it."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=Path(__file__).parent.parent, env=environment | settings,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return map(int, done.stdout.split())


@pytest.mark.skipif(not glibc, reason="another malloc than glibc's")
def test_a_tensor_takes_the_pages_of_the_one_before():
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    huge = 2**21 // os.sysconf("SC_PAGE_SIZE")  # the least that the system would have to fault in
    before, after = faults()
    assert before >= pages // huge and after < 10
    _, after = faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert after >= pages // huge  # the user's


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, "1000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_threads_that_wait_sleep_unless_the_user_says_how_they_wait(settings, expected):
    program = (
        "import sys, training.config, os; assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, env=environment | settings,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == expected + "\n"
