"Patches: what a weight taps, where a network is cut, and a population that is the loop over its members."
import copy

import pytest
import torch
from torch import nn

from archrepair.baselines.arachne import impacts
from archrepair.baselines.parts.patches import Population, Site, downstream, patch, tap
from archrepair.training.evaluation import predict
from support.populations import assert_equal_the_loop, rand, rows_of, small_net


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, (1, 2), groups=2, dilation=2, padding=(0, 1)),
                                   nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"), nn.Conv1d(4, 3, 3, stride=2),
                                   nn.Linear(7, 3)], ids=["stride", "groups", "depthwise", "1d", "linear"])
def test_what_a_weight_taps_is_how_the_output_moves(layer):
    layer, x = layer.double(), rand(2, 4, 6, 7) if isinstance(layer, nn.Conv2d) else rand(2, 4, 7)
    before = layer(x)
    for index in (tuple(int(i) for i in torch.unravel_index(torch.tensor(n), layer.weight.shape)) for n in range(layer.weight.numel())):
        moved = copy.deepcopy(layer)
        moved.weight.data[index] += 0.5
        difference = (moved(x) - before) / 0.5
        axis = -1 if isinstance(layer, nn.Linear) else 1
        assert torch.allclose(difference.select(axis, index[0]), tap(layer, x, before, index), atol=1e-9)
        assert int((difference.abs() > 1e-9).any(tuple(d for d in range(difference.ndim) if d != axis % difference.ndim)).sum()) <= 1


@pytest.mark.parametrize("layers, where, direct", [
    (["fc"], "fc", True), (["layer4.1.conv2"], "layer4.1", False), (["layer4.1.conv1"], "layer4.1", False),
    (["layer4.0.downsample.0"], "layer4.0", False), (["layer3.1.conv2", "fc"], "layer3.1", False),
    (["layer4.0.conv1", "layer4.0.downsample.0", "fc"], "layer4.0", False), (["conv1"], "conv1", True)])
def test_the_network_is_cut_as_late_as_it_can_be(problem, digits, layers, where, direct):
    example = problem.transform(digits.batch(torch.arange(3)))
    there = downstream(problem.network, layers, example)
    assert there.cut.name == where and there.direct == direct and 0 < there.share <= 1
    assert torch.equal(there.tail(there.cut.features(example)), copy.deepcopy(problem.network).eval()(example))
    for name in layers:
        assert torch.equal(there.modules[name].weight, problem.network.get_submodule(name).weight)
        assert there.modules[name] in list(there.tail.modules())


class Branching(nn.Module):
    "No clean cut before either layer, and one that decides by its data."

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.left(x).relu_() + self.right(x) if float(x.sum()) < 1e9 else x)


@pytest.mark.parametrize("layers", [["fc"], ["layer4.1.conv2"], ["layer4.0.downsample.0"],
                                    ["layer4.0.conv1", "layer4.0.downsample.0", "fc"]])
def test_a_population_is_the_loop_over_its_members(problem, digits, layers):
    network = copy.deepcopy(problem.network).eval()
    x, labels = problem.transform(digits.batch(torch.arange(12))), digits.labels[:12]
    sites = [Site(name, index) for name in layers for index in (
        tuple(int(i) for i in torch.unravel_index(torch.tensor(n * 37 + 5), network.get_submodule(name).weight.shape)) for n in range(4))]
    population, values = assert_equal_the_loop(network, layers, x, sites)
    features = population.network.cut.features(x)
    tally = population.tally(values, rows_of(features, labels))
    for m, member in enumerate(values):
        logits = predict(patch(copy.deepcopy(network), sites, member.tolist()), rows_of(x, labels))
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        right = logits.argmax(1) == labels
        assert int(tally.right[m]) == int(right.sum()) and float(tally.loss[m]) == pytest.approx(float(loss.sum()), rel=1e-4)
        assert float(tally.credit[m]) == pytest.approx(float(right.sum() + (1 / (1 + loss[~right])).sum()), rel=1e-4)
    pieces = population.tally(values, rows_of(features, labels), size=1)
    assert torch.equal(pieces.right, tally.right) and torch.allclose(pieces.loss, tally.loss, rtol=1e-5)
    unmoved = population.logits(population.before[None], features)[0]
    assert torch.allclose(unmoved, network(x), atol=1e-5)


def test_a_network_that_cannot_be_cut(untouched):
    network = Branching().eval()
    sites = [Site("left", (1, 3)), Site("right", (0, 2)), Site("head", (2, 5))]
    with untouched(network):
        assert downstream(network, ["left"]).cut.prefix is None
        assert_equal_the_loop(network, ["left", "right", "head"], rand(6, 8, dtype=torch.float32), sites)
        measures = impacts(downstream(network, ["left"]), rows_of(rand(6, 8, dtype=torch.float32), torch.arange(6) % 3))
    assert measures["left"][0].any() and measures["left"][1].any()


def test_a_tally_of_no_inputs():
    there = downstream(small_net(True), ["5"])
    population = Population(there, [Site("5", (0, 0))])
    tally = population.tally(torch.zeros(3, 1), rows_of(torch.zeros(0, 80), torch.zeros(0, dtype=torch.int64)))
    assert not torch.stack([tally.right, tally.loss, tally.credit]).any()
