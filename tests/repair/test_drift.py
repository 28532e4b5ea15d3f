"""Drift: the block that drives images and their emulated twins apart is the one that is blamed, without training and without a change."""
import json

import numpy as np
import pytest
import torch
from torch import nn

import archrepair
from archrepair.core.errors import ArchrepairError
from archrepair.data.images import ImageSet
from archrepair.data.pattern import Pattern
from archrepair.data.scenario import RepairData
from archrepair.repair.conditional import ConditionalRepair
from archrepair.repair.drift import drift
from archrepair.training.cost import CostMeter


class Sharpen(nn.Module):
    "Takes away a share of what neighbors have in common, so that noise is what remains; with a share of 0 it does nothing."

    def __init__(self, share: float):
        super().__init__()
        self.filter, self.pass_on = nn.Conv2d(3, 3, 5, padding=2, padding_mode="replicate", groups=3), nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.filter.weight.fill_(-share / 25)
            self.filter.weight[:, :, 2, 2] += 1
            self.pass_on.weight.copy_(torch.eye(3)[:, :, None, None])
            for layer in (self.filter, self.pass_on):
                layer.bias.zero_()

    def forward(self, x):
        return self.pass_on(self.filter(x))


class Net(nn.Module):
    "Three blocks of which one sharpens."

    def __init__(self, sharpening: int, classes: int = 4):
        super().__init__()
        self.blocks = nn.Sequential(*(Sharpen(0.95 if i == sharpening else 0.0) for i in range(3)))
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def smooth_images(n: int, seed: int) -> ImageSet:
    "Slowly varying pictures with four classes."
    coarse = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=16, mode="bilinear").mul(255).byte()
    return ImageSet(fine.permute(0, 2, 3, 1).contiguous(), torch.arange(n) % 4, tuple("abcd"))


def add_noise(images, generator):
    noise = torch.randn(images.shape, generator=generator) * 12
    return (images.float() + noise).clamp(0, 255).round().byte()


@pytest.fixture(scope="module")
def data():
    train, failures = smooth_images(300, 0), smooth_images(80, 1)
    noisy = ImageSet(add_noise(failures.images, torch.Generator().manual_seed(2)), failures.labels, failures.classes)
    return RepairData.of(failures=noisy, train=train, val=smooth_images(80, 3))


@pytest.fixture(scope="module")
def noise(data):
    return Pattern.of(data.failures, data.train, emulator=add_noise)


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_the_block_that_drives_twins_apart_is_blamed(data, noise, guilty):
    found = drift(Net(guilty), data, NAMES, pattern=noise)
    assert found.block == NAMES[guilty] and found.block in found.verdict and found.table.loc[found.block, "ratio"] > 3
    others = found.table.drop(found.block)["ratio"]
    assert np.allclose(others, 1, rtol=1e-4)  # they pass on what they get
    assert found.images == len(data.train) and (found.table["error"] >= 0).all()


def test_what_leaves_a_block_enters_the_next(data, noise):
    table = drift(Net(1), data, NAMES, pattern=noise).table
    assert np.allclose(table["leaving"].to_numpy()[:-1], table["entering"].to_numpy()[1:], rtol=1e-5)
    assert np.allclose(table["leaving"] / table["entering"], table["ratio"])


def test_distance_is_that_of_a_plain_loop(data, noise):
    "Every pair on its own, the mean taken over all images of each batch of a hundred."
    found = drift(Net(0), data, NAMES, pattern=noise, images=100)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:100]
    clean = data.train.batch(order)
    twins = noise(clean, torch.Generator().manual_seed(1))
    x, y = (data.transform(images).flatten(1).double() for images in (clean, twins))
    apart = sum(float((b - a).square().sum()) for a, b in zip(x, y)) / 100
    spread = sum(float((a - x.mean(0)).square().sum()) for a in x) / 99
    assert found.table.loc["blocks.0", "entering"] == pytest.approx(apart / spread, rel=1e-4)


def test_seed_network_and_cost(data, noise):
    network, meter = Net(2), CostMeter()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = drift(network, data, NAMES, pattern=noise, images=150, meter=meter)
    again, other = (drift(network, data, NAMES, pattern=noise, images=150, seed=seed) for seed in (0, 1))
    assert first.table.equals(again.table) and not first.table.equals(other.table)
    assert meter.forwards == 300 and meter.backwards == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_equals_are_named(data, noise):
    found = drift(Net(5), data, NAMES, pattern=noise)  # no block sharpens
    assert sum("the same within the error" in warning for warning in found.warnings) == 2
    assert "no block drives" in found.verdict or found.table["ratio"].max() > 1


def test_words_for_json_and_a_picture(data, noise):
    found = drift(Net(1), data, NAMES, pattern=noise)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["block"] == "blocks.1" and list(plain["blocks"]) == NAMES
    assert repr(found).startswith(found.verdict)
    assert [tick.get_text() for tick in found.plot().get_xticklabels()] == NAMES


def test_without_an_emulator_there_are_no_twins(data):
    nothing = Pattern.of(data.failures, data.train, emulator="none")
    with pytest.raises(ArchrepairError, match="no emulator imitates these failures.*tarantula"):
        drift(Net(0), data, NAMES, pattern=nothing)


def test_a_block_that_gives_no_tensor_is_named(data, noise):
    class Pair(Sharpen):
        def forward(self, x):
            return super().forward(x), x

    class Net2(Net):
        def forward(self, x):
            return self.head(self.blocks[2](self.blocks[1](x)[0]).mean((2, 3)))

    network = Net2(1)
    network.blocks[1] = Pair(0.5)
    with pytest.raises(ArchrepairError, match="blocks.1 takes or gives no tensor"):
        drift(network, data, NAMES[1:], pattern=noise)
    with pytest.raises(ArchrepairError, match="layer9"):
        drift(Net(0), data, ["layer9"], pattern=noise)


def test_repair_goes_where_twins_drift_apart(data):
    repair = ConditionalRepair(measure="drift", emulator="spectral", search_epochs=0, finetune_epochs=1, failure_views=1, control=False,
                               blocks=NAMES)
    result = repair.repair(Net(1), data)
    findings = result.conditional
    assert result.block == findings["drift"]["block"] == "blocks.1" and result.localization is not None


def test_repair_says_where_twins_are_missing(data):
    repair = ConditionalRepair(measure="drift", emulator="none", search_epochs=0, finetune_epochs=1, failure_views=1, control=False,
                               blocks=NAMES)
    result = repair.repair(Net(1), data)
    assert result.conditional["drift"] is None and result.block == result.localization.block
    assert any("ranked by tarantula, since no emulator" in warning for warning in result.warnings)


def test_it_is_public():
    assert archrepair.drift is drift
