"Architectures: stored and read again, alive or not, built as plain networks, exported."
import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.nas.genotype import Genotype, Slice
from archrepair.nas.graph import BlockGraph, Edge, Node, extract
from support.families import run
from support.handmade import maps
from support.relaxations import CASES, case, searched


pytestmark = pytest.mark.usefixtures("forked")


def chain(*edges, nodes=3, channel_parts=None, widen="keep"):
    "A genotype of 1×1 convolutions on four channels; edges are (source, target, inherited?, choice)."
    graph = BlockGraph(
        tuple(Node((4, 9, 9)) for _ in range(nodes)),
        tuple(Edge(i, j, (str(j - 1),) if inherited else None, 1) for i, j, inherited, _ in edges), "conv", max_span=2)
    return Genotype(graph, tuple(choice for *_, choice in edges), (1.0,) * len(edges), channel_parts or (1,) * len(edges), widen)


def test_what_is_alive():
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    whole = chain((0, 1, True, "original"), (0, 2, False, "none"), (1, 2, True, "original"))
    assert whole.live() == [0, 2] and torch.equal(whole.build(layers)(maps()), layers(maps()))
    bypass = chain((0, 1, True, "original"), (0, 2, False, "skip"), (1, 2, True, "none"))
    assert bypass.live() == [1] and not list(bypass.build(layers).inherited)
    remaining = chain((0, 1, True, "original"), (0, 2, False, "skip"), (1, 2, True, "none"), channel_parts=(2, 2, 2))
    assert remaining.live() == [0, 1, 2]  # outside its slice the second convolution remains
    unfed = chain((0, 1, True, "none"), (0, 2, False, "skip"), (1, 2, True, "none"), channel_parts=(1, 1, 2))
    assert unfed.live() == [1] and unfed.build(layers)(maps()).shape == (3, 4, 9, 9)  # but of nothing it makes nothing
    for lost in (chain((0, 1, True, "original"), (0, 2, False, "none"), (1, 2, True, "none")),
                 chain((0, 1, True, "none"), (0, 2, False, "none"), (1, 2, True, "original"))):
        assert lost.live() == []
        with pytest.raises(ArchrepairError, match="leads nowhere"):
            lost.build(layers)


def test_a_genotype_with_a_strange_number_of_parts():
    with pytest.raises(ArchrepairError, match="divided into 0 parts"):
        chain((0, 1, True, "original"), nodes=2, channel_parts=(0,))


def test_slices():
    graph = case("resnet18", "layer4")[2]
    assert [Slice.of(graph, i, 4).position for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert Slice.of(graph, 0, None).parts == 2 and Slice.of(graph, 2, 5).parts == 4  # 64 channels, no fifth of which is whole


def test_genotype_round_trip_and_the_original_exactly():
    for name, block in CASES:
        cut, x, graph = case(name, block)
        original = Genotype.original(graph, [Slice.of(graph, i, None).parts for i in range(len(graph.edges))])
        assert original.is_original and Genotype.from_json(original.to_json()) == original
        for train in (False, True):
            assert torch.equal(run(original.build(cut.block), x, train=train), run(cut.block, x, train=train))
    for text in ("", "{}", "[1]", original.to_json().replace('"original"', '"magic"')):
        with pytest.raises(ArchrepairError):
            Genotype.from_json(text)


STORED = """{
 "graph": {
  "nodes": [
   {"shape": [4, 9, 9], "post": null},
   {"shape": [4, 9, 9], "post": "1"}
  ],
  "edges": [
   {"source": 0, "target": 1, "inherited": ["0"], "stride": 1}
  ],
  "level": "conv",
  "wrapper": "2",
  "max_span": 1,
  "note": ""
 },
 "choices": ["original"],
 "coefficients": [0.75],
 "ks": [2],
 "widen": "keep",
 "strategy": "pc-darts"
}"""


def test_stored_genotypes_keep_their_keys():
    genotype = Genotype.from_json(STORED)
    assert (genotype.channel_parts, genotype.graph.tail, genotype.graph.nodes[1].activation) == ((2,), "2", "1")
    assert json.loads(genotype.to_json()) == json.loads(STORED) and list(json.loads(genotype.to_json())) == list(json.loads(STORED))
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    with torch.no_grad():
        y = block[0](maps())
        y[:, :2] *= 0.75
        assert torch.allclose(genotype.build(block)(maps()), block[1:](y), atol=1e-6)


def test_submodules_of_a_repaired_block_keep_their_names():
    "They are the paths in the stored genotype of a second repair."
    cut, x, graph = case("resnet18", "layer2")
    again = extract(Genotype.original(graph).build(cut.block), x)
    assert again.level == "conv" and [n.activation for n in again.nodes[1:]] == [f"posts.{i}.0" for i in range(4)]
    assert again.edges[0].inherited == ("inherited.0_1.0", "inherited.0_1.1")


def test_a_genotype_is_drawn_with_what_partly_remains():
    *_, genotype, _ = searched()
    assert genotype.partly == ["0_2", "1_2"] and not genotype.is_original
    assert "A searched architecture with 3 new operations." in genotype._repr_html_()
    original = Genotype.original(genotype.graph, strategy="darts")
    assert "The original architecture of the block, found by darts." in original._repr_html_()
    ax = genotype.draw(title="searched")
    assert ax.get_title() == "searched" and "dil conv" in {text.get_text() for text in ax.texts}
    plt.close(ax.figure)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_saved_block_is_built_again_on_the_original(name):
    cut, x, genotype, repaired = searched(name)
    before = copy.deepcopy(cut.block.state_dict())
    again = Genotype.from_json(genotype.to_json()).build(cut.block)
    assert not torch.allclose(run(again, x), run(repaired, x), atol=1e-3)
    again.load_state_dict(repaired.state_dict())
    assert torch.equal(run(again, x), run(repaired, x))
    assert all(torch.equal(v, cut.block.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize("name, block", [("resnet18", "layer2"), ("resnet50", "layer2")])
def test_a_neutral_block_computes_what_the_original_does(name, block):
    cut, x, genotype, repaired = searched(name, block, coefficient=0.6)
    neutral = genotype.build(cut.block, neutral=True)
    assert all(neutral.state_dict()[n].shape == v.shape for n, v in repaired.state_dict().items())
    assert neutral.state_dict().keys() == repaired.state_dict().keys()
    assert torch.equal(run(neutral, x, train=True), run(cut.block, x, train=True))


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
        half = replace(genotype, coefficients=(0.5,) * len(graph.edges))
        built = half.build(block)
        with torch.no_grad():
            expected = maps()
            for node in range(1, len(graph.nodes)):
                layers = [block.get_submodule(p) for p in next(e for _, e in graph.incoming(node) if e.inherited).inherited]
                expected = 0.5 * nn.Sequential(*layers)(expected)
            assert torch.allclose(built(maps()), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_export_and_trace(name):
    cut, x, _, repaired = searched(name)
    network = cut.tail(repaired).eval().requires_grad_(False)
    expected = network(x)
    assert torch.allclose(torch.jit.trace(network, x)(x[:2]), network(x[:2]), atol=1e-6)
    assert torch.allclose(torch.export.export(network, (x,)).module()(x), expected, atol=1e-6)
    dynamic = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    assert torch.allclose(dynamic(x[:3]), expected[:3], atol=1e-5)


@torch.no_grad()
def fired_on_half(gate, x):
    "Let `gate` fire on half of the rows of `x`; returns which."
    gate.mean.copy_(gate.read(x).mean(0))
    gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    scores = gate.score(gate.read(x))
    gate.threshold.copy_(scores.median() + 1e-4)
    return scores > gate.threshold


@torch.no_grad()
def test_a_gated_block_is_the_original_for_images_on_which_its_gate_does_not_fire():
    cut, x, genotype, plain = searched(coefficient=0.6)
    genotype = replace(genotype, gated=True)
    block, expected = genotype.build(cut.block).eval(), cut.block(x)
    for number, parameter in enumerate(block.added.parameters()):
        parameter.normal_(generator=torch.Generator().manual_seed(number))
    assert torch.equal(block(x), expected)  # a fresh gate never fires
    fires = fired_on_half(block.gate, x)
    y = block(x)
    assert fires.tolist().count(True) == 3 and torch.equal(y[~fires], expected[~fires])
    assert (y[fires] != expected[fires]).flatten(1).any(1).all()
    again = Genotype.from_json(genotype.to_json()).build(cut.block).eval()
    again.load_state_dict(block.state_dict())
    assert again.gate is not None and torch.equal(again(x), y)
    whole = genotype.build(cut.block, neutral=True).eval()
    whole.gate.load_state_dict(block.gate.state_dict())
    assert torch.equal(whole(x), expected)


@torch.no_grad()
def test_training_a_gated_block_leaves_its_original_layers_alone():
    cut, x, genotype, _ = searched()
    block = replace(genotype, gated=True).build(cut.block)
    before = copy.deepcopy(block.inherited.state_dict())
    block.train()
    block(x)
    assert all(torch.equal(value, before[name]) for name, value in block.inherited.state_dict().items())
    assert block.learns is block.added and block.added.training and genotype.build(cut.block).learns is not block.added


def test_a_gated_genotype_says_so_in_its_file_and_its_drawing():
    *_, genotype, _ = searched()
    assert "gated" not in json.loads(genotype.to_json())
    gated = replace(genotype, gated=True)
    assert json.loads(gated.to_json())["gated"] is True and Genotype.from_json(gated.to_json()) == gated
    page = gated._repr_html_()
    assert "3 new operations for the images on which its gate fires" in page and "dil conv where the gate fires" in page
    assert set(gated.partly) == {edge.key for edge, choice in zip(gated.graph.edges, gated.choices)
                                 if edge.inherited is not None and choice != "original"}
    with pytest.raises(ArchrepairError):
        Genotype.from_json(gated.to_json().replace("true", "3"))


def test_a_gated_block_can_be_exported():
    cut, x, genotype, _ = searched()
    block = replace(genotype, gated=True).build(cut.block)
    fires = fired_on_half(block.gate, x)
    network = cut.tail(block).eval().requires_grad_(False)
    dynamic = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    assert fires.any() and torch.allclose(dynamic(x[:5]), network(x[:5]), atol=1e-5)
