"""What a GPU makes of ResNet-18: steps of training and of a repair, localization and corruptions, with the device's own clock.

    python benchmarks/bench_device.py [--device cuda] [--width 1.0] [--batch 128] [--rounds 5]

Sides are timed in turns, in seconds by the clock of the wall: each measurement begins and ends where the device has nothing left to do.
The other scripts measure ratios on one thread of a CPU; these are the same ratios where their limit is arithmetic or memory.
"""
from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator

import torch
from bench_repair import limit
from measure import Ratio, in_turn, quotients
from torch import Tensor, nn

from archrepair.core.registry import CORRUPTIONS
from archrepair.corruptions.catalogue import corrupt
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize
from archrepair.networks.blocks import Split, block_names, freeze, split
from archrepair.networks.models import create_model
from archrepair.networks.neurons import wire
from archrepair.repair.localization import failure_gradients, spectrum
from archrepair.training.cost import work
from archrepair.training.fit import Recipe, autocast, sgd
from archrepair.training.rows import Rows, image_features


class Bench:
    "ResNet-18 of a width on a device, with one batch of images; `rounds` is how often each side is timed."

    def __init__(self, device: torch.device, width: float, batch: int, rounds: int):
        self.device, self.rounds = device, rounds
        self.network = create_model("resnet18", 10, width=width).to(device).eval()
        images = load_dataset("digits")
        self.images = images.select(torch.arange(batch) % len(images))
        self.x = Normalize.of(images)(self.images.batch(torch.arange(batch)).to(device))
        self.labels = self.images.labels.to(device)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def times(self, sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        return in_turn(sides, self.rounds, self.clock)

    def step(self, network: nn.Module, trained: nn.Module, x: Tensor, precision: str) -> Callable[[], None]:
        "A step of training, without the input side."
        parameters = list(trained.parameters())
        optimizer = sgd([{"params": parameters}], Recipe(epochs=1, lr=1e-4))

        def run() -> None:
            with autocast(self.device, precision):
                logits = network(x)
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits.float(), self.labels).backward()
            optimizer.step()

        return run

    def repair(self, cut: Split, precision: str) -> Callable[[], None]:
        "A step of a repair of a block from its cache."
        tail = freeze(cut.tail(copy.deepcopy(cut.block)))
        tail.block.requires_grad_(True).train()
        entering = cut.features(self.x).detach()
        assert torch.allclose(tail.eval()(entering), self.network(self.x), rtol=1e-2, atol=1e-2), "the cached rest answers otherwise"
        tail.block.train()
        return self.step(tail, tail.block, entering.to(torch.bfloat16) if precision == "bf16" else entering, precision)

    def whole(self, precision: str, layout: torch.memory_format) -> Callable[[], None]:
        "A step of training of the whole network."
        network = copy.deepcopy(self.network).to(memory_format=layout).requires_grad_(True).train()
        return self.step(network, network, self.x.contiguous(memory_format=layout), precision)


def training(bench: Bench) -> Iterator[Ratio]:
    "bfloat16 and channels last beside float32 and contiguous, and the share of arithmetic in what that takes."
    seconds = bench.times({"plain": bench.whole("fp32", torch.contiguous_format), "ours": bench.whole("bf16", torch.channels_last)})
    yield Ratio.of("training", "a training step of ResNet-18, bf16, channels last", "the same in float32, contiguous",
                   quotients(seconds["plain"], seconds["ours"]))
    operations = 3 * work(bench.network, bench.x)
    yield Ratio.of("training", "arithmetic in that step", "a second", [operations / s / 1e12 for s in seconds["ours"]], unit="TFLOP/s")
    yield Ratio.of("training", "images through that step", "a second", [len(bench.x) / s for s in seconds["ours"]], unit="images")


def blocks(bench: Bench) -> Iterator[Ratio]:
    "Every block from its cache beside the whole network, both in bfloat16; then the memory of both."
    cuts = {name: split(bench.network, name, bench.x[:2]) for name in block_names(bench.network)}
    sides = {name: bench.repair(cut, "bf16") for name, cut in cuts.items()}
    seconds = bench.times({"whole": bench.whole("bf16", torch.channels_last), **sides})
    for name, cut in cuts.items():
        most = limit(bench.network, cut, bench.x[:2])
        yield Ratio.of("blocks", f"a step of a repair of {name}, from its cache, bf16", "the whole network, bf16",
                       quotients(seconds["whole"], seconds[name]), limit=round(most, 2), goal=round(0.8 * most, 2))
    if bench.device.type == "cuda":
        peak = {name: _peak(run) for name, run in {"whole": bench.whole("bf16", torch.channels_last), **sides}.items()}
        for name in cuts:
            yield Ratio.of("blocks", f"peak memory of a step of a repair of {name}", "that of a training step of ResNet-18",
                           [peak[name] / peak["whole"]], unit="of the network's", goal=1.5)


def _peak(run: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def localization(bench: Bench) -> Iterator[Ratio]:
    "In forward passes of the same images, a tenth of which fail."
    rows = Rows([image_features(bench.images, Normalize.of(bench.images), bench.device)])
    wiring = wire(bench.network, rows.inputs(torch.arange(1))[0])
    failures = torch.arange(max(1, len(rows) // 10))

    def forward() -> None:
        with torch.inference_mode():
            bench.network(rows.inputs(torch.arange(len(rows)))[0])

    seconds = bench.times({"forward": forward, "spectrum": lambda: spectrum(bench.network, rows, wiring, batch_size=len(rows)),
                           "gradients": lambda: failure_gradients(bench.network, rows, failures, wiring)})
    total = [a + b for a, b in zip(seconds["spectrum"], seconds["gradients"], strict=True)]
    yield Ratio.of("localization", "localization, ResNet-18", "forward passes of its images", quotients(total, seconds["forward"]),
                   unit="forwards", limit=1.3, goal=1.32)


def corruptions(bench: Bench) -> Iterator[Ratio]:
    "All kinds, one after the other, on the device and on the host."
    here = bench.images.batch(torch.arange(len(bench.images))).cpu()
    there = here.to(bench.device)
    every = lambda images: [corrupt(images, name, 3) for name in CORRUPTIONS]
    seconds = bench.times({"host": lambda: every(here), "device": lambda: every(there)})
    yield Ratio.of("corruptions", f"{len(CORRUPTIONS)} corruptions", "the same on the host, all its threads",
                   quotients(seconds["host"], seconds["device"]))
    rate = [len(here) * len(CORRUPTIONS) / s for s in seconds["device"]]
    yield Ratio.of("corruptions", "corrupted images", "a second", rate, unit="images")


CASES: dict[str, Callable[[Bench], Iterator[Ratio]]] = {
    "training": training, "blocks": blocks, "localization": localization, "corruptions": corruptions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    bench = Bench(torch.device(arguments.device), arguments.width, arguments.batch, arguments.rounds)
    for case in CASES.values():
        for ratio in case(bench):
            print(json.dumps(ratio.as_dict()), flush=True)


if __name__ == "__main__":
    main()
