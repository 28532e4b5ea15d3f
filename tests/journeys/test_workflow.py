"The Snakemake workflow: what it plans, what it runs, and that it never repairs twice."
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import yaml

from archrepair.experiments.cells import Record
from archrepair.experiments.comparison import scores_of
from support import ROOT

SNAKEMAKE = Path(sys.executable).with_name("snakemake")
RECORDS = [f"outputs/smoke/records/digits~fog~3/resnet18/{method}-localized-clean-s0.json" for method in ("archrepair", "retrain")]
WEIGHTS = "outputs/smoke/originals/digits-resnet18-s0.safetensors"

if not SNAKEMAKE.exists():
    warnings.warn("SNAKEMAKE IS NOT INSTALLED: the workflow is not tested; pip install 'archrepair[sweep]'", stacklevel=1)
    pytest.skip("snakemake is not installed", allow_module_level=True)


def snakemake(folder: Path, *arguments: str, ok: bool = True) -> str:
    "Call it in a folder that holds the workflow; its output, both kinds."
    environment = {**os.environ, "ARCHREPAIR_HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "XDG_CACHE_HOME": str(folder / "cache")}
    command = [SNAKEMAKE, "--profile", "workflow/profiles/local", "--cores", "1", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=environment)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


SMOKE = ("--configfile", "workflow/.test/config.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(ROOT / "workflow", folder / "workflow")
    return folder


def planned(text: str) -> dict[str, int]:
    "Jobs by rule in the output of a dry run; nothing where there is nothing to do."
    lines = text[text.rindex("Job stats:"):].splitlines()[3:] if "Job stats:" in text else []
    rows = [line.split() for line in lines[:next((i for i, line in enumerate(lines) if line.startswith("total")), 0)]]
    return {name: int(count) for name, count in rows}


def test_the_grid_of_the_configuration(folder):
    "Two datasets × three methods, with three seeds in each job, and three originals, since both datasets are versions of one."
    assert planned(snakemake(folder, "-n")) == {"original": 3, "cell": 6, "table": 1, "all": 1}


def test_a_tier_that_depends_on_the_machine_is_refused(folder):
    assert "say smoke, lite or paper" in snakemake(folder, "-n", *SMOKE, "--config", "tier=auto", ok=False)


@pytest.mark.timeout(600)
def test_two_cells_and_never_again(folder):
    snakemake(folder, *SMOKE)
    records = [Record.read(folder / path) for path in RECORDS]
    table = pd.read_csv(folder / "outputs/smoke/tables/sweep.csv").set_index("method")
    for record in records:
        row = table.loc[record.cell["method"]]
        assert row["held_out"] == scores_of(record)["held_out"] and row["before"] == record.accuracy("held_out", "before")
        assert row["seed"] == 0
    summary = pd.read_csv(folder / "outputs/smoke/tables/sweep-summary.csv").set_index("method")
    assert summary["held_out mean"].to_dict() == table["held_out"].to_dict() and (summary["held_out n"] == 1).all()
    assert len({record.versions["weights"] for record in records}) == 1, "both began with the same original"
    assert not list(folder.rglob("*.checkpoints")) and not list(folder.rglob("*.part*"))

    os.utime(folder / WEIGHTS, (time.time() + 60, time.time() + 60))
    # A second call has nothing to do, even where the original looks newer, e.g. after a copy.
    assert planned(snakemake(folder, "-n", *SMOKE)) == {}
    (folder / RECORDS[0]).unlink()
    again = planned(snakemake(folder, "-n", *SMOKE, "--config", "seeds=[0,1]"))
    # Another seed is another original, and one more to do for both methods.
    assert again == {"original": 1, "cell": 2, "table": 1, "all": 1}


def test_records_lie_where_the_package_looks_for_them(folder):
    "The names of the workflow are those of `Cell.path` and `original`."
    from archrepair.core.tiers import TIERS
    from archrepair.experiments.cells import Cell
    from archrepair.experiments.originals import original

    assert Cell(dataset="digits:fog:3", tier="smoke").path(Path("outputs")).as_posix() == RECORDS[0]
    assert (folder / WEIGHTS).exists(), "runs after the workflow"
    written = (folder / WEIGHTS).stat().st_mtime_ns
    start = original("resnet18", "digits:fog:3", TIERS["smoke"], 0, outputs=folder / "outputs", device="cpu")
    assert start.path == folder / WEIGHTS and start.path.stat().st_mtime_ns == written, "it was read, not trained"


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_profiles_say_what_snakemake_knows(profile):
    "Every key is an option, and every rule named is one of the workflow."
    said = yaml.safe_load((ROOT / "workflow" / "profiles" / profile / "config.yaml").read_text())
    options = subprocess.run([SNAKEMAKE, "--help"], capture_output=True, text=True).stdout
    assert said.pop("executor", None) == {"local": None}.get(profile, profile)
    assert [key for key in said if f"--{key}" not in options] == []
    rules = (ROOT / "workflow" / "Snakefile").read_text()
    assert all(f"rule {line.partition(':')[0]}:" in rules for line in said.get("set-resources", []))
    assert said["keep-going"] and said["rerun-incomplete"] and said["rerun-triggers"] == ["mtime"]
    assert profile == "local" or "cell:gpu=1" in said["set-resources"]


def test_the_test_configuration_says_nothing_new():
    known = yaml.safe_load((ROOT / "workflow" / "config.yaml").read_text())
    small = yaml.safe_load((ROOT / "workflow" / ".test" / "config.yaml").read_text())
    assert not small.keys() - known.keys() and json.dumps(small) and small["tier"] == "smoke"
