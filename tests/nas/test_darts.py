"DARTS and PC-DARTS: gradients of first and second order, and how far α can move."
import copy

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.darts import MAX_RATE, ahead, alpha_gradient, reach
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.strategies import make_strategy
from archrepair.nas.supernet import untracked
from support.searches import quick, setting, started

SEP = CANDIDATES.index("sep_conv")


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
    group = {"params": list(supernet.parameters()), "lr": 0.05, "weight_decay": 1e-3}
    context.optimizer = torch.optim.SGD([group], lr=1.0, momentum=0.9, nesterov=True)
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


@pytest.mark.parametrize("name", ["darts", "pc-darts"])
def test_the_original_enters_with_one_and_edges_with_the_same_weight(name):
    strategy, *_ = started(name)
    c = strategy.coefficients(1, True).detach()
    assert bool((c[:, -1][strategy.mask[:, -1]] == 1).all())
    assert torch.equal(strategy.edge_weights(), torch.ones(len(c)))


def test_edge_normalization_balances_the_edges_into_a_node():
    strategy, *_ = started("pc-darts")
    strategy.arch["beta"].data.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    for node in range(1, len(strategy.graph.nodes)):
        incoming = [i for i, _ in strategy.graph.incoming(node)]
        expected = len(incoming) * strategy.arch["beta"].detach()[incoming].softmax(0)  # |In(j)| · softmax(β)
        assert torch.allclose(strategy.edge_weights()[incoming], expected)


@pytest.mark.parametrize("name, options, message", [("darts", {"order": 3}, "order"), ("pc-darts", {"channel_k": 0}, "channel_k")])
def test_options_out_of_range(name, options, message):
    with pytest.raises(ArchrepairError, match=message):
        make_strategy(name, **options)
