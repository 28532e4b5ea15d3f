"""A report: complete, true to the result, well-formed however odd the names are, and written whole or not at all."""
import copy
import html
import json
import os
import re
import shlex
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.core.html import figure, join, section, table, tag
from archrepair.deploy.comparison_page import best_of, groups_of, render_comparison, report_of, row_of, write_comparison
from archrepair.deploy.report import command_of, render_report, write_report
from archrepair.training.evaluation import compare, evaluate
from support.finished import DATASET, furnish
from support.reports import VERDICTS, Checked, bare, make


@pytest.fixture
def undrawn(monkeypatch):
    "Without figures, which take most of the time."
    monkeypatch.setattr("archrepair.deploy.report.figure", lambda *a: tag("figure"))


RECORD = {"cell": {"method": "archrepair", "model": "resnet18", "dataset": "toy:fog:3", "tier": "smoke", "protocol": "clean", "seed": 7},
          "versions": {"archrepair": "9.9", "commit": "abc1234"}, "metrics": {}, "repair": {}, "path": "x.json"}


def test_every_section_is_there_and_the_page_is_sound(parts):
    page = Checked(text := render_report(make(parts), scenario=parts[1], record=RECORD))
    ids = [a["id"] for _, a in page.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert {"before-and-after", "what-was-fixed-what-broke", "examples", "candidates", "which-block-is-to-blame", "architecture", "training",
            "what-changed", "what-it-cost", "what-was-asked", "how-to-load-it", "warnings"} <= set(ids)
    links = {a["href"] for a in page.all("a")}
    assert links and all(link[1:] in ids for link in links)
    assert text.startswith("<!DOCTYPE html>") and page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("title")) == 1
    assert len(page.all("svg")) == 5 and all(a["aria-label"] and a["role"] == "img" for a in page.all("svg"))
    assert page.all("img") and all(a["alt"] for a in page.all("img"))
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert all(c["aria-labelledby"] in ids for c in page.all("section"))
    references = re.findall(r"url\(#(.*?)\)", text) + [a["xlink:href"][1:] for a in page.all("use")]
    assert references and set(references) <= set(ids)
    for said in ("resnet18", "toy:fog:3", "smoke", "abc1234", "strategy pc-darts", "layer<1> (localized)", "beware of <i>this</i>", "a doubt <b>",
                 "81 training images", "contains the repaired images", "no repair has seen", "archrepair.load"):
        assert said in page.words, said


def test_nothing_is_fetched_and_nothing_can_be_injected(parts):
    text = render_report(make(parts), scenario=parts[1], record=RECORD, title="<script>x</script>")
    page = Checked(text)
    assert "<script" not in text and not page.all("script") and not page.all("link") and not page.all("i")
    assert "://" not in text and "@import" not in text and "url(h" not in text
    for name, attributes in page.seen:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,")), name
        assert not any(key.startswith("on") for key in attributes)
    assert any(a.get("content", "").startswith("default-src 'none'") for a in page.all("meta"))
    assert "<script>alert(1)</script>" in page.words and 'b"&\'' in page.words


def test_numbers_are_those_of_the_result(parts, undrawn):
    result = make(parts)
    scores = [result.metrics["before"], *(c["after"] for c in result.metrics["candidates"].values())]
    assert len({s["held_out"]["accuracy"] for s in scores}) == 3, "the toy networks no longer differ"
    page = Checked(render_report(result, scenario=parts[1])).words
    minus = lambda value, form: format(value, form).replace("-", "−")
    for name, before in result.metrics["before"].items():
        after = result.metrics["after"][name]
        row = (f"{before['n']} {before['accuracy']:.2f} % {before['low']:.2f}–{before['high']:.2f} {after['accuracy']:.2f} % "
               f"{after['low']:.2f}–{after['high']:.2f} {minus(after['accuracy'] - before['accuracy'], '+.2f')}")
        assert row in page, row
        flips = result.metrics["change"][name]
        assert f"{flips['fixed']} {flips['repair_rate']:.2f} % {flips['broken']} {flips['negative_flips']:.2f} % {minus(flips['p'], '.2g')}" in page
    for name in ("seen", "unseen"):
        flips = result.metrics["change"][name]
        assert f"{flips['fixed']} {flips['repair_rate']:.2f} % – – –" in page
    held = {name: c["after"]["held_out"]["accuracy"] for name, c in result.metrics["candidates"].items()}
    assert f"came 1.0000 {result.metrics['before']['held_out']['accuracy']:.2f} %" in page
    assert f"network 0.2500 {held['repaired']:.2f} %" in page and f"budget 0.5000 {held['control']:.2f} %" in page
    assert "repaired ← returned" in page and "control ← returned" not in page
    assert "Repair 1,234 567 8.9 7.5 10" in page and "Control 4,321 89 1.2 1.0 11" in page
    assert "2 changed (579 of their 579 numbers), 2 added." in page and "1.weight 576/576" in page
    assert "Parameters 579 591" in page and "layer<1> 2 2 1.3 0.33" in page


def test_the_verdict_leads(parts, undrawn):
    for chosen, tone in (("repaired", "good"), ("control", "even"), ("original", "bad")):
        page = Checked(render_report(make(parts, chosen), scenario=parts[1]))
        assert f"banner {tone}" in [a.get("class") for a in page.all("div")]
        sentence = VERDICTS[chosen].split(" (")[0].partition(": ")[2]
        assert f"{'Accept: ' if chosen == 'repaired' else 'Reject because '}{sentence}." in page.words
        assert ("The network that is returned does not use it" in page.words) == (chosen != "repaired")
    assert "Nothing: the network returned is the original" in page.words and not page.all("img")


def test_a_repair_that_lost_on_held_out_images_says_so(parts, undrawn):
    result = make(parts)
    for points, p, beware, chance in ((-1.5, 0.01, True, False), (-1.5, 0.5, True, True), (1.5, 0.5, False, False)):
        metrics = copy.deepcopy(result.metrics)
        metrics["after"]["held_out"]["accuracy"] = metrics["before"]["held_out"]["accuracy"] + points
        metrics["change"]["held_out"]["p"] = p
        page = render_report(replace(result, metrics=metrics))
        assert ("Beware" in page, "may be chance" in page, 'class="banner even"' in page) == (beware, chance, beware)


def test_only_what_differs_is_counted(parts, undrawn):
    page = Checked(render_report(make(parts, changed={"new": "added", "old": "removed", "older": "removed"}))).words
    assert "Tensors of the state dict: 1 added, 2 removed." in page


def test_metrics_are_computed_where_they_are_missing(parts, undrawn):
    networks, scenario = parts
    full, before, after = make(parts), *(evaluate(networks[n], scenario) for n in ("original", "repaired"))
    rows = lambda text: re.findall(r'<section aria-labelledby="(?:before-and-after|what-was-fixed-what-broke)".*?</section>', text, re.S)
    expected = rows(render_report(full, scenario=scenario))
    empty = replace(full, metrics={})
    assert len(expected) == 2
    assert rows(render_report(empty, scenario=scenario)) == expected
    assert rows(render_report(empty, scenario=scenario, before=before, after=after)) == expected
    assert rows(render_report(empty, record={"metrics": full.metrics})) == expected
    alone = Checked(render_report(empty, before=before, after=after)).words
    assert "Held out" in alone and "Failures never seen" not in alone


def test_examples_are_the_answers_that_changed(parts, undrawn):
    networks, scenario = parts
    result, before, after = make(parts), *(evaluate(networks[n], scenario) for n in ("original", "repaired"))
    change = compare(before, after, scenario)["held_out"]
    fixed, broken = (min(12, n) for n in (change.fixed, change.broken))
    assert change.fixed > fixed and broken, "the toy networks no longer show both cases"
    text = render_report(result, scenario=scenario)
    page = Checked(text)
    assert f"Fixed: {fixed} of {change.fixed}" in page.words and f"Broken: {broken} of {change.broken}" in page.words
    told = [re.fullmatch(r"(.*), predicted (.*) before and (.*) after", a["alt"]).groups() for a in page.all("img")]
    assert len(told) == fixed + broken
    assert all(true == now != was for true, was, now in told[:fixed]) and all(true == was != now for true, was, now in told[fixed:])
    given_both = render_report(result, scenario=scenario, before=before, after=after)
    assert given_both == text


def test_absent_parts_leave_their_sections_out(parts):
    page = Checked(render_report(bare(parts)))
    assert [a["id"] for a in page.all("h2")] == ["before-and-after", "candidates", "architecture", "what-changed", "what-was-asked", "how-to-load-it"]
    assert "on validation images alone" in page.words and "Weights only" in page.words and "0.2500" in page.words
    assert not page.all("svg") and not page.all("img")


def test_nan_and_unknown_names_are_shown_as_such(parts, undrawn):
    result = make(parts, validation={"original": float("nan"), "repaired": 0.25, "mine": 3.0})
    page = Checked(render_report(result)).words
    assert "the network as it came –" in page and "mine 3.0000" in page and "nan" not in page.lower()


def test_same_result_same_page_and_the_networks_stay_as_they_are(parts):
    networks, scenario = parts
    result = make(parts)
    networks["original"].train()
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        assert render_report(result, scenario=scenario) == render_report(result, scenario=scenario)
        assert torch.equal(state, torch.get_rng_state())
    assert networks["original"].training
    networks["original"].eval()
    assert all(torch.equal(v, before[name][k]) for name, network in networks.items() for k, v in network.state_dict().items())


def test_written_whole_or_not_at_all(parts, undrawn, tmp_path, monkeypatch):
    path = write_report(make(parts), tmp_path / "new" / "report.html", scenario=parts[1])
    assert Checked(path.read_text("utf-8")).words and "archrepair.load('new', network)" in Checked(path.read_text("utf-8")).words
    old = path.read_text("utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ArchrepairError, match="cannot write .*report.html: No space left"):
            write_report(bare(parts), path)
    broken = make(parts, candidates={"original": nn.Linear(1, 1)})
    with pytest.raises(RuntimeError):
        write_report(broken, path, scenario=parts[1])
    assert path.read_text("utf-8") == old and os.listdir(path.parent) == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchrepairError, match="cannot write"):
        write_report(bare(parts), tmp_path / "file" / "report.html")


@given(st.text())
def test_any_text_survives_the_way_into_a_page(text):
    page = Checked(tag("p", text, title=text))
    assert "".join(page.text) == text and page.seen == [("p", {"title": text})]


def test_elements():
    assert tag("p", "a", None, tag("b", 1), class_="x", aria_label="y", id=None) == '<p class="x" aria-label="y">a<b>1</b></p>'
    assert section("Nothing", None, "") == "" and join("<", tag("b")) == "&lt;<b></b>"
    assert Checked(table("none", (), [])).all("thead") == []


def test_figures_take_their_colors_from_the_page():
    drawn = figure("f", lambda ax: ax.plot([0, 1], color="#0173b2"), (3, 2), "caption", 'a "line"')
    page = Checked(drawn)
    assert "var(--blue)" in drawn and "var(--ink)" in drawn and "#0173b2" not in drawn and page.all("svg")[0]["aria-label"] == 'a "line"'


# --- what was asked, and the network's price

def test_what_was_asked_can_be_asked_again(parts, undrawn):
    cell = {**RECORD["cell"], "method": "sensei", "block": None,
            "options": [["strategy", "darts"], ["search_epochs", 2], ["blocks", ["layer1", "layer2"]], ["search_options", [["order", 2], ["select", "perturb"]]],
                        ["variant", "two words"]]}
    asked = shlex.split(command_of(cell))
    assert asked[:4] == ["archrepair", "repair", "--method", "sensei:variant=two words"] and "--block" not in asked
    pairs = list(zip(asked, asked[1:]))
    for pair in (("--model", "resnet18"), ("--dataset", "toy:fog:3"), ("--seed", "7"), ("--strategy", "darts"), ("--search-epochs", "2"),
                 ("--blocks", "layer1,layer2"), ("-S", "order=2"), ("-S", "select=perturb"), ("--protocol", "clean")):
        assert pair in pairs, pair
    page = Checked(render_report(make(parts), record={**RECORD, "cell": cell}))
    assert shlex.split(command_of(cell))[:3] == ["archrepair", "repair", "--method"] and "archrepair repair --method" in page.words


def test_size_and_speed_are_those_of_the_result_and_measured_once(parts, undrawn, monkeypatch):
    calls = []
    monkeypatch.setattr("archrepair.deploy.report.footprints", lambda *a: calls.append(a) or {
        when: {"parameters": n, "bytes": n * 2**20, "flops": n * 10**6, "milliseconds": n / 8, "device": "abacus"} for when, n in (("before", 12), ("after", 34))})
    result = make(parts)
    page = Checked(render_report(result, scenario=parts[1])).words
    assert "Parameters 12 34" in page and "MiB 12.00 34.00" in page and "an image 12.0 34.0" in page and "Milliseconds an image 1.50 4.25" in page
    assert "on abacus" in page and render_report(result, scenario=parts[1]) and len(calls) == 1


def test_a_layer_in_a_deep_network_is_not_one_bar_of_a_hundred(parts):
    result = make(parts)
    names = [f"layer{i}" for i in range(50)]
    summary = pd.DataFrame({"size": 2, "count": [i % 5 for i in range(50)], "expected": 1.0, "p": 0.5}, index=names)
    many = replace(result, localization=replace(result.localization, block="layer3", blocks=names, summary=summary))
    text = render_report(many)
    assert "Suspicious neurons in the 12 leading of 50 candidates." in text and "layer3" in Checked(text).words
    chart = re.search(r'aria-label="([^"]*layer3: 3, expected 1.0[^"]*)"', text)[1]
    assert chart.count(";") == 11 and Checked(text).words.count("layer49") == 2  # the details have all


# --- finished repairs

@pytest.fixture
def folder(tmp_path):
    "A finished repair of one's own."
    return furnish(tmp_path) / "outputs" / "repair"


def test_a_lost_report_is_made_anew_from_the_record(folder):
    written, made = report_of(folder)
    assert written == folder / "report.html" and not made
    before = Checked(written.read_text("utf-8"))
    written.unlink()
    path, made = report_of(folder)
    after = Checked(path.read_text("utf-8"))
    assert made and "made from the record alone" in after.words and not after.all("img")
    ids = lambda page: [a["id"] for a in page.all("h2")]
    assert [i for i in ids(after) if i != "warnings"] == [i for i in ids(before) if i not in ("examples", "warnings")]
    assert len(after.all("svg")) == len(before.all("svg")) and report_of(folder) == (path, False) and report_of(folder, force=True)[1]
    table_of = lambda page: page.words.partition("Before and after")[2].partition("What was fixed")[0]
    assert table_of(after) == table_of(before)


def test_the_code_in_a_report_works(folder, monkeypatch):
    home = folder.parents[1]
    monkeypatch.setenv("ARCHREPAIR_HOME", str(home))
    monkeypatch.chdir(folder.parent)
    code = html.unescape(re.search(r"<code>(.*?)</code>", (folder / "report.html").read_text("utf-8"), re.S)[1])
    space = {}
    exec(code, space)
    assert space["answers"].shape == (8,) and space["images"].name.startswith(DATASET)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"cell": 1}', '{"cell": {}, "metrics": {}, "repair": 3, "versions": {}}'])
def test_a_folder_without_a_repair(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(ArchrepairError, match="holds no repair") as error:
        report_of(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_saved_result_needs_no_record(parts, tmp_path):
    result = make(parts)
    folder = result.save(tmp_path / "saved")
    row = row_of(folder)
    assert row["after"] == result.metrics["after"]["held_out"]["accuracy"] and row["model"] is None and row["name"] == "saved"
    assert "Repairs 1" in render_comparison([folder])
    result.metrics = {}
    row = row_of(result.save(tmp_path / "alone"))
    assert row["after"] is None and row["difference"] is None and Checked(render_comparison([tmp_path / "alone", folder]))


def test_several_repairs_on_one_page(folder, tmp_path):
    record, others = json.loads((folder / "record.json").read_text()), []
    record["metrics"]["after"]["held_out"] |= {"accuracy": 80.0, "low": 75.0, "high": 84.0}  # made up: no outcome of a training counts here
    record["metrics"]["change"]["held_out"]["negative_flips"] = 2.0
    (folder / "record.json").write_text(json.dumps(record))
    for name, points, flips, dataset in (("<b>two</b>", 1.5, 0.5, DATASET), ("three", -2.0, 9.0, DATASET), ("four", 0.0, 1.0, "digits:fog:1")):
        other = copy.deepcopy(record)
        other["cell"]["dataset"] = dataset
        for key in ("accuracy", "low", "high"):
            other["metrics"]["after"]["held_out"][key] += points
        other["metrics"]["change"]["held_out"]["negative_flips"] = flips
        others.append(tmp_path / name.replace("/", "∕"))
        others[-1].mkdir()
        (others[-1] / "record.json").write_text(json.dumps(other))
    rows = [row_of(f) for f in (folder, *others)]
    assert [len(g) for g in groups_of(rows)] == [3, 1] and best_of(rows[3:]) == {}
    best = best_of(groups_of(rows)[0])
    assert best["after"] == rows[1]["after"] and best["negative_flips"] == 0.5 and best["difference"] == rows[1]["difference"] and "forwards" not in best
    path = write_comparison([folder, *others], tmp_path / "out" / "all.html")
    text = path.read_text("utf-8")
    page = Checked(text)
    assert "://" not in text and not page.all("script") and "<b>two<∕b>" in page.words and len(page.all("table")) == 2 == len(page.all("svg"))
    bold = re.findall(r"<td><b>(.*?)</b>", text)
    assert f"{rows[1]['after']:.2f} %" in bold and "0.50 %" in bold and f"{rows[2]['after']:.2f} %" not in bold
    assert f"{rows[1]['after_interval'][0]:.2f}–{rows[1]['after_interval'][1]:.2f}" in page.words
    with pytest.raises(ArchrepairError, match="holds no repair"):
        write_comparison([folder, tmp_path / "none"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
