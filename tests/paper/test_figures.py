"""A figure is the same file whenever it is drawn, and its card says what it shows."""
import json

import matplotlib.pyplot as plt
import pytest

from archrepair.paper.figures import save_figure
from support.exhibits import SMOKE


def test_the_same_figure_is_the_same_file(tmp_path):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot([0, 1], [1, 0])
    paths = save_figure(fig, "fig4", SMOKE, "A falling line.", tmp_path)
    before = [path.read_bytes() for path in paths]
    assert [path.suffix for path in paths] == [".svg", ".png", ".json"]
    assert [path.read_bytes() for path in save_figure(fig, "fig4", SMOKE, "A falling line.", tmp_path)] == before  # no date, no machine
    plt.close(fig)


def test_a_card_says_what_a_figure_shows(tmp_path):
    fig = plt.figure(figsize=(1, 1))
    *_, card = save_figure(fig, "table5-parts-of-gain", SMOKE, "Nothing.", tmp_path, commits=["b", "", "a", "b"])
    plt.close(fig)
    content = json.loads(card.read_text())
    assert (content["kind"], content["alt"], content["notebook"]) == ("figure", "Nothing.", "03_rq1")
    assert content["title"].endswith(": parts of gain") and content["caption"].startswith("Figure to Table 5 · ")
    assert content["caption"].endswith("commit a, b") and content["settings"]["seeds"] == 1


@pytest.mark.parametrize(("sizes", "text"), [([3, 3], "; n = 3; "), ([1, 2, 3], "; n = 1 to 3; "), (None, "; n = 1; "), ([], "; n = 0; ")])
def test_a_caption_counts_what_is_shown_and_not_what_was_asked_for(tmp_path, sizes, text):
    fig = plt.figure(figsize=(1, 1))
    *_, card = save_figure(fig, "fig4", SMOKE, "Nothing.", tmp_path, sizes=sizes)
    plt.close(fig)
    content = json.loads(card.read_text())
    assert text in content["caption"] and "seed" not in content["caption"]
    assert content["n"] == sorted(set(sizes if sizes is not None else [len(SMOKE.seeds)]))
