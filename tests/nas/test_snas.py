"SNAS: draws that become choices, and a start that is the original network."
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.snas import SNAS, draw_softly
from support.searches import quick, started

SEP, NONE = CANDIDATES.index("sep_conv"), CANDIDATES.index("none")


@pytest.mark.parametrize("temperature, error", [(1e-3, 0.01), (1.0, 0.01)])
def test_draws(temperature, error):
    log_alpha = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).log()
    draws = draw_softly(log_alpha, temperature, torch.Generator().manual_seed(0), (40_000,))[0]
    assert torch.allclose(draws.sum(0), torch.ones(40_000), atol=1e-5) and bool((draws[3] == 0).all())
    winners = draws.argmax(0).bincount(minlength=4) / 40_000
    assert float((winners - log_alpha.exp()[0]).abs().max()) < error  # the largest is a draw from the softmax at any temperature
    if temperature < 0.01:
        assert float(draws.max(0).values.mean()) > 0.99
    extreme = draw_softly(torch.tensor([[1e4, -1e4, 0.0]]), 0.03, torch.Generator().manual_seed(0), (100,))
    assert bool(torch.isfinite(extreme).all())


def test_snas_starts_from_the_original_and_cools_down():
    strategy, *_ = started("snas", steps=101)
    inherited = strategy.mask[:, -1]
    one_hot = strategy.coefficients(1, False)
    assert bool((one_hot[:, -1] == inherited).all()) and bool((one_hot.sum(1) == 1).all())
    start = strategy.scores()
    assert torch.allclose(start[inherited, -1], torch.tensor(0.9), atol=0.01)
    assert torch.allclose(start[~inherited, NONE], torch.tensor(0.9), atol=0.01)
    temperatures = []
    for strategy.steps_taken in (0, 50, 100, 500):
        temperatures.append(strategy.temperature)
    assert temperatures == pytest.approx([1.0, 0.515, 0.03, 0.03])
    one, two = strategy.coefficients(4, True), strategy.coefficients(4, True)
    assert not torch.equal(one, two) and torch.allclose(one.sum(1), torch.ones(len(one)))
    hard, *_ = started("snas", hard=True)
    c = hard.coefficients(4, True)
    assert set(c.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    hard.arch.requires_grad_(True)
    hard.coefficients(4, True)[:, SEP].sum().backward()
    assert float(hard.arch["log_alpha"].grad.abs().sum()) > 0
    each, *_ = started("snas", per_sample=True)
    assert each.coefficients(4, True).shape == (*each.mask.shape, 4, 1, 1, 1)


def test_snas_draws_for_every_image():
    result = quick(strategy="snas", strategy_options={"per_sample": True, "hard": True}, epochs=2)
    assert torch.isfinite(result.path).all()


@pytest.mark.parametrize(("options", "message"), [
    ({"confidence": 1.0}, r"confidence is 1.0; expected a number above 0 and below 1"),
    ({"confidence": 0.0}, r"confidence is 0.0; expected a number above 0 and below 1"),
    ({"temperatures": (1.0, 0.0)}, r"temperatures is \(1.0, 0.0\); expected a list of 2 values, each a number above 0"),
])
def test_options_out_of_range(options, message):
    with pytest.raises(ArchrepairError, match=message):
        SNAS(**options)
