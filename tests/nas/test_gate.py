"""A gate reads what is there, tells apart what can be told apart, and touches no more than it promised."""
import math

import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.nas.gate import (
    BOUND, EntryGate, Gate, Touch, auroc, choose_thresholds, crossed_auroc, fit_gate, pool, set_reach, touch_limit)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape, channels, over", [
    ((3, 5, 4, 6), 5, lambda x, c: x[:, c]),
    ((3, 4, 4, 5), 5, lambda x, c: x[..., c]),  # channels last, as in Swin
    ((3, 7, 5), 5, lambda x, c: x[..., c]),  # tokens
    ((3, 5, 2, 3, 4), 5, lambda x, c: x[:, c]),
])
def test_pooling_is_mean_and_spread_over_all_but_channels(shape, channels, over):
    x = normal(*shape).double()
    pooled = pool(x.float())
    assert pooled.shape == (3, 2 * channels)
    for c in range(channels):
        values = over(x, c).flatten(1)
        assert torch.allclose(pooled[:, c].double(), values.mean(1), atol=1e-6)
        assert torch.allclose(pooled[:, channels + c].double(), values.std(1, unbiased=False), atol=1e-6)


def test_numbers_are_read_as_they_are():
    x = normal(3, 5)
    assert torch.equal(pool(x), x)
    assert pool(x.bfloat16()).dtype == torch.float32


def test_a_fresh_gate_never_fires():
    x, readings = normal(4, 3, 8, 8), {"a": normal(4, 6, 4, 4)}
    gate = Gate.for_example(x, readings)
    assert gate.features(x, readings).shape == (4, 29 + 12)
    assert not gate.fires(gate.features(x, readings)).any()


def test_a_gate_reads_inputs_that_are_no_images():
    x, readings = normal(4, 10), {"a": normal(4, 6)}
    gate = Gate.for_example(x, readings)
    assert gate.statistics is None and torch.equal(gate.features(x, readings), readings["a"])


def test_a_fitted_gate_tells_shifted_features_and_bounds_each():
    train, failures = normal(300, 6), normal(200, 6, seed=1) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    train[:, 5], failures[:, 5] = 0.0, 1.0  # never varies on training images
    gate = fit_gate(Gate(["a"], 6), failures, train)
    assert int(gate.weight.abs().argmax()) in (0, 5)
    fresh = normal(300, 6, seed=2)
    fresh[:, 5] = 0.0
    assert auroc(gate.score(failures), gate.score(fresh)) > 0.95
    extreme = torch.full((1, 6), 1e9)
    assert float(gate.score(extreme)) <= float(BOUND * gate.weight.abs().sum() + gate.bias) + 1e-4


@pytest.mark.parametrize("failures, train, message", [
    (normal(0, 3), normal(5, 3), "0 failures"), (normal(5, 3), normal(0, 3), "0 training images"),
    (torch.full((5, 3), math.nan), normal(5, 3), "not finite")])
def test_what_cannot_be_fitted_is_one_line(failures, train, message):
    with pytest.raises(ArchrepairError, match=message):
        fit_gate(Gate(["a"], 3), failures, train)


def test_what_is_unlike_the_failures_is_out_of_reach():
    "Beyond the failures, in the same direction, and beside them: only what lies near them fires."
    train, failures = normal(400, 4), 0.5 * normal(300, 4, seed=1) + torch.tensor([8.0, 0, 0, 0])
    gate = fit_gate(Gate(["a"], 4), failures[:200], train)
    gate.threshold.fill_(float(gate.score(train).max()))
    beyond, beside = torch.tensor([[24.0, 0, 0, 0]]), torch.tensor([[8.0, 5, 0, 0]])
    assert gate.score(beyond) > gate.threshold
    set_reach(gate, failures[200:])
    assert float(gate.reach) == pytest.approx(1.5 * float(gate.distance(failures[200:]).max()))
    assert (gate.score(failures[200:]) > gate.threshold).float().mean() > 0.95
    assert gate.score(beyond) < gate.threshold and gate.score(beside) < gate.threshold


def test_a_threshold_lets_nothing_fire_that_is_out_of_reach():
    "Also where every ordinary image is out of reach, so that their scores say nothing."
    train, failures = normal(400, 4), 0.1 * normal(300, 4, seed=1) + 8
    gate = set_reach(fit_gate(Gate(["a"], 4), failures[:200], train[:200]), failures[200:])
    touch = choose_thresholds(gate.odds(train[200:300])[:, None], gate.score(train[300:])[:, None], budget=0.5)
    beside = normal(100, 4, seed=2) + torch.tensor([8.0, 8.0, 0.0, 0.0])
    assert (gate.odds(beside) > touch.thresholds[0]).any() and not (gate.score(beside) > touch.thresholds[0]).any()
    assert (gate.score(failures[200:]) > touch.thresholds[0]).all() and touch.fired == 0


def test_distance_is_the_root_mean_square_in_the_failures_own_spread():
    gate = fit_gate(Gate(["a"], 2), torch.tensor([[1.0, 0.0], [3.0, 8.0]]), normal(50, 2))
    assert gate.distance(torch.tensor([[2.0, 4.0], [4.0, 12.0]])).tolist() == pytest.approx([0.0, math.sqrt((4 + 4) / 2)])


def test_auroc_counts_pairs():
    high, low = normal(40).round(decimals=1), normal(50, seed=1).round(decimals=1)
    pairs = [(a > b) + 0.5 * (a == b) for a in high.tolist() for b in low.tolist()]
    assert auroc(high, low) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(torch.tensor([1.0]), torch.tensor([0.0])) == 1.0
    assert math.isnan(auroc(high, torch.zeros(0)))


@pytest.mark.parametrize("k, n", [(0, 60), (3, 100), (12, 2000), (2000, 2000)])
def test_the_limit_is_where_so_few_are_seen_in_one_of_twenty_cases(k, n):
    from scipy.stats import binom

    limit = touch_limit(k, n)
    assert limit == 1.0 if k == n else binom.cdf(k, n, limit) == pytest.approx(0.05, abs=1e-6)


def test_without_images_nothing_is_promised():
    assert touch_limit(0, 0) == 1.0


@pytest.mark.parametrize("gates", [1, 3])
def test_limits_hold_in_at_least_95_percent_of_2000_draws(gates):
    """Scores are standard normal and independent, so that the true share that fires is known.

    Thresholds are chosen for a budget each time; 0.9 % more than 5 % is three standard errors of 2,000 draws.
    """
    generator, broken, cdf = torch.Generator().manual_seed(gates), 0, torch.distributions.Normal(0.0, 1.0).cdf
    held = torch.randn(3000, gates, generator=generator)
    draws = 2000
    for _ in range(draws):
        touch = choose_thresholds(held, torch.randn(800, gates, generator=generator), budget=0.02)
        true = 1 - float(torch.stack([cdf(torch.tensor(t)) for t in touch.thresholds]).prod())
        broken += true > touch.limit
    assert broken / draws < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_a_fixed_threshold_has_an_exact_limit_too():
    generator, draws, n, true = torch.Generator().manual_seed(0), 2000, 500, 0.013
    fired = torch.binomial(torch.full((draws,), float(n)), torch.full((draws,), true), generator=generator)
    broken = sum(touch_limit(int(k), n) < true for k in fired) / draws
    assert broken < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_the_loosest_threshold_within_the_budget_is_chosen():
    held, calibration = normal(5000, 1), normal(4000, 1, seed=1)
    tight, loose = (choose_thresholds(held, calibration, budget) for budget in (0.005, 0.05))
    assert tight.thresholds[0] > loose.thresholds[0]
    for touch in (tight, loose):
        assert touch.holds and touch.limit == touch.budget
        assert touch_limit(touch.fired, touch.n) <= touch.budget
        assert touch.fired == int((calibration > touch.thresholds[0]).sum()) > 0.3 * touch.budget * touch.n


def test_too_few_images_prove_little_and_say_so():
    touch = choose_thresholds(normal(50, 1), normal(40, 1, seed=1) - 5, budget=0.01)
    assert not touch.holds and touch.limit == pytest.approx(touch_limit(0, 40))
    assert "7.22 %" in str(touch) and "1.00 % cannot be proved with so few images" in str(touch)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5])
def test_budgets_are_shares(budget):
    with pytest.raises(ArchrepairError, match="max_touched"):
        choose_thresholds(normal(5, 1), normal(5, 1), budget)


def test_no_images_are_one_line():
    with pytest.raises(ArchrepairError, match="no ordinary images"):
        choose_thresholds(normal(0, 1), normal(5, 1))


def test_what_a_gate_stores_is_what_it_learned():
    gate = Gate.for_example(normal(2, 3, 8, 8), {"a": normal(2, 6, 4, 4)})
    assert set(gate.state_dict()) == {"mean", "scale", "weight", "bias", "threshold", "center", "spread", "reach"}
    assert isinstance(choose_thresholds(normal(50, 1), normal(40, 1)), Touch)


def test_a_gate_judged_on_failures_it_was_not_fitted_to_does_not_praise_itself():
    "More numbers than failures: a gate tells those it was fitted to, whether or not they have something in common."
    failures, ordinary, held = normal(30, 600), normal(200, 600, seed=1), normal(200, 600, seed=2)
    gate = Gate([], 600)
    assert auroc(fit_gate(gate, failures, ordinary).odds(failures), gate.odds(held)) > 0.9
    assert crossed_auroc(gate, failures, ordinary, held) < 0.75
    assert crossed_auroc(gate, failures + 1, ordinary, held) > 0.95


def test_views_of_an_image_are_judged_together():
    views, ordinary, held = normal(29, 600).repeat(4, 1), normal(200, 600, seed=1), normal(200, 600, seed=2)
    gate = Gate([], 600)
    assert crossed_auroc(gate, views, ordinary, held, images=29) < 0.75 < 0.9 < crossed_auroc(gate, views, ordinary, held)


def test_a_gate_at_the_door_of_a_block_reads_what_enters():
    x = normal(6, 3, 5, 5)
    gate = EntryGate(3)
    assert gate.read(x).shape == (6, 6) and not gate(x).any() and gate(x).shape == (6, 1, 1, 1)
    gate.weight[0] = 1.0
    gate.threshold.copy_(x[:, 0].mean((1, 2)).median())
    assert torch.equal(gate(x).flatten(), x[:, 0].mean((1, 2)) > gate.threshold)
