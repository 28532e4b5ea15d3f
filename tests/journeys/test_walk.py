"All six networks, all their blocks, all four strategies: one step of the search, and the network that leaves it."
import copy

import pytest
import torch
from torch import nn

from archrepair.nas.discretization import discretize, guard
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import extract
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.strategies import STRATEGIES, make_strategy
from archrepair.nas.strategy import ArchContext
from archrepair.nas.supernet import SuperNet
from archrepair.repair.search import Relaxed, SearchRecipe, weight_groups
from archrepair.training.fit import Recipe, sgd
from support.families import NETWORKS, run, walk

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


class Head(nn.Module):
    "A frozen rest of the network behind a block."

    def __init__(self, block: nn.Module, channels: int):
        super().__init__()
        self.block, self.norm, self.out = block, nn.BatchNorm2d(channels), nn.Linear(channels, 10)
        nn.init.normal_(self.out.weight, generator=torch.Generator().manual_seed(0))
        self.norm.requires_grad_(False), self.out.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.block(x)).mean((2, 3)))


def step(place, name):
    "One step of weights and architecture; returns strategy, supernet and the block as it was."
    before = copy.deepcopy(place.block.state_dict())
    graph = extract(place.block, place.x)
    strategy, generator = make_strategy(name), torch.Generator().manual_seed(0)
    strategy.start(graph, 10, generator=generator)
    supernet = SuperNet(place.block, graph, channel_k=strategy.channel_k, generator=generator)
    relaxed = Relaxed(supernet, strategy)
    expected = run(place.block, place.x)
    assert torch.equal(run(relaxed, place.x), expected), "relaxed equals original"
    network = Head(relaxed, expected.shape[1]).eval()
    rest = {n: v.clone() for n, v in network.state_dict().items() if not n.startswith("block.")}
    supernet.train()
    batch, labels = place.x, torch.arange(len(place.x))
    optimizer = sgd(weight_groups(supernet, SearchRecipe()), Recipe(epochs=1))

    def loss(batch, parameters=None):
        logits = network(*batch) if parameters is None else torch.func.functional_call(network, parameters, batch)
        return nn.functional.cross_entropy(logits, labels)

    context = ArchContext(network, supernet, lambda: (batch,), lambda: (batch,), loss, optimizer)
    arch = {n: p.detach().clone() for n, p in strategy.arch.items()}
    weights = {n: p.detach().clone() for n, p in supernet.named_parameters()}
    for _ in range(2):  # in the first one only the last factors of silent operations have a gradient
        if strategy.bilevel:
            strategy.arch_step(context)
        optimizer.zero_grad()
        loss((batch,)).backward()
        optimizer.step()
        if not strategy.bilevel:
            strategy.arch_step(context)
    assert any(not torch.equal(p.detach(), arch[n]) for n, p in strategy.arch.items()), "the architecture has moved"
    assert any(not torch.equal(p.detach(), weights[n]) for n, p in supernet.named_parameters())
    assert all(torch.equal(v, network.state_dict()[n]) for n, v in rest.items()), "nothing but the block has moved"
    assert all(torch.equal(v, before[n]) for n, v in place.block.state_dict().items()), "the original is untouched"
    return strategy, supernet


@pytest.mark.parametrize("strategy_name", list(STRATEGIES))
@pytest.mark.parametrize("network_name", NETWORKS)
def test_walk(network_name, strategy_name):
    places = list(walk([network_name]))
    for i, place in enumerate(places):
        strategy, supernet = step(place, strategy_name)
        # A decision that changes something.
        scores = torch.rand(strategy.mask.shape, generator=torch.Generator().manual_seed(i)) * strategy.mask
        choices, _ = guard(strategy.graph, [CANDIDATES[int(row.argmax())] for row in scores], scores)
        c = strategy.coefficients(1, False).detach()
        strengths, shares = tuple(float(row.max()) or 1.0 for row in c), supernet.channel_parts
        genotype = Genotype(strategy.graph, choices, strengths, shares, strategy=strategy_name)
        block = discretize(supernet.eval(), genotype, place.block).eval()
        with torch.no_grad():
            y = block(place.x)
            again = Genotype.from_json(genotype.to_json()).build(place.block).eval()
            again.load_state_dict(block.state_dict())
            assert y.shape == run(place.block, place.x).shape and bool(torch.isfinite(y).all()) and torch.equal(again(place.x), y)
            if i % 12 == 0:
                assert torch.allclose(torch.jit.trace(block, place.x, check_trace=False)(place.x), y, atol=1e-5)
    if strategy_name == list(STRATEGIES)[NETWORKS.index(network_name) % len(STRATEGIES)]:
        batch = torch.export.Dim("batch", min=1)
        exported = torch.export.export(block, (place.x,), dynamic_shapes=({0: batch},)).module()
        assert torch.allclose(exported(place.x[:3]), block(place.x[:3]), atol=1e-5)

