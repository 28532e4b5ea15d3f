"Small networks, rows of tensors, and the check that a population equals the loop over its members."
import copy

import torch
from torch import nn

from archrepair.baselines.parts.patches import Population, downstream, patch
from archrepair.training.rows import Features


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows_of(x: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(labels, lambda positions, view: x[positions])


def small_net(inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 5, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(80, 3)).eval()


def members(there, sites, count=5, seed=3):
    before = torch.stack([there.modules[s.layer].weight.detach()[s.index] for s in sites])
    return before + 0.5 * rand(count, len(sites), seed=seed, dtype=torch.float32)


def assert_equal_the_loop(network, layers, x, sites):
    there = downstream(network, layers)
    population, values = Population(there, sites), members(there, sites)
    got = population.logits(values, there.cut.features(x))
    for member, logits in zip(values, got):
        alone = patch(copy.deepcopy(network).eval(), sites, member.tolist())
        with torch.no_grad():
            assert torch.allclose(logits, alone(x), atol=2e-5 * max(1.0, float(logits.abs().max())))
    with torch.no_grad():
        assert not torch.allclose(got[0], network(x), atol=1e-4), "the patches do nothing"
    return population, values
