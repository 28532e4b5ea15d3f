"Graph, supernet, genotype: function preserved, connected, discretized exactly, exportable."
import copy
import functools
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from archrepair.core.errors import ArchrepairError
from archrepair.nas.genotype import Genotype, Slice
from archrepair.nas.graph import BlockGraph, CannotRelax, extract
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.supernet import SuperNet, depthwise, discretize, guard, recalibrate, untracked
from archrepair.networks.blocks import block_names, split
from archrepair.networks.models import create_model

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


def op_by_op(supernet, x, coefficients):
    "The definition (eq. 7, 8): one operation after the other, each output times its coefficient, at its place among the channels."
    values = [x]
    for node, post in enumerate(supernet.posts, 1):
        channels, total = supernet.graph.nodes[node].shape[0], 0
        for index, edge in supernet.graph.incoming(node):
            source, cut, c = values[edge.source], supernet.slices[index], coefficients[index]
            around = (cut.target[0], channels - sum(cut.target))
            if edge.inherited is not None:
                inside = nn.functional.pad(torch.ones(cut.target[1]), around).view(-1, 1, 1).to(x.dtype)
                total = total + supernet.inherited[edge.key](source) * (1 - inside + c[-1] * inside)
            for name, operation in supernet.added[edge.key].items():
                y = c[CANDIDATES.index(name)] * operation(source.narrow(1, *cut.source))
                total = total + nn.functional.pad(y, (0, 0, 0, 0, *around))
        values.append(post(total))
    y = supernet.last(values[-1])
    return torch.cat([x, y], 1) if supernet.graph.wrapper == "concat" else y


def of_both_forms(name, block, k, result, *, dtype=torch.float64, mode=lambda supernet: supernet.train(), each=False):
    "`result(form, supernet, x, coefficients)` of the supernet and of the definition, on copies of one audible supernet."
    cut, x, graph = case(name, block)
    supernet = mode(relaxed(cut, graph, k, noise=0.3).to(dtype).requires_grad_(True))
    shape = (len(graph.edges), len(CANDIDATES), *((len(x), 1, 1, 1) if each else ()))
    c = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(True)
    found = []
    for form in (lambda net, x, c: net(x, c), op_by_op):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(result(form, copy.deepcopy(supernet), x.to(dtype).requires_grad_(True), c))
    return found


def apart(found):
    "The largest difference, relative to the tensor or, where it is nothing but rounding, to a millionth of the largest one."
    largest = max(float(b.abs().max()) for b in found[1])
    return max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6 * largest) for a, b in zip(*found, strict=True))


def everything(form, supernet, x, c):
    y = form(supernet, x, c)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, c, *supernet.parameters()], materialize_grads=True)]


@pytest.mark.parametrize("name, block, k, each", [*((*case, k, False) for case, k in zip(CASES, [None, 1, 4, 1, 4, None, None, 4])),
                                                  ("resnet18", "layer4", 1, False), ("resnet18", "layer2", 2, True), ("densenet121", 4, 1, True)])
def test_side_by_side_is_one_by_one(name, block, k, each):
    assert apart(of_both_forms(name, block, k, everything, each=each)) < 1e-8
    if name != "resnet50":  # the largest
        assert apart(of_both_forms(name, block, k, everything, each=each, mode=lambda supernet: supernet.eval())) < 1e-8


def test_side_by_side_in_single_precision():
    for name, block in (("resnet18", "layer3"), ("resnet50", "layer3")):
        found = of_both_forms(name, block, 4, everything, dtype=torch.float32)
        largest = max(float(b.abs().max()) for b in found[1][1:])
        assert all(float((a - b).abs().max()) < 1e-5 * max(largest, float(b.abs().max())) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name, block, k", [("resnet18", "layer4", 4), ("resnet50", "layer2", None), ("vgg16", 1, 1)])
def test_statistics_are_those_of_one_by_one(name, block, k, momentum):
    def statistics(form, supernet, x, c):
        for norm in supernet.modules():
            norm.momentum = momentum
        for i in range(3):
            form(supernet, x * (1 + i), c)
        return [v.double() for n, v in supernet.state_dict().items() if "running" in n or "num_batches" in n]

    assert apart(of_both_forms(name, block, k, statistics)) < 1e-9


@pytest.mark.parametrize("k", [1, 4])
def test_second_derivatives_are_those_of_one_by_one(k):
    def second(form, supernet, x, c):
        parameters = {n: p for n, p in supernet.named_parameters()}
        with untracked(supernet):
            gradients = torch.autograd.grad(form(supernet, x, c).square().mean(), list(parameters.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients)}
            if form is op_by_op:
                for (n, value) in moved.items():
                    owner = supernet.get_submodule(n.rpartition(".")[0])
                    delattr(owner, n.rpartition(".")[2])
                    setattr(owner, n.rpartition(".")[2], value)
                loss = op_by_op(supernet, x, c).square().mean()
            else:
                loss = torch.func.functional_call(supernet, moved, (x, c)).square().mean()
            return [loss.detach(), *torch.autograd.grad(loss, [c, *parameters.values()])]

    assert apart(of_both_forms("resnet18", "layer4", k, second)) < 1e-7


class Calls(TorchDispatchMode):
    "Every operation that runs within, with its arguments."

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function._overloadpacket.__name__, args))
        return function(*args, **(kwargs or {}))


def test_a_step_of_the_architecture_computes_no_gradient_of_weights_and_multiplies_no_map():
    cut, x, graph = case("resnet18", "layer4")
    supernet = relaxed(cut, graph, 4, noise=0.3).requires_grad_(True).train()
    c = start(graph).requires_grad_(True)
    with Calls() as steps, untracked(supernet):
        torch.autograd.grad(supernet(x, c).sum(), c)
    masks = [args[-1] for name, args in steps.calls if name == "convolution_backward"]
    assert masks and not any(mask[1] for mask in masks)
    maps = [args for name, args in steps.calls if name == "mul" and all(getattr(a, "ndim", 0) > 2 for a in args)]
    identities = sum(e.inherited == () for e in graph.edges)  # shortcuts, whose coefficient has no BatchNorm to go into
    assert len(maps) == 3 * identities  # forward, and back to features and to the coefficient
    norms = sum(name == "native_batch_norm" for name, _ in steps.calls)
    assert norms == len(supernet.bundles) * 6 + sum(len(layers) > 0 for layers in supernet.inherited.values())


@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (1, 3)])
def test_depthwise_is_a_convolution(stride, dilation):
    generator = torch.Generator().manual_seed(0)
    for height, width in ((1, 1), (2, 2), (2, 5), (3, 4), (4, 4), (5, 7), (8, 6), (9, 9)):
        x = torch.randn(3, 4, height, width, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        expected = nn.functional.conv2d(x, weight, None, stride, dilation, dilation, 4)
        found = depthwise(x, weight, stride, dilation)
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(y.pow(3).sum(), (x, weight)) for y in (found, expected))):
            assert torch.allclose(a, b, atol=1e-10)


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
def test_discretized_equals_supernet_with_hard_coefficients(name, block, k, widen):
    cut, x, graph = case(name, block)
    supernet, rng = relaxed(cut, graph, k, noise=0.3), random.Random(1)
    for _ in range(3):
        choices, _ = guard(graph, random_choices(graph, rng), start(graph))
        genotype = Genotype(graph, choices, tuple(rng.uniform(0.4, 1.3) for _ in choices), tuple(s.k for s in supernet.slices), widen)
        for train in (False, True):
            expected = run(supernet, x, hard(genotype), train=train)
            found = run(discretize(supernet, genotype, cut.block), x, train=train)
            assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max())), (choices, train)
            if genotype.choices.count("none") < len(choices):
                unfolded = run(discretize(supernet, genotype, cut.block, folded=False), x, train=train)
                assert not torch.allclose(unfolded, expected, atol=1e-4)


def test_widened_operations_can_learn_outside_their_slice():
    cut, x, graph = case("resnet18", "layer2")
    supernet = relaxed(cut, graph, 4, noise=0.3)
    choices = tuple("sep_conv" if e.key == "0_4" else "original" if e.inherited is not None else "none" for e in graph.edges)
    ks = tuple(s.k for s in supernet.slices)
    repaired = discretize(supernet, Genotype(graph, choices, (1.0,) * len(choices), ks), cut.block).requires_grad_(True).train()
    assert repaired.added["0_4"][-1].num_features == 16
    repaired(x).square().sum().backward()
    index = next(i for i, e in enumerate(graph.edges) if e.key == "0_4")
    begin, length = supernet.slices[index].target
    outside = [c for c in range(16) if not begin <= c < begin + length]
    assert bool((repaired.added["0_4"][-1].weight[outside] == 0).all())
    assert bool((repaired.added["0_4"][-1].weight.grad[outside] != 0).any())
    full = Genotype(graph, tuple("dil_conv" if e.key == "1_2" else c for e, c in zip(graph.edges, choices)), (1.0,) * len(choices), ks, "full")
    assert "1_2" not in discretize(supernet, full, cut.block).inherited and "1_2" in repaired.inherited


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
    return cut, x, genotype, discretize(supernet, genotype, cut.block).eval()


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


def test_the_guard_knows_what_lives_on_outside_the_slice():
    "None won in every slice; where inherited layers carry on outside it, nothing is erased and nothing has to be given back."
    _, _, graph = case("resnet18", "layer2")
    nothing = ["none"] * len(graph.edges)
    inherited = [i for i, e in enumerate(graph.edges) if e.inherited is not None]
    assert guard(graph, nothing, start(graph), inherited) == (tuple(nothing), [])
    chosen = ["sep_conv" if e.inherited is not None and e.source == 0 and e.target == 1 else "none" for e in graph.edges]
    assert guard(graph, chosen, start(graph), inherited)[0] == tuple(chosen), "what feeds a layer that lives on stays"
    assert guard(graph, nothing, start(graph))[1], "without slices the originals come back"
