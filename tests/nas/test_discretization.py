"From scores to a network: choices that connect input and output, and weights that compute what the mixture did."
import random
from dataclasses import replace

import pytest
import torch

from archrepair.nas.discretization import discretize, guard
from archrepair.nas.genotype import Genotype
from archrepair.nas.operations import CANDIDATES
from support.families import hard, relaxed, run, start
from support.relaxations import case


@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet50", "layer3"), ("densenet121", 4)])
def test_guard_connects_anything(name, block):
    _, _, graph = case(name, block)
    rng = random.Random(0)
    scores = torch.rand(len(graph.edges), len(CANDIDATES), generator=torch.Generator().manual_seed(0))
    for trial in range(60):
        sparse = [rng.choice(e.candidates) if rng.random() < 0.3 else "none" for e in graph.edges]
        choices, restored = guard(graph, sparse if trial else ["none"] * len(graph.edges), scores)
        alive = [(e.source, e.target) for e, c in zip(graph.edges, choices) if c != "none"]
        forwards, backwards = {0}, {len(graph.nodes) - 1}
        for source, target in sorted(alive):
            forwards |= {target} if source in forwards else set()
        for source, target in sorted(alive, key=lambda p: -p[1]):
            backwards |= {source} if target in backwards else set()
        assert len(graph.nodes) - 1 in forwards and 0 in backwards
        assert all(s in forwards and t in backwards for s, t in alive)
        assert trial or restored
        assert guard(graph, choices, scores) == (choices, [])


def test_the_guard_knows_what_remains_outside_the_slice():
    "None won in every slice; where inherited layers remain outside it, nothing is erased and nothing has to be restored."
    _, _, graph = case("resnet18", "layer2")
    nothing = ["none"] * len(graph.edges)
    inherited = [i for i, e in enumerate(graph.edges) if e.inherited is not None]
    assert guard(graph, nothing, start(graph), inherited) == (tuple(nothing), [])
    chosen = ["sep_conv" if e.inherited is not None and e.source == 0 and e.target == 1 else "none" for e in graph.edges]
    assert guard(graph, chosen, start(graph), inherited)[0] == tuple(chosen), "what feeds a layer that remains stays"
    assert guard(graph, nothing, start(graph))[1], "without slices the originals come back"


@pytest.mark.parametrize("widen", ["keep", "slice"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet50", "layer2"), ("densenet121", 4), ("vgg16", 1)])
def test_discretized_equals_supernet_with_hard_coefficients(name, block, k, widen):
    cut, x, graph = case(name, block)
    supernet, rng = relaxed(cut.block, graph, k, noise=0.3), random.Random(1)
    for _ in range(3):
        choices, _ = guard(graph, [rng.choice(e.candidates) for e in graph.edges], start(graph))
        genotype = Genotype(graph, choices, tuple(rng.uniform(0.4, 1.3) for _ in choices), supernet.channel_parts, widen)
        for train in (False, True):
            expected = run(supernet, x, hard(genotype), train=train)
            y = run(discretize(supernet, genotype, cut.block), x, train=train)
            assert torch.allclose(y, expected, atol=2e-5 * float(expected.abs().max())), (choices, train)
            if genotype.choices.count("none") < len(choices):
                unfolded = run(discretize(supernet, genotype, cut.block, folded=False), x, train=train)
                assert not torch.allclose(unfolded, expected, atol=1e-4)


def test_widened_operations_can_learn_outside_their_slice():
    cut, x, graph = case("resnet18", "layer2")
    supernet = relaxed(cut.block, graph, 4, noise=0.3)
    choices = tuple("sep_conv" if e.key == "0_4" else "original" if e.inherited is not None else "none" for e in graph.edges)
    genotype = Genotype(graph, choices, (1.0,) * len(choices), supernet.channel_parts)
    repaired = discretize(supernet, genotype, cut.block).requires_grad_(True).train()
    assert repaired.added["0_4"][-1].num_features == 16
    repaired(x).square().sum().backward()
    index = next(i for i, e in enumerate(graph.edges) if e.key == "0_4")
    begin, length = supernet.slices[index].target
    outside = [c for c in range(16) if not begin <= c < begin + length]
    assert bool((repaired.added["0_4"][-1].weight[outside] == 0).all())
    assert bool((repaired.added["0_4"][-1].weight.grad[outside] != 0).any())
    choices = tuple("dil_conv" if edge.key == "1_2" else choice for edge, choice in zip(graph.edges, choices))
    full = replace(genotype, choices=choices, widen="full")
    assert "1_2" not in discretize(supernet, full, cut.block).inherited and "1_2" in repaired.inherited
