"""The paper's six networks at their narrowest and two classic CIFAR ResNets, every block with what enters it, and random architectures."""
import copy
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archrepair.nas.discretization import discretize, guard
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import BlockGraph, extract
from archrepair.nas.operations import CANDIDATES
from archrepair.nas.supernet import SuperNet
from archrepair.networks.blocks import block_names, get_block
from archrepair.networks.cifar import CIFAR_RESNETS
from archrepair.networks.models import MODELS, create_model, group_units

NETWORKS = (*(name for name in MODELS if name not in CIFAR_RESNETS), "cifar-resnet20", "cifar-resnet32")


@dataclass(frozen=True)
class Place:
    "A block of a network, and features that enter it (4×C×H×W)."

    network: str
    model: nn.Module
    name: str
    block: nn.Module
    x: Tensor


@functools.cache
def network(name: str, group: int = 1) -> nn.Module:
    "A narrow network whose BatchNorm statistics are not the default; only to be read. `group` dense units are a block."
    model = create_model(name, 10, width=0.125, stem_stride=2)
    vary(model)
    return group_units(model, group) if group > 1 else model


def vary(model: nn.Module) -> None:
    "BatchNorm weights and statistics that are not the default, in place."
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.running_var, m.weight.data):
                value.uniform_(0.5, 1.5, generator=generator)
            m.running_mean.uniform_(-0.2, 0.2, generator=generator)


def entering(model: nn.Module, names: Sequence[str], size: int = 32, n: int = 4) -> dict[str, Tensor]:
    "What enters each of the submodules `names` in one run of the network on images of `size` px."
    seen: dict[str, Tensor] = {}
    see = lambda name: lambda module, args: seen.update({name: args[0].clone()})
    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    try:
        with torch.no_grad():
            model(torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@functools.cache
def _entering(name: str, size: int, group: int) -> dict[str, Tensor]:
    return entering(network(name, group), block_names(network(name, group)), size)


def walk(names: Sequence[str] = NETWORKS, *, size: int = 32, group: int = 1) -> Iterator[Place]:
    "Every block of the networks named, from input to output."
    for name in names:
        model = network(name, group)
        for block, x in _entering(name, size, group).items():
            yield Place(name, model, block, get_block(model, block), x)


def run(module: nn.Module, *inputs, train: bool = False) -> Tensor:
    "The output without gradients, in train mode of a copy; dropout and stochastic depth draw from one seed."
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (copy.deepcopy(module).train() if train else module.eval())(*inputs)


def relaxed(block: nn.Module, graph: BlockGraph, k: int | None = None, *, noise: float = 0.0) -> SuperNet:
    "The supernet of a block; `noise` makes its added operations audible."
    supernet = SuperNet(block, graph, channel_k=k, generator=torch.Generator().manual_seed(0))
    return shake(supernet, noise) if noise else supernet


def shake(supernet: SuperNet, noise: float) -> SuperNet:
    "Make the added operations audible, in place."
    generator = torch.Generator().manual_seed(1)
    for p in supernet.added.parameters():
        p.data += noise * torch.randn(p.shape, generator=generator)
    return supernet


def start(graph: BlockGraph) -> Tensor:
    "Coefficients of 1 for the original layers, and of anything for operations that are silent."
    rows = torch.rand(len(graph.edges), len(CANDIDATES), generator=torch.Generator().manual_seed(1))
    rows[:, -1] = 1.0
    return rows


def preserved(block: nn.Module, x: Tensor, graph: BlockGraph, k: int | None) -> None:
    "Relaxed, the block is exactly itself, in train and in eval mode, whatever the weights of silent operations; audible ones change it."
    supernet, case = relaxed(block, graph, k), (type(block).__name__, graph.nodes[0].shape, k)
    for train in (True, False):
        expected = run(block, x, train=train)
        assert torch.equal(run(supernet, x, start(graph), train=train), expected), (*case, train)
    assert not torch.allclose(run(shake(supernet, 0.5), x, start(graph)), expected, atol=1e-3), case


def random_genotype(supernet: SuperNet, seed: int, widen: str = "keep") -> Genotype:
    "A random architecture, made connected by the guard, at least one of its edges changed where that is possible."
    graph, rng = supernet.graph, random.Random(seed)
    scores = torch.rand(len(graph.edges), len(CANDIDATES), generator=torch.Generator().manual_seed(seed))
    while True:
        carried = [i for i, e in enumerate(graph.edges) if e.inherited is not None and supernet.slices[i].parts > 1 and widen != "full"]
        choices, _ = guard(graph, [rng.choice(e.candidates) for e in graph.edges], scores, carried)
        if any(c not in ("none", "original") for c in choices):
            return Genotype(graph, choices, tuple(rng.uniform(0.4, 1.3) for _ in choices), supernet.channel_parts, widen)


def hard(genotype: Genotype) -> Tensor:
    "The coefficients with which a supernet computes what the genotype does."
    c = torch.zeros(len(genotype.choices), len(CANDIDATES))
    for i, choice in enumerate(genotype.choices):
        c[i, CANDIDATES.index(choice)] = genotype.coefficients[i]
    return c


def discretized(place: Place, seed: int, k: int | None, widen: str) -> tuple[Genotype, nn.Module]:
    "A random architecture of a block with audible operations; where nothing is given up, it is the supernet's equal."
    supernet = relaxed(place.block, extract(place.block, place.x), k, noise=0.3)
    genotype = random_genotype(supernet, seed, widen)
    block = discretize(supernet.eval(), genotype, place.block)
    if widen != "full":
        for train in (False, True) if seed % 4 == 0 else (False,):
            expected = run(supernet, place.x, hard(genotype), train=train)
            found = run(block, place.x, train=train)
            assert torch.allclose(found, expected, atol=3e-5 * float(expected.abs().max())), (place.name, seed, genotype.edges, train)
    assert torch.isfinite(run(block, place.x)).all()
    return genotype, block.requires_grad_(False).eval()
