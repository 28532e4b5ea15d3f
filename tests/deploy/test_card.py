"""A model card beside every network that leaves."""
import json
import re

import torch

from archrepair.deploy.card import CARD, MARK, model_card, write_card
from archrepair.deploy.export import export_network
from support.finished import finished
from support.reports import make


def test_a_card_lies_beside_every_saved_network():
    folder = finished() / "outputs" / "repair"
    text, record = (folder / CARD).read_text(), json.loads((folder / "record.json").read_text())
    after = record["metrics"]["after"]["held_out"]
    assert f"| {after['n']} | " in text and f"{after['accuracy']:.2f} % ({after['low']:.2f}–{after['high']:.2f})" in text
    for words in ("# resnet18, repaired on digits:brightness:5", "seed 0", record["repair"]["block"], "## Limits",
                  "archrepair.load('repair', network)", "training images", "ms per image", "held out: no repair has seen these images",
                  f"{record['repair']['footprint']['after']['parameters']:,}"):
        assert words in text, words


def test_a_card_lies_beside_every_exported_network_and_its_code_works(tmp_path, monkeypatch):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    export_network(network, tmp_path / "a.pt2", torch.zeros(1, 3, 2, 2))
    text = (tmp_path / CARD).read_text()
    assert "# Sequential\n" in text and "Nothing is known here" in text
    space: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], space)
    assert torch.equal(space["repaired"](torch.ones(4, 3, 2, 2)), network(torch.ones(4, 3, 2, 2)))


def test_names_and_warnings_are_taken_literally(tmp_path, parts):
    (tmp_path / "a.pt2").write_text("")
    write_card(tmp_path, make(parts).to_dict(), {"model": "a|b", "dataset": "x"})
    text = (tmp_path / CARD).read_text()
    assert "# a\\|b, repaired on x" in text and "beware of &lt;i&gt;this&lt;/i&gt;" in text and "'a.pt2'" in text


def test_only_a_card_of_ours_is_replaced(tmp_path):
    card = tmp_path / CARD
    for first_line in (MARK, "<!-- written by archrepair; without this line it is yours, and is not replaced -->"):  # the second: of 0.1.0
        card.write_text(f"{first_line}\nold")
        assert "old" not in write_card(tmp_path, {}).read_text()
    card.write_text("mine")
    write_card(tmp_path, {})
    assert card.read_text() == "mine"


def test_a_card_of_a_repair_without_test_images():
    text = model_card({"method": "m", "block": None, "verdict": "accepted", "changed": {}, "metrics": {}})
    assert text.startswith(MARK) and "accuracy elsewhere is unknown" in text and "nan" not in text
