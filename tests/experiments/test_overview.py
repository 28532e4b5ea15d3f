"""What is finished and what runs is told from names alone, and all records become one flat table without loss."""
import base64
import csv
import json
import os
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import fields, replace
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
    files_of,
    kind_of,
    look_at,
    peek,
    place_of_record,
    planned,
    restore,
    rows_of,
    work_so_far,
    write_rows,
)
from archrepair.paper.parameters import parameters_of

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


def everything(outputs: Path) -> dict[str, str]:
    "The files that belong to records: what is to come back."
    found = [path for side in ("records", "robust", "localizations") for path in (outputs / "lite" / side).glob("*/*/*.json")]
    return {path.relative_to(outputs).as_posix(): path.read_text() for path in found}


@pytest.fixture
def whole(outputs):
    "The same with what belongs to the records, and what belongs to all of them."
    first, second = look_at(outputs)[0]
    network = Path(*first.parts[-3:-1])
    for side, name in (("robust", first.name), ("robust", "original-localized-clean-s0.json"),
                       ("localizations", "tarantula-localized-clean-s0.json")):
        place = outputs / "lite" / side / network / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"of": name, "text": "é" * 100}))
    return outputs


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_was_collected_is_restored_byte_for_byte_and_once(whole, tmp_path_factory, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    there = tmp_path_factory.mktemp("there")
    table = write_rows(collect(whole), there / f"results{suffix}")
    assert len(everything(whole)) == 5 and {path.relative_to(there).as_posix() for path in restore(table, there)} == set(everything(whole))
    assert everything(there) == everything(whole) and collect(there) == collect(whole)
    assert restore(table, there) == [] and restore("", there) == []


def test_what_is_there_stays_and_what_is_missing_comes_back(whole, tmp_path):
    table, (first, second) = write_rows(collect(whole), tmp_path / "results.csv"), look_at(whole)[0]
    mine = first.read_text() + "\n"
    first.write_text(mine)
    second.unlink()
    assert restore(table, whole) == [second] and first.read_text() == mine and Record.read(second)


def test_files_of_a_network_go_with_the_first_record_that_can_be_read(whole, tmp_path_factory):
    expected = everything(whole)
    first, second = look_at(whole)[0]
    assert len(files_of(first)) == 2 and len(files_of(first, shared=True)) == 4 and len(files_of(second)) == 1
    first.write_text("{")
    with pytest.warns(Notice, match=first.name):
        table = write_rows(collect(whole), tmp_path_factory.mktemp("there") / "results.csv")
    lost = {first.relative_to(whole).as_posix(), f"lite/robust/{'/'.join(first.parts[-3:])}"}
    restore(table, table.parent)
    assert everything(table.parent).keys() == expected.keys() - lost


def table_of(path: Path, texts: object) -> Path:
    "A table of one row that says it has these files."
    line = base64.b64encode(zlib.compress(json.dumps(texts).encode())).decode()
    path.write_text(f"method,files\nmode,{line}\n")
    return path


@pytest.mark.parametrize("name", ["../lite/records/a/b.json", "/lite/records/a/b.json", "lite/records/a/../b.json", "lite/records/a/b.json",
                                  "lite/records/a/b/c.py", "C:/records/a/b/c.json", "lite\\..\\../records/a/b/c.json"])
def test_a_table_writes_nowhere_but_at_the_place_of_a_record(tmp_path, name):
    table = table_of(tmp_path / "results.csv", {"lite/records/a/b/good.json": "{}", name: "{}"})
    with pytest.raises(ArchrepairError, match="no place of a record"):
        restore(table, tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("damage", ["cut", "not JSON", "a list", "text alone", "a picture", "absent", "a bomb", "empty"])
def test_a_table_that_cannot_be_read_is_one_line_and_nothing_is_written(outputs, tmp_path, damage):
    table, there = tmp_path / "results.csv", tmp_path / "there"
    if damage == "cut":
        text = write_rows(collect(outputs), table).read_text()
        table.write_text(text[:text.rindex(",eJ") + 1000])  # within the files of the last record
    elif damage in ("not JSON", "a list"):
        table_of(table, {"lite/records/a/b/c.json": "{"} if damage == "not JSON" else ["lite/records/a/b/c.json"])
    elif damage == "a bomb":
        table_of(table, {"lite/records/a/b/c.json": " " * (65 << 20)})
    elif damage != "absent":
        table.write_bytes({"text alone": b"hello", "a picture": bytes(range(256)), "empty": b""}[damage])
    with pytest.raises(ArchrepairError, match="results.csv.*expected a table that `archrepair collect` wrote") as error:
        restore(table, there)
    assert "\n" not in str(error.value) and not there.exists()


def test_numbers_alone_are_a_smaller_table_that_says_what_it_lacks(outputs, tmp_path):
    run = lambda *words: CliRunner().invoke(app, ["collect", str(outputs), *words])
    assert run("-o", str(tmp_path / "whole.csv")).exit_code == run("-o", str(tmp_path / "numbers.csv"), "--numbers").exit_code == 0
    assert (tmp_path / "numbers.csv").stat().st_size < (tmp_path / "whole.csv").stat().st_size
    with pytest.raises(ArchrepairError, match="numbers alone.*without --numbers"):
        restore(tmp_path / "numbers.csv", tmp_path / "there")
    assert collect(outputs, files=False) == [replace(row, files="") for row in collect(outputs)]


def test_the_paper_knows_what_another_machine_has_run(outputs, tmp_path, monkeypatch):
    for path in look_at(outputs)[0]:
        judged = Path("lite", "robust", *path.parts[-3:])
        (outputs / judged).parent.mkdir(parents=True, exist_ok=True)
        (outputs / judged).write_bytes((ROOT / "outputs" / judged).read_bytes())
    table = write_rows(collect(outputs), tmp_path / "results.csv")
    (tmp_path / "home").mkdir()
    for folder in ("nbs", "data"):
        (tmp_path / "home" / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path / "home"))
    paper = lambda *words: CliRunner().invoke(app, ["paper", "--tier", "lite", "--only", "table7", "--dry-run", "--json", *words])
    before, after = (json.loads(paper(*words).stdout) for words in ((), ("--collected", str(table))))
    assert len(before["tasks"]) - len(after["tasks"]) == 2
    assert everything(tmp_path / "home" / "outputs") == everything(outputs)
    assert isinstance(paper("--collected", "nowhere.csv").exception, ArchrepairError)


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_that_reads_records_reads_those_of_another_machine(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" and "#| export" not in "".join(cell["source"])]
    reading = [i for i, source in enumerate(code) if re.search(r"\b(Runs|Record\.read)\(", source)]
    restoring = [i for i, source in enumerate(code) if "\nrestore(collected)\n" in f"\n{source}\n"]
    assert bool(reading) == bool(restoring) == ("collected" in parameters_of(notebook)) and (not reading or restoring[0] <= reading[0])


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
