"""What is finished and what runs is told from names alone, and all records become one flat table without loss."""
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from archrepair.cli.app import app
from archrepair.core.errors import ArchrepairError, Notice
from archrepair.experiments.cells import Record
from archrepair.experiments.overview import Row, collect, look_at, place_of_record, rows_of, write_rows

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


def test_status_opens_no_record_and_needs_no_torch(tmp_path):
    "Of a sweep of 3,000 runs, in a process of its own; what the files hold does not matter."
    for network in range(30):
        folder = tmp_path / "lite" / "records" / "cifar10" / f"net{network}"
        folder.mkdir(parents=True)
        for seed in range(100):
            (folder / f"mode-localized-clean-s{seed}.json").touch()
    code = ("import sys; from archrepair.cli.app import app; from typer.testing import CliRunner; "
            "r = CliRunner().invoke(app, ['status', sys.argv[1]]); print(r.output); print('torch' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "3,000 records" in shown and shown.strip().endswith("False")


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
