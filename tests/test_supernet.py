"Graph, supernet, genotype: function preserved, connected, discretised exactly, exportable."
import copy
import functools
import random

import pytest
import torch
from torch import nn

from archrepair.blocks import block_names, split
from archrepair.errors import ArchrepairError
from archrepair.genotype import Genotype, Slice
from archrepair.graph import BlockGraph, CannotRelax, extract
from archrepair.models import create_model
from archrepair.operations import CANDIDATES
from archrepair.supernet import SuperNet, discretise, guard, recalibrate, untracked

ORIGINAL = len(CANDIDATES) - 1


@functools.cache
def case(name, block):
    "The cut, features that enter the block, and its graph, for a narrow network with BatchNorm statistics that are not the default."
    model = create_model(name, 5, width=0.125, stem_stride=2)
    block = block_names(model)[block] if isinstance(block, int) else block
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.running_var, m.weight.data):
                value.uniform_(0.5, 1.5, generator=generator)
            m.running_mean.uniform_(-0.2, 0.2, generator=generator)
    cut = split(model, block)
    x = cut.features(torch.randn(6, 3, 32, 32, generator=generator))
    return cut, x, extract(cut.block, x)


@pytest.fixture
def forked():
    "Constructors of layers draw from the global stream; here that is put back."
    with torch.random.fork_rng(devices=[]):
        yield


def relaxed(cut, graph, k=None, *, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    supernet = SuperNet(cut.block, graph, channel_k=k, generator=generator)
    for p in supernet.added.parameters() if noise else ():
        p.data += noise * torch.randn(p.shape, generator=generator)
    return supernet


def start(graph):
    return torch.tensor([0.1] * ORIGINAL + [1.0]).repeat(len(graph.edges), 1)


def run(module, *inputs, train):
    "Output without gradients; dropout and stochastic depth draw from one seed."
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return copy.deepcopy(module).train(train)(*inputs)


CASES = [("resnet18", "layer1"), ("resnet18", "layer2"), ("resnet18", "layer4"), ("resnet50", "layer1"), ("resnet50", "layer3"),
         ("vgg16", 1), ("densenet121", 4), ("efficientnet_b0", 2)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize("name, block", CASES)
def test_relaxed_equals_original(name, block, k, train):
    cut, x, graph = case(name, block)
    expected = run(cut.block, x, train=train)
    assert torch.equal(run(relaxed(cut, graph, k), x, start(graph), train=train), expected)
    assert not torch.allclose(run(relaxed(cut, graph, k, noise=0.5), x, start(graph), train=train), expected, atol=1e-3)


def test_graphs_of_the_families():
    levels = {name: case(name, block)[2].level for name, block in CASES}
    assert levels == {"resnet18": "conv", "resnet50": "unit", "vgg16": "conv", "densenet121": "conv", "efficientnet_b0": "unit"}
    graph = case("resnet18", "layer4")[2]
    assert len(graph.nodes) == 5 and len(graph.edges) == 10
    assert {e.key for e in graph.edges if e.inherited is not None} == {"0_1", "1_2", "0_2", "2_3", "3_4", "2_4"}
    assert graph.edges[0].stride == 2 and next(e for e in graph.edges if e.key == "2_4").inherited == ()
    assert len(case("resnet50", "layer3")[2].edges) == 21 and case("vgg16", 1)[2].wrapper == "6"
    assert case("densenet121", 4)[2].wrapper == "concat"
    assert BlockGraph.from_dict(graph.as_dict()) == graph


def test_edge_budget_and_levels():
    cut, x, _ = case("resnet50", "layer3")
    small = extract(cut.block, x, max_edges=10)
    assert len(small.edges) <= 11 and small.max_span == 1 or len(small.edges) <= 10
    assert "left out" in small.note
    conv = extract(cut.block, x, level="conv", max_span=1)
    assert conv.level == "conv" and len(conv.nodes) == 19
    assert torch.equal(run(relaxed(cut, conv), x, start(conv), train=True), run(cut.block, x, train=True))
    unit = extract(case("vgg16", 1)[0].block, case("vgg16", 1)[1], level="unit")
    assert unit.level == "unit" and len(unit.nodes) == 3


def test_foreign_blocks_are_refused_by_name(forked):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mix(x, x, x)[0]

    with pytest.raises(CannotRelax, match=r"no Conv2d but mix \(MultiheadAttention\)"):
        extract(Tokens(), torch.zeros(2, 4, 8))
    with pytest.raises(ArchrepairError, match="level"):
        extract(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4), level="layer")
    one = extract(nn.Conv2d(3, 6, 3, 2, 1), torch.zeros(1, 3, 9, 9))  # the layer level of Table 10
    assert len(one.edges) == 1 and one.edges[0].stride == 2


def test_functional_style_and_preactivation_blocks(forked):
    class Pre(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x):
            y = self.conv1(torch.relu(self.bn1(x)))
            return self.conv2(nn.functional.relu(self.bn2(y))) + x

    block, x = nn.Sequential(Pre(), Pre()).eval(), torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = extract(block, x)
    assert graph.level == "conv" and len(graph.nodes) == 5
    supernet = SuperNet(block, graph, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(supernet, x, start(graph), train=True), run(block, x, train=True), atol=1e-6)


def test_channels_outside_the_slice_depend_on_the_original_alone():
    cut, x, graph = case("resnet18", "layer4")
    supernet, c = relaxed(cut, graph, 4, noise=0.3).eval(), start(graph)
    for key in ("0_4", "3_4"):  # an extra edge, an inherited one
        index = next(i for i, e in enumerate(graph.edges) if e.key == key)
        other = c.clone()
        other[index] = torch.linspace(0.2, 0.8, len(CANDIDATES))
        begin, length = supernet.slices[index].target
        changed = (run(supernet, x, c, train=False) - run(supernet, x, other, train=False)).abs().amax((0, 2, 3))
        inside = torch.zeros_like(changed, dtype=torch.bool)
        inside[begin:begin + length] = True
        assert bool((changed[~inside] == 0).all()) and float(changed[inside].max()) > 0


def test_slices():
    graph = case("resnet18", "layer4")[2]
    assert [Slice.of(graph, i, 4).part for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert Slice.of(graph, 0, None).k == 2 and Slice.of(graph, 2, 5).k == 4  # 64 channels, no fifth of which is whole


def test_coefficients_of_each_sample():
    cut, x, graph = case("resnet18", "layer2")
    supernet = relaxed(cut, graph, 2, noise=0.3)
    c = torch.rand(len(graph.edges), len(CANDIDATES), generator=torch.Generator().manual_seed(0))
    each = c[:, :, None, None, None, None].expand(-1, -1, len(x), 1, 1, 1)
    assert torch.allclose(run(supernet, x, c, train=True), run(supernet, x, each, train=True), atol=1e-5)


def test_gradients_stay_in_the_block_and_statistics_where_they_were():
    cut, x, graph = case("resnet18", "layer3")
    supernet = relaxed(cut, graph).requires_grad_(True).train()
    before = {n: b.clone() for n, b in supernet.named_buffers()}
    with untracked(supernet):
        cut.suffix(supernet(x, start(graph))).sum().backward()
    assert all(torch.equal(before[n], b) for n, b in supernet.named_buffers())
    assert all(p.grad is None for p in cut.model.parameters()) and any(p.grad is not None for p in supernet.parameters())
    last = [op[-1] for ops in supernet.added.values() for op in ops.values()]
    assert sum(float(norm.weight.grad.abs().sum()) > 0 for norm in last) > len(last) / 2  # silent, but not dead
    supernet(x, start(graph))
    assert not all(torch.equal(before[n], b) for n, b in supernet.named_buffers())


def random_choices(graph, rng):
    return [rng.choice(e.candidates) for e in graph.edges]


@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet50", "layer3"), ("densenet121", 4)])
def test_guard_connects_anything(name, block):
    _, _, graph = case(name, block)
    rng = random.Random(0)
    scores = torch.rand(len(graph.edges), len(CANDIDATES), generator=torch.Generator().manual_seed(0))
    for trial in range(60):
        picked = ["none"] * len(graph.edges) if trial == 0 else [c if rng.random() < 0.3 else "none" for c in random_choices(graph, rng)]
        choices, given_back = guard(graph, picked, scores)
        alive = [(e.source, e.target) for e, c in zip(graph.edges, choices) if c != "none"]
        forwards, backwards = {0}, {len(graph.nodes) - 1}
        for source, target in sorted(alive):
            forwards |= {target} if source in forwards else set()
        for source, target in sorted(alive, key=lambda p: -p[1]):
            backwards |= {source} if target in backwards else set()
        assert len(graph.nodes) - 1 in forwards and 0 in backwards
        assert all(s in forwards and t in backwards for s, t in alive)
        assert trial or given_back
        assert guard(graph, choices, scores) == (choices, [])


def hard(genotype):
    c = torch.zeros(len(genotype.choices), len(CANDIDATES))
    for i, choice in enumerate(genotype.choices):
        c[i, CANDIDATES.index(choice)] = genotype.coefficients[i]
    return c


@pytest.mark.parametrize("widen", ["keep", "slice"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet50", "layer2"), ("densenet121", 4), ("vgg16", 1)])
def test_discretised_equals_supernet_with_hard_coefficients(name, block, k, widen):
    cut, x, graph = case(name, block)
    supernet, rng = relaxed(cut, graph, k, noise=0.3), random.Random(1)
    for _ in range(3):
        choices, _ = guard(graph, random_choices(graph, rng), start(graph))
        genotype = Genotype(graph, choices, tuple(rng.uniform(0.4, 1.3) for _ in choices), tuple(s.k for s in supernet.slices), widen)
        for train in (False, True):
            expected = run(supernet, x, hard(genotype), train=train)
            found = run(discretise(supernet, genotype, cut.block), x, train=train)
            assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max())), (choices, train)
            if genotype.choices.count("none") < len(choices):
                unfolded = run(discretise(supernet, genotype, cut.block, folded=False), x, train=train)
                assert not torch.allclose(unfolded, expected, atol=1e-4)


def test_widened_operations_can_learn_outside_their_slice():
    cut, x, graph = case("resnet18", "layer2")
    supernet = relaxed(cut, graph, 4, noise=0.3)
    choices = tuple("sep_conv" if e.key == "0_4" else "original" if e.inherited is not None else "none" for e in graph.edges)
    ks = tuple(s.k for s in supernet.slices)
    repaired = discretise(supernet, Genotype(graph, choices, (1.0,) * len(choices), ks), cut.block).requires_grad_(True).train()
    assert repaired.added["0_4"][-1].num_features == 16
    repaired(x).square().sum().backward()
    index = next(i for i, e in enumerate(graph.edges) if e.key == "0_4")
    begin, length = supernet.slices[index].target
    outside = [c for c in range(16) if not begin <= c < begin + length]
    assert bool((repaired.added["0_4"][-1].weight[outside] == 0).all())
    assert bool((repaired.added["0_4"][-1].weight.grad[outside] != 0).any())
    full = Genotype(graph, tuple("dil_conv" if e.key == "1_2" else c for e, c in zip(graph.edges, choices)), (1.0,) * len(choices), ks, "full")
    assert "1_2" not in discretise(supernet, full, cut.block).inherited and "1_2" in repaired.inherited


def test_genotype_round_trip_and_the_original_exactly():
    for name, block in CASES:
        cut, x, graph = case(name, block)
        original = Genotype.original(graph, [Slice.of(graph, i, None).k for i in range(len(graph.edges))])
        assert original.is_original and Genotype.from_json(original.to_json()) == original
        for train in (False, True):
            assert torch.equal(run(original.build(cut.block), x, train=train), run(cut.block, x, train=train))
    for text in ("", "{}", "[1]", original.to_json().replace('"original"', '"magic"')):
        with pytest.raises(ArchrepairError):
            Genotype.from_json(text)


def searched(name="resnet18", block="layer2", coefficient=1 / 3):
    cut, x, graph = case(name, block)
    supernet = relaxed(cut, graph, None, noise=0.3)
    picked = {"0_1": "original", "0_2": "max_pool", "1_2": "none", "0_3": "dil_conv", "0_4": "sep_conv"}
    choices = tuple(picked.get(e.key, "original" if e.inherited is not None else "none") for e in graph.edges)
    genotype = Genotype(graph, choices, (coefficient,) * len(choices), tuple(s.k for s in supernet.slices))
    return cut, x, genotype, discretise(supernet, genotype, cut.block).eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_saved_block_is_built_again_on_the_original(name):
    cut, x, genotype, repaired = searched(name)
    before = copy.deepcopy(cut.block.state_dict())
    again = Genotype.from_json(genotype.to_json()).build(cut.block)
    assert not torch.allclose(run(again, x, train=False), run(repaired, x, train=False), atol=1e-3)
    again.load_state_dict(repaired.state_dict())
    assert torch.equal(run(again, x, train=False), run(repaired, x, train=False))
    assert all(torch.equal(v, cut.block.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet50", "layer2")])
def test_a_neutral_block_computes_what_the_original_does(name, block):
    cut, x, genotype, repaired = searched(name, block, coefficient=0.6)
    neutral = genotype.build(cut.block, neutral=True)
    assert all(neutral.state_dict()[n].shape == v.shape for n, v in repaired.state_dict().items())
    assert neutral.state_dict().keys() == repaired.state_dict().keys()
    assert torch.equal(run(neutral, x, train=True), run(cut.block, x, train=True))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_export_and_trace(name):
    cut, x, _, repaired = searched(name)
    network = cut.tail(repaired).eval().requires_grad_(False)
    expected = network(x)
    assert torch.allclose(torch.jit.trace(network, x)(x[:2]), network(x[:2]), atol=1e-6)
    assert torch.allclose(torch.export.export(network, (x,)).module()(x), expected, atol=1e-6)
    dynamic = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    assert torch.allclose(dynamic(x[:3]), expected[:3], atol=1e-5)


def test_recalibration_averages_over_batches():
    _, x, _, repaired = searched()
    norm = repaired.inherited["0_1"][1]
    batches, momentum = [x[:3], 2 * x[3:]], norm.momentum
    recalibrate(repaired, iter(batches))
    means = [repaired.inherited["0_1"][0](b).mean((0, 2, 3)) for b in batches]
    assert torch.allclose(norm.running_mean, sum(means) / 2, atol=1e-5) and norm.momentum == momentum and not repaired.training
