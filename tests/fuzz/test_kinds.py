"""Every kind has a file of tests, and the numbers that pages state are right."""
import re

from support import ROOT
from support.kinds import FULL, SMOKE, TESTS


def test_numbers_of_inputs():
    assert sum(SMOKE.values()) == 2000 and sum(FULL.values()) == 100_000 and list(SMOKE) == list(FULL) == list(TESTS)


def test_every_kind_has_its_tests():
    "As many as `TESTS` says share the inputs of a kind; the page names them all."
    page = (ROOT / "docs" / "fuzz.md").read_text(encoding="utf-8")
    files = {path.stem.removeprefix("test_"): path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "fuzz").glob("test_*.py")}
    assert {kind: len(re.findall(r"^@fuzz", text, re.M)) for kind, text in files.items() if kind != "kinds"} == TESTS
    assert all(f"| {kind} | " in page and f"`tests/fuzz/test_{kind}.py`" in page for kind in TESTS)
