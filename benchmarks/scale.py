"""What the whole grid costs those who only look at it: seconds and memory of its plan, of `archrepair status` and of `archrepair collect`.

    python benchmarks/scale.py [--part 0.9] [--keep DIR]

Snakemake plans the grid of workflow/full.yaml in a folder of its own. That `--part` of its records is then written there, each with what a
stored record of its method holds (of another where none is stored), and a few runs are left as if they were under way. Every command runs
in a process of its own. `--keep` takes a folder that stays; by default it is a temporary one.
"""
from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "outputs" / "lite" / "records" / "cifar10" / "resnet18"
PLAN = ["snakemake", "-n", "--quiet", "--nolock", "--rerun-triggers", "mtime", "--configfile", "workflow/full.yaml"]
COMMANDS = {"`archrepair status`": ["archrepair", "status"], "`archrepair collect`": ["archrepair", "collect"], "`snakemake -n`": PLAN}
UNDER_WAY = 8  # runs


def report(title: str, command: list[str], folder: Path) -> None:
    "Print a row with seconds, processor seconds and the largest memory of a command and what it starts; it must succeed."
    settings = {"ARCHREPAIR_HOME": str(folder), "ARCHREPAIR_PROGRESS": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    program, started = Path(sys.executable).with_name(command[0]), time.perf_counter()
    process = subprocess.Popen([program, *command[1:]], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    seconds, cpu_seconds = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    print(f"| {title} | {seconds:.1f} | {cpu_seconds:.1f} | {usage.ru_maxrss * 1024 / 1e6:,.0f} |", flush=True)


def write_records(folder: Path, jobs: list[dict]) -> int:
    "Write the records of these jobs; returns their number."
    stored = {path.name.partition("-")[0]: json.loads(path.read_text(encoding="utf-8")) for path in sorted(STORED.glob("*.json"))}
    places = [(folder / record, job) for job in jobs for record in job["records"]]
    for path, job in places:
        method = job["method"].partition(":")[0]
        content = stored.get(method, stored["retrain"])
        seed = int(re.search(r"-s(\d+)", path.name)[1])
        cell = {**content["cell"], "method": method, "model": job["model"], "dataset": job["dataset"], "seed": seed, "tier": "paper"}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**content, "cell": cell}, indent=1), encoding="utf-8")
    return len(places)


def begin_runs(folder: Path, jobs: list[dict]) -> None:
    "Leave checkpoints as if the first record of each of these jobs were being made."
    cost = {"forwards": 1e5, "backwards": 5e4, "seconds": 60.0, "cpu_seconds": 60.0}
    for job in jobs:
        checkpoints = (folder / job["records"][0]).with_suffix(".checkpoints")
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / "run.json").write_text('{"cell": {"options": []}}', encoding="utf-8")
        with zipfile.ZipFile(checkpoints / "finetune.pt", "w") as archive:  # as torch writes them
            archive.writestr("finetune/data.pkl", pickle.dumps({"cost": cost}, protocol=2))
            archive.writestr("finetune/data/0", bytes(4_000_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=float, default=0.9, help="how much of the grid is recorded, 0 to 1")
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    arguments = parser.parse_args()
    with nullcontext(arguments.keep) if arguments.keep else tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / "workflow", folder / "workflow", dirs_exist_ok=True)
        print("| command | seconds | processor seconds | peak memory, MB |\n|---|---|---|---|")
        report("`snakemake -n`, nothing recorded", PLAN, folder)
        plan, = folder.glob("outputs/paper/logs/grid-*.json")
        jobs = list(json.loads(plan.read_text(encoding="utf-8"))["jobs"].values())
        n = round(arguments.part * len(jobs))
        recorded = write_records(folder, jobs[:n])
        begin_runs(folder, jobs[n:n + UNDER_WAY])
        for title, command in COMMANDS.items():
            report(f"{title}, {recorded:,} of {sum(len(job['records']) for job in jobs):,} records", command, folder)


if __name__ == "__main__":
    main()
