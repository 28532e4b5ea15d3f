"""Writes what `archrepair-bench v1` froze: data/bench-v1.toml, data/bench-v1.npz and the network of its small track.

    PYTHONPATH=tests python -m support.freeze FOLDER

It was run once. The test of the benchmark calls it again, and compares: indices that were drawn in another way would be noticed.
"""
import hashlib
import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from archrepair.core.tiers import TIERS
from archrepair.corruptions.catalogue import BENCHMARK_CORRUPTIONS, PARAMETERS
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize, holdout
from archrepair.data.scenario import build_scenario
from archrepair.experiments.originals import build_network, original
from archrepair.networks.sources import published_file
from archrepair.networks.weights import tensors_of
from archrepair.training.benchmark import digest_of, in_order, version_in_order
from archrepair.training.evaluation import is_correct, predict
from archrepair.training.fit import train_original

TRACKS = {
    "digits": {
        "dataset": "digits", "network": "resnet18", "weights": "bench-v1-digits.safetensors", "normalize": "dataset", "tier": "smoke",
        "width": 0.0625, "failing": ["fog:3", "frost:3"], "judged": ["clean", "fog:3", "frost:3", "contrast:3", "snow:3"], "seeds": [0, 1]},
    "cifar10": {
        "dataset": "cifar10", "network": "cifar-resnet20", "weights": "published", "normalize": "imagenet", "tier": "lite", "width": 1.0,
        "failing": ["gaussian_noise:3", "motion_blur:3", "fog:3"], "judged": ["clean", *(f"{name}:3" for name in BENCHMARK_CORRUPTIONS)],
        "seeds": [0, 1, 2]},
}
PROTOCOL = """
Positions are those in the order of the SHA-256 digests of the pixels, and the random numbers of a corruption belong to positions.
The network of a track fails on one version of the test images (`failing`). Half of the test images are the pool of a seed, drawn class by
class. A method gets images of the pool that the network gets wrong, `failures` to repair and `validation failures` to steer by, and in the
same way `training images` and `validation images`; the transform; and the share of the pool that fails. It may use nothing else of the
test set. It is judged on the other half, `held out`, in every version `judged`, with the network that it returns (rule `validation`) and
with its own network, whatever validation says of it (rule `paper`). All runs of a track make an entry: every failing version with every
seed. Search and fine-tuning last as long as the tier says, unless the entry says otherwise.
"""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def train_digits(path: Path) -> None:
    "The network of the small track, in half precision; it was trained once, and is committed."
    track = TRACKS["digits"]
    train = load_dataset("digits")
    network = build_network(track["network"], train, replace(TIERS["smoke"], width=track["width"]))
    seen = train.select(holdout(train.labels, 0.1, 0)[0])
    train_original(network, seen, TIERS["smoke"], epochs=30, transform=Normalize.of(train), seed=0)
    save_file({name: value.half() if value.is_floating_point() else value for name, value in tensors_of(network).items()}, path)


def lists_of(track: dict, weights: Path) -> Iterator[tuple[str, np.ndarray | float]]:
    "Each part of a track by its name: positions as one bit per image, and the share of the pool that fails."
    tier = replace(TIERS[track["tier"]], width=track["width"])
    unrepaired = original(track["network"], track["dataset"], tier, weights=weights, normalize=track["normalize"])
    train, clean = in_order(unrepaired.train), in_order(load_dataset(track["dataset"], "test"))
    bits = lambda positions, images: np.packbits(torch.zeros(len(images), dtype=torch.uint8).index_fill_(0, positions, 1).numpy())
    yield "labels", clean.labels.numpy().astype(np.uint8)
    for version in track["failing"]:
        test = version_in_order(clean, version)
        right = is_correct(predict(unrepaired.network, test, unrepaired.transform), test.labels)
        for seed in track["seeds"]:
            scenario = build_scenario(train, test, right, clean=clean, n_failures=tier.failures, n_train=tier.repair_train,
                                      transform=unrepaired.transform, seed=seed)
            data = scenario.data
            yield f"held out {seed}", bits(scenario.held_out, test)
            yield f"training images {seed}", bits(data.train.index, train)
            yield f"validation images {seed}", bits(data.val.index, train)
            yield f"failures {version} {seed}", bits(data.failures.index, test)
            yield f"validation failures {version} {seed}", bits(data.val_failures.index, test)
            yield f"{version} {seed}", round(data.failure_rate, 6)


def sources_of(track: dict, weights: Path) -> dict[str, str]:
    "Digests of what the lists are about: weights, images, and the constants of the corruptions."
    sets = {split: in_order(load_dataset(track["dataset"], split)) for split in ("train", "test")}
    names = sorted({version.split(":")[0] for version in track["judged"]} - {"clean"})
    constants = {name: PARAMETERS[name][sets["test"].size] for name in names}
    return {"weights": digest(weights.read_bytes()),
            **{f"{split} images": digest_of(images) for split, images in sets.items()},
            "constants": digest(json.dumps(constants, sort_keys=True).encode())}


def weights_of(track: dict, folder: Path) -> Path:
    return published_file(track["network"]) if track["weights"] == "published" else folder / track["weights"]


def freeze(folder: Path, tracks: dict[str, dict] = TRACKS) -> None:
    "Write the two files into `folder`, which holds the network."
    arrays: dict[str, np.ndarray] = {}
    head = ["# archrepair-bench v1: what is frozen, with the SHA-256 of each part. Made once by tests/support/freeze.py; never edited.",
            'name = "archrepair-bench"', "version = 1", f'protocol = """{PROTOCOL}"""']
    lines = ["\n".join(head)]
    for name, track in tracks.items():
        weights = weights_of(track, folder)
        parts = dict(lists_of(track, weights))
        lists = {part: value for part, value in parts.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{name}/{part}": value for part, value in lists.items()}
        hashes = {**sources_of(track, weights), **{part: digest(value.tobytes()) for part, value in lists.items()}}
        judged = textwrap.fill(json.dumps(track["judged"]), 120, subsequent_indent="    ")
        lines += [f"\n[track.{name}]", *(f"{key} = {judged if key == 'judged' else json.dumps(value)}" for key, value in track.items())]
        lines += [f"\n[track.{name}.failure_rate]", *(f'"{part}" = {value}' for part, value in parts.items() if part not in lists)]
        lines += [f"\n[track.{name}.sha256]", *(f'"{part}" = "{value}"' for part, value in hashes.items())]
    (folder / "bench-v1.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "bench-v1.npz", **arrays)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    network = target / TRACKS["digits"]["weights"]
    if not network.exists():
        with tempfile.TemporaryDirectory() as place:
            train_digits(Path(place) / network.name)
            shutil.copy(Path(place) / network.name, network)
    assert load_file(network)
    freeze(target)
