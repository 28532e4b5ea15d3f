"""How many threads a process computes with: who says so, and what is left of the machine where nobody does."""
import math
import os
import subprocess
import sys

import pytest

import archrepair.training.threads as threads
from archrepair.core.errors import ArchrepairError
from archrepair.training.threads import Machine, settle_threads, spare_threads, threads_for


@pytest.mark.parametrize(("machine", "environ", "expected"), [
    (Machine(8), {}, 8),
    (Machine(8, idle=0.5), {}, 4),
    (Machine(2, idle=0.5), {}, 1),
    (Machine(8, idle=0.0), {}, 1),  # it has to compute with something
    (Machine(8, quota=2.5), {}, 2),
    (Machine(8, quota=0.5), {}, 1),
    (Machine(4, quota=6.0, idle=0.3), {}, 1),
    (Machine(8, idle=0.5), {"OMP_NUM_THREADS": "6"}, 6),
    (Machine(8), {"OMP_NUM_THREADS": "3,2"}, 3),
    (Machine(8), {"OMP_NUM_THREADS": "many"}, 8),
    (Machine(8, quota=1.0), {"OMP_NUM_THREADS": "2", "ARCHREPAIR_THREADS": "5"}, 5),
])
def test_the_rule(machine, environ, expected):
    assert threads_for(machine, environ) == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
def test_a_number_that_is_none_is_one_line(text):
    with pytest.raises(ArchrepairError, match="ARCHREPAIR_THREADS is .* expected a whole number from 1"):
        threads_for(Machine(8), {"ARCHREPAIR_THREADS": text})


def read_from(monkeypatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(threads, "_read", lambda path: files.get(str(path), ""))


def test_what_a_container_grants(monkeypatch):
    read_from(monkeypatch, {"/proc/self/cgroup": "0::/box", "/sys/fs/cgroup/cpu.max": "max 100000",
                            "/sys/fs/cgroup/box/cpu.max": "150000 100000"})
    assert threads._quota() == 1.5
    read_from(monkeypatch, {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert threads._quota() == 4
    read_from(monkeypatch, {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert threads._quota() == math.inf


def test_second_threads_of_a_core_are_not_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5}, raising=False)
    folder = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    read_from(monkeypatch, {folder.format(number): siblings for number, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 5: "1,5"}.items()})
    assert threads._cores() == 3
    read_from(monkeypatch, {})
    assert threads._cores() == 4


def test_how_much_is_idle(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    read_from(monkeypatch, {"/proc/loadavg": "0.10 0.2 0.3 5/100 1"})
    assert threads._idle() == 1  # a moment's work, nothing that lasts
    read_from(monkeypatch, {"/proc/loadavg": "3.00 0.2 0.3 3/100 1"})
    assert threads._idle() == 0.75
    read_from(monkeypatch, {"/proc/loadavg": "90.0 0.2 0.3 99/100 1"})
    assert threads._idle() == 0
    read_from(monkeypatch, {})
    assert threads._idle() == 1


def test_it_is_settled_before_torch_is_there_and_not_after(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("ARCHREPAIR_THREADS", "7")
    settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3" and spare_threads() == 7
    program = ("import sys; from archrepair.cli.app import main\n"
               "try: main(['list' if len(sys.argv) > 1 else 'status', 'methods'])\nexcept SystemExit: pass\n"
               "import os; assert 'torch' not in sys.modules; print(os.environ['OMP_NUM_THREADS'])")
    said = [subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True).stdout.split()[-1]
            for more in ([], ["list"])]
    assert said == ["7", "3"]
