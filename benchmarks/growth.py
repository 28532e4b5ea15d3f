"""How time and memory of the steps of a repair grow with the number of images, width, depth, classes and the size of images.

    python benchmarks/growth.py [--factor FACTOR ...] [--full] [--page]

One factor is varied at a time. Each point has two processes of its own, on one thread, which take every step once on 64 images first. One
measures time, the CPU seconds of a step. The other measures memory: the peak of resident memory during the step above that of the process
with its network and before its images, so it includes all that is held meanwhile, which is the repair set, and after `prepare` the cache.
That process gives freed memory back at once, so that peaks repeat to a megabyte, which costs it time. Linux with glibc only.
Writes `outputs/bench/growth-<processor>.json`, .png and .svg, and with `--page` the table and the figure in docs/benchmarks.md.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch  # noqa: E402
from run import PAGE, ROOT, processor  # noqa: E402

from archrepair.core.errors import write_atomic, write_json  # noqa: E402
from archrepair.data.images import ImageSet, Normalize  # noqa: E402
from archrepair.data.scenario import RepairData  # noqa: E402
from archrepair.networks.blocks import block_names  # noqa: E402
from archrepair.networks.models import create_model  # noqa: E402
from archrepair.repair.blockdata import BlockData, prepare  # noqa: E402
from archrepair.repair.finetuning import finetune  # noqa: E402
from archrepair.repair.localization import localize  # noqa: E402
from archrepair.repair.search import search  # noqa: E402
from archrepair.training.evaluation import predict  # noqa: E402
from archrepair.training.rows import image_features  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = {"model": "resnet18", "images": 500, "width": 0.25, "classes": 10, "size": 32}
FACTORS = {
    "images": ("images", [1000, 2000, 5000, 10_000, 20_000, 50_000]),
    "width": ("width", [1 / 8, 1 / 4, 1 / 2, 1]),
    "depth": ("model", [f"cifar-resnet{depth}" for depth in (20, 32, 44, 56, 110)]),
    "classes": ("classes", [10, 100, 1000]),
    "size": ("size", [32, 64, 128, 224]),
}
LABELS = {"images": "images", "width": "width", "depth": "residual units (CIFAR ResNets)", "classes": "classes",
          "size": "side of images, px"}
STEPS = {"localize": "localization", "prepare": "filling the cache", "finetune": "an epoch of repair", "search": "an epoch of search"}
MOST_SEARCHED = 20_000  # images; a search of more runs only with --full
BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"


def resident(line: str) -> int:
    "Bytes of resident memory of this process: now (`VmRSS`), or at most since `begin` (`VmHWM`)."
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))


def give_back() -> None:
    "From now on freed blocks of 128 KB and more go back to the system at once (M_MMAP_THRESHOLD)."
    ctypes.CDLL(None).mallopt(-3, 1 << 17)


def begin() -> None:
    "Give freed memory back to the system, and begin a new peak."
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def cost(run: Callable[[], object], before: int) -> tuple[object, dict[str, float]]:
    "What `run` returns, its CPU seconds, and its peak of memory above `before` in MB."
    begin()
    started = time.process_time()
    result = run()
    return result, {"seconds": time.process_time() - started, "MB": (resident("VmHWM") - before) / 1e6}


def repair_set(network: torch.nn.Module, images: int, classes: int, size: int) -> RepairData:
    "Random pixels, a tenth of which the network gets wrong; a tenth of all is set aside for validation."
    some = torch.randint(256, (64, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names, transform = tuple(map(str, range(classes))), Normalize()
    unlabelled = ImageSet(some, torch.zeros(64, dtype=torch.int64), names)
    answers = predict(network, image_features(unlabelled, transform)).argmax(1)
    part = lambda n, shift: ImageSet(some[torch.arange(n) % 64], (answers[torch.arange(n) % 64] + shift) % classes, names)
    return RepairData.of(part(images // 10, 1), part(images - images // 10, 0), transform=transform)


def steps(network: torch.nn.Module, data: RepairData, before: int, searched: bool) -> Iterator[tuple[str, dict[str, float]]]:
    "The steps of a repair of the last block, each with its cost."
    yield "localize", cost(lambda: localize(network, data, n_train=None), before)[1]
    prepared, spent = cost(lambda: prepare(network, block_names(network)[-1], data), before)
    assert isinstance(prepared, BlockData)
    yield "prepare", spent
    yield "finetune", cost(lambda: finetune(prepared, epochs=1, line=(1.0,)), before)[1]
    if searched:
        yield "search", cost(lambda: search(prepared, epochs=1), before)[1]


def point(task: tuple[str, object, bool, str]) -> list[dict]:
    "What all steps cost at one value of one factor, in `seconds` or in `MB`; runs in a process of its own."
    factor, value, full, kind = task
    torch.set_num_threads(1)
    if kind == "MB":
        give_back()
    setting = {**BASE, FACTORS[factor][0]: value}
    network = create_model(setting["model"], setting["classes"], width=setting["width"], stem_stride=2)
    sizes = setting["classes"], setting["size"]
    list(steps(network, repair_set(network, 64, *sizes), 0, True))
    begin()
    before = resident("VmRSS")
    data = repair_set(network, setting["images"], *sizes)
    x = (int(value.removeprefix("cifar-resnet")) - 2) // 2 if isinstance(value, str) else value
    searched = full or setting["images"] <= MOST_SEARCHED
    return [{"factor": factor, "value": x, "step": step, kind: spent[kind]} for step, spent in steps(network, data, before, searched)]


def each(measure: Callable, tasks: list) -> Iterator:
    "The results of all tasks, each from a process of its own, which begins with what this one has imported."
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(measure, tasks, chunksize=1)


def slope(values: list[float], costs: list[float]) -> float:
    "The power with which costs grow: the slope of the least-squares line through their logarithms."
    x, y = [[math.log(number) for number in numbers] for numbers in (values, costs)]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def line_of(points: list[dict], factor: str, step: str, kind: str) -> tuple[list[float], list[float]]:
    "The values of a factor and the costs of a step."
    chosen = [p for p in points if p["factor"] == factor and p["step"] == step]
    return [p["value"] for p in chosen], [p[kind] for p in chosen]


def table(points: list[dict]) -> str:
    "Slopes as Markdown, a row for each factor; time / memory of each step."
    rows = [f"| factor | from – to | {' | '.join(STEPS.values())} |", "|---|---|" + "---|" * len(STEPS)]
    for factor in dict.fromkeys(p["factor"] for p in points):
        values = line_of(points, factor, "localize", "MB")[0]
        powers = lambda step, factor=factor: [round(slope(*line_of(points, factor, step, kind)), 2) + 0.0 for kind in ("seconds", "MB")]
        cells = ["{:.2f} / {:.2f}".format(*powers(step)) for step in STEPS]
        rows.append(f"| {LABELS[factor]} | {values[0]:g} – {values[-1]:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(points: list[dict], origin: str) -> Figure:
    "Small multiples, time above memory, with the slope of each line on its panel."
    import matplotlib.pyplot as plt

    from archrepair.paper.plots import set_style

    set_style()
    factors = list(dict.fromkeys(p["factor"] for p in points))
    fig, axes = plt.subplots(2, len(factors), figsize=(2.7 * len(factors), 5.6), squeeze=False, sharex="col", layout="constrained")
    for row, (kind, label) in zip(axes, (("seconds", "CPU seconds"), ("MB", "peak memory, MB"))):
        for ax, factor in zip(row, factors):
            texts, places = [], line_of(points, factor, "localize", kind)[0]
            for number, (step, title) in enumerate(STEPS.items()):
                values, costs = line_of(points, factor, step, kind)
                ax.plot(values, costs, "osD^"[number] + "-", color=f"C{number}", ms=4, lw=1, label=title)
                texts.append((f"{round(slope(values, costs), 2) + 0.0:.2f}", f"C{number}"))
            ax.set(xscale="log", yscale="log")
            low, high = ax.get_ylim()
            stretch = max(1.0, (30 * low / high) ** 0.5)  # a flat line shall look flat
            low, high = low / stretch, high * stretch
            ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the slopes
            for number, (text, color) in enumerate(texts):
                ax.text(0.04, 0.97 - 0.085 * number, text, color=color, transform=ax.transAxes, va="top", size="small")
            ax.set_xticks(places, [f"{v:g}" if v < 1000 else f"{v / 1000:g}k" for v in places], size="small")
            ax.minorticks_off()
            ax.set_title(f"n = {len(places)} points") if kind == "seconds" else ax.set_xlabel(LABELS[factor])
        row[0].set_ylabel(label)
    fig.suptitle(f"Numbers: slope on log-log axes. {origin}", size="small")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STEPS))
    return fig


def write_page(content: dict, folder: Path, stem: str) -> None:
    "Put the table between the marks of the page, and the figure beside it."
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    origin = f"{content['processor']}, one thread, torch {content['torch']}, {content['date']}; each cell: time / memory."
    text = f"{before}{BEGIN}\n{origin}\n\n{table(content['points'])}\n{END}{rest.split(END)[1]}"
    write_atomic(PAGE, lambda path: path.write_text(text, encoding="utf-8"))
    shutil.copy(folder / f"{stem}.svg", PAGE.parent / "_static" / "growth.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", action="append", choices=FACTORS, help="may be repeated; default: all")
    parser.add_argument("--full", action="store_true", help="also searches of more than 20,000 images")
    parser.add_argument("--page", action="store_true", help="write table and figure into docs/benchmarks.md")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    os.environ["ARCHREPAIR_PROGRESS"] = "0"
    chosen, stem = arguments.factor or [*FACTORS], f"growth-{processor()}"
    path = arguments.out / f"{stem}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"points": []}
    content |= {"processor": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "threads": 1, "base": BASE}
    kept = [p for p in content["points"] if p["factor"] not in chosen]
    tasks = [(factor, value, arguments.full, kind) for factor in FACTORS if factor in chosen for value in FACTORS[factor][1]
             for kind in ("seconds", "MB")]
    results = each(point, tasks)
    for times, peaks in zip(results, results):
        costs = [time | peak for time, peak in zip(times, peaks, strict=True)]
        kept += costs
        shown = (f"{p['seconds']:.2f} s, {p['MB']:.0f} MB" for p in costs)
        print(f"{costs[0]['factor']} {costs[0]['value']:g}", *shown, sep=" | ", flush=True)
    content["points"] = sorted(kept, key=lambda p: [*FACTORS].index(p["factor"]))
    write_json(path, content)
    figure = draw(content["points"], f"{content['processor']}, one thread, {content['date']}; one process per point.")
    for kind in ("png", "svg"):
        write_atomic(path.with_suffix(f".{kind}"), lambda p, kind=kind: figure.savefig(p, format=kind, dpi=120))
    print(path)
    if arguments.page:
        write_page(content, arguments.out, stem)


if __name__ == "__main__":
    main()
