"""What a table says of its records."""
import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.paper.exhibits import Requirement
from archrepair.paper.tables import ResultTable, collect_rows, keep_common_seeds, runs_as_values, save_sentence
from support.exhibits import SMOKE, a_copy, recorded


def values(**rows: list[float]) -> pd.DataFrame:
    "Values of `ResultTable.of`: accuracies of one network by method."
    return pd.DataFrame([{"row": row, "column": "ResNet-18", "score": "full", "value": value} for row, several in rows.items()
                         for value in several])


PAPER = pd.DataFrame({"ResNet-18": {"Original": 85.0, "MODE": 85.48}})


def test_a_table_says_mean_spread_n_paper_and_difference():
    accuracies = values(Original=[80.0, 82.0], MODE=[84.0, 86.0], Apricot=[84.0])
    table = ResultTable.of("table5", "Accuracy", SMOKE, accuracies, PAPER, commits=["b", "a", "b", ""])
    long = table.long
    assert list(long["mean"]) == [81.0, 85.0, 84.0] and list(long["n"]) == [2, 2, 1]
    assert long["sd"].iloc[0] == pytest.approx(math.sqrt(2)) and math.isnan(long["sd"].iloc[2])
    assert math.isnan(long["paper"].iloc[2])
    assert list(long["difference"].round(2))[:2] == [-4.0, -0.48]
    frame = table.frame(("<b>", "</b>"))["ResNet-18"]
    assert frame.loc["MODE", "full test"] == "<b>85.00 ± 1.41</b>" and frame.loc["Apricot", "full test"] == "84.00 (n 1)"
    assert frame.loc["Original", "difference"] == "-4.00" and frame.loc["Apricot", "paper"] == "–"
    assert table.commits == ("a", "b")
    assert all(words in table.caption for words in ("n = 1 to 2", "tier smoke", "commit a, b"))
    assert "**85.00 ± 1.41**" in table.markdown() and table.markdown().count("\n|") == 5


def test_the_scores_of_a_column_stand_together():
    both = pd.concat([values(MODE=[1.0]).assign(column=column, score=score) for score in ("full", "held_out") for column in ("A", "B")])
    frame = ResultTable.of("table5", "", SMOKE, both, pd.DataFrame({"A": {"MODE": 2.0}})).frame()
    assert list(frame.columns) == [("A", "full test"), ("A", "paper"), ("A", "difference"), ("A", "held out"), ("B", "full test"),
                                   ("B", "held out")]


def test_the_original_is_never_the_best_and_ties_share():
    table = ResultTable.of("table5", "", SMOKE, values(Original=[99.0], MODE=[84.001], Apricot=[84.004]))
    assert [text.startswith("<b>") for text in table.frame(("<b>", "</b>")).iloc[:, 0]] == [False, True, True]
    least = ResultTable.of("table4", "", SMOKE, values(MODE=[3.0], Apricot=[2.0]), better="min")
    assert [text.startswith("*") for text in least.frame(("*", "*")).iloc[:, 0]] == [False, True]
    assert not any("*" in text for text in replace(least, better="").frame(("*", "*")).iloc[:, 0])


def test_a_method_that_changed_nothing_is_marked_and_never_the_best():
    accuracies = values(Original=[80.0], MODE=[80.0], Apricot=[79.0], Arachne=[78.0]).assign(unchanged=[False, True, False, False])
    texts = list(ResultTable.of("table5", "", SMOKE, accuracies).frame(("<b>", "</b>")).iloc[:, 0])
    assert texts == ["80.00", "80.00, unchanged", "<b>79.00</b>", "78.00"]
    twice = pd.concat([accuracies, values(MODE=[81.0]).assign(unchanged=False)])  # on another seed it did change something
    assert ResultTable.of("table5", "", SMOKE, twice).frame().loc["MODE"].iloc[0].startswith("80.50 ± 0.71")


def test_numbers_that_cannot_be_compared_have_no_difference():
    table = ResultTable.of("table4", "", SMOKE, values(MODE=[3.0]), PAPER, compare=False, theirs="paper (minutes)")
    assert list(table.frame().columns) == [("ResNet-18", "full test"), ("ResNet-18", "paper (minutes)")]


def test_a_statistic_brings_its_own_n_and_its_own_form():
    p = pd.DataFrame([{"row": row, "column": "p", "score": "full", "value": value, "n": n} for row, value, n in
                      [("MODE", 3.9e-19, 120), ("Apricot", 0.03125, 6)]])
    table = ResultTable.of("table6", "Test", SMOKE, p, compare=False, better="", form=".2g", statistic="p over pairs", unit="p")
    assert list(table.frame().iloc[:, 0]) == ["3.9e-19", "0.031 (n 6)"]
    assert "p over pairs, n = 6 to 120 (given where it is not 120); p;" in table.caption


def test_tables_of_one_exhibit_have_captions_of_their_own():
    labels = [ResultTable.of(name, "", SMOKE, values(MODE=[1.0])).caption.split(" · ")[0] for name in ("table9", "table9-votes")]
    assert labels == ["Table 9", "Table 9, votes"]


def test_a_sentence_takes_the_place_of_a_table(tmp_path):
    *_, old = (old_csv, _, _) = ResultTable.of("table6", "Test", SMOKE, values(MODE=[0.5])).save(tmp_path)
    markdown, card = save_sentence("Two pairs < six.", "table6", "Test", SMOKE, tmp_path)
    assert card == old and not old_csv.exists()
    assert markdown.read_text().splitlines()[-1] == "Two pairs < six."
    assert json.loads(card.read_text())["html"] == "<p>Two pairs &lt; six.</p>"


def test_a_missing_cell_is_a_dash():
    ragged = pd.concat([values(MODE=[1.0], Apricot=[2.0]), values(MODE=[3.0]).assign(column="VGG-16")])
    assert ResultTable.of("table5", "", SMOKE, ragged).frame().loc["Apricot", ("VGG-16", "full test")] == "–"


def test_rows_are_the_records():
    _, runs, rows = recorded()
    assert list(rows["method"]) == ["retrain", "surgical"] and (rows["corruption"] == "fog").all() and (rows["full before"] > 0).all()
    for row in rows.itertuples():
        after = row.record.metrics["candidates"]["repaired"]["after"]
        assert row.full == after["full"]["accuracy"] and row.held_out == after["held_out"]["accuracy"] and row.cpu_seconds > 0
        assert runs.has_network(row.cell)  # they will be asked for by the figure
    table = runs_as_values(rows, "method", "model")
    assert list(dict.fromkeys(table["row"])) == ["Original", "Retraining", "Surgical"] and len(table) == 2 * 3
    assert collect_rows([Requirement(SMOKE.cell("mode"))], runs, missing="skip").empty


def test_repairs_of_two_originals_do_not_share_a_table(tmp_path):
    runs, cells = a_copy(tmp_path / "copy"), list(recorded()[2]["cell"])
    paths = [cell.path(runs.outputs) for cell in cells]
    content = json.loads(paths[0].read_text(encoding="utf-8"))
    content["versions"]["weights"] = "0" * 16
    paths[0].write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArchrepairError, match="records of seed 0 repair 2 different originals") as error:
        collect_rows(map(Requirement, cells), runs, missing="skip")
    assert all(str(path) in str(error.value) for path in paths[:2])


def test_methods_are_compared_on_the_same_seeds():
    rows = pd.DataFrame({"seed": [0, 0, 1, 1, 2], "method": ["a", "b", "a", "b", "a"]})
    assert list(keep_common_seeds(rows, "method")["seed"]) == [0, 0, 1, 1]
    assert list(keep_common_seeds(rows[:1], "method")["seed"]) == [0]
    assert list(keep_common_seeds(rows[rows["method"] == "a"], "method")["seed"]) == [0, 1, 2]
    assert keep_common_seeds(rows[:0], "method").empty


def test_a_saved_table_can_be_read_back(tmp_path):
    table = ResultTable.of("table5", "Accuracy <of> all", SMOKE, values(Original=[80.0], MODE=[84.0]), PAPER, commits=["abc"])
    csv, markdown, card = table.save(tmp_path)
    frame = pd.read_csv(csv)
    assert " ".join(frame) == "row column score mean sd n unchanged paper difference unit tier protocol commit" and len(frame) == 2
    assert markdown.read_text() == table.markdown()
    content = json.loads(card.read_text())
    assert card.name == "table5-resnet18-digits~fog~3-clean.json" and content["notebook"] == "03_rq1" and "84.00" in content["html"]
