"""Whatever number of channels a network takes, it gets one or three of them, or one line says why not."""
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision import transforms as T

from archrepair.baselines.retrain import Retrain
from archrepair.core.errors import ArchrepairError, Notice, note_once
from archrepair.data.datasets import load_dataset
from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import RepairData
from archrepair.data.transforms import LUMINANCE, ToChannels
from archrepair.networks.channels import channels_of, fit_channels
from archrepair.repair.archrepair import ArchRepair
from archrepair.repair.localization import localize
from archrepair.training.evaluation import predict

PLAIN = Normalize((0.0,), (1.0,))
GRAY_STAGES = T.Compose([T.Grayscale(), T.ToTensor()])


def network(channels: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())
        return nn.Sequential(nn.Conv2d(channels, 8, 3, 1, 1), block(8, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(8, 10)).eval()


class Converting(nn.Module):
    "Takes color images, and makes them gray itself."

    def __init__(self):
        super().__init__()
        self.net = network(1)

    def forward(self, x):
        return self.net(x.mean(1, keepdim=True)) if x.shape[1] == 3 else x[:, :0]


@pytest.fixture(scope="module")
def colors():
    pixels = torch.randint(0, 256, (12, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet(pixels, torch.arange(12) % 10, tuple(map(str, range(10))), "colors")


@pytest.mark.parametrize(("model", "transform", "channels"), [
    (network(3), PLAIN, 3), (network(1), PLAIN, 1), (network(1), lambda images: PLAIN(images)[:, :1], 1), (network(3), GRAY_STAGES, 3),
    (network(1), GRAY_STAGES, 1), (Converting(), PLAIN, 3), (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), PLAIN, 3),
])
def test_a_network_gets_the_channels_that_it_takes(colors, model, transform, channels):
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    predict(model, colors, transform)
    hook.remove()
    assert seen[-1] == channels


def test_gray_is_the_luminance_that_pillow_computes(colors):
    ours = ToChannels(PLAIN, 1)(colors.images)
    theirs = torch.stack([GRAY_STAGES(T.ToPILImage()(image.permute(2, 0, 1))) for image in colors.images])
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 0.51 / 255  # Pillow rounds
    assert sum(LUMINANCE) == pytest.approx(1)
    assert torch.equal(ToChannels(lambda images: theirs, 3)(colors.images), theirs.repeat(1, 3, 1, 1))


def test_a_transform_that_fits_stays_itself_and_what_is_changed_is_said_once(colors):
    assert fit_channels(network(3), PLAIN, colors) is PLAIN
    note_once.cache_clear()
    with pytest.warns(Notice, match="takes one channel: it gets the luminance of color images") as caught:
        for _ in range(2):
            assert fit_channels(network(1), PLAIN, colors) == ToChannels(PLAIN, 1)
    assert len(caught) == 1


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_numbers_of_channels_are_one_line(colors, channels):
    with pytest.raises(ArchrepairError, match=rf"takes images of {channels} channels and gets 3 \(.*expected a network for 3") as caught:
        predict(network(channels), colors, PLAIN)
    assert "\n" not in str(caught.value) and channels_of(network(channels)) == channels


def test_a_gray_network_is_localized_and_repaired_from_color_images(untouched):
    train, test = load_dataset("digits"), load_dataset("digits:fog:3", "test")
    data = RepairData.of(test.select(torch.arange(40)), train.select(torch.arange(120)))
    gray = replace(data, transform=ToChannels(data.transform, 1))
    with untouched(network(1)) as model:
        assert localize(model, data, k=10).summary.equals(localize(model, gray, k=10).summary)
        for method in (ArchRepair(strategy="pc-darts", search_epochs=1, finetune_epochs=1, block="2"), Retrain(epochs=1)):
            result = method.repair(model, data)
            assert result.changed or result.chosen == "original"
            assert predict(result.model, test, data.transform).shape == (len(test), 10)
