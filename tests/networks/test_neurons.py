"""Where the neurons are: which module returns a layer's pre-activation, and hooks that leave no trace."""
import pytest
import torch
from torch import nn

from archrepair.networks.models import create_model
from archrepair.networks.neurons import Wiring, watch, wire
from support.nets import Net


@pytest.fixture
def net():
    return Net().eval()


def read_from(wiring: Wiring) -> dict[str, list[str]]:
    "The modules at which each layer is read."
    return {layer: sorted(m for m, order in wiring.owners.items() if layer in order) for layer in wiring.layers}


def test_batchnorm_takes_the_place_of_its_convolution_only(net):
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    assert wiring.layers == {"stem": 4, "one.conv": 6, "one.short": 6, "two.conv": 8}  # in the order of the calls, without the head
    assert read_from(wiring) == {"stem": ["stem"], "one.conv": ["one.bn"], "one.short": ["one.short"], "two.conv": ["two.bn"]}
    assert read_from(wire(Net(norm=False).eval(), torch.zeros(1, 3, 12, 12)))["one.conv"] == ["one.conv"]


def test_families_have_their_neurons():
    image = torch.zeros(1, 3, 32, 32)
    resnet = wire(create_model("resnet18", 10, width=0.125, stem_stride=2), image)
    assert len(resnet.layers) == 20 and resnet.size == 600 and "fc" not in resnet.layers
    assert all(m.replace("bn", "conv").replace("downsample.1", "downsample.0") == layer for layer, (m,) in read_from(resnet).items())
    dense = read_from(wire(create_model("densenet121", 10, width=0.125, stem_stride=2), image))
    assert dense["features.denseblock1.denselayer1.conv1"] == ["features.denseblock1.denselayer1.norm2"]
    assert dense["features.denseblock1.denselayer1.conv2"] == ["features.denseblock1.denselayer1.conv2"]  # its BN reads a concatenation


def test_batchnorm_after_an_in_place_relu_is_not_the_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(5, 3))
    assert read_from(wire(net.eval(), torch.zeros(1, 3, 8, 8))) == {"0": ["0"]}


def test_hooks_are_removed_after_an_error(net):
    wiring = wire(net, torch.zeros(1, 3, 12, 12))
    with pytest.raises(RuntimeError), watch(net, wiring, lambda *a: None):
        net(torch.zeros(1, 4, 12, 12))
    with pytest.raises(RuntimeError):
        wire(net, torch.zeros(1, 4, 12, 12))
    assert not any(m._forward_hooks for m in net.modules())
