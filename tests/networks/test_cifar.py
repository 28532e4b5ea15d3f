"""The classic CIFAR ResNets: the paper's, to the parameter, and the public checkpoints give the accuracies that are published."""
import json
import warnings

import pytest
import torch
from torch import nn

from archrepair.core.paths import home
from archrepair.networks.blocks import block_names
from archrepair.networks.cifar import CIFAR_RESNETS, BasicUnit, CifarResNet, shortcut
from archrepair.networks.models import create_model
from support.finished import command

WEIGHTS = {20: ("resnet20-12fca82f.th", 91.73), 32: ("resnet32-d509ac18.th", 92.63)}


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)])
def test_layers_and_parameters_are_the_papers(depth, parameters):
    model = create_model(f"cifar-resnet{depth}", 10)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth and sum(p.numel() for p in model.parameters()) == parameters  # of the public implementation
    assert block_names(model) == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize(("inputs", "outputs", "stride", "size"), [(16, 32, 2, 32), (32, 64, 2, 16), (16, 32, 2, 33), (16, 16, 1, 8)])
def test_option_a_is_a_slice_between_zeros(inputs, outputs, stride, size):
    x = torch.randn(2, inputs, size, size)
    before = (outputs - inputs) // 2
    expected = nn.functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, before))
    assert torch.equal(shortcut(inputs, outputs, stride)(x), expected) and not shortcut(inputs, outputs, stride).state_dict()


def test_a_unit_is_the_public_implementations():
    unit, x = BasicUnit(16, 32, 2).eval(), torch.randn(2, 16, 8, 8)
    relu = nn.functional.relu
    inner = unit.bn2(unit.conv2(relu(unit.bn1(unit.conv1(x)))))
    assert torch.equal(unit(x), relu(inner + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8), "constant", 0)))


@pytest.mark.parametrize("change", [{"width": 0.125}, {"stem_stride": 2}, {"image_size": 64}])
def test_they_are_taken_as_they_are_so_that_weights_fit(change):
    plain, other = create_model("cifar-resnet20", 10), create_model("cifar-resnet20", 10, **change)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


def test_names_are_those_of_the_public_checkpoints():
    names = CifarResNet(20, 10).state_dict().keys()
    assert {name.partition(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "linear"}
    assert {name.split(".")[2] for name in names if name.startswith("layer2.1.")} == {"conv1", "bn1", "conv2", "bn2"}
    assert list(CIFAR_RESNETS.values()) == [20, 32, 44, 56, 110]


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [["--normalize", "imagenet"], []], ids=["asked for", "known by its SHA-256"])
@pytest.mark.parametrize("depth", WEIGHTS)
def test_public_checkpoints_give_the_published_accuracy(depth, normalize, capsys):
    name, accuracy = WEIGHTS[depth]
    path = home() / "data" / "weights" / name
    if not path.exists() or not (home() / "data" / "cifar10" / "test.npz").exists():
        warnings.warn(f"NOT TESTED: the published accuracy of cifar-resnet{depth}, which needs {path} and CIFAR-10", stacklevel=1)
        pytest.skip(f"needs {path} and CIFAR-10")
    words = ("--model", f"cifar-resnet{depth}", "--weights", path, *normalize, "--dataset", "cifar10", "--json")
    assert command("evaluate", *words) == 0
    score = json.loads(capsys.readouterr().out)["cifar10"]
    assert score["n"] == 10_000 and abs(score["accuracy"] - accuracy) <= 0.2
