"""What records say in a sentence, and whether the stored results and the pages say the same."""
from types import SimpleNamespace

import pytest

from archrepair.experiments.cells import Record
from archrepair.experiments.runs import Runs
from archrepair.paper.exhibits import Settings, requirements
from archrepair.paper.index import cards
from archrepair.paper.sentences import (FEWEST_PAIRS, Answer, Answers, edges_changed, is_unchanged, n_text, p_text, pairs_sentence,
                                        search_sentence)
from archrepair.paper.tables import collect_rows, keep_common_seeds
from archrepair.training.statistics import wilcoxon
from support import ROOT

EDGES = [{"inherited": "conv1"}, {"inherited": "conv2"}, {"inherited": None}]
STORED = [card for card in cards(ROOT / "outputs") if card["settings"]["tier"] == "lite"]


def searched(*choices: str) -> SimpleNamespace:
    return SimpleNamespace(repair={"genotype": {"graph": {"edges": EDGES}, "choices": choices}})


def changed(weights: dict, fixed: int = 0, broken: int = 0) -> SimpleNamespace:
    change = {"full": {"fixed": fixed, "broken": broken}}
    return SimpleNamespace(repair={"changed": weights}, metrics={"candidates": {"repaired": {"change": change}}})


@pytest.mark.parametrize(("choices", "count"), [
    (("original", "original", "none"), 0), (("original", "original", "skip"), 1), (("none", "original", "none"), 1),
    (("skip", "none", "sep_conv"), 3)])
def test_an_edge_has_changed_if_it_was_replaced_left_out_or_added(choices, count):
    assert edges_changed(searched(*choices)) == (count, 3)


@pytest.mark.parametrize("repair", [{}, {"genotype": None}, {"genotype": {}}])
def test_a_repair_without_a_search_has_no_edges(repair):
    assert edges_changed(SimpleNamespace(repair=repair)) is None


def test_the_sentence_about_the_search():
    same, one, two = (searched("original", choice, extra) for choice, extra in
                      (("original", "none"), ("original", "skip"), ("skip", "skip")))
    assert search_sentence([]) == "No search was part of these runs."
    assert search_sentence([same, same]).startswith("In none of the 2 runs did the search change an edge: ")
    assert search_sentence([same]).startswith("The search changed no edge: ")
    assert search_sentence([one]) == "The search changed 1 edge of the block."
    assert search_sentence([one, two]) == "The search changed 1 to 2 edges of the block in 2 of the 2 runs."
    assert search_sentence([same, two]) == ("The search changed 2 edges of the block in 1 of the 2 runs; in the others the architecture is "
                                            "the one that came in.")


def test_unchanged_is_a_network_without_another_weight_or_answer():
    assert is_unchanged(changed({}))
    assert not is_unchanged(changed({"fc.weight": "3/1280"}))  # other weights, no other answer
    assert not is_unchanged(changed({}, fixed=1, broken=2))  # the original was returned in its place


def test_few_pairs_are_not_tested():
    assert pairs_sentence(wilcoxon([1.0], [1.0]), 0) == "the one pair is equal"
    assert pairs_sentence(wilcoxon([1.0, 2.0], [1.0, 2.0]), 0) == "all 2 pairs are equal"
    assert pairs_sentence(wilcoxon([2.0, 2.0], [1.0, 2.0]), 1).startswith("1 of 1 differing pair in favor; too few to test")
    five, six = ([float(i) for i in range(1, n + 1)] for n in (FEWEST_PAIRS - 1, FEWEST_PAIRS))
    assert wilcoxon(five, [0.0] * len(five)).p > 0.05 > wilcoxon(six, [0.0] * len(six)).p
    assert "p =" not in pairs_sentence(wilcoxon(five, [0.0] * len(five)), 5)
    assert pairs_sentence(wilcoxon(six, [0.0] * len(six)), 6) == "6 of 6 differing pairs in favor, p = 0.031"


def test_numbers_in_words():
    assert [n_text(sizes) for sizes in ([], [3, 3], [1, 3, 2])] == ["n = 0", "n = 3", "n = 1 to 3"]
    assert [p_text(p) for p in (3.85e-19, 0.25, 0.000123)] == ["3.9e-19", "0.25", "0.00012"]


def test_answers_are_shown_whole():
    answers = Answers({"question": "a long answer, " * 40, "other": "no"})
    assert answers._repr_markdown_().count("a long answer") == repr(answers).count("a long answer") == 40
    assert answers._repr_markdown_().splitlines()[1] == "- **other:** no"
    assert Answer("Yes: " + "it does, " * 40)._repr_markdown_().count("it does") == 40


# --- the stored results


@pytest.mark.parametrize("card", [c for c in STORED if c["kind"] == "table"], ids=lambda card: card["path"].stem)
def test_the_caption_of_a_stored_table_counts_its_rows(card):
    csv = card["path"].with_suffix(".csv")
    if not csv.exists():
        assert card["html"].startswith("<p>"), "a table without numbers is a sentence"
        return
    import pandas as pd

    assert f"{n_text(pd.read_csv(csv)['n'])}" in card["caption"]


@pytest.mark.parametrize(("name", "columns", "side_by_side"), [
    ("table5-gain", ["method"], False), ("table5-parts-of-gain", ["method"], False), ("fig4", ["method"], True),
    ("fig4-change", ["method"], True), ("fig6", ["method", "corruption"], True), ("fig6-change", ["method", "corruption"], True),
    ("table9", ["block"], True)])
def test_the_caption_of_a_stored_figure_counts_its_records(name, columns, side_by_side):
    [card] = [card for card in STORED if card["name"] == name and card["kind"] == "figure"]
    settings = Settings.of(tier="lite", model=card["settings"]["models"][0], dataset=card["settings"]["dataset"], seeds=3)
    rows = collect_rows(requirements([name.split("-")[0]], settings), Runs(outputs=ROOT / "outputs"), missing="skip")
    shown = keep_common_seeds(rows, *columns) if side_by_side else rows
    sizes = shown.groupby(columns)["seed"].nunique()
    assert card["n"] == sorted(set(sizes)) and f"; {n_text(sizes)}; " in card["caption"]


def test_the_pages_say_of_the_search_what_the_records_say():
    folder = ROOT / "outputs" / "lite" / "records"
    records = [record for path in sorted(folder.rglob("*.json")) if edges_changed(record := Record.read(path)) is not None]
    localized = [record for record in records if record.cell["block"] is None]
    assert len(localized) >= 8 and search_sentence(localized).startswith("In none of ")
    front, paper = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/paper.md"))
    assert "did the search change an edge" in front and "the search left every edge" in " ".join(paper.split())
