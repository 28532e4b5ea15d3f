"""`make gpu`: every stage has its time, what fails or hangs costs no more than that, what is done is not done again, and little is kept."""
import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import pytest

from support import ROOT

PROGRAM = ROOT / "benchmarks" / "gpu.py"
FAKE = '''import sys, time
from pathlib import Path
sys.path[:0] = [{folder!r}, {root!r}]
from gpu import Journal
journal, stage = Journal(Path(sys.argv[sys.argv.index("--journal") + 1]), "cpu, tier smoke"), sys.argv[1]
{body}
'''


@pytest.fixture(scope="module")
def gpu():
    "The program as a module."
    spec = importlib.util.spec_from_file_location("gpu", PROGRAM)
    module = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "gpu.part").mkdir()
    return Namespace(device="cpu", tier="smoke", out=tmp_path / "gpu", work=tmp_path / "gpu.part")


@pytest.fixture
def stage(gpu, arguments, tmp_path, monkeypatch):
    "Run a stage whose script has this body; the outcome of each job in the order in which it came."
    def run(body: str, seconds: float = 20) -> list[tuple[str, str, str]]:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(folder=str(PROGRAM.parent), root=str(ROOT), body=body), encoding="utf-8")
        monkeypatch.setattr(gpu, "STAGES", script)
        gpu.run_stage("bench", arguments, time.monotonic() + seconds)
        return [(job.name, job.outcome, job.line) for job in gpu.journal_of(arguments).jobs()]

    return run


# --- time


def test_no_stage_takes_from_a_later_one(gpu):
    ends = gpu.ends(600)
    shares = [end - start for start, end in zip([0, *ends.values()], ends.values())]
    assert shares == pytest.approx([600 * share for share in gpu.SHARES.values()]) and 540 < ends["paper"] < 600
    assert gpu.ends(100, {"a": 0.5, "b": 0.25}) == {"a": 50, "b": 75}


def test_epochs_are_cut_until_the_first_table_fits(gpu):
    "Four repairs of 300 s, as counted for an H200, and 25 s for the original."
    share = lambda seconds: gpu.epochs_share([300.0] * 4, 25, seconds)
    assert [share(seconds) for seconds in (1225, 1224, 270, 100, 1)] == [1.0, 0.5, 0.2, 0.05, 0.05]


# --- stages


def test_a_stage_that_fails_has_its_line(stage):
    assert stage("journal.write(stage, 'one', 'done')\nraise ValueError('no such kernel')") == [
        ("one", "done", ""), ("(the stage)", "failed", "ValueError: no such kernel")]


def test_a_stage_that_hangs_is_ended(stage):
    begun = time.monotonic()
    assert stage("journal.write(stage, 'one', 'begun')\ntime.sleep(60)", seconds=1.5) == [("one", "begun", "")]
    assert time.monotonic() - begun < 20


def test_a_process_that_is_lost_is_begun_anew(stage):
    body = "done = journal.outcome(stage, 'one')\njournal.write(stage, 'two' if done else 'one', 'done')\nsys.exit(0 if done else 3)"
    assert stage(body) == [("one", "done", ""), ("two", "done", "")]


# --- the journal and the folder


def test_the_last_word_on_a_job_counts(gpu, tmp_path):
    journal, other = (gpu.Journal(tmp_path / "jobs.jsonl", on) for on in ("cuda, tier paper", "pretended, tier smoke"))
    for outcome in ("begun", "failed", "begun", "done"):
        journal.write("smoke", "export", outcome, 1.26)
    other.write("smoke", "export", "failed")
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": "smoke", "na')  # killed while it was written
    assert [job.outcome for job in journal.jobs()] == ["done"] and journal.outcome("smoke", "export") == "done"
    journal.compact()
    assert len(journal.path.read_text(encoding="utf-8").splitlines()) <= 3
    assert [job.outcome for job in other.jobs()] == ["failed"] and journal.jobs()[0].seconds == 1.3


def test_the_folder_keeps_what_matters_most(gpu, arguments, monkeypatch):
    work, out = arguments.work, arguments.out
    record = work / "results" / "paper" / "records" / "cifar10" / "resnet18" / "a.json"
    for path, text in {record: '{"cell": 1}', work / "results" / "paper" / "originals" / "a.json": "{}", work / "machine.json": "{}",
                       work / "report.html": "x" * 50_000, work / "bench.log": "slow"}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    gpu.journal_of(arguments).write("smoke", "export", "done")
    gpu.pack(work, out, "all well\n")
    assert {path.name for path in out.iterdir()} == {"jobs.jsonl", "summary.md", "records.jsonl", "machine.json", "report.html", "logs.txt"}
    monkeypatch.setattr(gpu, "BYTES", 30_000)
    gpu.pack(work, out, "all well\n")
    assert "Not kept, for want of room: report.html." in (out / "summary.md").read_text(encoding="utf-8")
    assert not (out / "report.html").exists() and sum(path.stat().st_size for path in out.iterdir()) <= 30_000
    record.unlink()
    gpu.unpack(out, work)
    assert record.read_text(encoding="utf-8") == '{"cell": 1}'  # a second call, perhaps on another machine, knows what is done
    assert gpu.fitting({str(number): 1 for number in range(20)}) == [str(number) for number in range(8)]


def test_the_summary_says_what_was_and_what_was_not(gpu):
    jobs = [gpu.Job("smoke", "export", "done", 3), gpu.Job("smoke", "onnx", "impossible", 0, "onnx: not installed"),
            gpu.Job("bench", "blocks", "failed", 2, "RuntimeError: no"), *(gpu.Job("paper", f"cell {n}", "left") for n in range(25))]
    text = gpu.summarize(jobs, 600)
    assert "| smoke | 1 | 0 | 1 | 0 | 3 |" in text and "| paper | 0 | 0 | 0 | 25 | 0 |" in text
    assert "- bench: blocks: RuntimeError: no" in text and "- smoke: onnx: onnx: not installed" in text and "- and 5 more" in text


# --- jobs


@pytest.fixture
def made(gpu, arguments, monkeypatch):
    "The module of the stages, and a stage of it."
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import gpu_stages

    stage = gpu_stages.Stage("smoke", "cpu", "smoke", arguments.work, gpu.journal_of(arguments), time.monotonic() + 100)
    yield gpu_stages, stage
    del sys.modules["gpu_stages"]


def test_a_job_is_done_once_and_a_failed_one_again(made):
    stages, stage = made
    calls = []

    def job(name: str, error: Exception | None = None) -> str:
        calls.append(name)
        if error:
            raise error
        return "well"

    for _ in range(2):
        stage.do("good", lambda: job("good"))
        stage.do("bad", lambda: job("bad", ValueError("wrong\nin detail")))
        stage.do("missing", lambda: job("missing", ModuleNotFoundError("No module named 'onnx'")))
        stage.do("long", lambda: job("long"), seconds=1000)
    assert calls == ["good", "bad", "missing", "bad", "missing"]
    assert [(job.name, job.outcome, job.line) for job in stage.journal.jobs()][:3] == [
        ("good", "done", "well"), ("bad", "failed", "ValueError: wrong"), ("missing", "impossible", "No module named 'onnx'")]
    assert stage.journal.outcome("smoke", "long") == "left"
    with pytest.raises(SystemExit) as ended:
        stage.do("lost", lambda: job("lost", RuntimeError("CUDA error: an illegal memory access was encountered")))
    assert ended.value.code == stages.RESTART and stage.journal.outcome("smoke", "lost") == "failed"


def test_forecasts_are_corrected_by_what_jobs_took(made):
    _, stage = made
    assert stage.expected(10) == 10
    stage.pace += [(10, 30), (10, 10)]
    assert stage.expected(10) == 20


def test_cells_are_those_of_the_tables_with_fewer_epochs(made):
    stages, stage = made
    whole = stages.cells_of("table9", "digits:fog:3", "paper", 0)
    short = stages.cells_of("table9", "digits:fog:3", "paper", 0, 0.1)
    assert [each.cell.block for each in whole] == [each.cell.block for each in short] == ["layer1", "layer2", "layer3", "layer4"]
    assert all(dict(each.cell.options) == {"strategy": "pc-darts", "search_epochs": 5, "finetune_epochs": 10} for each in short)
    assert {each.cell.path() for each in whole}.isdisjoint({each.cell.path() for each in short})
    methods = {each.cell.method: dict(each.cell.options) for each in stages.cells_of("table5", "digits:fog:3", "paper", 0, 0.1)}
    assert len(methods) == 7 and methods["sensei"] == {"epochs": 15}
    task = Namespace(cell=whole[0].cell, versions=(), trains_original=False)
    assert stages.expected(task, 1e-6, 0.1) == pytest.approx(0.1 * stages.expected(task, 1e-6))
    assert stages.planned_share(stage) is None
    stage.name = "paper"
    stage.journal.write("paper", f"{stages.PLAN}0.2 of the epochs", "done")
    assert stages.planned_share(stage) == 0.2


# --- all of it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_on_a_gpu_that_is_not_there(tmp_path):
    "Three minutes, and a second call, which does nothing twice."
    command = [sys.executable, str(PROGRAM), "--device", "pretended", "--tier", "smoke", "--out", str(tmp_path / "gpu")]
    first = subprocess.run([*command, "--minutes", "3"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert first.returncode == 0, first.stdout
    kept = list((tmp_path / "gpu").iterdir())
    assert len(kept) <= 8 and sum(path.stat().st_size for path in kept) <= 16 << 20
    jobs = lambda: [json.loads(line) for line in (tmp_path / "gpu" / "jobs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {job["stage"] for job in jobs()} == {"machine", "smoke", "tests", "bench", "paper"}
    assert all(f"| {stage} |" in first.stdout for stage in ("machine", "smoke", "tests", "bench", "paper"))
    second = subprocess.run([*command, "--minutes", "1", "--only", "machine"], capture_output=True, text=True)
    assert second.returncode == 0 and "2 done" in second.stdout
