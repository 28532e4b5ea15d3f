"""What is finished and what runs is told from names alone, and all records become one flat table without loss."""
import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from archrepair.cli.app import app
from archrepair.core.errors import ArchrepairError, Notice
from archrepair.core.tiers import TIERS, image_passes
from archrepair.experiments.cells import Record
from archrepair.experiments.overview import (
    QUIET,
    Outlook,
    Row,
    Run,
    Work,
    collect,
    kind_of,
    look_at,
    peek,
    place_of_record,
    planned,
    rows_of,
    work_so_far,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "outputs" / "lite" / "records" / "cifar10~gaussian_noise~3"


@pytest.fixture
def outputs(tmp_path):
    "Two records, a run that is under way, one that was stopped, and files that are neither."
    folder = tmp_path / "lite" / "records" / "cifar10~gaussian_noise~3" / "resnet18"
    folder.mkdir(parents=True)
    for path in sorted((STORED / "resnet18").glob("*.json"))[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    for name, stages, age in (("mode-localized-clean-s7", ("run.json", "search.pt"), 10),
                              ("retrain-localized-clean-s7", ("run.json",), 90000)):
        (folder / f"{name}.checkpoints").mkdir()
        for i, stage in enumerate(stages):
            path = folder / f"{name}.checkpoints" / stage
            path.write_text("{}")
            os.utime(path, 2 * (time.time() - age + i,))
    (tmp_path / "lite" / "tables").mkdir()
    (tmp_path / "lite" / "tables" / "table5.json").write_text("{}")
    return tmp_path


def test_names_tell_what_is_finished_and_what_runs(outputs):
    finished, runs = look_at(outputs)
    assert len(finished) == 2 and {place_of_record(path)[:3] for path in finished} == {("lite", "cifar10~gaussian_noise~3", "resnet18")}
    assert [(run.path.name, run.stage, run.stopped) for run in runs] == [
        ("mode-localized-clean-s7.json", "search", False), ("retrain-localized-clean-s7.json", "started", True)]
    assert 5 < runs[0].age < 60 and runs[1].age > 80000


def test_a_row_is_a_number_and_nothing_is_lost(outputs):
    rows = collect(outputs)
    by_record = {row.record for row in rows}
    assert by_record == {path.relative_to(outputs).as_posix() for path in look_at(outputs)[0]}
    for path in look_at(outputs)[0]:
        record = Record.read(path)
        own = [row for row in rows if path.name in row.record]
        for name, score in record.metrics["after"].items():
            value, = [row for row in own if row.set == name and row.metric == "accuracy"]
            assert (value.value, value.n, value.seed, value.version, value.severity) == (
                score["accuracy"], score["n"], record.cell["seed"], "gaussian_noise", 3)
        seconds, = [row.value for row in own if row.metric == "processor seconds"]
        assert seconds == record.repair["cost"]["cpu_seconds"]
    assert len(rows) == len({(row.record, row.set, row.metric) for row in rows})


def test_the_file_holds_the_rows(outputs, tmp_path):
    rows = collect(outputs)
    with write_rows(rows, tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in fields(Row)] and len(read) == len(rows)
    assert [float(line["value"]) for line in read] == [row.value for row in rows]
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(ArchrepairError, match="pyarrow"):
            write_rows(rows, tmp_path / "t.parquet")
        assert not (tmp_path / "t.parquet").exists()
    else:
        import pandas as pd
        assert len(pd.read_parquet(write_rows(rows, tmp_path / "t.parquet"))) == len(rows)


def test_a_broken_record_is_named_and_the_others_are_collected(outputs):
    good = len(collect(outputs))
    folder = look_at(outputs)[0][0].parent
    (folder / "zz-localized-clean-s0.json").write_text("{")
    (folder / "zy-localized-clean-s0.json").write_text(json.dumps({"cell": {}, "metrics": {}, "repair": {}, "versions": {}}))
    with pytest.warns(Notice) as notices:
        assert len(collect(outputs)) == good
    assert {name for notice in notices for name in ("zz-", "zy-") if name in str(notice.message)} == {"zz-", "zy-"}
    with pytest.raises(ArchrepairError, match="not a whole record"):
        list(rows_of(Record({"method": "mode"}, {}, {}, {})))


LOOK = """
import json, sys
seen = {"open": [], "os.scandir": []}

def note(event, arguments):
    if event in seen and str(arguments[0]).startswith(sys.argv[1]):
        seen[event].append(str(arguments[0]).removeprefix(sys.argv[1]))

sys.addaudithook(note)
from archrepair.cli.app import app
from typer.testing import CliRunner
print(json.dumps({"shown": CliRunner().invoke(app, ["status", sys.argv[1]]).output, "torch": "torch" in sys.modules, **seen}))
"""


def test_a_look_opens_one_record_of_a_kind_lists_folders_a_few_times_and_needs_no_torch(tmp_path):
    "Of a sweep of 3,000 runs, in a process of its own. Another is under way, and 61 are planned, of which 10 are recorded."
    records, name = tmp_path / "lite" / "records" / "cifar10", "mode-localized-clean-s{}.json"
    for network in range(30):
        (records / f"net{network}").mkdir(parents=True)
        for seed in range(100):
            (records / f"net{network}" / name.format(seed)).touch()
    begin(records / "net0" / name.format(100), Work(300.0, 30.0))
    plan(tmp_path / "lite", [f"cifar10/net0/{name.format(seed)}" for seed in range(90, 151)])
    done = subprocess.run([sys.executable, "-c", LOOK, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT)
    look = json.loads(done.stdout)
    assert "3,000 records" in look["shown"] and "to do: 51 runs of 61 planned" in look["shown"] and not look["torch"]
    opened = [Path(path).name for path in look["open"]]
    assert sorted(opened) == sorted([f"{name.format(100)}.lock", "run.json", "run.json", "training-0.pt", "grid-0123456789abcdef.json",
                                     name.format(99)])
    assert max(Counter(look["os.scandir"]).values()) <= 4


# --- time left


def begin(record: Path, *works: Work, cell: dict | None = None, age: float = 0) -> None:
    "The checkpoints of a run that has counted so much, each by a training of its own."
    folder = record.with_suffix(".checkpoints")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"cell": cell or {}}))
    for number, work in enumerate(works):
        cost = {"forwards": work.passes, "backwards": 0.0, "seconds": work.seconds, "cpu_seconds": 0.0}
        torch.save({"cost": cost, "state": {"model": {"weight": torch.zeros(3)}}}, folder / f"training-{number}.pt")
    for file in folder.iterdir():
        os.utime(file, 2 * (time.time() - age,))


def finish(record: Path, work: Work) -> None:
    "As much of a record as says what it cost."
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"repair": {"cost": {"forwards": work.passes, "backwards": 0.0, "seconds": work.seconds}}}))


def plan(folder: Path, records: list[str]) -> None:
    "What the workflow writes before its first job."
    (folder / "logs").mkdir(parents=True)
    jobs = {"a job": {"records": [f"outputs/{folder.name}/records/{record}" for record in records]}}
    (folder / "logs" / "grid-0123456789abcdef.json").write_text(json.dumps({"root": f"outputs/{folder.name}", "jobs": jobs}))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_is_read_without_its_tensors_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    content = {"cost": [1.0, 2.0], "epochs": [{"epoch": 1}], "tensor": torch.zeros(3), "state": optimizer.state_dict(), "bomb": Bomb()}
    torch.save(content, "c.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:300])
    seen = peek(tmp_path / "c.pt")
    assert (seen["cost"], seen["epochs"], seen["tensor"], seen["bomb"]) == ([1.0, 2.0], [{"epoch": 1}], None, None)
    assert not (tmp_path / "exploded").exists() and peek(tmp_path / "cut.pt") == peek(tmp_path / "none.pt") == {}


def test_what_a_run_has_counted_is_the_sum_of_its_trainings_or_the_total_of_a_method(tmp_path):
    run = Run(tmp_path / "a.json", "search", 0.0)
    assert work_so_far(run) == (0, 0)
    begin(run.path, Work(10.0, 2.0), Work(20.0, 3.0))
    folder = run.path.with_suffix(".checkpoints")
    (folder / "trials.json").write_text(json.dumps({"forwards": 4.0, "backwards": 3.0, "trials": []}))
    assert work_so_far(run) == (40.0, 5.0)
    torch.save({"settings": "", "cost": [100.0, 50.0, 7.0, 7.0], "state": {}}, folder / "rounds.pt")
    assert work_so_far(run) == (200.0, 7.0)


def test_time_left_is_what_is_missing_to_a_run_of_the_kind_at_the_own_pace(tmp_path):
    folder = tmp_path / "lite" / "records"
    done = folder / "cifar10~fog~3" / "net" / "mode-localized-clean-s0-0123abcd.json"
    finish(done, Work(1000.0, 100.0))
    path = folder / "cifar10" / "net" / "mode-localized-clean-s11-0123abcd.json"
    assert kind_of(path) == kind_of(done) == ("lite", "cifar10", "net", "mode-localized-clean-0123abcd")
    begin(path, Work(400.0, 80.0))
    outlook = Outlook([done])
    assert outlook.left(Run(path, "search", age=20.0)) == pytest.approx(600 * 0.2 - 20)
    assert outlook.left(Run(path, "search", age=2 * QUIET)) == pytest.approx(600 * 0.2)  # nobody is at work on it
    assert outlook.left(Run(path, "search", age=500.0)) == 0
    assert outlook.whole(path) == 100.0
    begin(path.with_name("mode-localized-clean-s12-0123abcd.json"))
    assert outlook.left(Run(path.with_name("mode-localized-clean-s12-0123abcd.json"), "started", age=0.0)) == pytest.approx(100)


def test_without_such_a_run_the_tier_says_how_much_there_is_to_do(tmp_path):
    folder = tmp_path / "lite" / "records" / "cifar10" / "net"
    finish(folder / "mode-localized-clean-s0.json", Work(1000.0, 100.0))
    finish(folder / "apricot-localized-clean-s0.json", Work(1000.0, 300.0))
    outlook, passes = Outlook(sorted(folder.iterdir())), image_passes("retrain", TIERS["lite"], 45_000)
    plain, short = (folder / f"retrain-localized-clean-s0{options}.json" for options in ("", "-0123abcd"))
    assert outlook.whole(plain) == pytest.approx(passes * 0.2)  # the median of both methods
    begin(short, cell={"options": [["epochs", 3]]})
    assert outlook.left(Run(short, "started", age=0.0)) == pytest.approx(passes * 0.2 / 3)


def test_of_what_nothing_is_known_nothing_is_said(tmp_path):
    records = tmp_path / "lite" / "records"
    finish(records / "cifar10" / "net" / "mode-localized-clean-s0.json", Work(1000.0, 100.0))
    outlook = Outlook([records / "cifar10" / "net" / "mode-localized-clean-s0.json"])
    for name in ("cifar10/other/mode-localized-clean-s0.json", "npz~mine~01234567/net/retrain-localized-clean-s0.json"):
        begin(records / name)
        assert outlook.whole(records / name) is None and outlook.left(Run(records / name, "started", 0.0)) is None


def test_what_is_to_do_is_what_is_planned_and_neither_done_nor_failed(tmp_path):
    folder = tmp_path / "lite" / "records" / "cifar10" / "net"
    name = "mode-localized-clean-s{}.json"
    finish(folder / name.format(0), Work(1000.0, 100.0))
    begin(folder / name.format(1), Work(500.0, 50.0))
    (folder / name.format(2)).with_suffix(".failed").write_text(json.dumps({"reason": "no failures", "transient": False}))
    plan(tmp_path / "lite", [*(f"cifar10/net/{name.format(seed)}" for seed in range(5)), "cifar10/other/mode-localized-clean-s0.json"])
    assert len(planned(tmp_path)) == 6 and planned(tmp_path / "lite") == []
    status = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).output)
    assert (status["planned"], status["to_do"], status["not_estimated"]) == (6, 4, 1)
    assert status["runs"][0]["left"] == pytest.approx(50, abs=5) and status["seconds"] == pytest.approx(250, abs=5)
    shown = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "to do: 4 runs of 6 planned, about 4 min for one worker, without 1 of which nothing is known yet" in shown


def test_the_commands_say_what_there_is(outputs, tmp_path):
    run = lambda *words: CliRunner().invoke(app, list(words))
    shown = run("status", str(outputs)).output
    assert "2 records" in shown and "1 under way, 1 stopped" in shown and "search" in shown
    status = json.loads(run("status", str(outputs), "--json").output)
    assert status["finished"] == 2 and [each["stopped"] for each in status["runs"]] == [False, True]
    ended = run("collect", str(outputs), "--json")
    assert json.loads(ended.output)["records"] == 2 and (outputs / "results.csv").exists()
    missing = run("status", str(tmp_path / "nowhere"))
    assert missing.exit_code != 0 and isinstance(missing.exception, (ArchrepairError, SystemExit))
