"""Where the time goes in the cases whose goal is not reached: parts left out, operators counted, a profile.

    python benchmarks/parts.py [repair] [localization] [search] [corruptions] [--rounds 5]

CPU time on one thread; sides alternate as in the benchmarks. Each line is a part with its median and, where it is a share, of what.
"""
from __future__ import annotations

import argparse
import copy
import io
import os
import statistics
from collections.abc import Callable, Iterator

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import bench_corruptions  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_localization import plain_forward  # noqa: E402
from bench_repair import PREPARE, cut_at, plain_epoch, some_images  # noqa: E402
from bench_search import search_steps, trained_tail, weights_step  # noqa: E402
from bench_search import limit as search_limit  # noqa: E402
from measure import in_turn  # noqa: E402
from PIL import Image  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from archrepair.corruptions.catalogue import COMMON_CORRUPTIONS, corrupt  # noqa: E402
from archrepair.data.datasets import load_dataset  # noqa: E402
from archrepair.data.images import Normalize  # noqa: E402
from archrepair.nas.graph import extract  # noqa: E402
from archrepair.networks.blocks import freeze, split  # noqa: E402
from archrepair.networks.models import create_model  # noqa: E402
from archrepair.networks.neurons import watch, wire  # noqa: E402
from archrepair.repair.localization import failure_gradients, spectrum  # noqa: E402
from archrepair.training.fit import Recipe, autocast, fit, precision_of  # noqa: E402
from archrepair.training.rows import Rows, cache_features, image_features  # noqa: E402

Part = tuple[str, float, str]  # what, how much, in which unit


class Operators(TorchDispatchMode):
    "Counts the operators that are started inside, those of backward passes too."

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def medians(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    "Milliseconds of each side."
    return {name: 1000 * statistics.median(seconds) for name, seconds in in_turn(sides, rounds).items()}


def shares(run: Callable[[], object], most: int = 6) -> list[tuple[str, float]]:
    "Operators by their share of the time of `run`, without what they call, the longest first."
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            run()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return [(name, time / sum(times.values())) for name, time in sorted(times.items(), key=lambda item: -item[1])[:most]]


def repair(rounds: int) -> Iterator[Part]:
    "An epoch of 128 images, which is a single step, and of 512; what `fit` does once per call; images, network and optimizer alone."
    network = create_model("resnet18", 10).eval()
    plain, precision = copy.deepcopy(network).to(memory_format=torch.contiguous_format), precision_of(network, "auto")
    for images in (128, 512):
        some = some_images(images)
        cut = cut_at(network, "layer4", some, Normalize.of(some))
        rows = Rows([cache_features(cut, some, Normalize.of(some), dtype=torch.bfloat16 if precision == "bf16" else torch.float32)])
        tail = freeze(cut.tail(copy.deepcopy(cut.block)))
        tail.block.requires_grad_(True)
        epochs = lambda n, tail=tail, rows=rows: fit(tail, rows, Recipe(epochs=n, lr=1e-4, precision=precision), trainable=[tail.block],
                                                     select="last")
        sides = {"plain": lambda some=some: plain_epoch(plain, some, 128), "one": lambda run=epochs: run(1),
                 "three": lambda run=epochs: run(3)}
        if images == 128:
            batch, = rows.place([torch.arange(128)])
            x = batch.inputs()

            def passes(tail: torch.nn.Module = tail, x: torch.Tensor = x) -> None:
                tail.block.train()
                tail.zero_grad(set_to_none=True)
                with autocast("cpu", precision):
                    loss = tail(x).float().square().mean()
                loss.backward()

            sides |= {"gather": batch.inputs, "passes": passes,
                      "copies": lambda tail=tail: [copy.deepcopy(tail.state_dict()) for _ in range(2)],
                      "pictures": lambda some=some: pictures(some)}
        ms = medians(sides, rounds)
        epoch = (ms["three"] - ms["one"]) / 2
        yield f"{images} images: plain epoch", ms["plain"], "ms"
        yield f"{images} images: fit of one epoch", ms["one"], "ms"
        yield f"{images} images: each further epoch", epoch, "ms"
        yield f"{images} images: plain / fit of one epoch", ms["plain"] / ms["one"], "times"
        yield f"{images} images: plain / further epoch", ms["plain"] / epoch, "times"
        for name in ("gather", "passes", "copies", "pictures"):
            if name in ms:
                yield f"{images} images: {name}", ms[name], "ms"


def pictures(some) -> list:
    "What the plain loop does to its images."
    return [PREPARE(Image.fromarray(image.numpy())) for image in some.images]


def localization(rounds: int, images: int = 400) -> Iterator[Part]:
    "In forward passes of all images: hooks that do nothing, statistics, and of the failures forward, backward and all."
    digits = load_dataset("digits")
    network = create_model("resnet18", 10, width=0.25)
    rows = Rows([image_features(digits.select(torch.arange(images)), Normalize.of(digits))])
    wiring = wire(network, rows.inputs(torch.arange(1))[0])
    failures = spectrum(network, rows, wiring, batch_size=100).failures[:images // 10]
    x, order = rows.inputs(failures)

    def hooked() -> None:
        with watch(network, wiring, lambda layer, z, view: None):
            plain_forward(network, rows, 100)

    def forward() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(x), rows.labels[order])

    def inference() -> None:
        with torch.inference_mode():
            network(x)

    weights = [p for p in network.parameters() if p.ndim == 4]
    ms = medians({"plain": lambda: plain_forward(network, rows, 100), "hooked": hooked,
                  "spectrum": lambda: spectrum(network, rows, wiring, batch_size=100), "inference": inference, "forward": forward,
                  "both": lambda: torch.autograd.grad(forward(), weights),
                  "gradients": lambda: failure_gradients(network, rows, failures, wiring)}, rounds)
    part = lambda difference: difference / ms["plain"]
    yield "a forward pass of all images", ms["plain"], "ms"
    yield "hooks that do nothing", part(ms["hooked"] - ms["plain"]), "forwards"
    yield "statistics of the neurons and counting", part(ms["spectrum"] - ms["hooked"]), "forwards"
    yield "failures: inference", part(ms["inference"]), "forwards"
    yield "failures: forward, all kept for backward", part(ms["forward"]), "forwards"
    yield "failures: backward to the weights of convolutions", part(ms["both"] - ms["forward"]), "forwards"
    yield "failures: the rest of `failure_gradients`", part(ms["gradients"] - ms["both"]), "forwards"
    yield "localization", part(ms["spectrum"] + ms["gradients"]), "forwards"


def searching(rounds: int) -> Iterator[Part]:
    "Operators started in a step and milliseconds of it, at two sizes of batches."
    for block in ("layer2", "layer4"):
        model = create_model("resnet18", 10, width=0.25, stem_stride=2)
        cut = split(model, block)
        for batch in (128, 512):
            generator = torch.Generator().manual_seed(0)
            x = cut.features(torch.randn(batch, 3, 32, 32, generator=generator)).to(memory_format=torch.channels_last)
            labels, graph = torch.randint(10, (batch,), generator=generator), extract(cut.block, x[:2])
            plain = copy.deepcopy(cut.block)
            tune = weights_step(trained_tail(cut, plain), plain, x, labels, "fp32")
            weights, architecture = search_steps(cut, graph, x, labels, "fp32", "pc-darts", plain=False)
            ms = medians({"tune": tune, "weights": weights, "architecture": architecture}, rounds)
            for name, run in {"tune": tune, "weights": weights, "architecture": architecture}.items():
                with Operators() as operators:
                    run()
                yield f"{block}, batch {batch}: {name}, operators", operators.count, ""
                yield f"{block}, batch {batch}: {name}", ms[name], "ms"
            yield f"{block}, batch {batch}: search / fine-tuning", (ms["weights"] + ms["architecture"]) / ms["tune"], "steps"
            yield f"{block}, batch {batch}: the same by arithmetic", search_limit(cut, graph, x, None), "steps"
            if batch == 128:
                for side, run in (("fine-tuning", tune), ("search", lambda run=(weights, architecture): [step() for step in run])):
                    parts = shares(run, 1000)
                    convolutions = sum(share for name, share in parts if "convolution" in name)
                    yield f"{block}, batch {batch}: {side}, convolutions", 100 * convolutions, "%"
                    yield from ((f"{block}, batch {batch}: {side} · {name}", 100 * share, "%") for name, share in parts[:8])


def corruptions(rounds: int, images: int = 400) -> Iterator[Part]:
    "Microseconds per image of each kind, ours and the plain loop's; of both sums; and of JPEG what libjpeg takes."
    some = load_dataset("digits", "test").images[:images].numpy()
    ours = plain = 0.0
    for name in COMMON_CORRUPTIONS:
        row = bench_corruptions.compare(name, some, 8 * rounds)
        times = 1e6 / row["images_per_s"], 1e6 / row["plain_per_s"]
        ours, plain = ours + times[0], plain + times[1]
        (operator, share), *_ = shares(lambda name=name: corrupt(some, name, 3, dataset="bench"), 1)
        yield f"{name}: plain {times[1]:.0f} µs, ratio {row['ratio']:.2f}, {operator} {share:.0%} of ours", times[0], "µs"
    yield "sum over all kinds, plain / ours", plain / ours, "times"

    def encode(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=58)
        return buffer.getvalue()

    encoded = [encode(image) for image in some]
    ms = medians({"encode": lambda: [encode(image) for image in some],
                  "decode": lambda: [Image.open(io.BytesIO(content)).load() for content in encoded],
                  "jpeg": lambda: corrupt(some, "jpeg_compression", 3, dataset="bench")}, rounds)
    yield from ((f"jpeg_compression: {name}", 1000 * time / images, "µs") for name, time in ms.items())


CASES = {"repair": repair, "localization": localization, "search": searching, "corruptions": corruptions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if wrong := [case for case in arguments.cases if case not in CASES]:
        parser.error(f"unknown case {wrong[0]}; expected some of {', '.join(CASES)}")
    os.environ["ARCHREPAIR_PROGRESS"] = "0"
    torch.set_num_threads(1)
    for case in arguments.cases or CASES:
        for what, number, unit in CASES[case](arguments.rounds):
            print(f"{case} | {what} | {number:.3g} {unit}", flush=True)


if __name__ == "__main__":
    main()
