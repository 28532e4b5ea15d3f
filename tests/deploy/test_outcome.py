"""The first half of a report: what a repair achieved, in the words and numbers of its result."""
import copy
import re
from dataclasses import replace

import pytest

from archrepair.deploy.outcome import verdict_banner
from archrepair.repair.verdict import Verdict
from archrepair.training.evaluation import compare, evaluate
from support.reports import VERDICTS, Checked, make, page_of


def test_the_verdict_leads(parts, undrawn):
    for chosen, tone in (("repaired", "good"), ("control", "even"), ("original", "bad")):
        page = Checked(page_of(make(parts, chosen), scenario=parts[1]))
        assert f"banner {tone}" in [a.get("class") for a in page.all("div")]
        sentence = VERDICTS[chosen].reason
        assert f"{'Accepted' if chosen == 'repaired' else 'Rejected'}: {sentence}." in page.words
        assert ("The network that is returned does not use it" in page.words) == (chosen != "repaired")
    assert "Nothing: the network returned is the original" in page.words and not page.all("img")


@pytest.mark.parametrize(("verdict", "headline"), [
    ("accepted: lower loss (loss: repaired 0.2, original 1.0)", "Accepted: lower loss."),
    ("rejected: plain fine-tuning has the lower loss (loss: repaired 0.2, control 0.1)", "Rejected: plain fine-tuning has the lower loss."),
    ("not accepted: plain fine-tuning validates better, and is returned", "Rejected: plain fine-tuning validates better, and is returned."),
    ("accepted, architecture unchanged: lower loss", "Accepted, architecture unchanged: lower loss."),
    ("accepted: by a gate; at most 1 % can change (0 of 9; few)", "Accepted: by a gate. At most 1 % can change (0 of 9; few)."),
    ("rejected: no pattern (AUROC 0.6; 0.9 is needed)", "Rejected: no pattern (AUROC 0.6; 0.9 is needed)."),
])
def test_verdicts_of_every_version_make_a_headline(verdict, headline):
    assert Checked(verdict_banner({"chosen": "original", "verdict": verdict}, {})).words.endswith(headline)


def test_a_repair_that_lost_on_held_out_images_says_so(parts, undrawn):
    result = make(parts)
    for points, p, warned, chance in ((-1.5, 0.01, True, False), (-1.5, 0.5, True, True), (1.5, 0.5, False, False)):
        metrics = copy.deepcopy(result.metrics)
        metrics["after"]["held_out"]["accuracy"] = metrics["before"]["held_out"]["accuracy"] + points
        metrics["change"]["held_out"]["p"] = p
        page = page_of(replace(result, metrics=metrics))
        assert ("Warning: " in page, "may be chance" in page, 'class="banner even"' in page) == (warned, chance, warned)


def test_metrics_are_computed_where_they_are_missing(parts, undrawn):
    networks, scenario = parts
    full, before, after = make(parts), *(evaluate(networks[n], scenario) for n in ("original", "repaired"))
    rows = lambda text: re.findall(r'<section aria-labelledby="(?:before-and-after|what-was-fixed-what-broke)".*?</section>', text, re.S)
    expected = rows(page_of(full, scenario=scenario))
    empty = replace(full, metrics={})
    assert len(expected) == 2
    assert rows(page_of(empty, scenario=scenario)) == expected
    assert rows(page_of(empty, scenario=scenario, before=before, after=after)) == expected
    assert rows(page_of(empty, record={"metrics": full.metrics})) == expected
    alone = Checked(page_of(empty, before=before, after=after)).words
    assert "Held out" in alone and "Failures never seen" not in alone


def test_examples_are_the_answers_that_changed(parts, undrawn):
    networks, scenario = parts
    result, before, after = make(parts), *(evaluate(networks[n], scenario) for n in ("original", "repaired"))
    change = compare(before, after, scenario)["held_out"]
    fixed, broken = (min(12, n) for n in (change.fixed, change.broken))
    assert change.fixed > fixed and broken, "the toy networks no longer show both cases"
    text = page_of(result, scenario=scenario)
    page = Checked(text)
    assert f"Fixed: {fixed} of {change.fixed}" in page.words and f"Broken: {broken} of {change.broken}" in page.words
    told = [re.fullmatch(r"(.*), predicted (.*) before and (.*) after", a["alt"]).groups() for a in page.all("img")]
    assert len(told) == fixed + broken
    assert all(true == now != was for true, was, now in told[:fixed]) and all(true == was != now for true, was, now in told[fixed:])
    given_both = page_of(result, scenario=scenario, before=before, after=after)
    assert given_both == text


def test_nan_and_unknown_names_are_shown_as_such(parts, undrawn):
    result = make(parts, verdict=Verdict("repaired", {"original": float("nan"), "repaired": 0.25, "mine": 3.0}, "a reason"))
    page = Checked(page_of(result)).words
    assert "the network as it came –" in page and "mine 3.0000" in page and "nan" not in page.lower()
