"""Numbers a user reads: each is checked against a formula or a count made by hand."""
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import build_scenario
from archrepair.networks.models import create_model
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import Comparison, Score, compare, evaluate, is_correct, predict, robust_accuracy, validation_loss
from archrepair.training.rows import image_features
from archrepair.training.statistics import Summary, mcnemar, wilcoxon, wilson


def test_predict_equals_a_plain_loop_and_does_not_depend_on_the_batch(problem, digits_test, quiet_stream):
    logits = predict(problem.network, digits_test, problem.transform)
    with torch.inference_mode():
        loop = torch.cat([problem.network(problem.transform(image[None])) for image in digits_test.images[:40]])
    assert logits.shape == (597, 10) and logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.allclose(logits[:40], loop, atol=1e-4)
    for size in (1, 7, 597, 1000):
        few = digits_test.select(torch.arange(40)) if size < 8 else digits_test
        assert torch.allclose(predict(problem.network, few, problem.transform, batch_size=size), logits[:len(few)], atol=1e-4)
    assert torch.equal(is_correct(logits, digits_test.labels), problem.correct)


def test_predict_restores_every_mode_even_when_it_fails(digits_test):
    model = create_model("resnet18", 10, width=0.0625).train()
    model.layer2.eval()
    modes = [m.training for m in model.modules()]
    predict(model, digits_test.select(torch.arange(5)), Normalize())
    assert modes == [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        predict(model, digits_test, lambda images: torch.zeros(len(images), 4, 32, 32))
    assert modes == [m.training for m in model.modules()]


def test_predict_runs_in_eval_mode_and_leaves_statistics_alone(untouched, digits_test):
    model = create_model("resnet18", 10, width=0.0625).train()
    few = digits_test.select(torch.arange(8))
    with untouched(model):
        training = predict(model, few, Normalize())
    assert torch.equal(training, predict(model.eval(), few, Normalize()))


def test_predict_counts_its_cost_and_takes_an_empty_set(problem, digits_test):
    meter = CostMeter()
    predict(problem.network, digits_test, problem.transform, meter=meter, share=0.5)
    assert (meter.forwards, meter.backwards) == (597 / 2, 0)
    assert len(predict(problem.network, digits_test.select(torch.arange(0)), problem.transform)) == 0


def test_predict_refuses_a_network_with_too_few_outputs(digits_test):
    with pytest.raises(ArchrepairError, match="the network has 9 outputs but labels run to 9"):
        predict(create_model("resnet18", 9, width=0.0625), digits_test.select(torch.arange(100)), Normalize())


# --- scores


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (1, 1), (85, 100), (850, 1000), (3, 7), (9999, 10000)])
def test_wilson_equals_scipy(right, n):
    from scipy.stats import binomtest

    theirs = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_wilson_stays_inside_0_and_1():
    assert wilson(0, 0) == (0, 1)
    assert all(0 <= low <= high <= 1 for n in range(1, 2000, 7) for right in (0, n) for low, high in [wilson(right, n)])


def test_score():
    score = Score.of(torch.arange(1000) < 857)
    assert (score.accuracy, score.n) == (85.7, 1000) and score.low < 85.7 < score.high
    assert math.isnan(Score.of(torch.zeros(0, dtype=torch.bool)).accuracy)


def test_comparison_by_hand():
    "10 images, 6 right before; 2 of 4 mistakes fixed, 1 of 6 right answers broken; McNemar on (2, 1): p = 1."
    before = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]).bool()
    after = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0, 0]).bool()
    assert Comparison.of(before, after) == Comparison(2, 1, 50.0, 16.667, 1.0)
    assert Comparison.of(torch.zeros(8).bool(), torch.ones(8).bool()).p == pytest.approx(2 / 2**8)
    same = Comparison.of(before, before)
    assert (same.fixed, same.broken, same.p) == (0, 0, 1.0)
    perfect = Comparison.of(torch.ones(3).bool(), torch.ones(3).bool())
    assert math.isnan(perfect.repair_rate) and perfect.negative_flips == 0


class Answers(nn.Module):
    "Answers by the brightness of an image: `table[first pixel]`."

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(nn.functional.one_hot(table, 2).float() * 5)

    def forward(self, x):
        return self.table[x[:, 0, 0, 0].long()]


def numbered(n: int) -> ImageSet:
    return ImageSet(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 4, 4, 3), torch.zeros(n, dtype=torch.long), ("a", "b"))


def test_scores_and_comparisons_are_read_on_the_right_images():
    number = lambda images: images.permute(0, 3, 1, 2).float()
    test = numbered(200)
    shifted = ImageSet(test.images.flip(0), test.labels, test.classes, "clean")
    first = (torch.arange(200) % 4 == 0).long()  # wrong on every fourth image
    second = ((torch.arange(200) % 8 == 0) | (torch.arange(200) == 3)).long()  # half of them fixed, one broken
    correct = first == 0
    made = build_scenario(numbered(100), test, correct, clean=shifted, n_failures=15, seed=1)
    object.__setattr__(made.data, "transform", number)
    one, two = evaluate(Answers(first), made), evaluate(Answers(second), made)
    assert set(one.scores) == {"full", "held_out", "clean_full", "clean_held_out"} and one.scores["full"].accuracy == 75.0
    assert torch.equal(one.correct["full"], correct) and torch.equal(one.correct["clean_full"], correct.flip(0))
    assert one.scores["held_out"].accuracy == round(100 * int(correct[made.held_out].sum()) / 100, 3)
    changes = compare(one, two, made)
    assert (changes["full"].fixed, changes["full"].broken) == (25, 1)
    assert changes["seen"].fixed == int((second[made.used] == 0).sum()) and changes["seen"].broken == 0
    unseen = made.held_out[first[made.held_out] == 1]
    assert changes["unseen"].repair_rate == round(100 * int((second[unseen] == 0).sum()) / len(unseen), 3)
    assert set(evaluate(Answers(first), build_like(made, test)).scores) == {"full", "held_out"}


def build_like(made, test):
    from dataclasses import replace

    return replace(made, clean=test)


def test_validation_loss_weighs_by_the_failure_rate():
    number = lambda images: images.permute(0, 3, 1, 2).float()
    model = Answers((torch.arange(200) % 2 == 1).long())  # wrong on odd numbers
    parts = tuple(image_features(numbered(200).select(torch.arange(start, 20, 2)), number) for start in (0, 1))
    right, wrong = math.log(1 + math.exp(-5)), math.log(1 + math.exp(5))
    meter = CostMeter()
    assert validation_loss(model, parts, 0.3, meter=meter) == pytest.approx(0.7 * right + 0.3 * wrong, rel=1e-5) and meter.forwards == 20
    assert validation_loss(model, parts, 0.0) == pytest.approx(right, rel=1e-4)
    empty = parts[1].select(torch.arange(0))
    assert validation_loss(model, (parts[0], empty), 0.3) == pytest.approx(right, rel=1e-4)


# --- robust accuracy


def test_robust_accuracy_by_hand():
    "Right in fog: 4 of 5, in snow 3, in blur 4; in all three: the third and the fifth image."
    bits = {"fog": [1, 1, 1, 0, 1], "snow": [1, 0, 1, 0, 1], "blur": [0, 1, 1, 1, 1]}
    got = robust_accuracy({name: torch.tensor(b).bool() for name, b in bits.items()})
    assert (got.mean, got.strict, got.worst, got.n) == (73.333, 40.0, 60.0, 5)
    assert {name: score.accuracy for name, score in got.scores.items()} == {"fog": 80, "snow": 60, "blur": 80}
    clean = torch.tensor([1, 1, 0, 1, 1]).bool()  # one more version: the third image no longer counts, and the mean moves
    more = robust_accuracy({name: torch.tensor(b).bool() for name, b in bits.items()} | {"clean": clean})
    assert (more.mean, more.strict) == (75.0, 20.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**31))
def test_strict_never_exceeds_the_worst_nor_the_worst_the_mean(versions, n, seed):
    bits = torch.rand(versions, n, generator=torch.Generator().manual_seed(seed)) < 0.8
    got = robust_accuracy({str(i): row for i, row in enumerate(bits)})
    assert got.strict <= got.worst <= got.mean + 1e-9 and got.n == n
    assert got.strict == round(100 * sum(bool(column.all()) for column in bits.T) / n, 3)
    same = robust_accuracy({str(i): bits[0] for i in range(versions)})
    assert same.strict == same.worst == pytest.approx(same.mean, abs=1e-3) == Score.of(bits[0]).accuracy
    fewer = robust_accuracy({str(i): row for i, row in enumerate(bits[:-1])} or {"0": bits[0]})
    assert got.strict <= fewer.strict


def test_robust_accuracy_needs_versions_of_the_same_images():
    for wrong in ({}, {"fog": torch.ones(3).bool(), "snow": torch.ones(4).bool()}):
        with pytest.raises(ArchrepairError, match="expected one or more versions of the same images"):
            robust_accuracy(wrong)


# --- over runs


def test_summary_by_hand():
    got = Summary.of([2.0, 4.0, 9.0])
    assert (got.mean, got.n) == (5.0, 3) and got.sd == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert str(got) == "5.00 ± 3.61 (n 3)" and f"{got:+.1f}" == "+5.0 ± 3.6 (n 3)"
    one = Summary.of([7.5])
    assert (one.mean, one.n) == (7.5, 1) and math.isnan(one.sd) and str(one) == "7.50 (n 1)"
    assert str(Summary.of([])) == str(Summary.of([None, math.nan, math.inf])) == "–" and Summary.of([math.nan, 3, None]) == Summary.of([3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_summary_equals_the_standard_library(values):
    got = Summary.of(values)
    assert got.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6) and got.n == len(values)
    assert got.sd == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)


# --- pairs


def test_wilcoxon_by_hand():
    """Seven differences 1, 2, 3, 4, 5, -6, 7: the negative ranks sum to 6. Of the 128 ways to choose signs, those whose negative ranks
    sum to at most 6 are: sum 0:1, 1:1, 2:1, 3:2, 4:2, 5:3, 6:4 = 14; both tails 28/128."""
    got = wilcoxon([1, 2, 3, 4, 5, -6, 7], [0] * 7)
    assert (got.test, got.statistic, got.p, got.n, got.of, got.note) == ("wilcoxon, exact", 6.0, 28 / 128, 7, 7, "")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_wilcoxon_counts_every_choice_of_signs(differences):
    "Ties and zeros included; by enumeration."
    from scipy.stats import rankdata

    kept = [d for d in differences if d]
    got = wilcoxon(differences, [0] * len(differences))
    assert (got.n, got.of) == (len(kept), len(differences))
    if not kept:
        return
    ranks = rankdata(np.abs(kept))
    lower = lambda signs: min(sum(r for r, s in zip(ranks, signs) if s > 0), sum(r for r, s in zip(ranks, signs) if s < 0))
    every = [lower(signs) for signs in itertools.product((-1, 1), repeat=len(kept))]
    assert got.statistic == lower(np.sign(kept)) and got.p == pytest.approx(np.mean([v <= got.statistic + 1e-9 for v in every]))
    other = wilcoxon([0] * len(differences), differences)
    assert (other.p, other.statistic) == (got.p, got.statistic)  # two-sided: the order of the methods does not matter


def test_wilcoxon_equals_scipy_and_finds_what_is_there():
    from scipy.stats import wilcoxon as theirs

    generator = np.random.default_rng(0)
    for n in (6, 20, 50, 51, 120):
        a, b = generator.normal(0.3, 1, n), generator.normal(0, 1, n)
        got = wilcoxon(a.tolist(), b.tolist())
        assert got.p == pytest.approx(theirs(np.round(a - b, 9), correction=n > 50).pvalue, rel=1e-9)
        assert got.test == ("wilcoxon, exact" if n <= 50 else "wilcoxon, normal approximation")
    assert wilcoxon(list(range(1, 9)), [0] * 8).p == 2 / 2**8


def test_wilcoxon_says_when_there_is_too_little():
    assert wilcoxon([1, 2, 3], [1, 2, 3]) == wilcoxon([1, 2, 3], [1, 2, 3]) and wilcoxon([1, 2], [1, 2]).note == "no pair differs"
    assert (wilcoxon([1, 2], [1, 2]).p, wilcoxon([1, 2], [1, 2]).n) == (1.0, 0)
    five = wilcoxon([2, 3, 4, 5, 6], [1, 1, 1, 1, 1])
    assert five.p == 0.0625 and five.note == "5 pairs cannot give p below 0.0625"
    assert wilcoxon([2.0], [1.0]).note == "1 pair cannot give p below 1" and wilcoxon([2, 3, 4, 5, 6, 7], [1] * 6).note == ""
    assert wilcoxon([0.3, 0.4], [0.2, 0.3]).statistic == 0 and wilcoxon([0.3, 0.2], [0.2, 0.3]).p == 1.0  # 0.3 - 0.2 ties with 0.2 - 0.1
    for wrong in (([1, 2], [1]), ([math.nan], [1.0]), ([1.0], [math.inf])):
        with pytest.raises(ArchrepairError, match="cannot be paired"):
            wilcoxon(*wrong)


def test_mcnemar_by_hand():
    "9 fixed, 3 broken: 2 · (1 + 12 + 66 + 220) / 2¹². 60 and 35: (25 - 1)² / 95."
    few = mcnemar(9, 3)
    assert few.p == pytest.approx(2 * (1 + 12 + 66 + 220) / 2**12) and (few.test, few.statistic, few.n) == ("mcnemar, exact binomial", 3.0, 12)
    many = mcnemar(60, 35)
    assert many.statistic == pytest.approx(24**2 / 95) and many.test == "mcnemar, chi2 with continuity correction"
    assert many.p == pytest.approx(math.erfc(math.sqrt(many.statistic / 2))) and mcnemar(60, 35, "exact").p == pytest.approx(many.p, rel=0.05)
    assert (mcnemar(13, 12).test, mcnemar(12, 12).test) == ("mcnemar, chi2 with continuity correction", "mcnemar, exact binomial")
    assert mcnemar(30, 30).p == mcnemar(31, 30).p == 1.0 and mcnemar(35, 60) == mcnemar(60, 35)
    assert mcnemar(0, 0).p == 1.0 and "agree" in mcnemar(0, 0).note and mcnemar(1, 0).p == 1.0 and mcnemar(6, 0).p == 2 / 2**6
    with pytest.raises(ArchrepairError, match="unknown method of McNemar's test"):
        mcnemar(1, 2, "exakt")


def test_a_comparison_uses_the_exact_test():
    before, after = torch.arange(200) < 100, torch.arange(200) < 130
    assert Comparison.of(before, after).p == mcnemar(30, 0, "exact").p == 2 / 2**30


def test_nothing_to_judge():
    assert is_correct(torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)).shape == (0,)
