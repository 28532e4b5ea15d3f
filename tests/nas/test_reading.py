"Reading a block: its layers and how they are connected, and what the obstacle is where it cannot be read."
import pytest
from torch import nn

from archrepair.nas.graph import extract
from archrepair.nas.reading import ACTIVATION_LAYERS, CannotRelax, obstacle, read_convolutions, read_units
from archrepair.networks.blocks import get_block
from support.families import network, preserved
from support.handmade import Functional, maps


pytestmark = pytest.mark.usefixtures("forked")


def test_the_skeleton_of_a_residual_unit():
    skeleton = read_convolutions(Functional(4, 6, 2))
    assert skeleton.activations == [None, "F.relu", "F.relu"] and (skeleton.level, skeleton.tail) == ("conv", None)
    assert skeleton.edges == [(0, 1, ("conv1", "bn1")), (1, 2, ("conv2", "bn2")), (0, 2, ("shortcut.0", "shortcut.1"))]


@pytest.mark.parametrize("layer", ACTIVATION_LAYERS)
def test_an_activation_after_a_convolution_ends_a_node(layer):
    skeleton = read_convolutions(nn.Sequential(nn.Conv2d(4, 4, 1), layer(), nn.Conv2d(4, 4, 1)))
    assert skeleton.activations == [None, "1", None] and [paths for *_, paths in skeleton.edges] == [("0",), ("2",)]


def test_a_pool_at_the_end_is_the_tail():
    skeleton = read_convolutions(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2)))
    assert (skeleton.activations, skeleton.tail) == ([None, "1"], "2")


def test_readers_and_obstacles():
    with pytest.raises(CannotRelax, match=r"block.*features.*\(iadd\)|mul|avgpool"):
        read_convolutions(get_block(network("efficientnet_b0"), "features.3"))
    assert len(read_units(get_block(network("efficientnet_b0"), "features.3")).edges) == 2
    with pytest.raises(CannotRelax, match=r"relu \(relu\) is not a link of a chain"):
        read_units(Functional(4, 4, 1))
    assert obstacle(ValueError("no\nmore")) == "its code cannot be followed: no"


def test_a_gate_belongs_to_the_unit_it_weighs():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x * self.fc(self.pool(x)).sigmoid()

    block = nn.Sequential(nn.Conv2d(4, 8, 1), nn.SiLU(), Gate(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).eval()
    graph = extract(block, maps())
    assert (graph.level, [e.inherited for e in graph.edges]) == ("unit", [("0", "1", "2", "3"), None, ("4", "5")])
    preserved(block, maps(), graph, 2)
