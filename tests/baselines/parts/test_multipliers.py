"Multipliers: which neurons are responsible, that folding them is exact, and a population of them in one pass."
import copy

import pytest
import torch
from torch import nn

from archrepair.baselines.domains import as_features
from archrepair.baselines.parts.multipliers import Behavior, fold, matched, responsibility, scalable, scaled, search_multipliers
from archrepair.networks.models import create_model
from archrepair.networks.neurons import wire
from archrepair.training.evaluation import is_correct, predict
from support.families import NETWORKS
from support.states import assert_same_state, state_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, purpose)))


def places_of(network: nn.Module, layers: dict, count: int, seed: int = 0) -> list[tuple[str, int]]:
    every = [(layer, c) for layer in layers for c in range(network.get_submodule(layer).weight.shape[0])]
    some = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return [every[i] for i in some]


def test_responsibility():
    positive, negative = draw(50, 6).abs(), draw(20, 6, seed=1).abs()
    expected = (positive.mean(0) - negative.mean(0)).abs().double()
    torch.testing.assert_close(responsibility(positive, negative), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(responsibility(positive, negative.repeat(3, 1)), responsibility(positive, negative))  # means, not sums
    assert responsibility(positive, positive).eq(0).all() and responsibility(positive, positive, normalize=True).eq(0).all()
    assert responsibility(positive, positive.flip(0)).max() < 1e-12
    scale = torch.tensor([1.0, 1000.0, 0.001, 1.0, 1.0, 0.0])
    one, two = (responsibility(positive * s, negative * s, normalize=True) for s in (1.0, scale))
    torch.testing.assert_close(one[:5], two[:5], rtol=1e-5, atol=1e-8)
    assert two[5] == 0


def test_positives_are_drawn_as_frequent_as_the_labels_of_the_negatives():
    labels, pool = torch.tensor([0] * 6 + [1] * 3 + [4] * 1), torch.tensor([0] * 50 + [1] * 2 + [2] * 50)
    got = matched(labels, pool, 20, torch.Generator().manual_seed(0))
    assert torch.bincount(pool[got], minlength=3).tolist() == [12, 6, 0]
    assert len(set(got[pool[got] == 0].tolist())) == 12 and set(got[pool[got] == 1].tolist()) == {50, 51}
    assert len(matched(torch.tensor([3]), pool, 5, torch.Generator())) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_is_multiplied_on_every_network(name):
    network = create_model(name, 10, width=0.125, stem_stride=2, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as if trained: β that is not 0 shows whether it is multiplied too
        for p in network.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    x = draw(4, 3, 32, 32)
    wiring, before = wire(network, x[:1]), state_of(network)
    layers = scalable(network, wiring, x[:1])
    assert len(layers) == len(wiring.layers) + 1 and list(layers)[:-1] == list(wiring.layers)
    places = places_of(network, layers, 30)
    factors = 2 * torch.rand(3, 30, generator=generator)
    factors[0, :4] = 0.0
    with torch.no_grad():
        with scaled(network, layers, places, factors):
            together = network(x.repeat(3, 1, 1, 1)).view(3, 4, -1)
        assert_same_state(before, network)
        plain = network(x)
        for member, got in zip(factors, together):
            folded = fold(copy.deepcopy(network), layers, places, member)
            torch.testing.assert_close(folded(x), got, rtol=1e-4, atol=2e-5 * float(plain.abs().max()))
            assert folded.state_dict().keys() == network.state_dict().keys()
        assert (together[1] - plain).abs().max() > 1e-3 * plain.abs().max()
        same = fold(copy.deepcopy(network), layers, places, torch.ones(30))
        assert all(torch.equal(v, same.state_dict()[k]) for k, v in network.state_dict().items())
        with scaled(network, layers, places, torch.ones(1, 30)):
            assert torch.equal(network(x), plain)


def test_neurons_that_cannot_be_scaled_exactly_are_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.tied, self.twin = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.twin.weight = self.tied.weight
            self.normed, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)
            self.both, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.twin(self.tied(self.plain(x)).relu()).relu()
            x = self.norm(self.normed(x)).relu()
            x = self.bn(self.both(x)).relu()
            return self.head(self.computed(self.both(x).relu()).relu())

    network, x = Odd().eval(), draw(1, 4)
    assert list(scalable(network, wire(network, x), x)) == ["plain", "head"]


def test_no_cut_no_matter(problem):
    "What comes before the first neuron is computed once, wherever that is, and a network that cannot be cut is run whole."
    class Opaque(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.sum() > -1e9 else x

    x = draw(12, 3, 32, 32)
    allowed = nn.functional.one_hot(torch.arange(12) % 10, 10).bool()
    negative = torch.arange(12) < 5
    wiring = wire(problem.network, x[:1])
    layers = scalable(problem.network, wiring, x[:1])
    factors = 1 + 0.8 * (2 * torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) - 1)
    shares = []
    for first in ("conv1", "layer2.1.conv2", "layer4.0.downsample.0", "fc"):
        later = {layer: names for layer, names in layers.items() if list(layers).index(layer) >= list(layers).index(first)}
        places = sorted({(first, 1), *places_of(problem.network, later, 9)}, key=lambda p: (list(layers).index(p[0]), p[1] != 1))
        places = places[:9]
        behavior = Behavior.of(problem.network, first, x, allowed, negative)
        shares.append(behavior.share)
        networks = [fold(copy.deepcopy(problem.network), layers, places, row) for row in factors]
        expected = torch.stack([is_correct(predict(network, as_features(x)), torch.arange(12) % 10) for network in networks])
        assert torch.equal(behavior.good(layers, places, factors), expected)
        assert torch.equal(behavior.good(layers, places, factors, rows=10), expected)
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.01 and shares[0] == 1
    opaque = Opaque(problem.network)
    layers = scalable(opaque, wire(opaque, x[:1]), x[:1])
    behavior = Behavior.of(opaque, "inner.fc", x, allowed, negative)
    assert behavior.share == 1 and torch.equal(behavior.good(layers, [(f"inner.{n}", c) for n, c in places], factors), expected)


def test_the_swarm_finds_multipliers_and_never_does_worse_than_none():
    "Two inputs, two classes: the second must be turned down for the negatives to be right."
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    x = torch.tensor([[1.0, 1.5], [1.0, 1.6], [0.2, 3.0], [0.1, 2.0]])
    labels, negative = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, False, False])
    layers = scalable(network, wire(network, x[:1]), x[:1])
    behavior = Behavior.of(network, "0", x, nn.functional.one_hot(labels, 2).bool(), negative)
    passes = []
    search = lambda **more: search_multipliers(behavior, layers, [("0", 0), ("0", 1)], stream, on_pass=passes.append, speed=0.5, **more)
    found = search()
    assert -found.history[0]["best"] == 0.5 and found.fitness == 0.0 and found.best.abs().max() <= 1
    assert behavior.good(layers, [("0", 0), ("0", 1)], 1 + found.best[None]).all()
    assert sum(passes) == 20 * 4 * len(found.history)
    again = search()
    assert torch.equal(again.best, found.best)
    assert not search(iterations=0).best.any()
    blind = search(alpha=1.0)  # violations do not matter: nothing to gain
    assert blind.fitness == 0.0 and not blind.best.any()
