"Reading a block: what its layers are, what is said of one that cannot be read, and how many edges it gets."
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

from archrepair.core.errors import ArchrepairError
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import BlockGraph, CannotRelax, extract
from archrepair.nas.operations import CANDIDATES, stride_between
from archrepair.nas.reading import obstacle, read_convolutions, read_units
from archrepair.networks.blocks import get_block
from support.families import network, preserved, relaxed, run, start


@pytest.fixture(autouse=True)
def forked():
    "Constructors of layers draw from the global stream; here that is put back."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def maps(channels=4, size=9, n=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    "Two convolutions; `how` says what happens to them."

    def __init__(self, how=None):
        super().__init__()
        self.first, self.second, self.relu, self.how = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(inplace=True), how

    def forward(self, x):
        return self.how(self, x)


# --- what cannot be relaxed, and why

class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


REFUSED = {
    "transformer": (EncoderBlock(2, 8, 16, 0.0, 0.0), torch.randn(2, 5, 8), r"EncoderBlock: it holds no Conv2d but self_attention \(MultiheadAtt"),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), r"no Conv2d but 1 \(Linear\)"),
    "lstm": (Memory(), torch.randn(2, 5, 4), r"no Conv2d but cells \(LSTM\)"),
    "one-dimensional": (nn.Conv1d(4, 4, 3), torch.randn(2, 4, 9), "Conv1d: it holds no Conv2d, and"),
    "flat": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten()), maps(), "it turns 3×4×9×9 into 3×196, and edges carry batch×channels×height×width"),
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
    before, kept = x.clone(), copy.deepcopy(block.state_dict())
    with pytest.raises(CannotRelax, match=message) as error:
        extract(block.eval(), x)
    assert str(error.value).startswith("cannot relax ") and str(error.value).endswith("; repair its weights instead")
    assert "\n" not in str(error.value) and torch.equal(x, before)
    assert all(torch.equal(v, kept[n]) for n, v in block.state_dict().items())


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
    "multiplied": (lambda m, x: m.first(x) * m.second(x), r"mul \(mul\) is no convolution"),
    "plus a number": (lambda m, x: m.first(x) + 1.0, r"add \(add\) adds something else than two features"),
    "scaled": (lambda m, x: torch.add(m.second(m.first(x)), x, alpha=0.5), "do not give its output"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_block_that_cannot_be_read_is_a_single_layer_and_says_why(case):
    how, message = SINGLE[case]
    block, x = Two(how).eval(), maps()
    graph = extract(block, x)
    assert (graph.level, [(e.key, e.inherited) for e in graph.edges]) == ("unit", [("0_1", ("",))]) and graph.edges[0].candidates == CANDIDATES
    assert re.search(f"searched as a single layer: .*{message}", graph.note), graph.note
    assert torch.equal(run(relaxed(block, graph, 2), x, start(graph), train=True), run(block, x, train=True))
    with pytest.raises(CannotRelax, match=f"cannot relax Two at conv level: .*{message}.*use level='unit'"):
        extract(block, x, level="conv")


# --- what can be read

class Functional(nn.Module):
    "A residual unit as people write them by hand."

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class Inverted(nn.Module):
    "Three convolutions of different widths, no chain of modules."

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))))


def test_blocks_written_by_hand():
    block = nn.Sequential(Functional(4, 6, 2), Functional(6, 6, 1)).eval()
    graph = extract(block, maps())
    assert (graph.level, len(graph.edges)) == ("conv", 10) and [n.post for n in graph.nodes] == [None] + ["F.relu"] * 4
    assert {e.key: e.stride for e in graph.edges if e.source == 0} == {"0_1": 2, "0_2": 2, "0_3": 2, "0_4": 2}
    assert {e.key: e.inherited for e in graph.edges}["2_4"] == ()
    preserved(block, maps(), graph, 2)
    graph = extract(Inverted().eval(), maps())
    assert (graph.level, [n.shape for n in graph.nodes], graph.note) == ("conv", [(4, 9, 9), (8, 9, 9), (8, 5, 5), (6, 5, 5)], "")
    preserved(Inverted().eval(), maps(), graph, 2)


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


def test_readers_and_obstacles():
    with pytest.raises(CannotRelax, match=r"block.*features.*\(iadd\)|mul|avgpool"):
        read_convolutions(get_block(network("efficientnet_b0"), "features.3"))
    assert len(read_units(get_block(network("efficientnet_b0"), "features.3")).edges) == 2
    with pytest.raises(CannotRelax, match=r"relu \(relu\) is no link of a chain"):
        read_units(Functional(4, 4, 1))
    assert obstacle(ValueError("no\nmore")) == "its code cannot be followed: no"


@pytest.mark.parametrize("source, target, stride", [((9, 9), (9, 9), 1), ((9, 9), (5, 5), 2), ((9, 8), (5, 4), 2), ((9, 9), (3, 3), 3),
                                                    ((7, 7), (1, 1), 7), ((9, 9), (4, 4), None), ((9, 9), (9, 5), None), ((4, 4), (8, 8), None)])
def test_strides_between_maps(source, target, stride):
    assert stride_between(source, target) == stride
    if stride:
        block = nn.Sequential(nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(target)).eval()
        x = torch.randn(3, 4, *source, generator=torch.Generator().manual_seed(0))
        graph = extract(block, x)
        assert graph.edges[0].stride == stride
        preserved(block, x, graph, 2)


def test_maps_of_several_strides_in_one_block():
    block = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 10, 3, 1, 1)).eval()
    x = maps(size=17)  # 17 → 9 → 4 → 4: no stride of a padded operation leads from 9 to 4
    graph = extract(block, x)
    assert {e.key: e.stride for e in graph.edges} == {"0_1": 2, "1_2": None, "2_3": 1, "0_2": 5, "0_3": 5}
    assert graph.edges[2].key == "1_2" and graph.edges[2].candidates == ("none", "original")
    preserved(block, x, graph, None)


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


# --- genotypes of graphs

def chain(*edges, nodes=3, ks=None, widen="keep"):
    "A genotype of 1×1 convolutions on four channels; edges are (source, target, inherited?, choice)."
    content = {"nodes": [{"shape": (4, 9, 9), "post": None}] * nodes, "level": "conv", "wrapper": None, "max_span": 2, "note": "",
               "edges": [{"source": i, "target": j, "inherited": (str(j - 1),) if own else None, "stride": 1} for i, j, own, _ in edges]}
    return Genotype(BlockGraph.from_dict(content), tuple(e[3] for e in edges), (1.0,) * len(edges), ks or (1,) * len(edges), widen)


def test_what_is_alive():
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    whole = chain((0, 1, True, "original"), (0, 2, False, "none"), (1, 2, True, "original"))
    assert whole.live() == [0, 2] and torch.equal(whole.build(layers)(maps()), layers(maps()))
    bypass = chain((0, 1, True, "original"), (0, 2, False, "skip"), (1, 2, True, "none"))
    assert bypass.live() == [1] and not list(bypass.build(layers).inherited)
    kept = chain((0, 1, True, "original"), (0, 2, False, "skip"), (1, 2, True, "none"), ks=(2, 2, 2))
    assert kept.live() == [0, 1, 2]  # outside its slice the second convolution lives on
    unfed = chain((0, 1, True, "none"), (0, 2, False, "skip"), (1, 2, True, "none"), ks=(1, 1, 2))
    assert unfed.live() == [1] and unfed.build(layers)(maps()).shape == (3, 4, 9, 9)  # but of nothing it makes nothing
    for lost in (chain((0, 1, True, "original"), (0, 2, False, "none"), (1, 2, True, "none")),
                 chain((0, 1, True, "none"), (0, 2, False, "none"), (1, 2, True, "original"))):
        assert lost.live() == []
        with pytest.raises(ArchrepairError, match="leads nowhere"):
            lost.build(layers)


def test_a_genotype_with_a_strange_number_of_parts():
    with pytest.raises(ArchrepairError, match="divided into 0 parts"):
        chain((0, 1, True, "original"), nodes=2, ks=(0,))


def test_layers_that_do_more_than_their_kind_are_scaled_not_folded():
    "A subclass of BatchNorm may go on to activate, one of convolution may standardize its weights: a factor inside would be lost."
    class Active(nn.BatchNorm2d):
        def forward(self, x):
            return torch.tanh(super().forward(x))

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.norm(), self.bias)

    for last in (Active(4), Standardized(4, 4, 1)):
        block = nn.Sequential(nn.Conv2d(4, 4, 1), last).eval()
        graph = extract(block, maps(), level="unit" if isinstance(last, Active) else "auto")
        genotype = Genotype.original(graph)
        half = Genotype(graph, genotype.choices, (0.5,) * len(graph.edges), genotype.ks)
        built = half.build(block)
        with torch.no_grad():
            expected = maps()
            for node in range(1, len(graph.nodes)):
                layers = [block.get_submodule(p) for p in next(e for _, e in graph.incoming(node) if e.inherited).inherited]
                expected = 0.5 * nn.Sequential(*layers)(expected)
            assert torch.allclose(built(maps()), expected, atol=1e-6)
