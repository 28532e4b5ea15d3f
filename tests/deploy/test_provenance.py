"""The second half of a report: where the repair came from, what it changed, and how it can be asked for again."""
import html
import re
import shlex
from dataclasses import replace

import pandas as pd

from archrepair.deploy.provenance import command_of
from support.finished import DATASET
from support.reports import RECORD, Checked, make, page_of


def test_only_what_differs_is_counted(parts, undrawn):
    page = Checked(page_of(make(parts, changed={"new": "added", "old": "removed", "older": "removed"}))).words
    assert "Tensors of the state dict: 1 added, 2 removed." in page


def test_what_was_asked_can_be_asked_again(parts, undrawn):
    cell = {**RECORD["cell"], "method": "sensei", "block": None,
            "options": [["strategy", "darts"], ["search_epochs", 2], ["blocks", ["layer1", "layer2"]],
                        ["search_options", [["order", 2], ["select", "perturb"]]], ["variant", "two words"]]}
    asked = shlex.split(command_of(cell))
    assert asked[:4] == ["archrepair", "repair", "--method", "sensei:variant=two words"] and "--block" not in asked
    pairs = list(zip(asked, asked[1:]))
    for pair in (("--model", "resnet18"), ("--dataset", "toy:fog:3"), ("--seed", "7"), ("--strategy", "darts"), ("--search-epochs", "2"),
                 ("--blocks", "layer1,layer2"), ("-S", "order=2"), ("-S", "select=perturb"), ("--protocol", "clean")):
        assert pair in pairs, pair
    page = Checked(page_of(make(parts), record={**RECORD, "cell": cell}))
    assert shlex.split(command_of(cell))[:3] == ["archrepair", "repair", "--method"] and "archrepair repair --method" in page.words


def test_size_and_speed_are_those_of_the_result_and_measured_once(parts, undrawn, monkeypatch, tmp_path):
    calls = []

    def measured(*networks):
        calls.append(networks)
        return {when: {"parameters": n, "bytes": n * 2**20, "flops": n * 10**6, "milliseconds": n / 8, "device": "abacus"}
                for when, n in (("before", 12), ("after", 34))}

    monkeypatch.setattr("archrepair.repair.result.footprints", measured)
    result = make(parts)
    path = result.report(tmp_path / "report.html", scenario=parts[1])
    words = Checked(path.read_text("utf-8")).words
    assert "Parameters 12 34" in words and "MiB 12.00 34.00" in words and "on abacus" in words
    assert "operations per image 12.0 34.0" in words and "Milliseconds per image 1.50 4.25" in words
    assert result.report(tmp_path / "again.html", scenario=parts[1]) and len(calls) == 1


def test_a_layer_in_a_deep_network_is_not_one_bar_of_a_hundred(parts):
    result = make(parts)
    names = [f"layer{i}" for i in range(50)]
    summary = pd.DataFrame({"size": 2, "count": [i % 5 for i in range(50)], "expected": 1.0, "p": 0.5}, index=names)
    many = replace(result, localization=replace(result.localization, block="layer3", blocks=names, summary=summary))
    text = page_of(many)
    assert "Suspicious neurons in the 12 leading of 50 candidates." in text and "layer3" in Checked(text).words
    chart = re.search(r'aria-label="([^"]*layer3: 3, expected 1.0[^"]*)"', text)[1]
    assert chart.count(";") == 11 and Checked(text).words.count("layer49") == 2  # the details have all


def test_the_code_in_a_report_works(folder, monkeypatch):
    home = folder.parents[1]
    monkeypatch.setenv("ARCHREPAIR_HOME", str(home))
    monkeypatch.chdir(folder.parent)
    code = html.unescape(re.search(r"<code>(.*?)</code>", (folder / "report.html").read_text("utf-8"), re.S)[1])
    space = {}
    exec(code, space)
    assert space["answers"].shape == (8,) and space["images"].name.startswith(DATASET)
