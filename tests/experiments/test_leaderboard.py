"""A method that is not in the package is entered by the guide alone, scored again, and becomes rows of one table with their rules."""
import json
import re
import shutil
from collections import Counter
from dataclasses import astuple, replace

import numpy as np
import pytest
from support import ROOT
from support.finished import command, fails
from support.last_layer import LastLayer, Mute, Vandal

import archrepair.experiments.leaderboard as module
from archrepair.core.errors import ArchrepairError
from archrepair.experiments.leaderboard import (
    Line, enter, leaderboard, lines_of_entry, oracle_lines, place_of_entry, read_entry, rescore, write_leaderboard,
)
from archrepair.training.benchmark import RULES, read_benchmark

METHOD = "support.last_layer:LastLayer"
RUN = [("fog:3", 0)]


@pytest.fixture(scope="module")
def benchmark():
    return read_benchmark(ROOT / "data")


@pytest.fixture(scope="module")
def entered(benchmark, tmp_path_factory):
    "The whole small track, entered by name."
    folder = tmp_path_factory.mktemp("outputs") / "entries" / "digits" / "last_layer"
    about = {"who": "A reader", "where": "a notebook", "paper": "none"}
    return folder, enter(f"{METHOD}:epochs=2", benchmark.tracks["digits"], folder, about=about)


@pytest.fixture
def entry(entered, tmp_path):
    "A copy to change."
    return shutil.copytree(entered[0], tmp_path / "entries" / "digits" / "mine")


def test_an_entry_says_who_what_and_at_which_cost(entered):
    folder, entry = entered
    assert json.loads((folder / "entry.json").read_text()) == json.loads(json.dumps(entry)) and entry["complete"]
    assert (entry["who"], entry["where"], entry["paper"]) == ("A reader", "a notebook", "none")
    assert entry["method"] == f"{METHOD}:epochs=2" and entry["settings"]["epochs"] == 2 and "seed" not in entry["settings"]
    assert {"archrepair", "torch", "numpy", "python", "machine", "commit"} <= set(entry["versions"])
    assert [(run["version"], run["seed"]) for run in entry["runs"]] == [("fog:3", 0), ("fog:3", 1), ("frost:3", 0), ("frost:3", 1)]
    for run in entry["runs"]:
        assert run["cost"]["forwards"] > 1000 and run["cost"]["cpu_seconds"] > 0 and run["cost"]["seconds"] > 0
        assert (folder / run["predictions"]).stat().st_size < 20_000
    assert not list(folder.glob("*.checkpoints"))


def test_it_is_scored_again_from_its_predictions_alone(entered, benchmark, monkeypatch):
    monkeypatch.setattr(module, "original", lambda *a, **k: pytest.fail("a network was asked for"))
    rows = rescore(entered[0], benchmark)
    assert len(rows) == 4 * 14 + 14 and all(row.agrees for row in rows) and {row.rule for row in rows} == {"validation", "paper"}


def test_an_interrupted_entry_goes_on_and_another_is_refused(entry, benchmark, monkeypatch):
    content = read_entry(entry)
    content["runs"].pop(2)
    (entry / "entry.json").write_text(json.dumps(content))
    calls = []
    once = module._run_once
    monkeypatch.setattr(module, "_run_once", lambda *a: calls.append(a[2:4]) or once(*a))
    again = enter(f"{METHOD}:epochs=2", benchmark.tracks["digits"], entry)
    assert calls == [("frost:3", 0)] and len(again["runs"]) == 4 and again["complete"]
    stated = {(run["version"], run["seed"]): run["scores"] for run in read_entry(entry)["runs"]}
    assert stated == {(run["version"], run["seed"]): run["scores"] for run in again["runs"]}
    with pytest.raises(ArchrepairError, match="holds another entry, of another method"):
        enter(METHOD, benchmark.tracks["digits"], entry)


def test_a_class_at_hand_is_entered_as_it_is(benchmark, tmp_path, entered):
    entry = enter(LastLayer, benchmark.tracks["digits"], tmp_path, only=RUN)
    assert entry["method"] == METHOD and not entry["complete"] and entry["settings"]["epochs"] == 5  # the tier's
    assert entry["runs"][0]["scores"]["paper"]["accuracy"] > 0


@pytest.mark.parametrize(("method", "message"), [
    (Vandal, "Vandal changed the network that it was given"), (Mute, "Mute.repair returned a ResNet; expected a RepairResult"),
    ("support.last_layer:LastLayr", "unknown class of support.last_layer 'LastLayr': did you mean 'LastLayer'"),
    ("support.first_layer:LastLayer", "cannot import the method"), (f"{METHOD}:rate=1", "unknown option .* 'rate'"),
    ("retrian", "unknown method 'retrian': did you mean 'retrain'"),
])
def test_a_method_that_does_not_keep_the_rules_is_one_line(benchmark, tmp_path, method, message):
    with pytest.raises(ArchrepairError, match=message):
        enter(method, benchmark.tracks["digits"], tmp_path, only=RUN)
    assert not (tmp_path / "entry.json").exists()


def test_a_number_that_does_not_follow_is_found(entry, benchmark, capsys):
    text = (entry / "entry.json").read_text()
    (entry / "entry.json").write_text(re.sub(r'("clean accuracy": )[\d.]+', r"\g<1>99.9", text, count=1))
    wrong = [row for row in rescore(entry, benchmark) if not row.agrees]
    assert [(row.metric, row.stated) for row in wrong] == [("clean accuracy", 99.9)]
    assert command("rescore", entry) == 1 and "is stated as 99.900" in capsys.readouterr().out
    assert command("rescore", entry, "--json") == 1
    assert json.loads(capsys.readouterr().out)[0]["differing"][0]["metric"] == "clean accuracy"
    with pytest.raises(ArchrepairError, match="states clean accuracy 99.9"):
        list(lines_of_entry(entry, benchmark, "x"))


def alter(folder, old, new):
    "Change a text of an entry."
    text = (folder / "entry.json").read_text()
    assert old in text
    (folder / "entry.json").write_text(text.replace(old, new))


@pytest.mark.parametrize(("change", "message"), [
    (lambda folder: np.savez(folder / "fog-3-s0.npz", **{"returned/clean": np.zeros(3, np.uint8)}), "not the file of the entry"),
    (lambda folder: (folder / "fog-3-s0.npz").unlink(), "cannot read the predictions"),
    (lambda folder: (folder / "entry.json").write_text("{}"), "is not an entry"),
    (lambda folder: alter(folder, '"track": "digits"', '"track": "digit"'), "track 'digit'"),
    (lambda folder: alter(folder, '"benchmark": "', '"benchmark": "0'), "was made for another benchmark"),
])
def test_a_damaged_entry_is_one_line(entry, capsys, change, message):
    change(entry)
    assert message in fails(capsys, "rescore", entry)


# --- one table


def test_the_stored_table_is_what_records_and_entries_give(tmp_path):
    "After new records: `archrepair leaderboard`, and commit."
    stored = ROOT / "outputs" / "leaderboard.csv"
    assert write_leaderboard(leaderboard(ROOT / "outputs"), tmp_path / "now.csv").read_text() == stored.read_text()
    assert "/".join(stored.relative_to(ROOT).parts) == "outputs/leaderboard.csv"


def test_every_number_names_its_rule_and_where_it_is_from():
    lines = leaderboard(ROOT / "outputs")
    assert {line.rule for line in lines} == set(RULES) and all((ROOT / "outputs" / line.source).is_file() for line in lines)
    assert len({astuple(replace(line, value=0.0, n=0)) for line in lines}) == len(lines), "two numbers of one name"
    tracks = Counter(line.track for line in lines)
    assert set(tracks) == {"", "archrepair-bench v1 digits"} and min(tracks.values()) > 100


def test_the_oracle_is_the_best_block_by_what_judges_it():
    line = Line("archrepair", "block=a", "net", "data", "fog", 3, 0, "accuracy", 70.0, 10, "paper", "lite", "", "", "x")
    others = [replace(line, options="block=b", value=72.0, source="y"), replace(line, options="block=b;k=1", value=99.0),
              replace(line, seed=1, value=80.0), replace(line, options="", value=90.0)]
    assert oracle_lines([line, *others]) == [replace(line, options="block=best", value=72.0, rule="oracle", source="y")]


def test_an_entry_becomes_lines_with_its_track(entered, benchmark):
    lines = list(lines_of_entry(entered[0], benchmark, "here"))
    assert {(line.track, line.source, line.tier) for line in lines} == {("archrepair-bench v1 digits", "here", "smoke")}
    assert {(line.method, line.options, line.n) for line in lines if line.metric == "accuracy"} == {(METHOD, "epochs=2", 298)}
    assert sum(line.metric == "processor seconds" for line in lines) == 4


def test_what_cannot_be_read_is_left_out_with_a_notice(entry):
    (entry / "entry.json").write_text("{}")
    with pytest.warns(match="left out .*entry.json: .* is not an entry"):
        assert leaderboard(entry.parents[2]) == []


def test_places_of_entries_are_names_of_folders(benchmark, tmp_path):
    place = place_of_entry("my.method:Shift:rate=0.1", benchmark.tracks["digits"], tmp_path)
    assert place == tmp_path / "entries" / "digits" / "my.method~Shift~rate=0.1"


# --- the command line


def test_the_command_enters_and_says_what_came_out(entry, capsys):
    "It is finished already, so that nothing is run."
    assert command("enter", f"{METHOD}:epochs=2", "--out", entry, "--who", "Somebody") == 0
    out = capsys.readouterr().out
    assert "mean ± sd of 4 runs" in out and "failures fixed" in out and "validation" in out
    assert read_entry(entry)["who"] == "Somebody"
    assert command("enter", f"{METHOD}:epochs=2", "--out", entry, "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["retrian"], "unknown method 'retrian'"), (["retrain", "--track", "digit"], "unknown track 'digit': did you mean 'digits'"),
    (["support.last_layer:LastLayr"], "unknown class of support.last_layer")])
def test_wrong_words_are_one_line(capsys, tmp_path, arguments, message):
    assert message in fails(capsys, "enter", *arguments, "--out", tmp_path / "mine")


def test_the_table_is_written_by_a_command_and_needs_something_to_hold(home, entry, capsys):
    assert "expected some: archrepair enter METHOD" in fails(capsys, "leaderboard") or not (home / "outputs").exists()
    shutil.copytree(ROOT / "data", home / "data", ignore=lambda folder, names: [name for name in names if not name.startswith("bench-v1")])
    shutil.copytree(entry, home / "outputs" / "entries" / "digits" / "mine")
    capsys.readouterr()
    assert command("leaderboard", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sources"] == 1 and said["numbers"] == 60
    head = (home / "outputs" / "leaderboard.csv").read_text().splitlines()[0].split(",")
    assert {"method", "network", "version", "severity", "seed", "metric", "value", "n", "rule", "tier", "commit"} < set(head)
