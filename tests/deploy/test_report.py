"""A report: complete, true to the result, well-formed however odd the names are, and written whole or not at all."""
import copy
import json
import os
import re

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.deploy.report import render_report, report_of, write_report
from archrepair.repair.verdict import Verdict
from support.reports import LOSSES, RECORD, Checked, bare, make, page_of


def test_every_section_is_there_and_the_page_is_sound(parts):
    page = Checked(text := page_of(make(parts), scenario=parts[1], record=RECORD))
    ids = [a["id"] for _, a in page.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert {"before-and-after", "what-was-fixed-what-broke", "examples", "candidates", "which-block-is-to-blame", "architecture",
            "training", "what-changed", "what-it-cost", "what-was-asked", "how-to-load-it", "warnings"} <= set(ids)
    links = {a["href"] for a in page.all("a")}
    assert links and all(link[1:] in ids for link in links)
    assert text.startswith("<!DOCTYPE html>") and page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("title")) == 1
    assert len(page.all("svg")) == 5 and all(a["aria-label"] and a["role"] == "img" for a in page.all("svg"))
    assert page.all("img") and all(a["alt"] for a in page.all("img"))
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert all(c["aria-labelledby"] in ids for c in page.all("section"))
    references = re.findall(r"url\(#(.*?)\)", text) + [a["xlink:href"][1:] for a in page.all("use")]
    assert references and set(references) <= set(ids)
    for words in ("resnet18", "toy:fog:3", "smoke", "abc1234", "strategy pc-darts", "layer<1> (localized)", "beware of <i>this</i>",
                  "a doubt <b>", "81 training images", "contains the repaired images", "no repair has seen", "archrepair.load"):
        assert words in page.words, words


def test_nothing_is_fetched_and_nothing_can_be_injected(parts):
    text = page_of(make(parts), scenario=parts[1], record=RECORD, title="<script>x</script>")
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
    page = Checked(page_of(result, scenario=parts[1])).words
    minus = lambda value, form: format(value, form).replace("-", "−")
    for name, before in result.metrics["before"].items():
        after = result.metrics["after"][name]
        row = (f"{before['n']} {before['accuracy']:.2f} % {before['low']:.2f}–{before['high']:.2f} {after['accuracy']:.2f} % "
               f"{after['low']:.2f}–{after['high']:.2f} {minus(after['accuracy'] - before['accuracy'], '+.2f')}")
        assert row in page, row
        flips = result.metrics["change"][name]
        fixed = f"{flips['fixed']} {flips['repair_rate']:.2f} %"
        assert f"{fixed} {flips['broken']} {flips['negative_flips']:.2f} % {minus(flips['p'], '.2g')}" in page
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


def test_absent_parts_leave_their_sections_out(parts):
    page = Checked(page_of(bare(parts)))
    ids = ["before-and-after", "candidates", "architecture", "what-changed", "what-was-asked", "how-to-load-it"]
    assert [a["id"] for a in page.all("h2")] == ids
    assert "on validation images alone" in page.words and "Weights only" in page.words and "0.2500" in page.words
    assert not page.all("svg") and not page.all("img")


def test_same_result_same_page_and_the_networks_stay_as_they_are(parts):
    networks, scenario = parts
    result = make(parts)
    networks["original"].train()
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        assert page_of(result, scenario=scenario) == page_of(result, scenario=scenario)
        assert torch.equal(state, torch.get_rng_state())
    assert networks["original"].training
    networks["original"].eval()
    assert all(torch.equal(v, before[name][k]) for name, network in networks.items() for k, v in network.state_dict().items())


def test_written_whole_or_not_at_all(parts, undrawn, tmp_path, monkeypatch):
    path = make(parts).report(tmp_path / "new" / "report.html", scenario=parts[1])
    text = path.read_text("utf-8")
    assert "archrepair.load('new', network)" in Checked(text).words
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ArchrepairError, match="cannot write .*report.html: No space left"):
            bare(parts).report(path)
    broken = make(parts, candidates={"original": nn.Linear(1, 1)}, footprint={"before": {}, "after": {}})
    with pytest.raises(RuntimeError):
        broken.report(path, scenario=parts[1])
    assert path.read_text("utf-8") == text and os.listdir(path.parent) == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchrepairError, match="cannot write"):
        bare(parts).report(tmp_path / "file" / "report.html")


def test_a_lost_report_is_rebuilt_from_the_record(folder):
    written, rebuilt = report_of(folder)
    assert written == folder / "report.html" and not rebuilt
    before = Checked(written.read_text("utf-8"))
    written.unlink()
    path, rebuilt = report_of(folder)
    after = Checked(path.read_text("utf-8"))
    assert rebuilt and "made from the record alone" in after.words and not after.all("img")
    ids = lambda page: [a["id"] for a in page.all("h2")]
    assert [i for i in ids(after) if i != "warnings"] == [i for i in ids(before) if i not in ("examples", "warnings")]
    assert len(after.all("svg")) == len(before.all("svg")) and report_of(folder) == (path, False) and report_of(folder, force=True)[1]
    table_of = lambda page: page.words.partition("Before and after")[2].partition("What was fixed")[0]
    assert table_of(after) == table_of(before)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"cell": 1}', '{"cell": {}, "metrics": {}, "repair": 3, "versions": {}}'])
def test_a_folder_without_a_repair(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(ArchrepairError, match="holds no repair") as error:
        report_of(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_results_show_themselves_in_a_notebook(parts):
    result = make(parts, block="<b>x</b>", verdict=Verdict("repaired", LOSSES, "<img src=x onerror=alert(1)> & so on"))
    result.localization.warnings.append("<script>y</script>")
    pieces = (result.localization, result.genotype, result.genotype.graph, result)
    located, genotype, graph, whole = (piece._repr_html_() for piece in pieces)
    for text in (located, genotype, graph, whole):
        page = Checked(text)
        assert not page.all("script") and not page.all("i") and "://" not in text and "onerror=" not in "".join(map(str, page.seen))
        assert "prefers-color-scheme: dark" in text and 'class="archrepair"' in text
        assert all(a.get("aria-label") for a in page.all("svg"))
    assert "layer<1>" in Checked(located).words and "<script>y</script>" in Checked(located).words
    assert "0 to 1 original" in genotype and "sep conv" in genotype and len(Checked(genotype).all("svg")) == 1
    words = Checked(whole).words
    assert "Accepted: <img src=x onerror=alert(1)> & so on." in words and "Held out" in words and "repaired ← returned" in words
    assert "Accepted: " in Checked(bare(parts)._repr_html_()).words


def test_a_result_and_its_dictionary_give_the_same_page(parts, tmp_path):
    "Through JSON and back, as a record is; but for the examples, which need the networks."
    result = make(parts)
    result.footprint = {when: {"parameters": 3, "bytes": 12} for when in ("before", "after")}
    result.localization.summary.loc["layer2", "p"] = float("nan")
    content = json.loads(json.dumps(result.to_dict()))
    assert render_report(content, record=RECORD) == page_of(result, record=RECORD)
    path = write_report(content, tmp_path / "report.html", record=RECORD)
    text = path.read_text("utf-8")
    assert text == render_report(content, path, record=RECORD) and "layer2 1 0 0.7 –" in Checked(text).words


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content.clear(), "not a saved repair: it lacks method, block, chosen;"),
    (lambda content: content.pop("verdict"), "it lacks verdict;"),
    (lambda content: content.update(cost={"miles": 3}), "it lacks cost.forwards, cost.seconds;"),
    (lambda content: content.update(genotype={"graph": 1}), "not a genotype"),
])
def test_a_dictionary_that_is_not_a_repair_is_refused_in_one_line(parts, undrawn, change, message):
    content = make(parts).to_dict()
    change(content)
    with pytest.raises(ArchrepairError, match=message) as error:
        render_report(content)
    assert "\n" not in str(error.value)


def test_a_result_in_place_of_its_dictionary_is_told_what_to_do(parts, tmp_path):
    with pytest.raises(ArchrepairError, match=r"is a RepairResult; expected .*to_dict\(\).*result.report\(path\)"):
        write_report(make(parts), tmp_path / "report.html")
