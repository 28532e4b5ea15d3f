"""The sentence with which a page opens says what its numbers say, also where they say little."""
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from archrepair.experiments.runs import Runs
from archrepair.paper import answers
from archrepair.paper.answers import LOST, WON
from archrepair.paper.exhibits import Settings, requirements
from archrepair.paper.tables import collect_rows
from support import ROOT
from support.exhibits import SMOKE, a_copy, recorded


def gains(**methods: tuple[float, float, bool]) -> pd.DataFrame:
    rows = [(name, full, held_out, 2, unchanged) for name, (full, held_out, unchanged) in methods.items()]
    return pd.DataFrame(rows, columns=["method", "full", "held_out", "n", "unchanged"]).set_index("method")


def matrix(**points: list[float]) -> pd.DataFrame:
    "Accuracies after repairing fog, by method; columns clean, fog, snow."
    base = [90.0, 70.0, 60.0]
    rows = [("resnet18", method, "fog", 0, *np.add(base, change)) for method, change in {"original": [0, 0, 0], **points}.items()]
    return pd.DataFrame(rows, columns=["model", "method", "repaired", "seed", "clean", "fog", "snow"])


def test_a_gain_is_taken_from_the_runs_own_original():
    rows = pd.DataFrame({"method": ["archrepair", "archrepair", "mode"], "seed": [0, 1, 0], "full": [82.0, 80, 81],
                         "full before": [80.0, 79, 81], "held_out": [70.0, 71, 70], "held_out before": [71.0, 71, 70],
                         "unchanged": [False, False, True]})
    means = answers.mean_gains(answers.gains_by_run(rows))
    assert means.loc["ArchRepair"].tolist() == [1.5, -0.5, 2, False] and means.loc["MODE", "unchanged"]


@pytest.mark.parametrize(("table", "beginning"), [
    (gains(ArchRepair=(3, 1, False), Apricot=(2, 0.5, False)),
     "Yes: on images that no repair has seen, ArchRepair changes accuracy by +1"),
    (gains(ArchRepair=(3, 1, False), Apricot=(4, 0.5, False)), "No: "),
    (gains(ArchRepair=(3, -1, False), Apricot=(2, -2, False)), "No: "),  # the best of losers has not gained
    (gains(ArchRepair=(3, 1, False), MODE=(0, 0, True)), "Not answered: "), (gains(Apricot=(3, 1, False)), "Not answered: ")])
def test_rq1_is_yes_only_where_archrepair_leads_twice_and_gains(table, beginning):
    assert answers.answer_rq1(table).startswith(beginning)


def test_rq1_names_who_leads():
    text = answers.answer_rq1(gains(ArchRepair=(3, -1, False), Apricot=(4, 0.5, False), MODE=(0, 0, True)))
    assert "(n = 2; number 2 of 2, Apricot leads with +0.50)" in text and "by +3.00 (number 2 of 2, Apricot leads with +4.00)" in text


@pytest.mark.parametrize(("snow", "text"), [(0.0, "harms nothing else"), (-0.4, "harms nothing else"), (-0.6, "does harm elsewhere")])
def test_rq2_counts_what_loses_more_than_half_a_point(snow, text):
    effects = answers.side_effects(matrix(archrepair=[0, 5, snow], sensei=[0, 6, 0]))
    answer = answers.answer_rq2(effects)
    assert text in answer and "gains +5.0 points" in answer and "number 2 of 2 methods; SENSEI leads with +6.0" in answer
    assert f"in {int(snow < -0.5)} of 1 cases" in answer


def test_rq2_without_archrepair_is_not_answered():
    assert answers.answer_rq2(answers.side_effects(matrix(sensei=[0, 6, 0]))).startswith("Not answered")
    assert answers.answer_rq2(answers.side_effects(matrix()[:0])).startswith("Not answered")


@pytest.mark.parametrize(("localized", "word", "lost", "won"), [
    ({0: "a", 1: "b"}, "Yes", 0, 1), ({0: "b", 1: "b"}, "Not always", 1, 0), ({0: "b", 1: "a"}, "No", 2, -1)])
def test_rq3_compares_the_localized_block_with_the_best_and_the_mean(localized, word, lost, won):
    rows = pd.DataFrame({"seed": [0, 0, 1, 1], "block": ["a", "b"] * 2, "held_out": [82.0, 80, 70, 72]})
    verdicts = answers.trust(rows, localized)
    assert (verdicts[LOST].mean(), verdicts[WON].mean()) == (lost, won)
    assert answers.answer_rq3(verdicts).startswith(f"{word}: ")


def test_rq4_needs_seeds_that_agree_and_pairs_that_differ():
    pairs = pd.DataFrame({"search": [80.0, 81, 79], "control": [80.0, 80, np.nan], "edges changed": [0, 2, 3]})
    whole = {0: 2.0, 1: 3.0}
    verdicts = {"a block": answers.verdict(whole, {0: 1.0, 1: 1.0}), "votes": answers.verdict(whole, {0: 3.0, 1: 1.0}),
                "gradients": answers.verdict({0: 2.0}, {1: 1.0}), "search": answers.verdict({0: 1.0}, {0: 2.0})}
    assert {part: word for part, (word, *_) in verdicts.items()} == {
        "a block": "yes", "votes": "not shown, the seeds disagree", "gradients": "not measured", "search": "no"}
    text = answers.answer_rq4(pairs, verdicts)
    assert text.startswith("All seeds agree that a block (+1.50 points, n = 2) helps, and that search (-1.00 points, n = 1) does not; ")
    assert "only 1 of 2 pairs" in text


def test_blocks_chosen_with_and_without_the_reweighting():
    rows = pd.DataFrame({"seed": [0, 0], "block": ["a", "b"], "gain": [1.0, 3.0]})
    table = answers.places(rows, {0: {"block": "a", "counts_s": {"a": 10, "b": 40}}, 1: {"block": "a", "counts_s": {"a": 1, "b": 0}}})
    assert table.loc[0].tolist() == ["a", "b", "b", 1.0, 3.0, 2.0, 3.0]
    assert table.loc[1, "best"] == "–" and np.isnan(table.loc[1, "gain, best"])


def test_the_parts_of_a_gain_add_up():
    change = {"seen": {"fixed": 60, "broken": 0}, "full": {"fixed": 70, "broken": 35}, "held_out": {"fixed": 5, "broken": 10}}
    record = SimpleNamespace(metrics={"before": {"full": {"n": 1000}}, "candidates": {"repaired": {"change": change}}})
    assert list(answers.parts_of_gain(record).values()) == [6.0, -2.0, -0.5]


def test_the_original_is_judged_once_per_seed(tmp_path):
    runs, rows = a_copy(tmp_path / "outputs"), recorded()[2]
    table = answers.accuracy_everywhere(rows.assign(corruption="clean"), SMOKE, runs)
    assert table["method"].tolist() == ["original", "retrain", "surgical"]
    assert table["clean"].between(0, 100).all() and (table["strict"] <= table["mean"]).all()
    assert answers.points_gained(table).index.tolist() == [("retrain", "clean"), ("surgical", "clean")]


# --- the stored pages


def before_the_evidence(notebook: str) -> list[dict]:
    "The outputs of a page before its first section."
    outputs = []
    for cell in json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and "\n## " in "\n" + "".join(cell["source"]):
            return outputs
        outputs += cell.get("outputs", [])
    return outputs


@pytest.mark.parametrize("notebook", ["03_rq1", "04_rq2", "05_rq3", "06_rq4"])
def test_a_result_page_opens_with_its_answer_and_one_figure(notebook):
    answer, figure = before_the_evidence(notebook)
    assert "".join(answer["data"]["text/markdown"]).startswith("**") and "image/png" in figure["data"]


def test_the_stored_answer_is_that_of_the_stored_records():
    settings = Settings.of(tier="lite", seeds=3)
    rows = collect_rows(requirements(["table5"], settings), Runs(outputs=ROOT / "outputs"), missing="skip")
    answer = answers.answer_rq1(answers.mean_gains(answers.gains_by_run(rows)))
    assert "".join(before_the_evidence("03_rq1")[0]["data"]["text/markdown"]) == answer._repr_markdown_()
