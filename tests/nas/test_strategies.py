"Four strategies: gradients of second order, draws that become choices, priors that prune, and decisions by perturbation."
import copy
import math

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.bayesnas import THRESHOLD, combine, evidence, switch_gradients
from archrepair.nas.darts import MAX_RATE, ahead, alpha_gradient, reach
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.snas import draw_softly
from archrepair.nas.strategies import STRATEGIES, make_strategy
from archrepair.nas.supernet import untracked
from support.searches import quick, setting, started

SEP, NONE = CANDIDATES.index("sep_conv"), 0


def smooth(order=2, name="darts"):
    "A strategy in float64 on a block without kinks whose added operations already speak, with two batches."
    _, _, network, context = started(name, order=order)
    network = copy.deepcopy(network)  # its rest is shared
    strategy, supernet = network.block.strategy, network.block.supernet
    context.network, context.supernet = network, supernet
    for module in list(network.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, key, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, key, nn.AvgPool2d(3, child.stride, 1))
    generator = torch.Generator().manual_seed(1)
    for operations in supernet.added.values():
        for operation in operations.values():
            nn.init.uniform_(operation[-1].weight, 0.2, 0.6, generator=generator)
    network.double()
    strategy.arch.double()
    strategy.initial = {n: v.double() for n, v in strategy.initial.items()}
    _, _, prepared = setting()
    rows = prepared.rows(0)
    batches = []
    for positions in (torch.arange(0, 12), torch.arange(12, 24)):
        x, at = rows.inputs(positions)
        batches.append((x.double(), rows.labels[at]))

    def loss(batch, parameters=None):
        logits = network(batch[0]) if parameters is None else torch.func.functional_call(network, parameters, (batch[0],))
        return nn.functional.cross_entropy(logits, batch[1])

    context.loss, context.draw, context.draw_weights = loss, lambda: batches[0], lambda: batches[1]
    context.optimizer = torch.optim.SGD([{"params": list(supernet.parameters()), "lr": 0.05, "weight_decay": 1e-3}], lr=1.0, momentum=0.9, nesterov=True)
    strategy.arch.requires_grad_(True)
    return strategy, supernet, network, context


def test_second_order_equals_finite_differences():
    strategy, supernet, network, context = smooth()
    weights = [p for p in network.parameters() if p.requires_grad]
    with untracked(supernet):
        nn.utils.clip_grad_norm_(weights, 1.0)
        context.loss(context.draw_weights()).backward()
        context.optimizer.step()  # so that there is momentum
        context.optimizer.zero_grad()
        before = {n: v.clone() for n, v in network.state_dict().items()}
        arch = list(strategy.arch.values())
        first = alpha_gradient(context, arch, 1)[0]
        exact = alpha_gradient(context, arch, 2)[0]
        close = alpha_gradient(context, arch, "fd", radius=1e-3)[0]
    assert float((exact - close).norm() / exact.norm()) < 1e-6
    assert float((exact - first).norm() / exact.norm()) > 1e-3, "the second order changes something"
    assert all(torch.equal(v, network.state_dict()[n]) for n, v in before.items()), "weights and statistics stay as they were"
    assert all(p.grad is None for p in weights)


def test_second_order_is_the_derivative_of_the_loss_after_the_step():
    "By brute force: move one alpha, let the optimizer take its step, and see what the validation loss does."
    strategy, supernet, network, context = smooth()
    alpha = strategy.arch["alpha"]
    with untracked(supernet):
        exact = alpha_gradient(context, [alpha], 2)[0]
        weights = {n: p for n, p in network.named_parameters() if p.requires_grad}
        for edge, candidate in ((0, SEP), (3, len(CANDIDATES) - 1)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    alpha[edge, candidate] += sign * 1e-5
                gradients = torch.autograd.grad(context.loss(context.draw_weights()), list(weights.values()))
                moved, _ = ahead(context.optimizer, weights, dict(zip(weights, gradients)))
                values.append(float(context.loss(context.draw(), moved).detach()))
                with torch.no_grad():
                    alpha[edge, candidate] -= sign * 1e-5
            numeric = (values[0] - values[1]) / 2e-5
            assert numeric == pytest.approx(float(exact[edge, candidate]), rel=1e-4, abs=1e-9)


def test_ahead_is_where_the_optimizer_goes():
    strategy, supernet, network, context = smooth()
    weights = {n: p for n, p in network.named_parameters() if p.requires_grad}
    with untracked(supernet):
        for _ in range(2):  # without momentum and with it
            context.optimizer.zero_grad()
            context.loss(context.draw_weights()).backward()
            moved, factors = ahead(context.optimizer, weights, {n: p.grad for n, p in weights.items()})
            context.optimizer.step()
            assert all(torch.allclose(p, moved[n], rtol=0, atol=1e-14) for n, p in weights.items())
    assert set(factors.values()) == {0.05 * 1.9}


@pytest.mark.parametrize("order", [2, "fd"])
def test_orders_search(order):
    plain, other = (quick(strategy="darts", strategy_options={"order": o}, epochs=2) for o in (1, order))
    assert torch.isfinite(other.path).all() and not torch.equal(plain.path[-1], other.path[-1])


def test_reach_has_two_ends():
    assert reach(6e-4, 1.0, 100_000) == 6e-4 and reach(6e-4, 1.0, 100) == 0.02 and reach(6e-4, 1.0, 3) == MAX_RATE
    assert reach(3e-4, 4.0, 100) == 0.05


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
    assert bool((strategy.coefficients(1, False)[:, -1] == inherited).all()) and bool((strategy.coefficients(1, False).sum(1) == 1).all())
    start = strategy.scores()
    assert torch.allclose(start[inherited, -1], torch.tensor(0.9), atol=0.01) and torch.allclose(start[~inherited, NONE], torch.tensor(0.9), atol=0.01)
    temperatures = []
    for strategy.taken in (0, 50, 100, 500):
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
    strategy.renew = lambda context: strategy.arch["operation_penalty"].data.fill_(1.0)
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
    strategy.renew = lambda context: strategy.arch["operation_penalty"].data.copy_(torch.linspace(2.0, 1.0, len(CANDIDATES)).expand_as(strategy.mask))
    for _ in range(40):
        strategy.arch["operation"].grad = torch.zeros_like(strategy.arch["operation"])
        strategy.arch_step(context)
    strongest = strategy.coefficients(1, False).abs().amax(1)
    for node in range(1, len(strategy.graph.nodes)):
        assert float(max(strongest[i] for i, _ in strategy.graph.incoming(node)).detach()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_scores_put_the_original_first_at_the_start(name):
    strategy, *_ = started(name)
    assert [c in ("original", "none") for c in strategy.decide()] == [True] * len(strategy.mask)
    assert strategy.scores().shape == strategy.mask.shape and bool((strategy.scores()[~strategy.mask.cpu()] == 0).all())


@pytest.mark.parametrize("name", ["snas", "bayesnas"])
def test_one_level_strategies_resume(name, tmp_path, monkeypatch):
    from archrepair.training import fit as training

    straight = quick(strategy=name)
    save, saved = training._save, []

    def killed(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        quick(strategy=name, checkpoint=tmp_path / "s.pt")
    monkeypatch.setattr(training, "_save", save)
    resumed = quick(strategy=name, checkpoint=tmp_path / "s.pt")
    assert torch.equal(straight.path, resumed.path) and straight.genotype == resumed.genotype
    assert all(torch.equal(v, resumed.block.state_dict()[n]) for n, v in straight.block.state_dict().items())


def test_single_level_architectures_stand_still_during_the_warm_up():
    for name in ("snas", "bayesnas"):
        result = quick(strategy=name, warmup=0.5)
        moved = [not torch.equal(result.path[0], scores) for scores in result.path]
        assert not any(moved[:len(moved) // 2]) and moved[-1]


def test_perturbation_keeps_what_hurts_most_when_removed(tmp_path):
    whole, again = (quick(select="perturb", epochs=2, checkpoint=tmp_path / "c.pt") for _ in range(2))  # the second only reads
    assert whole.genotype == again.genotype
    assert (tmp_path / "c.perturb.pt").exists() and whole.genotype.live()
    assert "skip" not in quick(select="perturb", epochs=1, max_skip=0).genotype.choices
    with pytest.raises(ArchrepairError, match="selection"):
        quick(select="best")


def test_perturbation_by_hand():
    from archrepair.nas.removal import Removal
    from archrepair.repair.search import Relaxed

    strategy, supernet, *_ = started("darts")
    relaxed = Relaxed(supernet, strategy)
    worth = torch.rand(strategy.mask.shape, generator=torch.Generator().manual_seed(0)) - 0.3
    decided = Removal(relaxed, lambda: -float((worth * relaxed.allowed)[:, 1:].masked_fill(~strategy.mask[:, 1:], 0.0).sum()), None, 0)
    choices = decided.result()
    for row, mask, choice in zip(worth, strategy.mask, choices):
        value = torch.where(mask, row, -1.0)
        value[NONE] = 0.0
        assert choice == CANDIDATES[int(value.argmax())]
    assert bool((relaxed.allowed.sum(1) == 1).all())


def test_mistakes():
    for name, options, message in (("darts", {"order": 3}, "order"), ("snas", {"confidence": 1.0}, "confidence"), ("snas", {"tau": 1}, "strategy snas"),
                                   ("bayesnas", {"sparsity": 0}, "sparsity"), ("bayesnas", {"updates": 0}, "updates"), ("pc-darts", {"channel_k": 0}, "channel_k")):
        with pytest.raises(ArchrepairError, match=message):
            make_strategy(name, **options)
