"""What a folder of photographs occupies in memory, and what it costs to read: kept as bytes, or decoded whenever an image is needed.

    python benchmarks/folders.py [--images 500 1000 2000 8000]

The images of ImageNet that lie in data/imagenet, as often as it takes, in a folder of links; 224 px. Each row has a process of its own.
Memory is that of `growth.py`. A pass is a forward pass of ResNet-18 at an eighth of its width over all images, in batches of 500.
Writes `outputs/bench/folders-<processor>.json`.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from growth import begin, cost, each, give_back, resident  # it sets the threads, before torch
from run import ROOT, processor

import torch  # isort: skip

from archrepair.core.errors import write_json
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize
from archrepair.networks.models import create_model
from archrepair.training.evaluation import predict
from archrepair.training.rows import image_features


def measure(task: tuple[int, bool]) -> dict[str, float]:
    "A row: so many images, decoded on demand (`lazy`) or as `load_dataset` chooses."
    count, lazy = task
    torch.set_num_threads(1)
    give_back()
    files = sorted((ROOT / "data" / "imagenet").rglob("*.JPEG"))
    network = create_model("resnet18", 10, image_size=224, width=1 / 8)
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            link = Path(name, "train", f"class{number % 10}", f"{number}.jpeg")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[number % len(files)])
        Path(name, "test").symlink_to(Path(name, "train"))
        run = lambda images: predict(network, image_features(images, Normalize()))
        run(load_dataset(f"folder:{name}", image_size=224, lazy=True).select(torch.arange(256)))
        begin()
        before = resident("VmRSS")
        images, loading = cost(lambda: load_dataset(f"folder:{name}", image_size=224, lazy=lazy), before)
        begin()
        held = resident("VmRSS") - before
        _, passing = cost(lambda: run(images), before)
    return {"images": count, "lazy": lazy, "in memory": isinstance(images.images, torch.Tensor), "held MB": held / 1e6,
            "loading MB": loading["MB"], "pass MB": passing["MB"], "loading s": loading["seconds"], "pass s": passing["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 1000, 2000, 8000])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    if not (ROOT / "data" / "imagenet").is_dir():
        parser.error(f"no images in {ROOT / 'data' / 'imagenet'}; expected <class>/<image>.JPEG below it, as few as there are")
    os.environ["ARCHREPAIR_PROGRESS"] = "0"
    content = {"processor": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": []}
    for row in each(measure, [(images, lazy) for images in arguments.images for lazy in (False, True) if not lazy or images < 8000]):
        content["rows"].append(row)
        print(*(f"{key} {value:.5g}" for key, value in row.items()), sep=", ", flush=True)
    path = arguments.out / f"folders-{processor()}.json"
    write_json(path, content)
    print(path)


if __name__ == "__main__":
    main()
