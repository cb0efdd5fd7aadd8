"""Whether a process keeps the memory that it frees, and grows no further."""

import json
import platform
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from common.run import allocator
from common.run.allocator import VARIABLES

# blocks as a step has them: many large ones, freed together; prints what it set, the page faults
# of every later round and the resident MB after the first and the last round
SCRIPT = """
import json, resource, sys, numpy as np
from common.run.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident(): return next(int(l.split()[1]) for l in open("/proc/self/status") if "VmRSS" in l)
sizes = np.random.default_rng(0).integers(1, 48, (18, 8)) * 2**20
counts, held = [], []
for round in sizes:
    before = faults()
    blocks = [np.ones(size, np.uint8) for size in round]
    del blocks
    counts.append(faults() - before)
    held.append(resident() // 1024)
print(json.dumps({"kept": kept, "faults": sum(counts[6:]), "held": [max(held[:6]), held[-1]]}))
"""


def rounds(mode):
    clean = {k: v for k, v in environment().items() if k not in VARIABLES}
    command = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_blocks_are_there_for_the_next_step_and_memory_does_not_grow():
    plain, kept = rounds("plain"), rounds("keep")
    assert kept["kept"] is True
    assert kept["faults"] < plain["faults"] / 10
    early, late = kept["held"]
    assert late < 1.1 * early


@pytest.fixture
def untouchable(monkeypatch):
    """Removes the environment's settings, and replaces the allocator by one that fails if asked."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("was asked"))


@pytest.mark.parametrize("name", VARIABLES)
def test_a_setting_of_the_environment_is_left_alone(name, untouchable, monkeypatch):
    monkeypatch.setenv(name, "65536")
    assert allocator.keep_freed_memory() is False


def test_another_c_library_is_left_alone(untouchable, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
