"""A sweep on a Slurm cluster of two nodes on this host, disturbed in the middle, ends whole and with the numbers of an undisturbed one.

`make test-slurm` runs this; the cluster needs root and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml

from archrepair.experiments.cells import Cell, Record
from archrepair.experiments.runs import method_cell, work
from support import ROOT
from support.faults import comparable

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
if not MISSING and not shutil.which("snakemake", path=str(Path(sys.executable).parent)):
    MISSING = ["snakemake"]
if MISSING:
    warnings.warn(f"SLURM IS NOT INSTALLED ({', '.join(MISSING)} missing): sweeps on a cluster are not tested; apt-get install slurmctld "
                  "slurmd slurm-client munge, pip install 'archrepair[cluster]'", stacklevel=1)
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600), pytest.mark.skipif(bool(MISSING), reason="Slurm is not installed"),
              pytest.mark.skipif(os.getuid() != 0, reason="slurmd needs root")]
GRID = yaml.safe_load((HERE / "config.yaml").read_text())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "Two nodes that are up; commands of Slurm speak to them."
    folder = tmp_path_factory.mktemp("cluster")
    done = subprocess.run([HERE / "up.sh", folder], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
        subprocess.run([HERE / "down.sh", folder], check=True)


def slurm(*command: object, ok: bool = True) -> str:
    "What a command of Slurm's prints."
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or not ok, done.stderr
    return done.stdout.strip()


def running() -> dict[int, str]:
    "Node by number of the jobs that are running."
    lines = slurm("squeue", "--noheader", "--states=R", "--format=%i %N").splitlines()
    return {int(number): node for number, node in map(str.split, lines)}


class Sweep:
    "Snakemake in a folder of its own; `wait_for` looks until something is true."

    def __init__(self, folder: Path):
        shutil.copytree(ROOT / "workflow", folder / "workflow")
        self.folder, self.log, self.started = folder, folder / "log.txt", time.monotonic()
        environment = {**os.environ, "ARCHREPAIR_HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": str(ROOT)}
        command = [Path(sys.executable).with_name("snakemake"), "--profile", "workflow/profiles/slurm",
                   "--configfile", HERE / "config.yaml", "--jobs", "6", "--latency-wait", "20",
                   "--slurm-status-command", "squeue", "--slurm-no-account",  # there is no database that sacct could ask
                   "--slurm-init-seconds-before-status-checks", "5"]
        self.process = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=self.log.open("w"),
                                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def said(self) -> str:
        return self.log.read_text()

    def note(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:5.0f} s  {text}", flush=True)

    def wait_for(self, what, minutes: float = 20):
        "What the function `what` returns, once that is true."
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            if result := what():
                return result
            assert self.process.poll() is None, self.said()
            time.sleep(1)
        pytest.fail(f"nothing after {minutes:g} minutes:\n{self.said()[-3000:]}")

    def records(self) -> list[Path]:
        return sorted((self.folder / "outputs/smoke/records").rglob("*.json"))

    def worker_of(self, job: int) -> bool:
        "Has a job come as far as repairing?"
        return job in running() and bool(list((self.folder / "outputs/smoke").rglob("*.checkpoints")))


def drain_a_node(sweep: Sweep) -> str:
    "A node is to be serviced: its job ends, and no other comes until it is back."
    job, node = sweep.wait_for(lambda: next(iter(running().items()), None))
    slurm("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=service")
    sweep.wait_for(lambda: job not in running())
    time.sleep(3)
    assert node not in running().values()
    slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
    return f"{node} was drained while job {job} was on it, and came back"


def cancel_a_job(sweep: Sweep) -> str:
    "Somebody cancels a job in the middle of a repair."
    job = sweep.wait_for(lambda: next((job for job in running() if sweep.worker_of(job)), None))
    slurm("scancel", job)
    sweep.wait_for(lambda: f"{job}' failed" in sweep.said())
    return f"job {job} was canceled"


def let_a_job_run_out_of_time(sweep: Sweep) -> str:
    "A job stands still until its time is over."
    def stopped() -> int | None:
        job = next(iter(running()), None)
        if job is None:
            return None
        slurm("scancel", "--signal=STOP", job, ok=False)
        time.sleep(3)
        state = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T", ok=False)
        return job if state == "STOPPED" else None  # else it ended before it could be stopped

    job = sweep.wait_for(stopped)
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    sweep.wait_for(lambda: f"{job}' failed" in sweep.said() and "TIMEOUT" in sweep.said())
    return f"job {job} ran out of time"


def fill_the_queue(sweep: Sweep) -> str:
    "The cluster takes no more jobs, until its controller is started again with more room: sbatch waits for that."
    room = 199 - len(slurm("squeue", "--noheader", "--states=all", "--array").splitlines())
    number = slurm("sbatch", "--parsable", "--hold", "--output=/dev/null", f"--array=1-{room}", "--wrap=true")
    refused = subprocess.run(["timeout", "4", "sbatch", "--hold", "--wrap=true"], capture_output=True, text=True)
    assert "temporarily unable to accept job" in refused.stderr
    finished = sweep.said().count("Finished jobid")
    sweep.wait_for(lambda: sweep.said().count("Finished jobid") > finished)  # so that another job is to be submitted
    time.sleep(5)
    configuration = Path(os.environ["SLURM_CONF"])
    configuration.write_text(configuration.read_text().replace("MaxJobCount=200", "MaxJobCount=10000"))
    controller = configuration.with_name("slurmctld.pid")
    os.kill(int(controller.read_text()), signal.SIGTERM)
    sweep.wait_for(lambda: not controller.exists())
    subprocess.run(["slurmctld", "-f", configuration], check=True)
    sweep.wait_for(lambda: "UP" in slurm("scontrol", "ping", ok=False))
    slurm("scancel", number)
    return f"the queue was full with {room} jobs, and had room again when the controller was started anew"


def test_a_sweep_ends_whole_whatever_happens_to_its_jobs(cluster, tmp_path):
    sweep = Sweep(tmp_path)
    try:
        for disturb in (drain_a_node, cancel_a_job, let_a_job_run_out_of_time, fill_the_queue):
            sweep.note(disturb(sweep))
        assert sweep.process.wait(2400) == 0, sweep.said()
    finally:
        sweep.process.kill()
    sweep.note(f"{len(sweep.records())} records; jobs that failed: {sweep.said().count('Error in rule')}")
    records = [Record.read(path) for path in sweep.records()]
    cells = [method_cell(method, Cell(model=model, dataset=dataset, seed=seed, tier="smoke"))
             for method in GRID["methods"] for model in GRID["models"] for dataset in GRID["datasets"] for seed in GRID["seeds"]]
    assert sorted(cell.path(tmp_path / "outputs") for cell in cells) == sweep.records(), "each once, and no other"
    weights = {(record.cell["model"], record.cell["seed"]): record.versions["weights"] for record in records}
    assert all(weights[record.cell["model"], record.cell["seed"]] == record.versions["weights"] for record in records), "one original each"
    left = [path.name for path in (tmp_path / "outputs").rglob("*")
            if path.name.endswith((".lock", ".failed", ".checkpoints", ".damaged")) or ".part" in path.name]
    assert left == []
    some = cells[:: len(cells) // 4]  # one of each method, computed here and undisturbed
    assert all(outcome.state == "recorded" for outcome in work(some, outputs=tmp_path / "again", device="cpu"))
    for cell in some:
        here, there = (json.loads(cell.path(tmp_path / name).read_text()) for name in ("again", "outputs"))
        assert comparable(here) == comparable(there)
