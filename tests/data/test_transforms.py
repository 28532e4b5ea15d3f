"""Stages of torchvision do to a batch what they do to one image; what works as it is stays as it is; and what works in no way is said."""
import pytest
import torch
from torchvision import transforms as T
from torchvision.transforms import v2

from archrepair.core.errors import ArchrepairError
from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import RepairData
from archrepair.data.transforms import as_transform
from support.pictures import pixels, tiny

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STAGES = {
    "ToTensor, Normalize": T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)]),
    "PILToTensor, ConvertImageDtype": T.Compose([T.PILToTensor(), T.ConvertImageDtype(torch.float32), T.Normalize(MEAN, STD)]),
    "ConvertImageDtype": T.Compose([T.ConvertImageDtype(torch.float32), T.Normalize(MEAN, STD)]),
    "v2 of PIL": v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]),
    "v2 of tensors": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]),
    "of one's own": lambda batch: (batch.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1),
}


@pytest.mark.parametrize("form", STAGES)
@pytest.mark.parametrize("side", [8, 3, 1])
def test_stages_give_what_normalize_gives(form, side):
    images = tiny(6, images=pixels(6, side))
    transform, expected = as_transform(STAGES[form], images), Normalize(MEAN, STD)(images.images)
    assert torch.allclose(transform(images.images), expected, atol=1e-6)
    if form != "of one's own":
        assert torch.allclose(transform(images.images.permute(0, 3, 1, 2) / 255), expected, atol=1e-6)
    assert as_transform(transform, images) is transform


def test_one_mean_for_all_channels_does_not_lie_on_its_side():
    images = tiny()
    transform = as_transform(v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,), (0.25,))]), images)
    assert torch.allclose(transform(images.images), Normalize((0.5,) * 3, (0.25,) * 3)(images.images), atol=1e-6)


def test_what_takes_a_batch_is_left_alone():
    for transform in (Normalize(), lambda batch: batch.float(), lambda batch: {"pixels": batch}):
        assert as_transform(transform, tiny()) is transform


def test_random_stages_leave_the_random_numbers_alone():
    flip = T.Compose([T.RandomHorizontalFlip(), T.ToTensor()])
    before = torch.random.get_rng_state()
    as_transform(flip, tiny())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("transform", "message"), [
    (T.Normalize(MEAN, STD), r"transform Normalize makes no network input \(given a uint8 B×H×W×3 batch: .*ToTensor"),
    (T.Resize(4), "given PIL images: .*given a uint8 B×3×H×W batch it returns uint8"),
    (lambda batch: batch / "x", "makes no network input"), ("imagnet", "normalize is 'imagnet'; expected cifar10, "),
    (7, "transform is 7; expected a function"),
])
def test_what_makes_no_input_is_said_before_any_work(transform, message):
    train = ImageSet(pixels(24), [0, 1] * 12, ("cat", "dog"), "train")
    with pytest.raises(ArchrepairError, match=message) as caught:
        RepairData.of(tiny(), train, transform=transform)
    assert "\n" not in str(caught.value)
