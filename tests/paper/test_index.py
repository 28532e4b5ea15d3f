"""One page of all tables and figures, that cannot be broken by a name and loads nothing."""
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from archrepair.paper.figures import save_figure
from archrepair.paper.index import cards, index
from archrepair.paper.tables import ResultTable
from support.exhibits import SMOKE


@pytest.fixture
def exhibits(tmp_path):
    "A folder with a table and a figure."
    values = pd.DataFrame({"row": ["Original", "MODE"], "column": "ResNet-18", "score": "full", "value": [80.0, 84.0]})
    ResultTable.of("table5", "Accuracy <of> all", SMOKE, values).save(tmp_path)
    fig = plt.figure(figsize=(1, 1))
    save_figure(fig, "fig4", SMOKE, "A <b> of bars.", tmp_path)
    plt.close(fig)
    return tmp_path


def test_cards_come_in_the_papers_order_and_the_largest_tier_first(exhibits):
    card = next(exhibits.glob("smoke/tables/*.json"))
    (card.with_name("old.json")).write_text(json.dumps({**json.loads(card.read_text()), "name": "line"}))  # a version knew other exhibits
    paper = exhibits / "paper" / "tables" / card.name
    paper.parent.mkdir(parents=True)
    content = json.loads(card.read_text())
    paper.write_text(json.dumps({**content, "name": "table10", "settings": {**content["settings"], "tier": "paper"}}))
    assert [(c["settings"]["tier"], c["name"]) for c in cards(exhibits)] == [("paper", "table10"), ("smoke", "table5"), ("smoke", "fig4")]


def test_the_page_holds_everything_and_loads_nothing(exhibits):
    text = index(exhibits).read_text()
    assert "Accuracy &lt;of&gt; all" in text and 'alt="A &lt;b&gt; of bars."' in text and text.count("<article") == 2
    assert 'src="data:image/png;base64,' in text and "http:" not in text and "https:" not in text
    for card in cards(exhibits):
        assert f'href="#smoke-{card["path"].stem}"' in text and f'id="smoke-{card["path"].stem}"' in text


def test_a_page_of_nothing_says_so(tmp_path):
    assert "Nothing has been made yet." in index(tmp_path).read_text()
