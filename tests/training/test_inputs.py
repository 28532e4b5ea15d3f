"""A wrong normalization is noticed, and a network's own configuration is taken, before anything rests on it."""
import pytest
import torch
from torch import nn

from archrepair.core.errors import Notice, note_once
from archrepair.data.images import ImageSet, Normalize, normalization
from archrepair.data.scenario import RepairData
from archrepair.data.transforms import ToChannels
from archrepair.repair.archrepair import ArchRepair
from archrepair.training.evaluation import is_correct, predict
from archrepair.training.inputs import fit_inputs, normalization_doubt, settle_normalization, spread_sample

CLASSES = ("dark", "gray", "light", "white")
LEVELS = torch.tensor([20, 90, 170, 250])


class Levels(nn.Module):
    "Knows the gray level of each class under the normalization that it was made with, and no other."

    def __init__(self, expected: Normalize, configuration: dict | None = None):
        super().__init__()
        values = expected(LEVELS.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 3)).mean((1, 2, 3))
        self.levels, self.scale = nn.Parameter(values), nn.Parameter(torch.tensor(1.0))
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        if configuration:
            self.pretrained_cfg = configuration

    def forward(self, x):
        return -self.scale * (x.mean((1, 2, 3))[:, None] - self.levels).abs() + 0 * self.conv(x).mean((2, 3))


def images(count: int = 80, size: int = 4, name: str = "levels") -> ImageSet:
    labels = torch.arange(count) * 4 // count  # class by class, as folders come
    return ImageSet(LEVELS[labels].to(torch.uint8).view(-1, 1, 1, 1).expand(-1, size, size, 3).contiguous(), labels, CLASSES, name)


def doubt(expected: str, used: object) -> str:
    model, some = Levels(normalization(expected, images())), images()
    return normalization_doubt(model, some, used, is_correct(predict(model, some, used), some.labels))


FAR = Normalize((0.0,), (0.05,))


@pytest.mark.parametrize("expected", ["imagenet", "none", "cifar10", "0.5/0.5", "dataset"])
@pytest.mark.parametrize("used", [FAR, ToChannels(FAR, 3), lambda pixels: pixels.permute(0, 3, 1, 2).float()])
def test_a_wrong_normalization_is_doubted_and_one_that_fits_named(expected, used):
    line = doubt(expected, used)
    best = line.split("--normalize ")[1].split(",")[0]
    model, some = Levels(normalization(expected, images())), images()
    assert "% of 80 images of levels" in line and "\n" not in line
    right = is_correct(predict(model, some, normalization(best, some)), some.labels).float().mean()
    assert right >= 2 * is_correct(predict(model, some, used), some.labels).float().mean()


@pytest.mark.parametrize("name", ["imagenet", "none", "dataset"])
def test_the_right_normalization_is_not_doubted(name):
    assert doubt(name, normalization(name, images())) == ""


def test_a_network_that_knows_nothing_is_not_doubted():
    model, some = Levels(normalization("none", images())), images()
    model.levels.data.fill_(0)  # every image is of the first class
    assert normalization_doubt(model, some, FAR, torch.zeros(80, dtype=torch.bool)) == ""  # from none to a quarter: by chance


@pytest.mark.parametrize(("size", "count", "taken"), [(32, 4000, 500), (64, 4000, 500), (224, 4000, 60), (128, 4000, 125), (32, 7, 7)])
def test_a_few_images_of_every_class_are_enough(size, count, taken):
    labels = torch.arange(count) * 4 // count
    some = spread_sample(ImageSet(torch.zeros(count, 1, 1, 3, dtype=torch.uint8).expand(-1, size, size, 3), labels, CLASSES))
    assert 0.85 * taken <= len(some) <= taken and some.labels.unique().tolist() == [0, 1, 2, 3]


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(("trained_with", "taken", "said"), [
    ("imagenet", "imagenet", "normalized by imagenet, as the network's configuration says"),
    ("dataset", "dataset", "the mean and deviation of levels: they suit the network better than imagenet"),
])
def test_what_the_configuration_says_is_taken_unless_images_say_otherwise(trained_with, taken, said):
    train = images()
    dataset, own = Normalize.of(train), Normalize(**IMAGENET)
    model = Levels({"imagenet": own, "dataset": dataset}[trained_with], IMAGENET)
    note_once.cache_clear()
    with pytest.warns(Notice, match=said):
        assert settle_normalization(model, train, own) == {"imagenet": own, "dataset": dataset}[taken]


def test_a_repair_set_gets_the_normalization_of_the_network_unless_the_user_has_chosen_one():
    train = images(200)
    model = Levels(Normalize(**IMAGENET), IMAGENET)
    chosen = {None: Normalize(**IMAGENET), "none": normalization("none", train), Normalize.of(train): Normalize.of(train)}
    for transform, expected in chosen.items():
        data = RepairData.of(images(40), train, transform=transform)
        assert fit_inputs(model, data)[0].transform == expected
    assert fit_inputs(Levels(Normalize.of(train)), RepairData.of(images(40), train))[0].transform == Normalize.of(train)


def test_a_repair_says_that_its_normalization_is_doubtful_and_keeps_the_remark():
    data = RepairData.of(images(40), images(200), transform=FAR)
    note_once.cache_clear()
    with pytest.warns(Notice, match="if it was trained that way, give --normalize"):
        method = ArchRepair(strategy="pc-darts", search_epochs=0, finetune_epochs=0, block="conv")
        result = method.repair(Levels(normalization("none", data.train)), data)
    assert [warning for warning in result.warnings if "normalized by 0.0/0.05 the network is right on 25 %" in warning]
