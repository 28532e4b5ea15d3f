"""Localization: the spectrum, the gradients, the vote, and what must not change while they are taken."""
import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError, NoFailures
from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import RepairData
from archrepair.networks.blocks import block_names, freeze
from archrepair.networks.models import create_model
from archrepair.networks.neurons import watch, wire
from archrepair.repair.localization import failure_gradients, localize, reweight, spectrum, suspiciousness
from archrepair.repair.votes import THRESHOLDS
from archrepair.training.cost import CostMeter
from archrepair.training.rows import Rows, image_features
from support.nets import Net


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 12, 12, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.randint(0, classes, (n,), generator=generator), tuple("abcdef"[:classes]), "noise")


def labelled(net, n, right, seed=0):
    "Images whose labels the network gets right (or wrong, by one)."
    drawn = images(n, seed)
    with torch.no_grad():
        said = copy.deepcopy(net).eval()(Normalize()(drawn.images)).argmax(1)
    return ImageSet(drawn.images, said if right else (said + 1) % 3, drawn.classes, drawn.name)


def repair_data(net, n_fail=12, n_train=40):
    train = labelled(net, n_train, True, seed=1)
    failures = labelled(net, n_fail, False, seed=2)
    return RepairData(failures, train, train.select(torch.arange(4)), Normalize(), train.select(torch.arange(0)))


def rows_of(*parts):
    return Rows([image_features(part, Normalize()) for part in parts])


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def data(net):
    return repair_data(net)


BLOCKS = ["one", "two"]

# --- the measures, by hand ---------------------------------------------------------------------------------------------

CASES = [  # Am, Nm, Ac, Nc, Tarantula, Ochiai, D*²
    (8, 2, 10, 90, 0.8889, 0.5963, 5.3333),
    (5, 5, 50, 50, 0.5, 0.2132, 0.4545),
    (0, 10, 50, 50, 0.0, 0.0, 0.0),
    (10, 0, 0, 100, 1.0, 1.0, math.inf),
    (0, 10, 0, 100, 0.0, 0.0, 0.0),
    (10, 0, 100, 0, 0.5, 0.3015, 1.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:4])))
def test_measures_by_hand(case):
    for measure, expected in zip(("tarantula", "ochiai", "dstar"), case[4:]):
        assert float(suspiciousness(*case[:4], measure)) == pytest.approx(expected, abs=5e-5), measure


def test_measures_take_arrays_and_an_exponent():
    counts = np.array([c[:4] for c in CASES]).T
    assert np.allclose(suspiciousness(*counts), [c[4] for c in CASES], atol=5e-5)
    assert float(suspiciousness(8, 2, 10, 90, "dstar", star=3)) == pytest.approx(512 / 12)


def test_no_correct_inputs_and_smoothing():
    assert suspiciousness([3, 0], [1, 4], [0, 0], [0, 0]).tolist() == [1, 0]  # the right-hand rate is 0
    smooth = float(suspiciousness(0, 10, 0, 100, smooth=0.5))
    assert smooth == pytest.approx((0.5 / 11) / (0.5 / 11 + 0.5 / 101))
    assert float(suspiciousness(10, 0, 0, 100, "dstar", smooth=0.5)) == pytest.approx(10.5**2 / 1)


# --- where the neurons are ------------------------------------------------------------------------------------------------

class Reused(nn.Module):
    "One convolution called twice, each time followed by a BatchNorm of its own."

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 3)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.b.bias.data.fill_(0.7)

    def forward(self, x):
        x = torch.relu_(self.a(self.conv(self.stem(x))))
        return self.head(torch.relu_(self.b(self.conv(x))).mean((2, 3)))


def test_reused_modules_average_over_their_calls():
    net = Reused().eval()
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    assert wiring.layers == {"stem": 4, "conv": 4} and wiring.owners["a"] == ("conv",) and wiring.owners["b"] == ("conv",)
    seen = []
    x = Normalize()(images(5).images)
    with torch.inference_mode(), watch(net, wiring, lambda layer, z, view: seen.append((layer, view(z).mean(-1)))):
        net(x)
    first, second = (z for layer, z in seen if layer == "conv")
    with torch.inference_mode():
        one = net.a(net.conv(net.stem(x)))
        assert torch.allclose(first, one.mean((2, 3))) and torch.allclose(second, net.b(net.conv(one.relu())).mean((2, 3)))
    counted = spectrum(net, rows_of(images(5)), wiring)
    active = ((first + second) / 2 > 0).sum(0).numpy()
    assert (counted.am + counted.ac)[4:].tolist() == active.tolist()
    assert localize(net, repair_data(net), ["conv"]).block == "conv"


def test_linear_layers_average_over_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 3)
            self.mlp = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))

        def forward(self, x):
            t = self.embed(x).flatten(2).transpose(1, 2)
            return self.head((t + self.mlp(t)).mean(1))

    net = Tokens().eval()
    found = {}
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    with torch.inference_mode(), watch(net, wiring, lambda layer, z, view: found.update({layer: view(z).shape})):
        net(torch.zeros(2, 3, 12, 12))
    assert found == {"embed": (2, 6, 9), "mlp.0": (2, 7, 9), "mlp.2": (2, 6, 9)}
    result = localize(net, repair_data(net), ["mlp"], k=5)
    assert result.summary.loc["mlp", "size"] == 13 and result.counts.loc["mlp", 5] + result.outside[5] == 5


# --- the spectrum -----------------------------------------------------------------------------------------------------------

def naive_counts(net, parts):
    "One image and one neuron at a time, from a network whose ReLUs overwrite nothing."
    plain = copy.deepcopy(net)
    plain.relu.inplace = False
    kept = {}
    read = {"stem": plain.stem, "one.conv": plain.one["bn"], "one.short": plain.one["short"], "two.conv": plain.two["bn"]}
    for layer, module in read.items():
        module.register_forward_hook(lambda m, a, out, layer=layer: kept.update({layer: out[0]}))
    counts = None
    for part in parts:
        for i in range(len(part)):
            with torch.no_grad():
                logits = plain(Normalize()(part.images[i:i + 1]))
            wrong = int(logits.argmax()) != int(part.labels[i])
            active = [float(channel.mean()) > 0 for layer in kept.values() for channel in layer]
            counts = counts or [[0, 0, 0, 0] for _ in active]
            for count, on in zip(counts, active):
                count[(0 if on else 1) if wrong else (2 if on else 3)] += 1
    return np.array(counts)


@pytest.mark.parametrize("functional", [False, True], ids=["in-place ReLU", "functional ReLU"])
def test_counts_equal_a_naive_loop(functional):
    net = Net(functional=functional).eval()
    data = repair_data(net)
    mixed = images(30, seed=5)  # right and wrong ones among the training images too
    data = RepairData(data.failures, mixed, mixed, Normalize(), mixed)
    result = localize(net, data, BLOCKS, batch_size=7)
    expected = naive_counts(net, [data.failures, mixed])
    assert (result.neurons[["Am", "Nm", "Ac", "Nc"]].to_numpy() == expected).all()
    assert result.n_failures > len(data.failures)  # misclassified training images are failures too
    assert 0 < expected[:, 0].sum() < expected[:, :2].sum()
    assert (result.neurons["Am"] + result.neurons["Nm"] == result.n_failures).all()
    assert (result.neurons["Ac"] + result.neurons["Nc"] == result.n_correct).all()
    assert result.neurons[["Am", "Nm", "Ac", "Nc"]].dtypes.eq(np.int64).all()
    assert result.n_failures + result.n_correct == 42


def test_without_batchnorm_the_convolution_is_read():
    net = Net(norm=False).eval()
    kept = []
    handle = net.two["conv"].register_forward_hook(lambda m, a, out: kept.append(out.mean((2, 3)) > 0))
    with torch.no_grad():
        net(Normalize()(images(20).images))
    handle.remove()
    counted = spectrum(net, rows_of(images(20)), wire(net, torch.zeros(1, 3, 12, 12)))
    assert (counted.am + counted.ac)[-8:].tolist() == kept[0].sum(0).tolist()


@pytest.mark.parametrize("activation", ["pre", "relu", "mean", "scaled"])
def test_definitions_of_active(net, activation):
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    rows = rows_of(images(25))
    counted = spectrum(net, rows, wiring, activation=activation, batch_size=9)
    kept = []
    handle = net.two["bn"].register_forward_hook(lambda m, a, out: kept.append(out.clone()))
    with torch.no_grad():
        net(Normalize()(images(25).images))
    handle.remove()
    z, a = kept[0].mean((2, 3)), kept[0].relu().mean((2, 3))
    low, high = a.min(1, keepdim=True).values, a.max(1, keepdim=True).values
    active = {"pre": z > 0, "relu": a > 0, "mean": a > a.mean(0), "scaled": (a - low) / (high - low) > 0.5}[activation]
    assert (counted.am + counted.ac)[-8:].tolist() == active.sum(0).tolist()


def test_order_and_batch_size_do_not_matter(net, data):
    reference = localize(net, data, BLOCKS)
    for batch_size in (1, 5, 64):
        shuffle = lambda s, seed: s.select(torch.randperm(len(s), generator=torch.Generator().manual_seed(seed)))
        other = RepairData(shuffle(data.failures, batch_size), shuffle(data.train, 3), data.val, Normalize(), data.val_failures)
        result = localize(net, other, BLOCKS, batch_size=batch_size)
        pd.testing.assert_frame_equal(result.neurons[["layer", "channel", "Am", "Nm", "Ac", "Nc"]],
                                      reference.neurons[["layer", "channel", "Am", "Nm", "Ac", "Nc"]])
        assert np.allclose(result.neurons["g"], reference.neurons["g"], rtol=1e-4, atol=1e-9)
        assert result.block == reference.block


# --- the model is left alone ---------------------------------------------------------------------------------------------------

def test_model_is_untouched(net, data):
    net.train()
    net.two.eval()
    net.stem.weight.requires_grad_(False)
    net.head.weight.grad = torch.full_like(net.head.weight, 3.0)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    modes = {n: m.training for n, m in net.named_modules()}
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    for grad in ("weight", "taylor"):
        localize(net, data, BLOCKS, grad=grad, activation="mean")
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {"head.weight"} and (net.head.weight.grad == 3).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_parts_leave_the_network_alone_too(net, data):
    rows = rows_of(data.failures)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    failures = spectrum(net, rows, wiring).failures
    for grad in ("weight", "activation"):
        failure_gradients(net, rows, failures, wiring, grad=grad)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def test_works_under_no_grad_and_inference_mode_and_frozen(net, data):
    reference = localize(net, data, BLOCKS).neurons
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            pd.testing.assert_frame_equal(localize(freeze(copy.deepcopy(net)), data, BLOCKS).neurons, reference)


# --- gradients ----------------------------------------------------------------------------------------------------------------

def per_sample(net, part, grad):
    "g_j from one image at a time, with torch.func for the weights and plain autograd for the pre-activations."
    plain = freeze(copy.deepcopy(net)) if grad == "weight" else copy.deepcopy(net)
    plain.relu.inplace = False
    loss = lambda logits, y: nn.functional.cross_entropy(logits, y[None])
    x, y = Normalize()(part.images), part.labels
    if grad == "weight":
        names = ["stem.weight", "one.conv.weight", "one.short.weight", "two.conv.weight"]
        weights = {n: dict(plain.named_parameters())[n] for n in names}
        run = lambda w, a, b: loss(torch.func.functional_call(plain, w, (a[None],)), b)
        grads = torch.func.vmap(torch.func.grad(run), (None, 0, 0))(weights, x, y)
        return np.concatenate([grads[n].mean(0).abs().flatten(1).mean(1).numpy() for n in names])
    total = 0
    for i in range(len(part)):
        kept = []
        for module in (plain.stem, plain.one["bn"], plain.one["short"], plain.two["bn"]):
            module.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        logits = plain(x[i:i + 1])
        d = torch.autograd.grad(loss(logits, y[i]), kept)
        one = {"bias": lambda d, z: d.sum((2, 3)).abs(), "activation": lambda d, z: d.abs().mean((2, 3)),
               "taylor": lambda d, z: (d * z).sum((2, 3)).abs()}[grad]
        total = total + torch.cat([one(a, z.detach())[0] for a, z in zip(d, kept)])
        for module in plain.modules():
            module._forward_hooks.clear()
    return (total / len(part)).numpy()


@pytest.mark.parametrize("grad", ["weight", "bias", "activation", "taylor"])
def test_gradients_are_the_mean_over_images(net, data, grad):
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    for batch_size in (5, 128):
        g = failure_gradients(net, rows_of(data.failures), torch.arange(12), wiring, grad=grad, batch_size=batch_size)
        expected = per_sample(net, data.failures, grad)
        assert g.min() >= 0 and np.allclose(g, expected, rtol=2e-4, atol=1e-7 + 1e-5 * expected.max())


@pytest.mark.parametrize("grad", ["weight", "taylor"])
def test_in_place_relu_changes_nothing(data, grad):
    results = [localize(Net(inplace=inplace).eval(), data, BLOCKS, grad=grad).neurons for inplace in (True, False)]
    pd.testing.assert_frame_equal(*results)


@pytest.mark.parametrize("grad", ["weight", "activation"])
def test_duplicated_failures_leave_gradients_unchanged(net, data, grad):
    twice = RepairData(data.failures.select(torch.arange(12).repeat(2)), data.train, data.val, Normalize(), data.val_failures)
    one, two = (localize(net, d, BLOCKS, grad=grad) for d in (data, twice))
    assert two.n_failures == 2 * one.n_failures
    assert np.allclose(one.neurons["g"], two.neurons["g"], rtol=1e-5)


def test_input_in_place_and_tied_weights(data):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(self.a(x.mul_(2))).mean((2, 3)))

    net = Tied().eval()
    for grad in ("weight", "activation"):
        result = localize(net, repair_data(net), ["b"], grad=grad)
        g = result.neurons["g"].to_numpy()
        assert (g > 0).all() and (grad != "weight" or (g[:3] == g[3:]).all())


# --- reweighting ------------------------------------------------------------------------------------------------------------------

def test_equation_6_by_hand():
    s, g, member = np.array([0.5, 1.0, 0.8, 0.6, 0.9]), np.array([1.0, 3.0, 6.0, 10.0, 25.0]), np.array([0, 0, 1, 1, -1])
    s_hat, g_bar = reweight(s, g, member)
    assert g_bar == 5.0  # mean of (1+3)/2 and (6+10)/2; the last neuron has no say
    assert np.allclose(s_hat, np.array([4, 2, 1, 5, 20]) / 20 * s)
    assert np.allclose(reweight(s, g, member, "positive")[0], np.array([0, 0, 1, 5, 20]) / 20 * s)
    assert np.allclose(reweight(s, g, member, "ratio")[0], g / 25 * s)


@pytest.mark.parametrize("deviation", ["abs", "positive", "ratio"])
def test_reweighting_properties(deviation):
    draw = np.random.default_rng(0)
    s, g, member = draw.uniform(size=60), draw.exponential(size=60), np.arange(60) % 3
    s_hat, g_bar = reweight(s, g, member, deviation)
    assert (s_hat <= s).all() and (s_hat >= 0).all()
    assert np.array_equal(reweight(s, 8 * g, member, deviation)[0], s_hat)  # the scale of the loss cancels
    assert np.allclose(reweight(s, 3.7 * g, member, deviation)[0], s_hat)
    one = reweight(np.ones(4), np.array([1.0, 3.0, 2.0, 2.0]), np.array([0, 0, 1, 1]))[0]
    assert one.tolist() == [1, 1, 0, 0]  # 0 where g = Ḡ


def test_equal_gradients_and_infinite_suspicion():
    s = np.array([0.2, 0.9, np.inf, np.inf])
    assert np.array_equal(reweight(s, np.full(4, 2.0), np.zeros(4, int))[0], s)  # no deviation anywhere: weight 1
    s_hat, _ = reweight(s, np.array([0.0, 4.0, 2.0, 2.5]), np.array([0, 0, 0, -1]))
    assert s_hat[2] == 0 and s_hat[3] == np.inf and not np.isnan(s_hat).any()  # g = Ḡ beats an infinite D*


# --- the vote ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ties", ["exact", "include"])
def test_counts_and_outside_add_up(net, data, ties):
    result = localize(net, data, BLOCKS, k=7, ties=ties)
    assert set(result.counts.columns) == {*THRESHOLDS, 7} and result.counts.index.tolist() == BLOCKS
    outside = result.outside
    for i in result.counts:
        total = result.counts[i].sum() + outside[i]
        assert total == min(i, 24) if ties == "exact" else total >= min(i, 24)
    assert result.counts[150].tolist() == [12, 8] and outside[150] == 4  # more than there are: all
    assert len(result.top()) == 7 or ties == "include"


def test_include_counts_every_neuron_at_the_threshold(net, data):
    exact, tied = (localize(net, data, BLOCKS, k=5, ties=t, measure="ochiai") for t in ("exact", "include"))
    threshold = exact.neurons["s_hat"].sort_values(ascending=False).iloc[4]
    assert len(tied.top()) == (exact.neurons["s_hat"] >= threshold).sum()


def test_rank_columns_and_diagnostics(net, data):
    from scipy.stats import hypergeom

    result = localize(net, data, BLOCKS, k=9)
    n = result.neurons
    assert sorted(n["rank"]) == list(range(1, 25))
    assert n.sort_values("rank").head(9).index.tolist() == result.top().index.tolist()
    assert (n["s_hat"] <= n["s"]).all()
    for block, size in (("one", 12), ("two", 8)):
        row = result.summary.loc[block]
        count = (result.top()["block"] == block).sum()
        assert (row["size"], row["count"], row["expected"]) == (size, count, pytest.approx(9 * size / 24))
        assert row["enrichment"] == pytest.approx(count / (9 * size / 24)) and row["per_neuron"] == count / size
        assert row["p"] == pytest.approx(sum(hypergeom.pmf(j, 24, size, 9) for j in range(count, 10)))
        assert row["gradient"] == pytest.approx(n.loc[n["block"] == block, "g"].mean())
    assert result.mean_gradient == pytest.approx(result.summary["gradient"].mean())
    assert result.below == pytest.approx((result.top()["g"] < result.mean_gradient).mean())
    assert any("below the mean" in w for w in result.warnings) == (result.below > 0.5)
    assert result.summary.loc[result.block, "count"] == result.summary["count"].max()


def test_ties_between_blocks(monkeypatch, net, data):
    import archrepair.repair.localization as module

    def verdict(s_hat):  # neurons: 0-3 stem, 4-15 block one, 16-23 block two
        monkeypatch.setattr(module, "reweight", lambda s, g, member, deviation: (s_hat, 0.0))
        monkeypatch.setattr(module, "suspiciousness", lambda *a: s_hat)
        return localize(net, data, BLOCKS, k=2).block

    s_hat = np.zeros(24)
    s_hat[[4, 16]] = 0.9, 0.8
    assert verdict(s_hat) == "one"  # equal counts: larger sum
    s_hat[[4, 16, 5]] = 0.9, 0.9, 0.1
    assert verdict(s_hat) == "two"  # equal sums: larger mean ŝ, and block two is smaller (0.9/8 > 1.0/12)
    s_hat[5:16] = 0.7
    assert verdict(s_hat) == "one"
    s_hat[:] = 0
    s_hat[4], s_hat[5:14] = 0.75, 0.25
    s_hat[16], s_hat[17:22] = 0.75, 0.25
    assert s_hat[4:16].mean() == s_hat[16:].mean() and verdict(s_hat) == "two"  # equal means: the deeper one


def test_all_outside_is_said(monkeypatch, net, data):
    import archrepair.repair.localization as module

    s_hat = np.zeros(24)
    s_hat[:4] = 1
    monkeypatch.setattr(module, "reweight", lambda s, g, member, deviation: (s_hat, 0.0))
    result = localize(net, data, BLOCKS, k=4)
    assert result.counts[4].sum() == 0 and result.outside[4] == 4 and "none of the 4" in " ".join(result.warnings)


def test_large_gradients_below_the_mean_are_warned_of(monkeypatch, net, data):
    import archrepair.repair.localization as module

    g = np.full(24, 1.0)
    g[4:16], g[16:] = 0.0, 8.0  # Ḡ = 4: block one is as far below it as block two is above, and comes first
    monkeypatch.setattr(module, "failure_gradients", lambda *a, **k: g)
    monkeypatch.setattr(module, "suspiciousness", lambda am, *a: np.ones(len(am)))
    both = localize(net, data, BLOCKS, k=8)
    assert (both.block, both.below) == ("one", 1.0) and "compare deviation='positive'" in both.warnings[0]
    above = localize(net, data, BLOCKS, k=8, deviation="positive")
    assert (above.block, above.below, above.warnings) == ("two", 0.0, [])


def test_defaults_find_the_blocks_of_the_paper():
    net = create_model("resnet18", 3, width=0.125, stem_stride=2)
    data = repair_data(net, 6, 10)
    first, second = (localize(net, data, k=50) for _ in range(2))
    assert first.blocks == block_names(net) == ["layer1", "layer2", "layer3", "layer4"]
    pd.testing.assert_frame_equal(first.neurons, second.neurons)
    shortcut = first.neurons[first.neurons["layer"] == "layer2.0.downsample.0"]
    assert (shortcut["block"] == "layer2").all() and (first.neurons.loc[first.neurons["layer"] == "conv1", "block"] == "").all()
    few = localize(net, data, ["layer3", "layer2"], k=50)
    assert few.blocks == ["layer3", "layer2"] and few.counts[50].sum() + few.outside[50] == 50


def test_as_json_and_html_and_picture(net, data):
    result = localize(net, data, BLOCKS, k=6, measure="dstar")
    text = json.dumps(result.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["block"] == result.block and len(back["top"]) == 6 and back["counts"]["6"] == result.counts[6].to_dict()
    assert back["settings"]["measure"] == "dstar" and back["summary"]["two"]["size"] == 8 and len(text) < 8000
    assert result.verdict in result._repr_html_() and result.verdict in repr(result) and "<table" in result._repr_html_()
    import matplotlib

    matplotlib.use("Agg")
    axes = result.plot()
    assert [bar.get_height() for bar in axes.patches] == result.summary["count"].tolist()


def test_infinite_suspicion_becomes_null(monkeypatch, net, data):
    import archrepair.repair.localization as module

    monkeypatch.setattr(module, "suspiciousness", lambda am, *a: np.full(len(am), np.inf))
    assert json.loads(json.dumps(localize(net, data, BLOCKS, k=3).to_dict(), allow_nan=False))["top"][0]["s"] is None


@pytest.mark.parametrize("activation, passes", [("pre", 1), ("mean", 2)])
def test_cost_is_counted(net, data, activation, passes):
    meter = CostMeter()
    localize(net, data, BLOCKS, activation=activation, meter=meter)
    assert meter.forwards == 1 + passes * 52 + 12 and meter.backwards == 12  # the 1 finds the neurons


def test_training_sample_is_limited(net, data):
    assert localize(net, data, BLOCKS, n_train=10).n_correct == 10
    assert localize(net, data, BLOCKS, n_train=None).n_correct == 40


def test_without_correct_inputs(net, data):
    wrong = RepairData(data.failures, data.failures, data.val, Normalize(), data.val_failures)
    alone = localize(net, wrong, BLOCKS)
    assert alone.n_correct == 0 and set(alone.neurons["s"]) == {0.0, 1.0}


def test_bf16_counts_stay_exact(net):
    data = repair_data(net, 12, 600)
    result = localize(net, data, BLOCKS, precision="bf16", batch_size=512)
    assert (result.neurons["Ac"] + result.neurons["Nc"] == result.n_correct).all() and result.n_failures + result.n_correct == 612
    exact = localize(net, data, BLOCKS, batch_size=512)
    assert np.abs(result.neurons["Ac"] - exact.neurons["Ac"]).max() < 30  # only neurons at the edge of being active differ


# --- mistakes ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"measure": "tarantola"}, "unknown measure 'tarantola': did you mean 'tarantula'"),
    ({"activation": "post"}, "unknown activation 'post'"),
    ({"grad": "weights"}, "unknown gradient 'weights': did you mean 'weight'"),
    ({"deviation": "both"}, "unknown deviation"),
    ({"ties": "all"}, "unknown way with ties"),
    ({"precision": "fp16"}, "unknown precision"),
    ({"k": 0}, "k is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"smooth": -1.0}, "smooth is -1"),
    ({"n_train": 0}, "n_train is 0"),
    ({"blocks": ["three"]}, "unknown block 'three'"),
    ({"blocks": []}, "no blocks"),
    ({"blocks": ["one", "one.conv"]}, "one.conv is a part of block one"),
    ({"blocks": ["one", "relu"]}, "block relu holds no conv or linear layer"),
    ({"blocks": ["head"]}, "block head holds no conv or linear layer"),
])
def test_bad_options(net, data, options, message):
    with pytest.raises(ArchrepairError) as error:
        localize(net, data, **{"blocks": BLOCKS} | options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parts_check_their_options_too(net, data):
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    for call in (lambda: suspiciousness(1, 1, 1, 1, "x"), lambda: reweight(np.ones(1), np.ones(1), np.zeros(1, int), "x"),
                 lambda: spectrum(net, rows_of(data.failures), wiring, activation="x"),
                 lambda: failure_gradients(net, rows_of(data.failures), torch.arange(2), wiring, grad="x")):
        with pytest.raises(ArchrepairError, match="unknown"):
            call()


def test_nothing_wrong_is_said(net):
    right = labelled(net, 8, True)
    with pytest.raises(NoFailures, match="no mistake on the 16 images"):
        localize(net, RepairData(right, right, right, Normalize(), right), BLOCKS)


def test_gradients_that_are_no_numbers(net, data):
    net.one["conv"].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ArchrepairError, match="not finite"):
        localize(net, data, BLOCKS)


def test_labels_beyond_the_outputs(net):
    many = images(20, classes=6)
    with pytest.raises(ArchrepairError, match="3 outputs but labels run to 5"):
        localize(net, RepairData(many, many, many, Normalize(), many), BLOCKS)


def test_networks_without_neurons_and_computed_weights(data):
    only = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 3)).eval()
    with pytest.raises(ArchrepairError, match="found no neurons in Sequential"):
        localize(only, data, ["1"])
    net = Net().eval()
    nn.utils.parametrizations.weight_norm(net.two["conv"])
    by_activation = localize(net, data, BLOCKS, grad="activation")
    assert by_activation.block in BLOCKS
    assert localize(net, data, BLOCKS).to_dict() == by_activation.to_dict()  # a computed weight has no gradient of its own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu(net, data):
    here, there = (localize(net, data, BLOCKS, device=d) for d in ("cpu", "cuda"))
    assert next(net.parameters()).device.type == "cpu"
    assert np.abs(here.neurons["Ac"] - there.neurons["Ac"]).max() <= 1
    assert np.allclose(here.neurons["g"], there.neurons["g"], rtol=1e-2)
