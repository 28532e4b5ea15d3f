"""A network with strided 1×1 convolutions of few channels, and its gradients: to be run in a process of its own, which may die.

`python -m support.narrow CHANNELS …` prints as JSON, for each number of channels, the layout chosen and the largest relative errors of
gradients against plain sums in float64.
"""
import copy
import json
import sys

import numpy as np
import torch
from torch import nn

from archrepair.baselines.arachne import impacts
from archrepair.baselines.parts.common import Problem
from archrepair.baselines.parts.patches import downstream
from archrepair.baselines.surgical import failure_gradient
from archrepair.data.scenario import RepairData
from archrepair.core.layout import layout_of
from archrepair.networks.blocks import freeze
from archrepair.networks.neurons import wire
from archrepair.repair.archrepair import ArchRepair
from archrepair.repair.localization import failure_gradients
from archrepair.training.fit import Recipe, fit
from archrepair.training.rows import Features, Rows
from support.states import assert_same_state, state_of

IMAGES, CLASSES = 81, 5


class Shortcut(nn.Module):
    "Half of a residual unit: a narrow strided 1×1 convolution beside a 3×3 one."

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, 2, bias=False)

    def forward(self, x):
        return (self.norm(self.conv(x)) + self.shortcut(x)).relu()


class Network(nn.Module):
    "A stem, two such units and a linear layer."

    def __init__(self, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.layer1, self.layer2 = Shortcut(channels), Shortcut(2 * channels)
        self.fc = nn.Linear(4 * channels, CLASSES)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x).relu())).mean((2, 3)))


def error(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    "The largest difference, as a share of the largest number."
    return float((gradient.double() - expected.double()).abs().max() / expected.abs().max())


def plain_gradient(network: Network, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    "The gradient of the mean loss for the weight of the first shortcut (out×in), in float64: a sum over images and pixels."
    network = copy.deepcopy(network).double().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    caught = []
    network.layer1.shortcut.register_forward_hook(lambda m, args, y: caught.extend([args[0], y.requires_grad_()]) or y)
    loss = nn.functional.cross_entropy(network(x.double()), labels)
    (before, after), (pull,) = caught, torch.autograd.grad(loss, caught[1])
    assert pull.shape == after.shape
    return torch.einsum("bohw,bihw->oi", pull, before[:, :, ::2, ::2])


def check(channels: int) -> dict[str, object]:
    "All ways to a weight gradient, for a network that its user laid out channels last."
    generator = torch.Generator().manual_seed(channels)
    torch.manual_seed(channels)
    model = Network(channels).to(memory_format=torch.channels_last).eval()
    x = torch.randn(IMAGES, 3, 16, 16, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.arange(IMAGES) % CLASSES
    features = Features(labels, lambda positions, view: x[positions].contiguous(memory_format=torch.channels_last))
    expected, before = plain_gradient(model, x, labels), state_of(model)
    errors = {}

    trained = copy.deepcopy(model)
    one_step = Recipe(epochs=1, lr=1.0, batch_size=IMAGES, momentum=0.0, weight_decay=0.0, schedule="constant", clip=None)
    groups = [{"params": list(trained.parameters()), "lr": 1.0, "weight_decay": 0.0}]
    fit(trained, Rows([features]), one_step, trainable=[trained.stem], groups=groups)  # BatchNorm stays in eval mode
    errors["fit"] = error((model.layer1.shortcut.weight - trained.layer1.shortcut.weight).detach().flatten(1), expected)

    wiring = wire(freeze(copy.deepcopy(model)), x[:1])
    g = failure_gradients(model, Rows([features]), torch.arange(IMAGES), wiring, batch_size=IMAGES)
    start = sum(size for name, size in list(wiring.layers.items())[:list(wiring.layers).index("layer1.shortcut")])
    errors["localization"] = error(torch.from_numpy(g[start:start + 2 * channels]), expected.abs().mean(1))

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8))
    data = RepairData.of((images[:40], labels[:40]), (images[40:], labels[40:]))
    tuned = failure_gradient(Problem(freeze(copy.deepcopy(model)), data))["layer1.shortcut.weight"].flatten(1)
    failures = data.transform(data.failures.batch(torch.arange(len(data.failures))))
    errors["surgical"] = error(tuned, plain_gradient(model, failures, data.failures.labels))
    below = downstream(model, ["layer1.shortcut"])
    entering = below.cut.features(x).detach().contiguous(memory_format=torch.channels_last)
    lost, _ = impacts(below, Features(labels, lambda positions, view: entering[positions]), batch_size=IMAGES)["layer1.shortcut"]
    errors["arachne"] = error(lost.flatten(1), expected.abs())

    result = ArchRepair(strategy="pc-darts", block="layer1", search_epochs=1, finetune_epochs=1).repair(model, data)
    assert_same_state(before, model)  # memory format included
    finite = all(bool(p.isfinite().all()) for p in result.model.parameters())
    return {"errors": errors, "finite": finite, "layout": str(layout_of(model))}


if __name__ == "__main__":
    print(json.dumps({channels: check(int(channels)) for channels in sys.argv[1:]}))
