"""A narrow network, its third block relaxed, and a search of it."""
import functools

import torch

from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize
from archrepair.data.scenario import RepairData
from archrepair.nas.graph import extract
from archrepair.nas.strategies import make_strategy
from archrepair.nas.strategy import ArchContext
from archrepair.nas.supernet import SuperNet
from archrepair.networks.models import create_model
from archrepair.repair.blockdata import prepare
from archrepair.repair.search import Relaxed, search


@functools.cache
def setting(name="resnet18", precision="fp32"):
    "An untrained narrow network, a small repair set, and what the third block sees of it."
    model = create_model(name, 10, width=0.125, stem_stride=2)
    digits = load_dataset("digits", "train")
    data = RepairData.of(digits.select(torch.arange(30)), digits.select(torch.arange(30, 150)), transform=Normalize.of(digits))
    return model, data, prepare(model, "layer3", data, precision=precision)


def quick(name="resnet18", precision="fp32", **options):
    model, _, prepared = setting(name, precision)
    return search(model, "layer3", prepared=prepared, **{"epochs": 3, "batch_size": 32, "warmup": 0.3} | options)


def started(strategy, steps=100, **options):
    "A strategy on the third block, its relaxed network and a loss on some rows."
    _, _, prepared = setting()
    graph = extract(prepared.cut.block, prepared.entering(2))
    strategy = make_strategy(strategy, **options)
    strategy.start(graph, steps)
    supernet = SuperNet(prepared.cut.block, graph, channel_k=strategy.channel_k, generator=torch.Generator().manual_seed(0))
    network = prepared.tail(Relaxed(supernet, strategy))
    supernet.train()
    x, order = prepared.rows(1).inputs(torch.arange(24))
    labels = prepared.rows(1).labels[order]
    loss = lambda batch: torch.nn.functional.cross_entropy(network(x), labels)
    return strategy, supernet, network, ArchContext(network, supernet, lambda: None, lambda: None, loss)
