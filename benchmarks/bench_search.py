"""A step of the search beside a step of plain fine-tuning of the same cached block, in CPU time on one thread.

    python benchmarks/bench_search.py [--blocks resnet18:layer4:0.25 ...] [--precision fp32 bf16] [--rounds 5] [--full] [--json]

A search step is a step of the weights and one of the architecture. The plain form of the relaxed block runs one operation after the
other; outputs, gradients and running statistics of both forms must agree before they are timed, in turn, in one process. Ratios are to
fine-tuning in the same round: median (least to largest). `work` is the ratio by floating-point operations, a limit where arithmetic is what
costs. `--full` takes blocks of three networks at the lite tier's width, and the last block of ResNet-18 at full width.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch  # noqa: E402
from measure import Ratio  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from archrepair.nas.graph import BlockGraph, extract  # noqa: E402
from archrepair.nas.operations import CANDIDATES  # noqa: E402
from archrepair.nas.strategies import make_strategy  # noqa: E402
from archrepair.nas.strategy import ArchContext  # noqa: E402
from archrepair.nas.supernet import SuperNet  # noqa: E402
from archrepair.networks.blocks import Split, block_names, freeze, split  # noqa: E402
from archrepair.networks.models import create_model  # noqa: E402
from archrepair.repair.search import Relaxed  # noqa: E402
from archrepair.training.cost import work
from archrepair.training.fit import Recipe, autocast, sgd  # noqa: E402

SMALL = ("resnet18:layer2:0.25", "resnet18:layer4:0.25")
FULL = (*(f"resnet18:layer{i}:0.25" for i in range(1, 5)), "resnet50:layer3:0.25", "efficientnet_b0:3:0.25", "resnet18:layer4:1.0")


class OpByOp(nn.Module):
    "The relaxed block as eq. 7 and 8 define it: one operation after the other, each output times its coefficient."

    def __init__(self, supernet: SuperNet):
        super().__init__()
        self.supernet = supernet

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        return self.supernet.forward_reference(x, coefficients)


def trained_tail(cut: Split, block: nn.Module) -> nn.Module:
    "The cached rest of the network, of which only the block is trained."
    tail = freeze(cut.tail(block))
    block.requires_grad_(True).train()
    return tail


def weights_step(network: nn.Module, module: nn.Module, x: Tensor, labels: Tensor, precision: str) -> Callable[[], None]:
    "A training step as `training.fit` takes it."
    parameters = list(module.parameters())
    optimizer = sgd([{"params": parameters}], Recipe(epochs=1, lr=1e-4))

    def step() -> None:
        with autocast(x.device, precision):
            logits = network(x)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def search_steps(cut: Split, graph: BlockGraph, x: Tensor, labels: Tensor, precision: str, name: str,
                 plain: bool) -> list[Callable[[], None]]:
    "The two steps of a search: weights, architecture."
    strategy = make_strategy(name)
    strategy.start(graph, 1000)
    supernet = SuperNet(cut.block, graph, channel_k=strategy.channel_k, generator=torch.Generator().manual_seed(0))
    relaxed = Relaxed(supernet, strategy)
    if plain:
        relaxed.supernet = OpByOp(supernet)
    network = trained_tail(cut, relaxed)

    def loss(batch: object) -> Tensor:
        with autocast(x.device, precision):
            logits = network(x)
        return nn.functional.cross_entropy(logits.float(), labels)

    context = ArchContext(network, supernet, lambda: None, lambda: None, loss)
    return [weights_step(network, supernet, x, labels, precision), lambda: strategy.arch_step(context)]


def agree(cut: Split, graph: BlockGraph, x: Tensor, k: int | None) -> float:
    "The largest relative difference between both forms: outputs, gradients, running statistics, in double precision."
    generator = torch.Generator().manual_seed(1)
    supernet = SuperNet(cut.block, graph, channel_k=k, generator=generator)
    for p in supernet.added.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    coefficients = torch.rand(len(graph.edges), len(CANDIDATES), generator=generator).double().requires_grad_()
    found = []
    for form in (lambda net: net, OpByOp):
        net = copy.deepcopy(supernet).double().requires_grad_(True).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # stochastic depth
            y = form(net)(x[:8].double(), coefficients)
        gradients = torch.autograd.grad(y.square().mean(), [coefficients, *net.parameters()], materialize_grads=True)
        found.append([y.detach(), *gradients, *(v for n, v in net.state_dict().items() if "running" in n)])
    largest = max(float(g.abs().max()) for g in found[1][1:])
    apart = max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6 * largest) for a, b in zip(*found))
    assert apart < 1e-6, f"the two forms differ by {apart:.1e}"
    return apart


def limit(cut: Split, graph: BlockGraph, x: Tensor, k: int | None) -> float:
    "The ratio by floating-point operations: both steps forward, back through the rest, and back through the block, one with weights."
    supernet = SuperNet(cut.block, graph, channel_k=k, generator=torch.Generator().manual_seed(0)).eval()
    mixed = lambda features: supernet(features, torch.ones(len(graph.edges), len(CANDIDATES)))
    block, relaxed = work(cut.block.eval(), x[:2]), work(mixed, x[:2])
    rest = work(cut.tail().eval(), x[:2]) - block
    return (5 * relaxed + 4 * rest) / (3 * block + 2 * rest)


def compare(network: str, block: str, width: float, batch: int, precision: str, rounds: int) -> dict:
    "CPU milliseconds of a fine-tuning step and the ratios of all search steps to it."
    model = create_model(network, 10, width=width, stem_stride=2)
    cut = split(model, block_names(model)[int(block)] if block.isdigit() else block)
    generator = torch.Generator().manual_seed(0)
    x = cut.features(torch.randn(batch, 3, 32, 32, generator=generator)).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator)
    graph = extract(cut.block, x[:2])
    kinds = {"pc-darts": ("pc-darts", False), "darts": ("darts", False), "one by one": ("pc-darts", True)}
    apart = max(agree(cut, graph, x, make_strategy(name).channel_k) for name in ("pc-darts", "darts"))
    row = {"network": network, "block": cut.name, "width": width, "batch": batch, "precision": precision, "edges": len(graph.edges),
           "apart": apart, "work": limit(cut, graph, x, None)}

    x = x.to(torch.bfloat16) if precision == "bf16" else x
    plain = copy.deepcopy(cut.block)
    sides = {"fine-tuning": [weights_step(trained_tail(cut, plain), plain, x, labels, precision)]}
    sides |= {side: search_steps(cut, graph, x, labels, precision, *kind) for side, kind in kinds.items()}
    seconds: dict[str, list[list[float]]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, steps in sides.items():
            taken = []
            for step in steps:
                started = time.process_time()
                step()
                taken.append(time.process_time() - started)
            seconds[side] += [taken] if turn else []  # the first warms up
    row["fine-tuning ms"] = 1000 * statistics.median(t for t, in seconds["fine-tuning"])
    for side in kinds:
        for what, pick in (("", sum), (" weights", lambda t: t[0]), (" architecture", lambda t: t[1])):
            ratios = [pick(t) / base for t, (base,) in zip(seconds[side], seconds["fine-tuning"])]
            row[side + what] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def cases(rounds: int = 5):
    "The lines of the table."
    for place in SMALL:
        network, block, width = place.split(":")
        row = compare(network, block, float(width), 128, "fp32", rounds)
        for side, name in (("pc-darts", "a search step"), ("one by one", "the same, one operation at a time")):
            median, low, high = (round(number, 3) for number in row[side])
            limit, goal = (round(row["work"], 2), 2.0) if side == "pc-darts" else (None, None)
            yield Ratio("search", f"{name}, {network} ×{width}, {block}", "a step of plain fine-tuning of the same cached block",
                        median, low, high, unit="fine-tuning steps", limit=limit, goal=goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", nargs="+", metavar="NETWORK:BLOCK:WIDTH", help="BLOCK is a name or a number")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if not arguments.json:
        print(f"{'':34}{'fine-tuning':>12}{'work':>7}{'PC-DARTS':>19}{'weights':>9}{'arch.':>7}{'DARTS':>20}{'one by one':>21}")
    for place in arguments.blocks or (FULL if arguments.full else SMALL):
        network, block, width = place.split(":")
        for precision in arguments.precision:
            row = compare(network, block, float(width), arguments.batch, precision, arguments.rounds)
            rows.append(row)
            if not arguments.json:
                shown = {side: "{:.2f} ({:.2f}–{:.2f})".format(*row[side]) for side in ("pc-darts", "darts", "one by one")}
                print(f"{network + ' ' + row['block']:22}{width:>6}{precision:>6}{row['fine-tuning ms']:9.1f} ms{row['work']:7.2f}"
                      f"{shown['pc-darts']:>19}{row['pc-darts weights'][0]:9.2f}{row['pc-darts architecture'][0]:7.2f}"
                      f"{shown['darts']:>20}{shown['one by one']:>21}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
