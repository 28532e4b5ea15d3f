"""Methods on the same failures, and every block in turn: what the tables say is what the records say, and nothing is run twice."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import archrepair.experiments.comparison as module
from archrepair.cli.app import main
from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import load_dataset
from archrepair.experiments.cells import Record
from archrepair.experiments.comparison import BlockTable, compare_blocks, compare_methods, one_original, scores_of
from archrepair.experiments.runs import Runs, method_cell
from archrepair.repair.result import load
from archrepair.training.evaluation import predict, robust_accuracy
from archrepair.training.statistics import Summary, wilcoxon
from support.comparisons import CELL, METHODS, VERSIONS
from support.finished import DATASET, fails, finished, tree

# --- the table of methods

def test_the_table_says_what_the_records_say(project):
    outputs, table, _ = project
    assert [(run["method"], run["seed"]) for run in table.runs] == [(m, s) for s in (0, 1) for m in (*METHODS, "original")]
    for run in table.runs:
        label = METHODS[0] if run["method"] == "original" else run["method"]
        record = Record.read(method_cell(label, replace(CELL, seed=run["seed"]), 1).path(outputs))
        if run["method"] == "original":
            assert run["held_out"] == record.accuracy("held_out", "before") and run["clean"] == record.accuracy("clean_held_out", "before")
            assert "seconds" not in run
            continue
        part = record.metrics["candidates"]["repaired"]
        assert run["held_out"] == part["after"]["held_out"]["accuracy"] and run["clean"] == part["after"]["clean_held_out"]["accuracy"]
        assert run["gain"] == pytest.approx(run["held_out"] - record.accuracy("held_out", "before"))
        assert (run["seen"], run["unseen"]) == (part["change"]["seen"]["repair_rate"], part["change"]["unseen"]["repair_rate"])
        assert run["negative_flips"] == part["change"]["held_out"]["negative_flips"] and run["accepted"] == record.repair["accepted"]
        assert (run["forwards"], run["backwards"]) == (record.repair["cost"]["forwards"], record.repair["cost"]["backwards"])
    held = [[r["held_out"] for r in table.runs if r["method"] == m] for m in METHODS]
    assert table.tests == {m: wilcoxon(held[i], held[0]) for i, m in enumerate(METHODS) if i}
    assert table.summary(METHODS[1])["held_out"] == Summary.of(held[1])


def test_own_and_returned_networks_are_told_apart():
    record = Record(**json.loads((finished() / "outputs" / "repair" / "record.json").read_text()))
    record.metrics["candidates"]["repaired"]["after"]["held_out"]["accuracy"] = 12.5
    assert scores_of(record)["held_out"] == 12.5 and scores_of(record, "returned")["held_out"] == record.accuracy()
    with pytest.raises(ArchrepairError, match="unknown network to score 'best'"):
        scores_of(record, "best")


def test_robust_accuracy_is_that_of_the_networks_kept(project):
    outputs, table, _ = project
    runs = Runs(outputs)
    assert table.versions == [DATASET, "digits:contrast:5", "digits"]
    for label in ("original", METHODS[1]):
        cell = CELL.unrepaired() if label == "original" else method_cell(label, CELL, 1)
        unrepaired, scenario = runs.problem(cell)
        network = unrepaired.network if label == "original" else load(runs.file(cell, "networks", ""), unrepaired.network)
        right = {}
        for version in table.versions:
            images = load_dataset(version, "test").select(scenario.held_out)
            right[version] = predict(network, images, unrepaired.transform).argmax(1) == images.labels
        expected = robust_accuracy(right)
        run = next(r for r in table.runs if r["method"] == label and r["seed"] == 0)
        assert (run["robust"], run["strict"]) == (pytest.approx(expected.mean, abs=0.4), pytest.approx(expected.strict, abs=0.4))
        assert run["versions"][DATASET] == pytest.approx(run["held_out"], abs=0.35)  # the same images once more, in other batches
    assert all(run["strict"] <= min(run["versions"].values()) <= run["robust"] for run in table.runs)


def test_a_second_call_runs_nothing(project, idle):
    outputs, table, log = project
    before, again = tree(outputs), []
    other = compare_methods(METHODS, CELL, seeds=[0, 1], corruptions=VERSIONS, epochs=1, runs=Runs(outputs, log=again.append))
    assert json.dumps(other.to_dict()) == json.dumps(table.to_dict()) and not again and tree(outputs) == before
    few = compare_methods(METHODS[1:], CELL, seeds=[1], corruptions=["clean", "own"], epochs=1, runs=Runs(outputs))
    accuracies = [[run["held_out"] for run in each.runs if run["method"] == METHODS[1]] for each in (few, table)]
    assert few.tests == {} and accuracies[0] == accuracies[1][1:]
    assert sum("retrain" in line and "on" not in line.split() for line in log) == 2  # one run per seed, its network with it


def test_the_table_as_text(project):
    _, table, _ = project
    frame = table.frame()
    assert list(frame.index) == ["original", *METHODS] and "full test" not in frame and f"p vs {METHODS[0]}" in frame
    held_out = str(table.summary(METHODS[1])["held_out"])
    assert frame.loc["original", "seconds"] == "–" and frame.loc[METHODS[1], "held out"] == held_out.removesuffix(" (n 2)")
    assert "n = 2 seeds" in table.caption and "1 pass over" in table.caption and table.caption in table._repr_html_()
    assert "full test" in replace(table, cell=replace(table.cell, protocol="paper")).frame()


def test_records_of_two_originals_are_not_compared():
    record = json.loads((finished() / "outputs" / "repair" / "record.json").read_text())
    one, two = Record(**record), Record(**{**record, "versions": {**record["versions"], "weights": "0" * 16}})
    assert one_original({"a": one, "b": one}, 0) == record["versions"]["weights"]
    with pytest.raises(ArchrepairError, match="repair 2 different originals"):
        one_original({"a": one, "b": two}, 0)


# --- the oracle check

class ScriptedRuns(Runs):
    "Runs whose results are set: accuracy by (seed, block), localized block and suspicious neurons by seed."

    def __init__(self, held_out: dict, localized: dict, counts: dict):
        super().__init__()
        self.held_out, self.localized, self.counts = held_out, localized, counts
        self.template = json.loads((finished() / "outputs" / "repair" / "record.json").read_text())

    def localization(self, cell):
        summary = {block: {"count": n} for block, n in self.counts.items()}
        return {"block": self.localized[cell.seed], "blocks": list(self.counts), "summary": summary}

    def record(self, cell, *, network=False):
        record = Record(**json.loads(json.dumps(self.template)))
        record.metrics["before"]["held_out"]["accuracy"] = 50.0
        record.metrics["candidates"]["repaired"]["after"]["held_out"]["accuracy"] = self.held_out[cell.seed, cell.block]
        return record


def test_the_oracle_by_hand():
    "Seed 0: layer4 localized, layer2 best, 8 points lost; seed 1: layer4 is the best. Gains of 5, 9, 3, 8 against counts 1, 2, 3, 4."
    held = {(0, "layer1"): 54.0, (0, "layer2"): 60.0, (0, "layer3"): 52.0, (0, "layer4"): 52.0,
            (1, "layer1"): 56.0, (1, "layer2"): 58.0, (1, "layer3"): 54.0, (1, "layer4"): 64.0}
    counts = {"layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
    table = compare_blocks(CELL, seeds=[0, 1], runs=ScriptedRuns(held, {0: "layer4", 1: "layer4"}, counts))
    assert (table.localized, table.best) == (["layer4", "layer4"], ["layer2", "layer4"])
    assert [table.gain(b).mean for b in counts] == [5.0, 9.0, 3.0, 8.0] and table.gain("layer4", 1).mean == 14.0
    assert table.lost == Summary.of([8.0, 0.0])
    # ranks of the gains 2, 4, 1, 3 against 1, 2, 3, 4: squared differences 1 + 4 + 4 + 1, so 1 - 6 * 10 / (4 * 15)
    assert table.correlation.statistic == pytest.approx(0.0) and table.correlation.n == 4
    assert table.verdict == ("the localized block (layer4) was the best to repair in 1 of 2 runs (best: layer2, layer4), which cost "
                             "4.00 ± 5.66 (n 2) points; rank correlation of suspicion and gain +0.00 (n 4 blocks, p 1)")
    assert list(table.frame()[""]) == ["", "best 1/2", "", "localized 2/2, best 1/2"] and json.dumps(table.to_dict())
    assert list(table.frame()["suspicious"]) == ["1 ± 0", "2 ± 0", "3 ± 0", "4 ± 0"]


def test_the_oracle_on_some_blocks_and_without_an_order():
    held = {(0, b): 60.0 for b in ("layer1", "layer2", "layer3")}
    scripted = lambda counts: ScriptedRuns(held, {0: "layer3"}, counts)
    table = compare_blocks(CELL, ["layer1", "layer2"], runs=scripted({"layer1": 1, "layer2": 2, "layer3": 3}))
    assert table.blocks == ["layer1", "layer2"] and not table.lost.n and math.isnan(table.correlation.statistic)
    assert "layer3 was not among the blocks repaired" in table.verdict and "no order" in table.verdict
    same = compare_blocks(CELL, runs=scripted({"layer1": 2, "layer2": 2, "layer3": 2}))
    assert "was the best to repair in 0 of 1 run" in same.verdict or "in 1 of 1 run" in same.verdict
    mistakes = [({"blocks": ["layer9"]}, "unknown block 'layer9'"),
                ({"method": "retrain"}, "retrain does not take a block; expected one of archrepair")]
    for arguments, message in mistakes:
        with pytest.raises(ArchrepairError, match=message):
            compare_blocks(CELL, runs=scripted({"layer1": 1}), **arguments)


def test_every_block_is_really_repaired(project, monkeypatch):
    outputs, _, _ = project
    log = []
    table = compare_blocks(CELL, ["layer3", "layer4"], method="surgical", epochs=1, runs=Runs(outputs, log=log.append))
    assert isinstance(table, BlockTable) and [line for line in log if "surgical" in line] == [
        "surgical (epochs=1), layer3, seed 0", "surgical (epochs=1), layer4, seed 0"]
    localization = Runs(outputs).localization(CELL)
    assert [run["suspicious"] for run in table.runs] == [localization["summary"][b]["count"] for b in ("layer3", "layer4")]
    repair = json.loads((finished() / "outputs" / "repair" / "record.json").read_text())["repair"]
    assert table.localized == [localization["block"]] == [repair["localization"]["block"]]
    again = compare_blocks(CELL, ["layer3", "layer4"], method="surgical", epochs=1, runs=Runs(outputs, log=lambda line: pytest.fail(line)))
    assert again.to_dict() == table.to_dict()


# --- the command

def printed(capsys, *arguments) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--tier", "smoke", "--dataset", DATASET, *map(str, arguments)])
    assert not ended.value.code
    return capsys.readouterr()


def test_the_command(project, capsys, idle, monkeypatch):
    outputs, table, _ = project
    arguments = ("--methods", ",".join(METHODS), "--seeds", "0,1", "--corruptions", ",".join(VERSIONS), "--epochs", 1, "--out", outputs)
    assert json.loads(printed(capsys, *arguments, "--json")[0]) == json.loads(json.dumps(table.to_dict()).replace("NaN", "null"))
    for width in (60, 250):  # methods in columns, or in rows
        monkeypatch.setenv("COLUMNS", str(width))
        out, err = printed(capsys, *arguments)
        assert table.caption in out and not err and "2 pairs cannot give p below 0.5" in out
        assert ("retrain" in out.split("held out")[0]) == (width == 60)
    assert str(np.round(table.summary(METHODS[1])["seconds"].mean, 1)) in out


def test_the_command_on_blocks(project, capsys):
    outputs, _, _ = project
    arguments = ("--blocks", "layer3,layer4", "--methods", "surgical", "--epochs", 1, "--out", outputs)
    out, _ = printed(capsys, *arguments)
    got = json.loads(printed(capsys, *arguments, "--json")[0])
    assert got["verdict"] in out and {run["block"] for run in got["runs"]} == {"layer3", "layer4"}


@pytest.mark.parametrize(("arguments", "message"), [
    (("--methods", "retrian"), "did you mean 'retrain'"), (("--seeds", "0,x"), "seeds are '0,x'; expected whole numbers"),
    (("--blocks", "all", "--methods", "retrain"), "retrain does not take a block"), (("--epochs", 0), "epochs is 0"),
    (("--blocks", "all", "--methods", "archrepair,surgical"), "leave out --corruptions and all methods but that one"),
    (("--corruptions", "smow"), "unknown corruption"), (("--weights", "none.pt"), "folder of their own"),
    (("--methods", ","), "unknown method"),
])
def test_the_commands_mistakes(home, capsys, arguments, message):
    assert message in fails(capsys, "compare", "--tier", "smoke", "--dataset", DATASET, *arguments)
    assert not list(Path(home).rglob("*.json"))


def test_the_module_is_named_for_what_it_does():
    assert {"compare_methods", "compare_blocks", "MethodTable", "BlockTable"} <= set(module.__all__)
