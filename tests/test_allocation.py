"""Memory that is kept for the next update."""

import platform
import subprocess
import sys

import pytest

from vadd_pyro import allocation

FAULTS = """
import resource, sys, torch
from vadd_pyro.allocation import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for repeat in range(25):
    if repeat == 20:  # until then aligned pieces leave gaps too narrow for the next one
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24)  # 64 MiB, more than the C library keeps of itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to give for five tensors, one after the other."""
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    # However large the system's pages are, those of five tensors are more than those of none.
    assert 10 * faults("keep") < faults("leave")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocation.ctypes, "CDLL", None)
    assert not allocation.keep_freed_memory()
