"""Arachne: the front is the brute-force front, a batched population is the loop over its members, and only the front's weights change."""
import copy

import pytest
import torch
from torch import nn

from archrepair.baselines.arachne import Arachne, forward_impact, impacts, localize_weights, pareto_front, spread_by_label, well_handled
from archrepair.baselines.parts.common import Problem
from archrepair.baselines.parts.patches import Site, downstream, patchable, tap
from archrepair.core.errors import ArchrepairError
from archrepair.data.images import ImageSet
from archrepair.data.scenario import RepairData
from archrepair.nas.supernet import recalibrate
from archrepair.networks.blocks import freeze
from archrepair.networks.models import create_model
from archrepair.repair.result import changes
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import predict
from archrepair.training.rows import image_features
from support.families import NETWORKS
from support.populations import assert_equal_the_loop, rand, rows_of, small_net

QUICK = {"population": 6, "iterations": 2, "positives": 30}


# --- the front


def brute_force(a, b):
    return [i for i in range(len(a)) if not any(a[j] >= a[i] and b[j] >= b[i] and (a[j] > a[i] or b[j] > b[i]) for j in range(len(a)))]


@pytest.mark.parametrize("values", [2, 4, 1000])
def test_the_front_is_the_brute_force_front(values):
    "With few values there are many ties."
    for seed in range(10):
        a, b = torch.randint(values, (2, 60), generator=torch.Generator().manual_seed(seed)).double()
        assert pareto_front(a, b).tolist() == brute_force(a.tolist(), b.tolist())


def test_fronts_of_few_points():
    one = torch.ones(1)
    assert pareto_front(one, one).tolist() == [0]
    assert pareto_front(torch.ones(5), torch.ones(5)).tolist() == [0, 1, 2, 3, 4]
    assert pareto_front(torch.arange(4.0), torch.arange(4.0)).tolist() == [3]
    assert pareto_front(torch.arange(4.0), -torch.arange(4.0)).tolist() == [0, 1, 2, 3]


def test_localization_names_the_weights_of_the_front():
    measures = {"a": (rand(3, 4).abs(), rand(3, 4, seed=1).abs()), "b": (rand(2, 2, 3, 3, seed=2).abs(), rand(2, 2, 3, 3, seed=3).abs())}
    contrast = {"a": (rand(3, 4, seed=4).abs(), rand(3, 4, seed=5).abs()),
                "b": (rand(2, 2, 3, 3, seed=6).abs(), rand(2, 2, 3, 3, seed=7).abs())}
    for other, keep in ((None, None), (contrast, None), (None, 7)):
        divided = {name: [m / (1 + other[name][w]) if other else m for w, m in enumerate(both)] for name, both in measures.items()}
        points = [(name, tuple(index), *(float(m[tuple(index)]) for m in divided[name]))
                  for name, both in measures.items() for index in torch.cartesian_prod(*map(torch.arange, both[0].shape)).tolist()]
        if keep:
            points = [p for p in points if p[2] >= sorted((q[2] for q in points), reverse=True)[keep - 1]]
        expected = [points[i] for i in brute_force([p[2] for p in points], [p[3] for p in points])]
        front = localize_weights(measures, other, keep)
        assert [(s.layer, s.index) for s in front] == [p[:2] for p in expected]
        assert [v for s in front for v in (s.gradient_loss, s.forward_impact)] == pytest.approx([v for p in expected for v in p[2:]])


def test_localization_without_anything_to_find():
    nothing = torch.zeros(2, 3)
    with pytest.raises(ArchrepairError, match="no weight of fc has any influence"):
        localize_weights({"fc": (nothing, nothing)})
    with pytest.raises(ArchrepairError, match="not finite"):
        localize_weights({"fc": (nothing, nothing + torch.nan)})
    only = torch.zeros(2, 3)
    only[1, 2] = 1
    assert [s.index for s in localize_weights({"fc": (only, nothing)})] == [(1, 2)], "weights that do nothing at all are no candidates"


# --- the measures


@pytest.mark.parametrize("normalized", [True, False])
def test_forward_impact_of_a_linear_layer_is_the_loop(normalized):
    layer, x, g = nn.Linear(4, 3).double(), rand(5, 4), rand(5, 3, seed=1)
    x[2] = 0
    g[3] = 0
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for n in range(5):
        for j in range(3):
            flow = [abs(float(layer.weight.data[j, i] * x[n, i])) for i in range(4)]
            pull = abs(float(g[n, j])) / float(g[n].abs().sum()) if g[n].any() else 0.0
            for i in range(4):
                expected[j, i] += (flow[i] / sum(flow) if normalized and sum(flow) else flow[i]) * pull
    assert torch.allclose(forward_impact(layer, x, g, normalized).double(), expected, atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, (1, 2), groups=2, dilation=2, padding=(0, 1)),
                                   nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="circular"), nn.Conv1d(4, 3, 3, stride=2)],
                         ids=["stride", "groups", "depthwise", "1d"])
def test_forward_impact_of_a_convolution_is_the_loop(layer, normalized):
    "Over images, output units, positions and weights, with the input values that `tap` reads."
    layer = layer.double()
    shape = (2, 4, 7) if isinstance(layer, nn.Conv1d) else (2, 4, 6, 7)
    x = rand(*shape).relu()
    output = layer(x)
    g = rand(*output.shape, seed=1)
    weights = [tuple(i) for i in torch.cartesian_prod(*map(torch.arange, layer.weight.shape)).tolist()]
    flow = {w: (layer.weight[w] * tap(layer, x, output, w)).abs() for w in weights}
    total = {unit: sum(flow[w] for w in weights if w[0] == unit) for unit in range(len(layer.weight))}
    expected = torch.zeros_like(layer.weight)
    for w in weights:
        share = torch.where(total[w[0]] > 0, flow[w] / total[w[0]], 0) if normalized else flow[w]
        expected[w] = sum((share[n] * g[n, w[0]].abs() / g[n].abs().sum()).sum() for n in range(2))
    assert torch.allclose(forward_impact(layer, x, g, normalized).double(), expected, rtol=1e-5, atol=1e-7)


def test_a_weight_without_activation_has_no_impact():
    for layer, x in ((nn.Linear(4, 3), rand(5, 4, dtype=torch.float32)), (nn.Conv2d(4, 3, 3), rand(5, 4, 6, 6, dtype=torch.float32))):
        x[:, 2] = 0
        g = torch.ones_like(layer(x))
        for normalized in (True, False):
            small = forward_impact(layer, x, g, normalized)
            layer.weight.data[:, 2] *= 1000
            large = forward_impact(layer, x, g, normalized)
            assert not small[:, 2].any() and not large[:, 2].any() and torch.equal(small, large) and small[:, 0].all()


def test_impacts_are_means_over_the_inputs():
    "Gradient loss is the gradient of the mean loss; batches and in-place activations make no difference."
    x, labels = rand(11, 3, 8, 8, dtype=torch.float32), torch.arange(11) % 3
    network = small_net(True)
    there = downstream(network, ["0", "2", "5"])
    got = impacts(there, rows_of(x, labels), batch_size=11)
    nn.functional.cross_entropy(network(x), labels).backward()
    for name in ("0", "2", "5"):
        assert torch.allclose(got[name][0], network.get_submodule(name).weight.grad.abs(), atol=1e-6)
    elsewhere = downstream(small_net(False), ["0", "2", "5"])
    for other in (impacts(there, rows_of(x, labels), batch_size=4), impacts(elsewhere, rows_of(x, labels))):
        for name in got:
            assert torch.allclose(got[name][0], other[name][0], atol=1e-6) and torch.allclose(got[name][1], other[name][1], atol=1e-6)
    plain = small_net(False)
    entering = {"2": plain[:2](x), "5": plain[:5](x)}
    outputs = {name: plain.get_submodule(name)(entering[name]).detach().requires_grad_(True) for name in entering}
    plain[3:](outputs["2"]).sum().backward()
    outputs["5"].sum().backward()
    for name, o in outputs.items():
        assert torch.allclose(got[name][1], forward_impact(plain.get_submodule(name), entering[name], o.grad) / 11, atol=1e-6)
    assert not any(p.requires_grad for p in there.tail.parameters())


def test_impacts_of_no_inputs_are_zero():
    got = impacts(downstream(small_net(True), ["5"]), rows_of(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)))
    assert not got["5"][0].any() and not got["5"][1].any()


# --- the cut and the population


class Tokens(nn.Module):
    "Layers in a list, on B×tokens×features; one that is never called."

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))])
        self.norm, self.head, self.spare = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1).unflatten(1, (-1, 6))
        for stage in self.stages:
            x = x + stage(self.norm(x))
        return self.head(x.mean(1))


def test_layers_in_lists_and_on_tokens():
    torch.manual_seed(0)
    network, x = Tokens().eval(), rand(6, 30, dtype=torch.float32)
    for layers in (["stages.0"], ["stages.1.2"], ["stages.1.0", "head"]):
        there = downstream(network, layers, x)
        front = localize_weights(impacts(there, rows_of(there.cut.features(x), torch.arange(6) % 3)))
        assert_equal_the_loop(network, layers, x, front)
    with pytest.raises(ArchrepairError, match="spare.*never called"):
        downstream(network, ["spare"], x)


# --- the method


@pytest.mark.parametrize("options", [{}, {"search": "de"}, {"localization": "v2"}, {"layers": "layer4.1.conv2, fc"},
                                     {"min_step": 0.2, "pull": 4.1}])
def test_only_the_weights_of_the_front_change(problem, options):
    result = Arachne(**QUICK | options).repair(problem.network, problem.scenario.data)
    front, repaired = result.config["front"], result.candidates["repaired"]
    state = copy.deepcopy(problem.network.state_dict())
    assert front and len({(entry["layer"], *entry["index"]) for entry in front}) == len(front)
    for entry in front:
        weight = state[f"{entry['layer']}.weight"]
        assert float(weight[tuple(entry["index"])]) == entry["before"]
        weight[tuple(entry["index"])] = entry["after"]
    assert all(torch.equal(v, repaired.state_dict()[k]) for k, v in state.items()), "the front is the whole difference"
    assert set(changes(problem.network.state_dict(), repaired.state_dict())) <= {f"{entry['layer']}.weight" for entry in front}
    best = [entry["best"] for entry in result.history["search"]]
    assert best == sorted(best) and result.config["fitness"] == best[-1]
    assert result.block == ("fc" if "layers" not in options else None)
    if options.get("search") == "de":
        weight = problem.network.fc.weight.data
        assert all(2 * float(weight.min()) - 1e-6 <= entry["after"] <= 2 * float(weight.max()) + 1e-6 for entry in front)


def test_fitness_is_what_the_repaired_network_does(problem):
    data = problem.scenario.data
    result = Arachne(population=10, iterations=3, positives=40, precision="fp32").repair(problem.network, data)
    repaired, n = result.candidates["repaired"], 40
    logits = predict(repaired, data.failures, problem.transform)
    loss = float(nn.functional.cross_entropy(logits, data.failures.labels))
    bad = (int((logits.argmax(1) == data.failures.labels).sum()) + 1) / (loss + 1)
    assert bad <= result.config["fitness"] <= bad + n + 1
    free = Arachne(search="de", population=10, iterations=3, alpha=0.0, precision="fp32").repair(problem.network, data)
    assert free.config["positives"] == int((predict(problem.network, data.train, problem.transform).argmax(1) == data.train.labels).sum())
    assert free.config["fitness"] <= free.config["positives"] + 1e-6


def test_what_it_costs(problem):
    "Features once, then members × inputs × the tail's share; the tail of a last layer is next to nothing."
    data = problem.scenario.data
    cost = {}
    for n in (10, 20):
        cost[n] = Arachne(population=n, iterations=4, positives=40, patience=9).repair(problem.network, data).cost
    share = downstream(problem.network, ["fc"], problem.transform(data.train.batch(torch.arange(2)))).share
    assert share < 0.01
    assert cost[20].forwards - cost[10].forwards == pytest.approx(10 * 5 * (len(data.failures) + 40) * share)
    assert cost[10].backwards == cost[20].backwards == pytest.approx(2 * len(data.failures) * share)


def test_guards_are_inputs_that_the_network_gets_right(problem):
    "The first of an order that holds the classes in their proportions."
    data = problem.scenario.data
    here = Problem(freeze(copy.deepcopy(problem.network)), data, meter=CostMeter())
    there = downstream(problem.network, ["fc"])
    order = spread_by_label(data.train.labels, here.generator("positives"))
    right = predict(problem.network, data.train, problem.transform).argmax(1) == data.train.labels
    expected = data.train.labels[order[right[order]]]
    rows = well_handled(here, there, 50, 0)
    assert len(rows) == 50 and (predict(there.tail, rows).argmax(1) == rows.labels).all()
    assert torch.equal(rows.labels, expected[:50]) and not here.warnings
    assert torch.equal(well_handled(here, there, 10, 30).labels, expected[:30]) and not here.warnings
    assert torch.equal(well_handled(here, there, 100_000, 0).labels, expected)
    assert len(here.warnings) == 1 and "100000 were asked for" in here.warnings[0]
    assert torch.equal(well_handled(here, there, None, 0).labels, expected) and len(here.warnings) == 1


def test_a_network_that_is_right_about_nothing(problem):
    "No guards: the search goes on without them, and says so."
    data = problem.scenario.data
    train = data.train.select(torch.arange(20))
    wrong = (predict(problem.network, train, problem.transform).argmax(1) + 1) % 10
    turned = ImageSet(train.images, wrong, train.classes, train.name)
    for options in ({}, {"search": "de"}):
        repair_set = RepairData(data.failures, turned, data.val, data.transform, data.val_failures, 0.5)
        result = Arachne(population=4, iterations=1, precision="fp32", **options).repair(problem.network, repair_set)
        assert result.config["positives"] == 0 and (options or any("only 0 training images" in w for w in result.warnings))


def test_a_beginning_of_the_order_holds_the_classes_in_their_proportions():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = spread_by_label(labels, torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(100))
    for n in (10, 20, 50):
        assert labels[order[:n]].bincount(minlength=3).tolist() == pytest.approx([0.6 * n, 0.3 * n, 0.1 * n], abs=1)
    assert not torch.equal(order, spread_by_label(labels, torch.Generator().manual_seed(1)))


def settled(name, digits):
    "An untrained network with statistics of its own: without them EfficientNet's signals vanish."
    network = create_model(name, 10, width=0.125, stem_stride=2).eval()
    with torch.no_grad():
        recalibrate(network, [digits.batch(torch.arange(16)).permute(0, 3, 1, 2).float() / 64])
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name, digits):
    "Untrained, on a few images: the population equals the loop and a repair goes through."
    network = settled(name, digits)
    some = digits.select(torch.arange(40))
    data = RepairData.of(some.select(torch.arange(10)), some.select(torch.arange(10, 40)))
    layer = patchable(network)
    assert layer == patchable(network, ",".join(layer)) and isinstance(network.get_submodule(layer[0]), nn.Linear)
    sites = [Site(layer[0], (1, 0)), Site(layer[0], (7, 3))]
    assert_equal_the_loop(network, layer, data.transform(some.batch(torch.arange(5))), sites)
    result = Arachne(population=5, iterations=1).repair(network, data)
    assert set(changes(network.state_dict(), result.candidates["repaired"].state_dict())) <= {f"{layer[0]}.weight"}


@pytest.mark.parametrize("name, layer", [("vgg16", "features.block5.0"), ("resnet50", "layer4.2.conv2"),
                                         ("densenet121", "features.denseblock4.denselayer16.conv2"),
                                         ("efficientnet_b0", "features.7.0.block.1.0")])
def test_convolutions_of_every_family(name, layer, digits):
    "Of EfficientNet a depthwise one."
    network = settled(name, digits)
    x = digits.batch(torch.arange(6)).permute(0, 3, 1, 2).float() / 64
    there = downstream(network, [layer])
    front = localize_weights(impacts(there, rows_of(there.cut.features(x), digits.labels[:6])))
    assert front
    weight = network.get_submodule(layer).weight
    center = tuple(k // 2 for k in weight.shape[2:])
    sites = [*front, Site(layer, (1, 0, *center))]
    assert_equal_the_loop(network, [layer], x, list({s.index: s for s in sites}.values()))


def test_mistakes(problem):
    for options, message in (({"search": "pos"}, "unknown search of Arachne 'pos'.*did you mean 'pso'"),
                             ({"localization": "v3"}, "auto, v1, v2"),
                             ({"population": 0}, "population is 0"), ({"search": "de", "population": 3}, "expected a whole number from 4"),
                             ({"positives": 0}, "positives is 0"), ({"patience": 0}, "patience is 0"), ({"phi": 4.0}, "above 4"),
                             ({"alpha": -1.0}, "alpha is -1"), ({"iterations": 1.5}, "iterations is 1.5")):
        with pytest.raises(ArchrepairError, match=message):
            Arachne(**options)
    data = problem.scenario.data
    for layers, message in (("fcc", "unknown convolution or linear layer 'fcc': did you mean 'fc'"), ("bn1", "unknown convolution"),
                            ([], "layers is empty")):
        with pytest.raises(ArchrepairError, match=message):
            Arachne(layers=layers).repair(problem.network, data)
    with pytest.raises(ArchrepairError, match="no linear layer to patch"):
        patchable(nn.Sequential(nn.Conv2d(3, 4, 3)))
    broken = copy.deepcopy(problem.network)
    broken.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ArchrepairError, match="not finite"):
        Arachne(**QUICK).repair(broken, data)
    dead = copy.deepcopy(problem.network)
    nn.init.zeros_(dead.layer4[1].bn2.weight)
    nn.init.zeros_(dead.layer4[1].bn2.bias)
    with pytest.raises(ArchrepairError, match="no weight of layer4.1.conv1 has any influence"):
        Arachne(**QUICK, layers="layer4.1.conv1").repair(dead, data)


def test_image_features_are_what_a_network_without_a_cut_works_on(problem):
    "The first convolution has nothing before it."
    data = problem.scenario.data
    result = Arachne(population=4, iterations=1, positives=10, layers=["conv1"]).repair(problem.network, data)
    assert result.block == "conv1" and len(image_features(data.failures, data.transform)) == len(data.failures)
