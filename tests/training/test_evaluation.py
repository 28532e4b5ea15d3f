"""Numbers a user reads: each is checked against a formula or a count made by hand."""
import math

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
from archrepair.training.statistics import mcnemar


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
        predict(model, digits_test, lambda images: torch.zeros(len(images), 3, 0, 0))
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


def test_a_comparison_uses_the_exact_test():
    before, after = torch.arange(200) < 100, torch.arange(200) < 130
    assert Comparison.of(before, after).p == mcnemar(30, 0, "exact").p == 2 / 2**30


def test_nothing_to_judge():
    assert is_correct(torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)).shape == (0,)


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
