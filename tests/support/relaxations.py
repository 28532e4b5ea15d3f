"Blocks of narrow networks with the features that enter them and their graphs, relaxed and searched."
import functools

import torch
from torch import Tensor, nn

from archrepair.nas.discretization import discretize
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import BlockGraph, extract
from archrepair.networks.blocks import Split, block_names, split
from archrepair.networks.models import create_model
from support.families import relaxed, vary

CASES = [("resnet18", "layer1"), ("resnet18", "layer2"), ("resnet18", "layer4"), ("resnet50", "layer1"), ("resnet50", "layer3"),
         ("vgg16", 1), ("densenet121", 4), ("efficientnet_b0", 2)]


@functools.cache
def case(name: str, block: str | int) -> tuple[Split, Tensor, BlockGraph]:
    "The cut, features that enter the block, and its graph, for a narrow network with BatchNorm statistics that are not the default."
    model = create_model(name, 5, width=0.125, stem_stride=2)
    vary(model)
    cut = split(model, block_names(model)[block] if isinstance(block, int) else block)
    x = cut.features(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
    return cut, x, extract(cut.block, x)


def searched(name: str = "resnet18", block: str = "layer2", coefficient: float = 1 / 3) -> tuple[Split, Tensor, Genotype, nn.Module]:
    "A case, an architecture of its block in which something changed on most kinds of edges, and the repaired block."
    cut, x, graph = case(name, block)
    supernet = relaxed(cut.block, graph, noise=0.3)
    changes = {"0_1": "original", "0_2": "max_pool", "1_2": "none", "0_3": "dil_conv", "0_4": "sep_conv"}
    choices = tuple(changes.get(e.key, "original" if e.inherited is not None else "none") for e in graph.edges)
    genotype = Genotype(graph, choices, (coefficient,) * len(choices), supernet.channel_parts)
    return cut, x, genotype, discretize(supernet, genotype, cut.block).eval()
