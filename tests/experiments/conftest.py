"""One comparison of two methods, run to its end, for the tests of runs and of comparisons."""
import pytest

import archrepair.experiments.runs as runs_module
from archrepair.experiments.comparison import compare_methods
from archrepair.experiments.runs import Runs
from support.comparisons import CELL, METHODS, VERSIONS
from support.finished import ORIGINAL, furnish


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    "A project whose cached originals of seeds 0 and 1 are one network, with a comparison of two methods that was run to its end."
    folder, log = tmp_path_factory.mktemp("project"), []
    furnish(folder, repaired=False)
    (folder / str(ORIGINAL).replace("s0", "s1")).write_bytes((folder / ORIGINAL).read_bytes())
    runs = Runs(folder / "outputs", log=log.append)
    table = compare_methods(METHODS, CELL, seeds=[0, 1], corruptions=VERSIONS, epochs=1, runs=runs)
    return folder / "outputs", table, log


@pytest.fixture
def idle(monkeypatch):
    "Nothing may be run, and no original loaded."
    for name in ("run_full", "original", "localize"):
        monkeypatch.setattr(runs_module, name, lambda *a, **k: pytest.fail("was run"))
