"""One judge: the lowest finite loss wins, ties go to the repair and never to the control, and the sentence says what happened."""
import math

import pytest

from archrepair.repair.verdict import judge


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
