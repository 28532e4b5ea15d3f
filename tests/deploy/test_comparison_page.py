"""Several finished repairs on one page."""
import json
import re

import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.deploy.comparison_page import best_of, groups_of, render_comparison_page, row_of, write_comparison_page
from support.reports import Checked, make

DATASET = "digits:brightness:5"


def test_a_saved_result_needs_no_record(parts, tmp_path):
    result = make(parts)
    folder = result.save(tmp_path / "saved")
    row = row_of(folder)
    assert row["after"] == result.metrics["after"]["held_out"]["accuracy"] and row["model"] is None and row["name"] == "saved"
    assert "Repairs 1" in render_comparison_page([folder])
    result.metrics = {}
    row = row_of(result.save(tmp_path / "alone"))
    assert row["after"] is None and row["difference"] is None and Checked(render_comparison_page([tmp_path / "alone", folder]))


def record_in(folder, after: float, flips: float, dataset: str = DATASET):
    "A made-up record of a repair that took the held-out images from 60 % to `after` %, in `folder`."
    score = lambda accuracy: {"accuracy": accuracy, "low": accuracy - 2, "high": accuracy + 2, "n": 300}
    change = {"fixed": 40, "broken": 3, "repair_rate": 50.0, "negative_flips": flips, "p": 0.01}
    content = {"cell": {"model": "resnet18", "dataset": dataset, "protocol": "clean", "tier": "smoke", "seed": 0}, "versions": {},
               "metrics": {"before": {"held_out": score(60.0)}, "after": {"held_out": score(after), "clean_held_out": score(90.0)},
                           "change": {"held_out": change, "seen": change, "unseen": change}},
               "repair": {"method": "archrepair", "block": "layer4", "chosen": "repaired", "verdict": "accepted",
                          "cost": {"forwards": 900.0, "seconds": 3.0}}}
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folders(tmp_path):
    "Three repairs of one network on one dataset, and one on another."
    return [record_in(tmp_path / "one", 80.0, 4.0), record_in(tmp_path / "<b>two<∕b>", 81.5, 0.5), record_in(tmp_path / "three", 78.0, 9.0),
            record_in(tmp_path / "four", 80.0, 1.0, "digits:fog:1")]


def test_what_was_asked_alike_is_compared(folders):
    rows = [row_of(folder) for folder in folders]
    groups = groups_of(rows)
    assert [[row["name"] for row in group] for group in groups] == [["one", "<b>two<∕b>", "three"], ["four"]]
    assert best_of(groups[0]) == {"after": 81.5, "difference": 21.5, "negative_flips": 0.5}  # the other columns have nothing to choose from
    assert best_of(groups[1]) == {}


def test_several_repairs_on_one_page(folders, tmp_path):
    text = write_comparison_page(folders, tmp_path / "out" / "all.html").read_text("utf-8")
    page = Checked(text)
    assert "://" not in text and not page.all("script") and "<b>two<∕b>" in page.words
    assert len(page.all("table")) == 2 == len(page.all("svg"))
    assert re.findall(r"<td><b>(.*?)</b>", text) == ["81.50 %", "+21.50", "0.50 %"]
    for words in ("79.50–83.50", "repair set: 50.00 %", "resnet18 · digits:fog:1 · clean protocol · smoke tier"):
        assert words in page.words


def test_a_folder_without_a_repair_is_not_compared(folders, tmp_path):
    with pytest.raises(ArchrepairError, match="holds no repair"):
        write_comparison_page([folders[0], tmp_path / "none"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
