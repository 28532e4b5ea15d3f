"""Genotypes from files: JSON of any content becomes an architecture that fits, or one line."""

import functools
import json

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import BlockGraph, Edge, Node
from archrepair.networks.weights import save_weights
from archrepair.repair.result import load
from support.fuzz import attempt, broken, damage, fuzz, ground, mutate, mutations, text

KIND = "genotypes"


class Block(nn.Module):
    "Two convolutions, one after the other."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.b(self.a(x)).relu()


@functools.cache
def network() -> nn.Module:
    return nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@functools.cache
def genotype() -> Genotype:
    graph = BlockGraph(
        (Node((3, 8, 8)), Node((4, 8, 8)), Node((4, 8, 8), "F.relu")),
        (Edge(0, 1, ("a",), 1), Edge(0, 2, None, 1), Edge(1, 2, ("b",), 1)),
        "conv",
    )
    return Genotype(graph, ("original", "sep_conv", "original"), (1.0, 0.5, 1.0), (1, 1, 2))


def use(content: str, draw: bool, folder) -> None:
    "Read it, show it, write it again, and load the repair that it belongs to."
    read = Genotype.from_json(content)
    if draw:
        assert "<xss" not in read._repr_html_()
    assert Genotype.from_json(read.to_json()).to_json() == read.to_json()
    load(folder, network())(torch.zeros(1, 3, 8, 8))


def change(**parts) -> str:
    "The genotype with other parts, as text."
    return json.dumps({**json.loads(genotype().to_json()), **parts})


def change_graph(**parts) -> str:
    return change(graph={**json.loads(genotype().to_json())["graph"], **parts})


contents = st.one_of(
    mutations().map(lambda changes: json.dumps(mutate(json.loads(genotype().to_json()), changes))),
    text,
    st.tuples(broken, st.just(genotype().to_json())).map(lambda pair: damage(pair[1].encode(), pair[0]).decode("utf-8", "replace")),
)


@given(contents, st.sampled_from([True] + 9 * [False]))
@example(change(), True)
@example(change(ks=[1, 1, 10**9]), False)
@example(change(coefficients=[1, None, "<xss-a>"]), False)
@example(change(strategy="<xss-a>"), True)
@example(change_graph(nodes=[]), True)
@example(change_graph(nodes=[{"shape": [10**9, 10**9, 1], "post": None}, {"shape": [10**9, 1, 1], "post": None}] * 2), False)
@example(change_graph(nodes=[{"shape": [3, 8], "post": 1}, {"shape": "xyz", "post": None}, {"shape": [None] * 3, "post": None}]), True)
@example(change_graph(edges=[{"source": 2, "target": 0, "inherited": None, "stride": 1}] * 3), True)
@example(change_graph(edges=[{"source": 0, "target": 2, "inherited": ["nowhere"], "stride": 2}] * 3), True)
@example("[" * 100_000, False)
@fuzz(KIND)
def test_genotypes(content, draw):
    with ground() as folder:
        model = network()
        repaired = nn.Sequential(genotype().build(model[0]), *model[1:])
        save_weights(repaired, folder / "repaired.safetensors")
        (folder / "repair.json").write_text(json.dumps({"searched": True, "block": "0"}))
        (folder / "genotype.json").write_text(content, encoding="utf-8", errors="replace")
        attempt(KIND, lambda: use(content, draw, folder), folder)
