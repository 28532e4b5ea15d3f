"""What it is worth that a block alone is repaired: an epoch and its memory, beside the loop that trains the whole network.

    python benchmarks/bench_repair.py [--images 128] [--rounds 5] [--full]

Trained from cached features, a block gets the weights that it gets in the whole network with everything else frozen, which is compared
first. The plain loop is the one of public training scripts: images through Pillow one at a time, float32, contiguous, all weights,
`loss.item()` in every step. `--full` takes every block of the six networks at full width.
"""
from __future__ import annotations

import argparse
import copy
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch  # noqa: E402
from measure import Ratio, in_turn, quotients  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision import transforms  # noqa: E402

from archrepair.core.registry import MODELS  # noqa: E402
from archrepair.data.datasets import load_dataset  # noqa: E402
from archrepair.data.images import ImageSet, Normalize  # noqa: E402
from archrepair.experiments.forecast import saved_bytes  # noqa: E402
from archrepair.networks.blocks import Split, block_names, freeze, split  # noqa: E402
from archrepair.networks.models import create_model  # noqa: E402
from archrepair.training.cost import work  # noqa: E402
from archrepair.training.fit import Recipe, fit, precision_of  # noqa: E402
from archrepair.training.rows import Rows, cache_features, image_features  # noqa: E402

SMALL = (("resnet18", "layer1", 0.25), ("resnet18", "layer2", 0.25), ("resnet18", "layer3", 0.25), ("resnet18", "layer4", 0.25))
PREPARE = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                              transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))])  # of the plain loop
PAPERS = ("vgg16", "resnet18", "resnet50", "resnet101", "densenet121", "efficientnet_b0")


def some_images(n: int) -> ImageSet:
    digits = load_dataset("digits")
    return digits.select(torch.arange(n) % len(digits))


def cut_at(network: nn.Module, block: str, images: ImageSet, transform: Normalize) -> Split:
    return split(network, block, transform(images.batch(torch.arange(2))))


def repaired(cut: Split, rows: Rows, recipe: Recipe) -> nn.Module:
    "The block after a training from cached features."
    tail = freeze(cut.tail(copy.deepcopy(cut.block)))
    tail.block.requires_grad_(True)
    fit(tail, rows, recipe, trainable=[tail.block], select="last")
    return tail.block


def frozen(network: nn.Module, block: str, rows: Rows, recipe: Recipe) -> nn.Module:
    "The block after a training of the whole network in which all else is frozen."
    whole = freeze(copy.deepcopy(network))
    part = whole.get_submodule(block).requires_grad_(True)
    fit(whole, rows, recipe, trainable=[part], select="last")
    return part


def agree(cut: Split, network: nn.Module, block: str, cached: Rows, images: Rows, recipe: Recipe) -> None:
    "Cached and frozen training must lead to the same weights, and those must have moved."
    ours, theirs = repaired(cut, cached, recipe).state_dict(), frozen(network, block, images, recipe).state_dict()
    moved = max(float((ours[name] - value).abs().max()) for name, value in cut.block.state_dict().items() if value.is_floating_point())
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours if ours[name].is_floating_point())
    assert moved > 1e-4 and apart <= 1e-5 * max(1.0, moved), f"weights are {apart:.1e} apart, and moved by {moved:.1e}"


def entering_work(block: nn.Module, x: Tensor) -> int:
    "Operations of the layers that take what enters the block: the gradient of their inputs is not needed."
    first: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_pre_hook(lambda m, args: first.append((m, args[0])) if args[0].data_ptr() == x.data_ptr() else None)
             for m in layers]
    with torch.no_grad():
        block(x)
    for hook in hooks:
        hook.remove()
    return sum(work(m, entering) for m, entering in first)


def limit(network: nn.Module, cut: Split, x: Tensor) -> float:
    "How many times less arithmetic a step from the cache has: 3F / (3b − d + 2s), network F, block b, suffix s, d see `entering_work`."
    entering = cut.features(x)
    block, tail = work(cut.block, entering), work(cut.tail(), entering)
    return 3 * work(network, x) / (3 * block - entering_work(cut.block, entering) + 2 * (tail - block))


def plain_epoch(network: nn.Module, images: ImageSet, batch_size: int) -> None:
    "Train all of the network for an epoch, as public scripts do."
    pictures = [(Image.fromarray(image.numpy()), int(label)) for image, label in zip(images.images, images.labels)]
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    with torch.random.fork_rng(devices=[]):
        for positions in torch.randperm(len(pictures)).split(batch_size):
            batch = [pictures[i] for i in positions.tolist()]
            x, labels = torch.stack([PREPARE(picture) for picture, _ in batch]), torch.tensor([label for _, label in batch])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            loss.item()


def epoch(images: int = 128, width: float = 1.0, rounds: int = 5) -> Ratio:
    "An epoch of a repair of the last block of ResNet-18, beside the plain loop."
    network, some = create_model("resnet18", 10, width=width).eval(), some_images(images)
    transform, plain = Normalize.of(some), copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    cut, precision = cut_at(network, "layer4", some, transform), precision_of(network, "auto")
    cache = lambda dtype: Rows([cache_features(cut, some, transform, dtype=dtype)])
    recipe = Recipe(epochs=1, lr=0.01, batch_size=128)
    agree(cut, network, "layer4", cache(torch.float32), Rows([image_features(some, transform)]), recipe)
    rows = cache(torch.bfloat16 if precision == "bf16" else torch.float32)
    tail = freeze(cut.tail(copy.deepcopy(cut.block)))
    tail.block.requires_grad_(True)
    used = Recipe(epochs=1, lr=0.01, batch_size=128, precision=precision)
    seconds = in_turn({"plain": lambda: plain_epoch(plain, some, 128),
                       "ours": lambda: fit(tail, rows, used, trainable=[tail.block], select="last")}, rounds)
    return Ratio.of("repair epoch", f"repair epoch of ResNet-18's last block, {precision}",
                    "all weights, float32, one image at a time through Pillow", quotients(seconds["plain"], seconds["ours"]),
                    limit=round(limit(network, cut, torch.zeros(2, 3, 32, 32)), 2), goal=12.0 if precision == "bf16" else 7.0)


def same_precision(name: str, block: str, width: float, images: int = 128, rounds: int = 5) -> Ratio:
    "A block from its cache beside the whole network, both in float32 and by the one training loop."
    network, some = create_model(name, 10, width=width).eval(), some_images(images)
    transform = Normalize.of(some)
    cut, recipe = cut_at(network, block, some, transform), Recipe(epochs=1, lr=0.01, batch_size=64)
    cached, whole = Rows([cache_features(cut, some, transform)]), Rows([image_features(some, transform)])
    agree(cut, network, block, cached, whole, recipe)
    tail, full = freeze(cut.tail(copy.deepcopy(cut.block))), copy.deepcopy(network).requires_grad_(True)
    tail.block.requires_grad_(True)
    seconds = in_turn({"full": lambda: fit(full, whole, recipe, select="last"),
                       "cached": lambda: fit(tail, cached, recipe, trainable=[tail.block], select="last")}, rounds)
    most = round(limit(network, cut, torch.zeros(2, 3, 32, 32)), 2)
    return Ratio.of("same precision", f"{name} ×{width:g}, block {block}, from its cache", "the whole network, float32",
                    quotients(seconds["full"], seconds["cached"]), limit=most, goal=round(0.8 * most, 2))


def memory(width: float = 1.0, batch: int = 32) -> list[Ratio]:
    "What a repair's step keeps for its backward pass, by block of ResNet-18, beside a training step of the network; counted, not timed."
    network, x = create_model("resnet18", 10, width=width).train(), torch.zeros(batch, 3, 32, 32)
    whole, rows = saved_bytes(network, x), []
    for block in block_names(network):
        cut = split(network.eval(), block, x[:2])
        tail = freeze(cut.tail(copy.deepcopy(cut.block)))
        tail.block.requires_grad_(True).train()
        share = saved_bytes(tail, cut.features(x)) / whole
        rows.append(Ratio.of("memory", f"activations kept by a step of a repair of {block}, without the cache",
                             "those of a training step of ResNet-18", [share], unit="of the network's", goal=1.5))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for row in cases(arguments.full, arguments.images, arguments.rounds):
        print(json.dumps(row.as_dict()), flush=True)


def cases(full: bool = False, images: int = 128, rounds: int = 5):
    "All of the above, one after the other."
    yield epoch(images, rounds=rounds)
    yield from memory()
    every = [(name, block, 1.0) for name in PAPERS for block in block_names(create_model(name, 10))] if full else SMALL
    assert {name for name, *_ in every} <= set(MODELS)
    for name, block, width in every:
        yield same_precision(name, block, width, images, rounds)


if __name__ == "__main__":
    main()
