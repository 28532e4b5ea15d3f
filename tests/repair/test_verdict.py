"""One judge: the lowest finite loss wins, ties go to the repair and never to the control, and the sentence says what happened."""
import math

import pytest
import torch

from archrepair.repair.verdict import EMULATED, REAL, Seen, judge, objection


@pytest.mark.parametrize(("losses", "winner"), [
    ((1.0, 0.5, 0.7), "repaired"), ((1.0, 0.7, 0.5), "control"), ((0.3, 0.7, 0.5), "original"),
    ((1.0, 0.5, 0.5), "repaired"), ((0.5, 0.5, 0.5), "repaired"), ((0.5, 0.5, 0.9), "repaired"), ((0.5, 0.9, 0.5), "original"),
    ((1.0, math.nan, 0.5), "control"), ((1.0, math.nan, 1.5), "original"), ((math.nan, 2.0, math.inf), "repaired"),
    ((math.nan, -math.inf, 3.0), "control"), ((math.nan, math.nan, math.nan), "original"),
    ((0.5, 0.4), "repaired"), ((0.5, 0.5), "repaired"), ((0.4, 0.5), "original"), ((0.4, math.nan), "original"),
])
def test_the_acceptance_rule(losses, winner):
    losses = dict(zip(("original", "repaired", "control"), losses))
    verdict = judge(losses)
    assert verdict.chosen == winner and verdict.losses == losses and verdict.accepted == (winner == "repaired")
    assert str(verdict).startswith(f"{'accepted' if winner == 'repaired' else 'rejected'}: ") and "\n" not in str(verdict)
    assert ("plain fine-tuning" in str(verdict)) == (winner == "control")
    assert ("nan" in str(verdict), "inf" in str(verdict)) == (False, False), "losses that are not finite are not shown as numbers"


def test_the_sentence_names_the_method_the_lack_of_a_control_and_an_architecture_that_stayed():
    assert str(judge({"original": 0.5, "repaired": 0.25, "control": 0.3}, unchanged=True)) == (
        "accepted, architecture unchanged: validation loss no worse than the original's and the control's "
        "(loss: repaired 0.2500, original 0.5000, control 0.3000)")
    assert str(judge({"original": 0.5, "repaired": 0.25})).startswith("accepted: weights only: ")
    worse = judge({"original": 0.5, "repaired": 0.75}, method="mode")
    assert str(worse).startswith("rejected: mode: no candidate has a lower validation loss")
    assert str(judge({"original": math.nan, "repaired": math.inf}, method="mode")) == (
        "rejected: mode: no candidate has a finite validation loss; returning the original unchanged")


def seen(wrong: int, loss: float = 2.0, spread: float = 0.0) -> Seen:
    "1,000 ordinary images, `wrong` of them wrong, and 100 failures whose losses lie `spread` around `loss`."
    return Seen(torch.arange(1000) >= wrong, loss + spread * torch.linspace(-1, 1, 100))


@pytest.mark.parametrize(("candidate", "speaks"), [
    (seen(80), ""), (seen(70, 1.0), ""), (seen(88, 1.0), ""),  # a standard error of 92 % on 1,000 images is 8.6 images
    (seen(89, 1.0), "gets 0.9 points fewer of the ordinary"), (seen(300, 0.0), "gets 22.0 points fewer"),
    (seen(80, 2.001), "does worse on the failures"), (seen(80, 2.01, 1.0), ""), (seen(80, 2.1, 1.0), "does worse on the failures")])
def test_what_speaks_against_a_candidate_is_a_standard_error(candidate, speaks):
    said = objection(seen(80), candidate)
    assert said.startswith(speaks) and bool(said) == bool(speaks)


@pytest.mark.parametrize(("lost", "speaks"), [(0, ""), (6, ""), (7, "gets 0.3 points fewer")])
def test_a_quarter_of_a_point_is_allowed_where_the_original_makes_no_mistakes(lost, speaks):
    seen_before, seen_after = (Seen(torch.arange(2500) >= wrong, torch.zeros(10)) for wrong in (3, 3 + lost))
    assert objection(seen_before, seen_after).startswith(speaks) and bool(objection(seen_before, seen_after)) == bool(speaks)


def test_a_few_failures_or_a_perfect_original_do_not_break_it():
    perfect = Seen(torch.ones(50, dtype=torch.bool), torch.tensor([1.0]))
    assert objection(perfect, perfect) == "" and objection(perfect, Seen(torch.ones(50, dtype=torch.bool), torch.tensor([9.0]))) == ""
    assert "2.0 points fewer" in objection(perfect, Seen(torch.arange(50) > 0, torch.empty(0)))
    nothing = Seen(torch.empty(0, dtype=torch.bool), torch.empty(0))
    assert objection(nothing, nothing) == ""
    assert objection(seen(80)._replace(failing=torch.empty(0)), seen(80)._replace(failing=torch.empty(0))) == ""


def test_whom_something_speaks_against_does_not_win():
    losses = {"original": 0.5, "repaired": 0.4, "control": 0.3}
    assert judge(losses).chosen == "control"
    kept = judge(losses, method="behind a gate", objections={"control": "does worse", "repaired": ""}, rule=EMULATED)
    assert kept.chosen == "repaired" and kept.rule == EMULATED and judge(losses).rule == REAL
    assert str(kept).startswith("accepted: behind a gate: validation loss no worse than the original's (")
    assert judge(losses, objections={"repaired": "does worse"}).chosen == "control"
    refused = judge(losses, method="m", objections=dict.fromkeys(("repaired", "control"), "gets 1.0 points fewer right"))
    assert refused.chosen == "original"
    assert str(refused).startswith("rejected: m: the repaired network gets 1.0 points fewer right; returning the original unchanged")
