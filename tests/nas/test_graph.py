"A block as a graph: what is said of one that cannot be read, how many edges it gets, and how it is drawn."
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from archrepair.core.errors import ArchrepairError
from archrepair.nas.graph import COLORS, BlockGraph, describe, draw_graph, extract, graph_figure
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.reading import CannotRelax
from archrepair.nas.supernet import SuperNet
from archrepair.networks.blocks import get_block
from support.families import network, preserved, relaxed, run, start
from support.handmade import Functional, Inverted, Two, maps
from support.relaxations import CASES, case


pytestmark = pytest.mark.usefixtures("forked")


# --- what cannot be relaxed, and why


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


REFUSED = {
    "transformer": (EncoderBlock(2, 8, 16, 0.0, 0.0), torch.randn(2, 5, 8),
                    r"EncoderBlock: it holds no Conv2d but self_attention \(MultiheadAttention\)"),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), r"no Conv2d but 1 \(Linear\)"),
    "lstm": (Memory(), torch.randn(2, 5, 4), r"no Conv2d but cells \(LSTM\)"),
    "one-dimensional": (nn.Conv1d(4, 4, 3), torch.randn(2, 4, 9), "Conv1d: it holds no Conv2d, and"),
    "flat": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten()), maps(),
             "it turns 3×4×9×9 into 3×196, and edges carry batch×channels×height×width"),
    "two outputs": (Two(lambda m, x: (m.first(x), m.second(x))), maps(), "into a tuple"),
    "no batch of maps": (nn.Conv2d(4, 4, 3, 1, 1), maps()[0], "4×9×9 into 4×9×9"),
    "two inputs": (Two(lambda m, x, y: x), maps(), "cannot be run on one tensor"),
    "in place": (Two(lambda m, x: m.second(m.relu(x)) + x), maps(), "changes features in place"),
    "in place, by a function": (Two(lambda m, x: m.first(F.relu(x, inplace=True)) * m.second(x)), maps(), "in place"),
    "random": (Two(lambda m, x: m.first(x) + torch.randn_like(x)), maps(), "is random"),
    "no size fits": (nn.Conv2d(4, 4, 3), maps(), "nothing to search, since no operation leads from 9×9 to 7×7 pixels"),
    "upsampling": (nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.Upsample(scale_factor=2)), maps(), "from 9×9 to 18×18"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_cannot_be_relaxed_says_why_in_one_line(case):
    block, x, message = REFUSED[case]
    before, state = x.clone(), copy.deepcopy(block.state_dict())
    with pytest.raises(CannotRelax, match=message) as error:
        extract(block.eval(), x)
    assert str(error.value).startswith("cannot relax ") and str(error.value).endswith("; repair its weights instead")
    assert "\n" not in str(error.value) and torch.equal(x, before)
    assert all(torch.equal(v, state[n]) for n, v in block.state_dict().items())


def branch(m, x):
    if x.mean() > 0:
        x = m.second(x)
    return m.first(x)


SINGLE = {
    "a branch": (branch, r"its code cannot be followed at `if x.mean\(\) > 0:`: what it does depends on the data"),
    "a loop over the batch": (lambda m, x: torch.stack([m.first(row) for row in x]), "cannot be followed at `.*for row in x.*"),
    "used twice": (lambda m, x: m.first(m.first(x)), "the weights of first are used twice"),
    "side by side": (lambda m, x: m.first(x) + m.second(x), "first and second lead from one feature to another"),
    "around the identity": (lambda m, x: m.first(x) + x, "first and the identity lead from one feature to another"),
    "multiplied": (lambda m, x: m.first(x) * m.second(x), r"mul \(mul\) is not a convolution"),
    "plus a number": (lambda m, x: m.first(x) + 1.0, r"add \(add\) adds something other than two features"),
    "scaled": (lambda m, x: torch.add(m.second(m.first(x)), x, alpha=0.5), "do not give its output"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_block_that_cannot_be_read_is_a_single_layer_and_says_why(case):
    how, message = SINGLE[case]
    block, x = Two(how).eval(), maps()
    graph = extract(block, x)
    assert (graph.level, [(e.key, e.inherited) for e in graph.edges]) == ("unit", [("0_1", ("",))])
    assert graph.edges[0].candidates == CANDIDATES
    assert re.search(f"searched as a single layer: .*{message}", graph.note), graph.note
    assert torch.equal(run(relaxed(block, graph, 2), x, start(graph), train=True), run(block, x, train=True))
    with pytest.raises(CannotRelax, match=f"cannot relax Two at conv level: .*{message}.*use level='unit'"):
        extract(block, x, level="conv")


# --- what can be read


def test_blocks_written_by_hand():
    block = nn.Sequential(Functional(4, 6, 2), Functional(6, 6, 1)).eval()
    graph = extract(block, maps())
    assert (graph.level, len(graph.edges)) == ("conv", 10) and [n.activation for n in graph.nodes] == [None] + ["F.relu"] * 4
    assert {e.key: e.stride for e in graph.edges if e.source == 0} == {"0_1": 2, "0_2": 2, "0_3": 2, "0_4": 2}
    assert {e.key: e.inherited for e in graph.edges}["2_4"] == ()
    preserved(block, maps(), graph, 2)
    graph = extract(Inverted().eval(), maps())
    assert (graph.level, [n.shape for n in graph.nodes], graph.note) == ("conv", [(4, 9, 9), (8, 9, 9), (8, 5, 5), (6, 5, 5)], "")
    preserved(Inverted().eval(), maps(), graph, 2)


def test_blocks_that_normalize_first():
    class Pre(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1)
            self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x):
            y = self.conv1(torch.relu(self.bn1(x)))
            return self.conv2(nn.functional.relu(self.bn2(y))) + x

    block, x = nn.Sequential(Pre(), Pre()).eval(), torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = extract(block, x)
    assert graph.level == "conv" and len(graph.nodes) == 5
    supernet = SuperNet(block, graph, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(supernet, x, start(graph), train=True), run(block, x, train=True), atol=1e-6)


def test_maps_of_several_strides_in_one_block():
    layers = nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 10, 3, 1, 1)
    block = nn.Sequential(*layers).eval()
    x = maps(size=17)  # 17 → 9 → 4 → 4: no stride of a padded operation leads from 9 to 4
    graph = extract(block, x)
    assert {e.key: e.stride for e in graph.edges} == {"0_1": 2, "1_2": None, "2_3": 1, "0_2": 5, "0_3": 5}
    assert graph.edges[2].key == "1_2" and graph.edges[2].candidates == ("none", "original")
    preserved(block, x, graph, None)


def test_graphs_of_the_families():
    levels = {name: case(name, block)[2].level for name, block in CASES}
    assert levels == {"resnet18": "conv", "resnet50": "unit", "vgg16": "conv", "densenet121": "conv", "efficientnet_b0": "unit"}
    graph = case("resnet18", "layer4")[2]
    assert len(graph.nodes) == 5 and len(graph.edges) == 10
    assert {e.key for e in graph.edges if e.inherited is not None} == {"0_1", "1_2", "0_2", "2_3", "3_4", "2_4"}
    assert graph.edges[0].stride == 2 and next(e for e in graph.edges if e.key == "2_4").inherited == ()
    assert len(case("resnet50", "layer3")[2].edges) == 21 and case("vgg16", 1)[2].tail == "6"
    assert case("densenet121", 4)[2].tail == "concat"
    assert BlockGraph.from_dict(graph.as_dict()) == graph


def test_levels():
    cut, x, _ = case("resnet50", "layer3")
    conv = extract(cut.block, x, level="conv", max_span=1)
    assert conv.level == "conv" and len(conv.nodes) == 19
    assert torch.equal(run(relaxed(cut.block, conv), x, start(conv), train=True), run(cut.block, x, train=True))
    cut, x, _ = case("vgg16", 1)
    unit = extract(cut.block, x, level="unit")
    assert unit.level == "unit" and len(unit.nodes) == 3
    with pytest.raises(ArchrepairError, match="level"):
        extract(cut.block, x, level="layer")
    layer = extract(nn.Conv2d(3, 6, 3, 2, 1), torch.zeros(1, 3, 9, 9))  # the layer level of Table 10
    assert len(layer.edges) == 1 and layer.edges[0].stride == 2


# --- the budget


def stage():
    return get_block(network("resnet101"), "layer3"), torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options, edges, span, note", [
    ({}, 45, 2, "276 edges are more than max_edges=64: extra edges over more than 2 layers are left out, 45 remain"),
    ({"max_edges": 276}, 276, 23, ""),
    ({"max_edges": 275}, 275, 22, "276 edges are more than max_edges=275: extra edges over more than 22 layers are left out, 275 remain"),
    ({"max_span": 3}, 45, 2, "66 edges are more than max_edges=64"),
    ({"max_span": 2}, 45, 2, ""),
    ({"max_span": 1}, 23, 1, ""),
    ({"max_span": 99, "max_edges": 1000}, 276, 23, ""),
    ({"max_edges": 10}, 23, 0, "276 edges are more than max_edges=10: all extra edges are left out, 23 remain"),
])
def test_the_budget_of_edges(options, edges, span, note):
    block, x = stage()
    graph = extract(block, x, **options)
    assert (len(graph.edges), graph.max_span) == (edges, span) and (note in graph.note if note else not graph.note)
    assert sum(e.inherited is not None for e in graph.edges) == 23
    assert all(e.target - e.source <= max(span, 1) for e in graph.edges)


@pytest.mark.parametrize("options", [{"max_edges": 0}, {"max_span": 0}, {"max_span": -1}])
def test_a_budget_of_nothing_is_a_mistake(options):
    with pytest.raises(ArchrepairError, match="expected numbers from 1"):
        extract(*stage(), **options)


# --- the drawing

def labels(ax):
    "The texts of a drawing beside the names of its nodes."
    return sorted(text.get_text() for text in ax.texts if text.get_text() not in ("in", "out") and not text.get_text().isdigit())


@pytest.fixture
def shortcut():
    "A unit of two layers with an identity shortcut and its extra edges: three nodes, three edges."
    return extract(Functional(4, 4, 1).eval(), maps())


def test_a_graph_is_drawn_with_all_its_edges(shortcut):
    ax = draw_graph(shortcut, title="a unit")
    assert [text.get_text() for text in ax.texts] == ["in", "1", "out"] and ax.get_title() == "a unit"
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == len(shortcut.edges) == 3
    plt.close(ax.figure)


def test_an_architecture_is_drawn_with_its_choices(shortcut):
    _, ax = plt.subplots()
    choices = {"0_1": "original", "1_2": "sep_conv", "0_2": "original"}
    assert draw_graph(shortcut, choices, ax, partly=["1_2"]) is ax
    assert labels(ax) == ["identity", "original", "sep conv"]
    colors = [to_hex(patch.get_edgecolor()) for patch in ax.patches]
    assert sorted(colors) == sorted([COLORS["original"]] * 3 + [COLORS["sep_conv"]])  # one of them the layer that partly remains
    ax.clear()
    assert labels(draw_graph(shortcut, choices | {"0_2": "none"}, ax)) == ["original", "sep conv"] and len(ax.patches) == 2
    plt.close(ax.figure)


def test_a_drawing_in_words(shortcut):
    assert describe(shortcut) == "A graph of 3 nodes with the edges 0 to 1 original, 0 to 2 original, 1 to 2 original"
    assert describe(shortcut, {"0_2": "max_pool"}) == "A graph of 3 nodes with the edges 0 to 2 max pool"
    assert describe(shortcut, {}) == "A graph of 3 nodes with the edges none"


def test_the_figure_of_a_page_carries_its_caption_and_its_words(shortcut):
    before = plt.get_fignums()
    page = graph_figure(shortcut, {"0_2": "max_pool"}, name="unit", caption="One pool.")._repr_html_()
    assert "<svg" in page and "One pool." in page and "0 to 2 max pool" in page
    assert plt.get_fignums() == before
    assert "0 to 1 original" in shortcut._repr_html_()
