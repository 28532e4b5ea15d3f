"One level of repair: the neuron, layer and block with the largest failure gradient, and only that is tuned."
import copy

import pytest
import torch
from torch import nn

from archrepair.baselines import levels
from archrepair.baselines.levels import Levels, largest_gradients
from archrepair.core.errors import ArchrepairError
from archrepair.networks.blocks import block_names
from archrepair.networks.neurons import wire
from archrepair.repair.finetuning import LEVELS
from archrepair.repair.result import changes
from archrepair.training.cost import CostMeter

PLACES = {"neuron": "layer2.0.conv1:3", "layer": "layer3.1.conv2", "block": "layer4", "network": None}


def test_the_largest_of_made_up_gradients(problem, monkeypatch, untouched):
    "The stem has the largest gradient of all and is not a candidate; one neuron stands out, another layer has the largest mean."
    wiring = wire(copy.deepcopy(problem.network).eval(), torch.zeros(1, 3, 32, 32))
    values = {layer: torch.full((size,), 0.1) for layer, size in wiring.layers.items()}
    values["conv1"] += 100.0
    values["layer2.0.conv1"][3] = 9.0
    values["layer3.1.conv2"] += 2.0
    for layer in values:
        if layer.startswith("layer4."):
            values[layer] += 1.5
    gradient = torch.cat(list(values.values())).numpy()
    monkeypatch.setattr(levels, "failure_gradients", lambda *args, **more: gradient)
    with untouched(problem.network):
        assert largest_gradients(problem.network, problem.scenario.data) == PLACES


def test_the_gradients_are_those_of_a_few_failures(problem):
    "One forward and one backward for each of them, and the same ones for the same seed."
    meters = [CostMeter(), CostMeter()]
    places = [largest_gradients(problem.network, problem.scenario.data, 7, seed=3, meter=meter) for meter in meters]
    assert places[0] == places[1] and meters[0].forwards == meters[0].backwards == 7
    assert set(places[0]) == set(LEVELS) and places[0]["block"] in block_names(problem.network)


@pytest.mark.parametrize("level", LEVELS)
def test_only_the_level_is_tuned(problem, monkeypatch, level):
    monkeypatch.setattr(levels, "largest_gradients", lambda *args, **more: PLACES)
    result = Levels(level=level, epochs=1).repair(problem.network, problem.scenario.data)
    assert result.config["where"] == PLACES[level] and result.block == ("layer4" if level == "block" else None)
    changed = changes(problem.network.state_dict(), result.candidates["repaired"].state_dict())
    if level == "block":
        assert all(name.startswith("layer4.") for name in changed)
    if level == "layer":
        assert all(name.startswith(("layer3.1.conv2.", "layer3.1.bn2.")) for name in changed)
    if level == "neuron":
        assert all(name.startswith(("layer2.0.conv1.", "layer2.0.bn1.")) for name in changed)


def test_wrong_settings_are_named():
    wrong = ({"level": "blocks"}, "unknown level 'blocks': did you mean 'block'"), ({"n_failures": 0}, "n_failures is 0")
    for settings, message in wrong:
        with pytest.raises(ArchrepairError, match=message):
            Levels(**settings)


def test_it_runs_on_a_network_whose_blocks_are_few(digits):
    "The places named are within its blocks."
    from archrepair.data.scenario import RepairData

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10)
    network = nn.Sequential(*layers)
    data = RepairData.of(digits.select(torch.arange(10)), digits.select(torch.arange(10, 40)))
    places = largest_gradients(network.eval(), data)
    assert places["block"] in block_names(network)
