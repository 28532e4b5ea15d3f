"All six networks, all their blocks: relaxed, they compute what they did; discretized, they run, save, load and export."
import copy
import itertools

import pytest
import torch
from torch import nn

from archrepair.nas.genotype import WIDEN, Genotype
from archrepair.nas.graph import BlockGraph, extract
from archrepair.nas.operations import CANDIDATES
from archrepair.networks.blocks import block_names, replace_block
from archrepair.networks.models import create_model
from support.families import NETWORKS, Place, discretized, entering, network, preserved, relaxed, run, start, walk

KS = (1, 2, 4, None)


# --- relaxed equals original

@pytest.mark.parametrize("name, size", [*((name, 32) for name in NETWORKS), ("vgg16", 33), ("resnet18", 33), ("efficientnet_b0", 31)])
def test_every_block_of_every_network_keeps_its_function(name, size):
    for place, k in zip(walk([name], size=size), itertools.cycle(KS)):
        preserved(place.block, place.x, extract(place.block, place.x), k)


@pytest.mark.slow
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("size", [31, 32, 33, 40])
def test_every_block_with_every_number_of_parts(size, k):
    for place in walk(size=size):
        preserved(place.block, place.x, extract(place.block, place.x), k)


# --- what the graphs are

GRAPHS = {  # level, layers, edges, inherited ones, what follows
    "vgg16": [("conv", 2, 3, 2, "6")] * 2 + [("conv", 3, 6, 3, "9")] * 3,
    "resnet18": [("conv", 4, 10, 6, None)] * 4,
    "resnet50": [("unit", 3, 6, 3, None), ("unit", 4, 10, 4, None), ("unit", 6, 21, 6, None), ("unit", 3, 6, 3, None)],
    "resnet101": [("unit", 3, 6, 3, None), ("unit", 4, 10, 4, None), ("unit", 23, 45, 23, None), ("unit", 3, 6, 3, None)],
    "densenet121": [("conv", 2, 3, 2, "concat")] * 58,
    "efficientnet_b0": [("unit", k, k * (k + 1) // 2, k, None) for k in (1, 2, 2, 3, 3, 4, 1)],
    "cifar-resnet20": [("conv", 6, 21, 9, None)] * 3,
    "cifar-resnet32": [("unit", 5, 15, 5, None)] * 3,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_of_every_block(name):
    found = []
    for place in walk([name]):
        graph = extract(place.block, place.x)
        inherited = [e for e in graph.edges if e.inherited is not None]
        found.append((graph.level, len(graph.nodes) - 1, len(graph.edges), len(inherited), graph.tail))
        assert all(e.stride for e in graph.edges) and all("original" in e.candidates for e in inherited)
        assert graph.nodes[0].shape == tuple(place.x.shape[1:]) and BlockGraph.from_dict(graph.as_dict()) == graph
        assert ("left out" in graph.note) == (len(inherited) == 23) and len(graph.edges) <= 64
    assert found == GRAPHS[name]


def test_squeeze_excitation_and_shortcuts_stay_inside_their_unit():
    for place in walk(["efficientnet_b0", "resnet50"]):
        graph = extract(place.block, place.x)
        assert [e.inherited for e in graph.edges if e.inherited] == [(n,) for n, _ in place.block.named_children()]


def test_stochastic_depth_draws_as_in_the_original():
    "The same seed drops the same units; another drops others, so that equality was not for want of randomness."
    place = [p for p in walk(["efficientnet_b0"]) if p.name == "features.6"][0]
    graph = extract(place.block, place.x)
    drawn = []
    for seed in range(4):
        outputs = []
        for module, inputs in ((place.block, (place.x,)), (relaxed(place.block, graph), (place.x, start(graph)))):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                outputs.append(copy.deepcopy(module).train()(*inputs))
        assert torch.equal(*outputs)
        drawn.append(outputs[0])
    assert any(not torch.allclose(drawn[0], other) for other in drawn[1:])


# --- one block of two dense layers

def test_dense_layers_in_pairs():
    plain, pairs = network("densenet121"), network("densenet121", 2)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for train in (False, True):
        assert torch.equal(run(pairs, images, train=train), run(plain, images, train=train))
    assert len(block_names(pairs)) == 29 and block_names(pairs)[0] == "features.denseblock1.group1"
    for place, k in itertools.islice(zip(walk(["densenet121"], group=2), itertools.cycle(KS)), 0, None, 5):
        graph = extract(place.block, place.x)
        shapes = [n.shape for n in graph.nodes]
        assert (graph.level, len(graph.edges), graph.tail) == ("unit", 3, None)
        assert [shapes[i + 1][0] - shapes[i][0] for i in range(2)] == [4, 4]  # the growth
        assert [e.key for e in graph.edges if e.inherited is not None] == ["0_1", "1_2"]
        preserved(place.block, place.x, graph, k)


# --- one layer

@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_can_be_searched_as_a_block_of_its_own(name):
    model = network(name)
    blocks = block_names(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith(tuple(f"{b}." for b in blocks))]
    kinds = set()
    for position, (layer, x) in enumerate(entering(model, names).items()):
        conv = model.get_submodule(layer)
        graph = extract(conv, x)
        assert (graph.level, graph.note, [(e.key, e.inherited) for e in graph.edges]) == ("conv", "", [("0_1", ("",))]), layer
        assert graph.edges[0].candidates == CANDIDATES, layer
        kind = (conv.kernel_size, conv.groups > 1, conv.stride, x.shape[-1] > 1)
        if kind not in kinds:
            kinds.add(kind)
            preserved(conv, x, graph, KS[position % 4])
    assert len(kinds) > 1


# --- discretized

@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
@pytest.mark.parametrize("name", NETWORKS)
def test_random_architectures_of_every_block_run_save_load_and_trace(name):
    for seed, place in enumerate(walk([name])):
        genotype, block = discretized(place, seed, KS[seed % 4], WIDEN[seed % 3])
        again = Genotype.from_json(genotype.to_json()).build(place.block).eval()
        assert again.state_dict().keys() == block.state_dict().keys()
        assert not torch.equal(run(again, place.x), run(block, place.x)), place.name
        again.load_state_dict(block.state_dict())
        assert torch.equal(run(again, place.x), run(block, place.x)), place.name
        if seed % 3 == 0:
            traced = torch.jit.trace(block, place.x[:2], check_trace=False)
            assert torch.allclose(traced(place.x), run(block, place.x), atol=1e-5 * float(place.x.abs().max())), place.name


def exports(network: nn.Module, x: torch.Tensor) -> None:
    "`torch.export` with a dynamic batch."
    program = torch.export.export(network, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    expected = run(network, x)
    for n in (1, 4):
        assert torch.allclose(program(x[:n]), expected[:n], atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name, widen", list(zip(NETWORKS, itertools.cycle(WIDEN))))
def test_a_searched_block_of_every_network_exports(name, widen):
    place = list(walk([name]))[1]
    exports(discretized(place, WIDEN.index(widen), 4, widen)[1], place.x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_exports_and_every_network_with_one_traces(name):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for seed, place in enumerate(walk([name])):
        block = discretized(place, seed, KS[seed % 4], WIDEN[seed % 3])[1]
        exports(block, place.x)
        whole = replace_block(place.model, place.name, block).requires_grad_(False).eval()
        assert torch.allclose(torch.jit.trace(whole, images[:2], check_trace=False)(images), whole(images), rtol=1e-4), place.name


# --- networks that are not the paper's

OTHERS = {  # network, image size: level, layers of the blocks that are looked at
    ("mobilenet_v3_small", 64): {"features.1": ("unit", 2), "features.2": ("unit", 3), "features.3": ("conv", 3),
                                 "features.5": ("unit", 1)},
    ("shufflenet_v2_x0_5", 64): {"stage2": ("unit", 4)},
    ("regnet_y_400mf", 64): {"trunk_output.block1": ("unit", 1), "trunk_output.block2": ("unit", 3)},
    ("convnext_tiny", 64): {"features.1": ("unit", 3), "features.2": ("unit", 1)},
    ("googlenet", 64): {"inception3a": ("unit", 1), "inception4b": ("unit", 1)},
    ("mobilenet_v2", 64): {"features.2": ("unit", 3), "features.3": ("conv", 3)},
}


@pytest.mark.parametrize("name, size", OTHERS)
def test_blocks_of_other_networks(name, size):
    model = create_model(f"torchvision:{name}", 10, image_size=size)
    expected = OTHERS[name, size]
    for position, (block, x) in enumerate(entering(model, list(expected), size, n=2).items()):
        place = Place(name, model, block, model.get_submodule(block), x)
        graph = extract(place.block, x)
        assert (graph.level, len(graph.nodes) - 1) == expected[block], block
        preserved(place.block, x, graph, KS[position % 4])
        discretized(place, 0, 2, "keep")
