"BayesNAS: priors that prune, derivatives of every image, and switches that keep their ratios."
import math

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.bayesnas import THRESHOLD, BayesNAS, combine, evidence, switch_gradients
from archrepair.nas.operations import CANDIDATES
from support.searches import setting, started


def test_evidence_is_the_fixed_point_of_the_published_updates():
    w, h = torch.tensor([0.02, 0.3, 1.0, 2.0], dtype=torch.float64), torch.tensor([5.0, 0.4, 2.0, 0.1], dtype=torch.float64)
    gamma = torch.ones(4, dtype=torch.float64)
    for _ in range(4000):
        c = 1 / (1 / gamma + h)
        omega = (1 / gamma - c / gamma ** 2).sqrt()
        gamma = w.abs() / omega
    closed, weight = evidence(w, h)
    assert torch.allclose(closed, gamma, rtol=1e-6) and torch.allclose(weight, omega, rtol=1e-6)
    rising = evidence(torch.linspace(0, 2, 50), torch.tensor(0.7))[0]
    assert bool((rising.diff() > 0).all()) and float(rising[0]) == 0.0
    assert bool(torch.isfinite(evidence(torch.tensor([0.0, 1.0]), torch.zeros(2))[0]).all())


def test_an_edge_takes_its_operations_along():
    operations = torch.full((3, 2), 2.0)
    both = combine(operations, torch.tensor([1e9, 2.0, 0.0]))
    assert both.tolist() == [pytest.approx([2.0, 2.0]), [1.0, 1.0], [0.0, 0.0]]
    assert pytest.approx(0.0) == 0.5 * math.log(2 * math.pi * math.e * THRESHOLD)
    strategy, *_ = started("bayesnas")
    strategy.arch["operation_gamma"].data.fill_(1.0)
    strategy.arch["edge_gamma"].data[0] = 0.0
    choices = strategy.decide()
    assert choices[0] == "none" and "none" not in choices[1:]


def test_one_backward_pass_gives_every_images_derivative():
    _, _, prepared = setting()
    strategy, supernet, network, context = started("bayesnas")
    for operations in supernet.added.values():
        for operation in operations.values():
            nn.init.constant_(operation[-1].weight, 0.4)
    x, at = prepared.rows(0).inputs(torch.arange(5))
    labels = prepared.rows(0).labels[at]
    context.loss = lambda batch: nn.functional.cross_entropy(network(batch[0]), batch[1])
    before, modes = {n: v.clone() for n, v in network.state_dict().items()}, [m.training for m in network.modules()]
    together = switch_gradients(strategy, context, (x, labels), 5)
    alone = torch.cat([switch_gradients(strategy, context, (x[i:i + 1], labels[i:i + 1]), 1) for i in range(5)], 2)
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-6) and float(together.abs().max()) > 1e-4
    assert modes == [m.training for m in network.modules()] and strategy.probe is None
    assert all(torch.equal(v, network.state_dict()[n]) for n, v in before.items())


def test_the_penalty_prunes_what_the_data_do_not_hold():
    strategy, supernet, network, context = started("bayesnas", steps=40)
    strategy.update_posteriors = lambda context: strategy.arch["operation_penalty"].data.fill_(1.0)
    strategy.arch["operation"].grad = torch.zeros_like(strategy.arch["operation"])
    for _ in range(40):
        strategy.arch["operation"].grad = torch.zeros_like(strategy.arch["operation"])
        strategy.arch["operation"].grad[:, -1] = -1.0  # the data hold on to the original
        strategy.arch_step(context)
    c, inherited = strategy.coefficients(1, False).detach(), strategy.mask[:, -1]
    assert float(c[inherited, :-1].abs().max()) == 0.0 and torch.allclose(c[inherited, -1], torch.ones(int(inherited.sum())))


def test_what_nothing_holds_does_not_vanish_together():
    "The scale of a node is BatchNorm's; switches only compare."
    strategy, supernet, network, context = started("bayesnas", steps=40)
    penalties = torch.linspace(2.0, 1.0, len(CANDIDATES)).expand_as(strategy.mask)
    strategy.update_posteriors = lambda context: strategy.arch["operation_penalty"].data.copy_(penalties)
    for _ in range(40):
        strategy.arch["operation"].grad = torch.zeros_like(strategy.arch["operation"])
        strategy.arch_step(context)
    strongest = strategy.coefficients(1, False).abs().amax(1)
    for node in range(1, len(strategy.graph.nodes)):
        assert float(max(strongest[i] for i, _ in strategy.graph.incoming(node)).detach()) == pytest.approx(1.0, abs=1e-5)


def test_normalized_switches_keep_their_ratios():
    strategy, *_ = started("bayesnas")
    generator = torch.Generator().manual_seed(0)
    for name in ("edge", "operation"):
        strategy.arch[name].data.uniform_(0.2, 2.0, generator=generator)
    before = strategy.coefficients(1, False).detach()
    strategy.normalize_switches()
    after = strategy.coefficients(1, False).detach()
    for node in range(1, len(strategy.graph.nodes)):
        incoming = [i for i, _ in strategy.graph.incoming(node)]
        ratios = (after[incoming] / before[incoming])[strategy.mask[incoming] & (before[incoming] > 0)]
        assert torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-5)
        assert max(float(after[i, -1]) for i in incoming) == pytest.approx(1.0)


@pytest.mark.parametrize("options, message", [({"sparsity": 0}, "sparsity"), ({"updates": 0}, "updates"), ({"threshold": -1}, "threshold")])
def test_options_out_of_range(options, message):
    with pytest.raises(ArchrepairError, match=message):
        BayesNAS(**options)
