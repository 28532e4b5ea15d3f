"The relaxed block: at the start the block itself, and in every pass what its definition says, operation by operation."
import copy
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from archrepair.nas.graph import extract
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.supernet import SuperNet, depthwise, recalibrate, untracked
from support.families import relaxed, run, start
from support.relaxations import CASES, case, searched


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize("name, block", CASES)
def test_relaxed_equals_original(name, block, k, train):
    cut, x, graph = case(name, block)
    expected = run(cut.block, x, train=train)
    assert torch.equal(run(relaxed(cut.block, graph, k), x, start(graph), train=train), expected)
    assert not torch.allclose(run(relaxed(cut.block, graph, k, noise=0.5), x, start(graph), train=train), expected, atol=1e-3)


def test_channels_outside_the_slice_depend_on_the_original_alone():
    cut, x, graph = case("resnet18", "layer4")
    supernet, c = relaxed(cut.block, graph, 4, noise=0.3).eval(), start(graph)
    for key in ("0_4", "3_4"):  # an extra edge, an inherited one
        index = next(i for i, e in enumerate(graph.edges) if e.key == key)
        other = c.clone()
        other[index] = torch.linspace(0.2, 0.8, len(CANDIDATES))
        begin, length = supernet.slices[index].target
        changed = (run(supernet, x, c, train=False) - run(supernet, x, other, train=False)).abs().amax((0, 2, 3))
        inside = torch.zeros_like(changed, dtype=torch.bool)
        inside[begin:begin + length] = True
        assert bool((changed[~inside] == 0).all()) and float(changed[inside].max()) > 0


def test_coefficients_of_each_sample():
    cut, x, graph = case("resnet18", "layer2")
    supernet = relaxed(cut.block, graph, 2, noise=0.3)
    c = torch.rand(len(graph.edges), len(CANDIDATES), generator=torch.Generator().manual_seed(0))
    each = c[:, :, None, None, None, None].expand(-1, -1, len(x), 1, 1, 1)
    assert torch.allclose(run(supernet, x, c, train=True), run(supernet, x, each, train=True), atol=1e-5)


def test_gradients_stay_in_the_block_and_statistics_where_they_were():
    cut, x, graph = case("resnet18", "layer3")
    supernet = relaxed(cut.block, graph).requires_grad_(True).train()
    before = {n: b.clone() for n, b in supernet.named_buffers()}
    with untracked(supernet):
        cut.suffix(supernet(x, start(graph))).sum().backward()
    assert all(torch.equal(before[n], b) for n, b in supernet.named_buffers())
    assert all(p.grad is None for p in cut.model.parameters()) and any(p.grad is not None for p in supernet.parameters())
    last = [op[-1] for ops in supernet.added.values() for op in ops.values()]
    assert sum(float(norm.weight.grad.abs().sum()) > 0 for norm in last) > len(last) / 2  # silent, but not dead
    supernet(x, start(graph))
    assert not all(torch.equal(before[n], b) for n, b in supernet.named_buffers())


FORMS = SuperNet.forward, SuperNet.forward_reference


def of_both_forms(name, block, k, result, *, dtype=torch.float64, train=True, each=False):
    "`result(form, supernet, x, coefficients)` of the supernet and of its definition, on copies of one audible supernet."
    cut, x, graph = case(name, block)
    supernet = relaxed(cut.block, graph, k, noise=0.3).to(dtype).requires_grad_(True).train(train)
    return of_both(supernet, x, result, each=each)


def of_both(supernet, x, result, *, each=False):
    "The same for any supernet."
    x = x.to(next(supernet.added.parameters()).dtype)
    shape = (len(supernet.graph.edges), len(CANDIDATES), *((len(x), 1, 1, 1) if each else ()))
    c = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(x.dtype).requires_grad_(True)
    results = []
    for form in FORMS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            results.append(result(form, copy.deepcopy(supernet), x.clone().requires_grad_(True), c))
    return results


def apart(results):
    "The largest difference, relative to the tensor or, where it is nothing but rounding, to a millionth of the largest one."
    largest = max(float(b.abs().max()) for b in results[1])
    return max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6 * largest) for a, b in zip(*results, strict=True))


def everything(form, supernet, x, c):
    y = form(supernet, x, c)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, c, *supernet.parameters()], materialize_grads=True)]


PARTS = [None, 1, 4, 1, 4, None, None, 4]
MORE = [("resnet18", "layer4", 1, False), ("resnet18", "layer2", 2, True), ("densenet121", 4, 1, True)]


@pytest.mark.parametrize("name, block, k, each", [*((*case, k, False) for case, k in zip(CASES, PARTS)), *MORE])
def test_the_forward_pass_is_its_definition(name, block, k, each):
    assert apart(of_both_forms(name, block, k, everything, each=each)) < 1e-8
    if name != "resnet50":  # the largest
        assert apart(of_both_forms(name, block, k, everything, each=each, train=False)) < 1e-8


def random_block(seed):
    "A chain of convolutions of random widths, strides, normalizations and activations, some with shortcuts, and features that enter it."
    rng = random.Random(seed)
    layers, channels = [], 4
    for _ in range(rng.randint(1, 4)):
        width, stride = rng.choice((4, 6, 8)), rng.choice((1, 1, 2))
        layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=rng.random() < 0.5))
        layers += [nn.BatchNorm2d(width)] if rng.random() < 0.7 else []
        layers += [rng.choice((nn.ReLU, nn.SiLU))()] if rng.random() < 0.7 else []
        channels = width
    layers += [nn.MaxPool2d(2, ceil_mode=True)] if rng.random() < 0.3 else []
    x = torch.randn(3, 4, rng.choice((5, 8, 9)), 8, generator=torch.Generator().manual_seed(seed))
    return nn.Sequential(*layers).eval(), x


@pytest.mark.parametrize("each", [False, True])
def test_the_forward_pass_is_its_definition_on_random_blocks(each):
    tested = 0
    for seed in range(12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            block, x = random_block(seed)
        graph = extract(block, x)
        for train in (True, False):
            supernet = relaxed(block, graph, 1 + seed % 4, noise=0.3).double().requires_grad_(True).train(train)
            assert apart(of_both(supernet, x, everything, each=each)) < 1e-8, (seed, block)
            tested += len(graph.edges)
    assert tested > 60


def test_the_definition_by_hand():
    "One edge: outside the slice the layer alone, inside it every candidate times its coefficient."
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    supernet = relaxed(conv, extract(conv, x), 2, noise=0.3).eval()
    c = torch.rand(1, len(CANDIDATES), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = conv(x)
        expected[:, :2] *= c[0, -1]
        for name, operation in supernet.added["0_1"].items():
            expected[:, :2] += c[0, CANDIDATES.index(name)] * operation(x[:, :2])
        for form in FORMS:
            assert torch.allclose(form(supernet, x, c), expected, atol=1e-6)
            other = c.clone()
            other[0, 0] = 5.0  # None multiplies nothing
            assert torch.equal(form(supernet, x, other), form(supernet, x, c))


def test_the_forward_pass_is_its_definition_in_single_precision():
    for name, block in (("resnet18", "layer3"), ("resnet50", "layer3")):
        results = of_both_forms(name, block, 4, everything, dtype=torch.float32)
        largest = max(float(b.abs().max()) for b in results[1][1:])
        for a, b in zip(*results, strict=True):
            assert float((a - b).abs().max()) < 1e-5 * max(largest, float(b.abs().max()))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name, block, k", [("resnet18", "layer4", 4), ("resnet50", "layer2", None), ("vgg16", 1, 1)])
def test_statistics_are_those_of_the_definition(name, block, k, momentum):
    def statistics(form, supernet, x, c):
        for norm in supernet.modules():
            norm.momentum = momentum
        for i in range(3):
            form(supernet, x * (1 + i), c)
        return [v.double() for n, v in supernet.state_dict().items() if "running" in n or "num_batches" in n]

    assert apart(of_both_forms(name, block, k, statistics)) < 1e-9


@pytest.mark.parametrize("k", [1, 4])
def test_second_derivatives_are_those_of_the_definition(k):
    def second(form, supernet, x, c):
        parameters = {n: p for n, p in supernet.named_parameters()}
        with untracked(supernet):
            gradients = torch.autograd.grad(form(supernet, x, c).square().mean(), list(parameters.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients)}
            if form is SuperNet.forward_reference:
                for (n, value) in moved.items():
                    owner = supernet.get_submodule(n.rpartition(".")[0])
                    delattr(owner, n.rpartition(".")[2])
                    setattr(owner, n.rpartition(".")[2], value)
                loss = supernet.forward_reference(x, c).square().mean()
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
    supernet = relaxed(cut.block, graph, 4, noise=0.3).requires_grad_(True).train()
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
        y = depthwise(x, weight, stride, dilation)
        assert y.shape == expected.shape and torch.allclose(y, expected, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(form.pow(3).sum(), (x, weight)) for form in (y, expected))):
            assert torch.allclose(a, b, atol=1e-10)


def test_recalibration_averages_over_batches():
    _, x, _, repaired = searched()
    norm = repaired.inherited["0_1"][1]
    batches, momentum = [x[:3], 2 * x[3:]], norm.momentum
    recalibrate(repaired, iter(batches))
    means = [repaired.inherited["0_1"][0](b).mean((0, 2, 3)) for b in batches]
    assert torch.allclose(norm.running_mean, sum(means) / 2, atol=1e-5) and norm.momentum == momentum and not repaired.training
