"Surgical fine-tuning: gradients of the failures, relative norms, and what is tuned by them."
import copy
import math

import pytest
import torch
from torch import nn

from archrepair.baselines import surgical
from archrepair.baselines.parts.common import Problem
from archrepair.baselines.retrain import Retrain
from archrepair.baselines.surgical import Surgical, failure_gradient, layer_rates, layers, relative_norms
from archrepair.core.errors import ArchrepairError
from archrepair.networks.blocks import block_names
from archrepair.training.fit import Recipe
from support.states import same_state


def test_gradients_of_the_failures_equal_a_plain_loop(_problem):
    problem = Problem(copy.deepcopy(_problem.network).eval(), _problem.scenario.data)
    gradient, failures = failure_gradient(problem, batch_size=7), problem.data.failures
    network = copy.deepcopy(problem.original).requires_grad_(True)
    for image, label in zip(failures.images, failures.labels):  # one at a time
        nn.functional.cross_entropy(network(problem.data.transform(image[None])), label[None]).backward()
    for name, p in network.named_parameters():
        assert torch.allclose(gradient[name], p.grad / len(failures), atol=1e-5, rtol=1e-3), name
    assert (problem.meter.forwards, problem.meter.backwards) == (len(failures), len(failures))


def test_relative_norms_by_hand():
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2)), nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0][0].weight.copy_(torch.tensor([[3.0, 0.0]]))
        network[0][1].weight.copy_(torch.tensor([[4.0], [0.0]]))
        network[2].weight.zero_()
    gradient = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    gradient["0.0.weight"], gradient["0.1.weight"] = torch.tensor([[6.0, 0.0]]), torch.tensor([[0.0], [8.0]])
    gradient["0.0.bias"] += 100  # biases and BatchNorm do not count
    gradient["1.weight"] += 100
    assert relative_norms(network, gradient, {"all": network[0], "last": network[2]}) == {"all": 10 / 5, "last": 0.0}  # 0 of 0 weights
    assert set(layers(network)) == {"0.0", "0.1", "2"}
    assert relative_norms(network, gradient, layers(network)) == {"0.0": 2.0, "0.1": 2.0, "2": 0.0}
    groups = layer_rates(network, {"0.0": 1.0, "2": 0.25}, Recipe(epochs=1, lr=0.1, weight_decay=0.01))
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [(1, 0.1, 0.01), (1, 0.1, 0.0), (1, 0.025, 0.01)]
    with pytest.raises(ArchrepairError, match="no weights to tune"):
        relative_norms(network, gradient, {"norm": network[1]})
    gradient["0.0.weight"][0, 0] = math.nan
    with pytest.raises(ArchrepairError, match="not finite"):
        relative_norms(network, gradient, layers(network))


def test_surgery_is_on_the_block_with_the_largest_norm(_problem):
    result = Surgical(epochs=1).repair(_problem.network, _problem.scenario.data)
    norms = result.config["relative_norms"]
    assert set(norms) == set(block_names(_problem.network)) and result.block == max(norms, key=norms.get)
    fixed = Surgical(epochs=1, block="layer4").repair(_problem.network, _problem.scenario.data)
    assert fixed.block == "layer4" and "relative_norms" not in fixed.config


def test_auto_rgn_tunes_layers_by_their_norms(_problem, monkeypatch):
    "Every layer has its rate, in proportion to its norm; what belongs to no layer is not trained."
    calls = []

    def spy(network, data, **settings):
        calls.append(settings)
        return finetune(network, data, **settings)

    finetune = surgical.finetune
    monkeypatch.setattr(surgical, "finetune", spy)
    result = Surgical(epochs=1, variant="auto-rgn").repair(_problem.network, _problem.scenario.data)
    [settings], norms = calls, result.config["relative_norms"]
    assert result.block is None and settings["level"] == "network"
    network = copy.deepcopy(_problem.network)
    rates = {id(p): group["lr"] for group in settings["groups"](network) for p in group["params"]}
    layer_of = {f"{name}.{kind}": name for name in norms for kind in ("weight", "bias")}
    rate = surgical.PRESETS["default"].lr / max(norms.values())
    for name, p in network.named_parameters():
        assert (id(p) in rates) == (name in layer_of), name
        if name in layer_of:
            assert rates[id(p)] == pytest.approx(rate * norms[layer_of[name]])
    before, after = _problem.network.state_dict(), result.candidates["repaired"].state_dict()
    affine = [k for k in before if "bn" in k and k.endswith((".weight", ".bias"))]
    assert affine and all(torch.equal(before[k], after[k]) for k in affine)


def test_without_gradients_everything_is_tuned_alike(_problem, monkeypatch):
    "A network that makes no loss on its failures has no relative norms; it is then fine-tuned as a whole."
    zero = lambda problem: {name: torch.zeros_like(p) for name, p in problem.original.named_parameters()}
    monkeypatch.setattr(surgical, "failure_gradient", zero)
    got = Surgical(epochs=1, variant="auto-rgn").repair(_problem.network, _problem.scenario.data)
    whole = Retrain(epochs=1).repair(_problem.network, _problem.scenario.data)
    assert same_state(got.candidates["repaired"], whole.candidates["repaired"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"variant": "blok"}, "did you mean 'block'"), ({"preset": "x"}, "unknown preset"), ({"epochs": 1.0}, "epochs is 1.0"),
    ({"variant": "auto-rgn", "block": "layer1"}, "tunes every layer and takes no block")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        Surgical(**settings)
