"""`archrepair bench`: the words of the command become those of the runner, and where there is no runner one line says so."""
import subprocess
import sys

import pytest

from archrepair.cli.bench import CASES, runner
from support import ROOT
from support.finished import command, fails


@pytest.fixture
def runs(monkeypatch):
    "The command lines that would have been run; each ends with status 3."
    lines = []
    monkeypatch.setattr(subprocess, "run", lambda line: lines.append(line) or subprocess.CompletedProcess(line, 3))
    monkeypatch.setenv("ARCHREPAIR_HOME", str(ROOT))
    return lines


def test_words_are_passed_on_and_so_is_the_status(runs):
    assert command("bench", "--only", "search", "--only", "repair", "--json", "--rounds", 2, "--out", "there") == 3
    assert runs == [[sys.executable, str(ROOT / "benchmarks" / "run.py"), "search", "repair", "--rounds", "2", "--json", "--out", "there"]]


def test_every_case_has_its_script(runs):
    assert all((runner().parent / f"bench_{case}.py").is_file() for case in CASES)


def test_what_is_wrong_is_one_line(runs, home, monkeypatch, capsys):
    assert fails(capsys, "bench", "--only", "serch").startswith("unknown benchmark 'serch': did you mean 'search'?")
    assert "expected a whole number from 1" in fails(capsys, "bench", "--rounds", 0)
    monkeypatch.setenv("ARCHREPAIR_HOME", str(home))
    assert "not with an installed wheel" in fails(capsys, "bench") and not runs
