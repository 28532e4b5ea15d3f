"""Images as people have them: arrays, tensors and datasets become the same sets, and what cannot be taken is refused in one line."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import archrepair
from archrepair import ArchRepair, Normalize, RepairData, localize
from archrepair.core.errors import ArchrepairError
from archrepair.data.arrays import as_images, as_pixels, as_sets
from archrepair.data.images import ImageSet


def pixels(n: int = 24, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


class Photos(Dataset):
    "As torchvision's: PIL images, and names of the classes."
    classes = ["cat", "dog", "owl"]

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return Image.fromarray(pixels()[i]), i % 3


LABELS = np.arange(24) % 3
FORMS = {
    "numpy": (pixels(), LABELS), "list of labels": (pixels(), LABELS.tolist()),
    "uint8 N×H×W×3": (torch.from_numpy(pixels()), torch.from_numpy(LABELS)),
    "uint8 N×3×H×W": (torch.from_numpy(pixels()).permute(0, 3, 1, 2), LABELS),
    "float N×3×H×W": (torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255, LABELS),
    "half": (torch.from_numpy(pixels()).permute(0, 3, 1, 2).double() / 255, torch.from_numpy(LABELS).int()),
    "float N×H×W×3": (pixels().astype(np.float32) / 255, LABELS), "PIL dataset": Photos(), "subset": Subset(Photos(), range(24)),
    "tensor dataset": TensorDataset(torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(LABELS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form):
    images = as_images(FORMS[form])
    assert torch.equal(images.images, torch.from_numpy(pixels()))
    assert images.labels.tolist() == LABELS.tolist() and images.labels.dtype == torch.int64
    assert images.classes == (("cat", "dog", "owl") if form in ("PIL dataset", "subset") else ("0", "1", "2"))


@pytest.mark.parametrize("form", FORMS)
def test_a_repair_set_from_every_form(form):
    data = RepairData.of(FORMS[form], FORMS["numpy"], transform=Normalize(), classes=["a", "b", "c"])
    same = RepairData.of(*2 * [ImageSet(pixels(), LABELS, ("a", "b", "c"))], transform=Normalize())
    for part in ("failures", "train", "val", "val_failures"):
        assert torch.equal(getattr(data, part).images, getattr(same, part).images) and getattr(data, part).classes == ("a", "b", "c")
    assert len(RepairData.of(FORMS[form], FORMS["numpy"], FORMS["numpy"]).val) == 24


def test_gray_images_get_three_channels():
    gray = torch.arange(32, dtype=torch.uint8).view(2, 4, 4, 1)
    three = as_pixels(gray)
    assert three.shape == (2, 4, 4, 3) and torch.equal(three[..., 0], gray[..., 0]) and torch.equal(three[..., 0], three[..., 2])
    assert torch.equal(as_pixels(gray.permute(0, 3, 1, 2)), three) and torch.equal(as_pixels(gray.permute(0, 3, 1, 2) / 255), three)
    assert torch.equal(as_images(TensorDataset(gray[..., 0], torch.tensor([0, 1]))).images, three)


def test_sets_agree_on_their_classes():
    sets = as_sets({"failures": (pixels(3), [1, 0, 1]), "train": (pixels(), LABELS)})
    assert sets["failures"].classes == sets["train"].classes == ("0", "1", "2")
    assert as_sets({"failures": (pixels(3), [1, 0, 1]), "train": Photos()})["failures"].classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(("source", "message"), [
    ((pixels()[..., 0], LABELS), r"failures: images are uint8 \(24, 8, 8\)"), ((pixels()[0], LABELS), "images are uint8"),
    ((pixels().astype(np.int64), LABELS), "images are int64"), ((pixels(), LABELS[:5]), "one integer per image"),
    ((pixels(), LABELS + 0.5), "one integer per image"), ((pixels(), LABELS - 1), "labels run from -1"),
    ((torch.randn(24, 3, 8, 8), LABELS), r"float images run from .* expected 0 to 1: give them before normalization"),
    ((torch.full((2, 3, 8, 8), torch.nan), [0, 1]), "float images run from nan"),
    (pixels(), "failures are a ndarray; expected"), ("images.npz", "failures are a str; expected"),
    (None, "failures are a NoneType; expected"), (TensorDataset(torch.zeros(3, 3, 8, 8)), r"expected a pair \(image, label\)"),
    (TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0)), "is empty"),
    ([(pixels()[0], 0), (pixels()[1], 1), (pixels()[2], 1)], "failures are a list; expected"),
])
def test_what_cannot_be_taken_is_said_in_a_line(source, message):
    with pytest.raises(ArchrepairError, match=message) as error:
        RepairData.of(source, FORMS["numpy"])
    assert "\n" not in str(error.value)


def test_images_of_many_sizes_are_refused():
    class Mixed(Photos):
        def __getitem__(self, i):
            return Image.new("RGB", (8 + i % 2, 8)), 0

    with pytest.raises(ArchrepairError, match="item 1 is 8×9 px and item 0 is 8×8.*resize"):
        as_images(Mixed())


def test_other_data_is_refused_before_any_work(problem):
    for act in (lambda data: localize(problem.network, data),
                lambda data: ArchRepair(search_epochs=0).repair(problem.network, data),
                lambda data: archrepair.search(problem.network, "layer4", data),
                lambda data: archrepair.finetune(problem.network, data, where="layer4")):
        with pytest.raises(ArchrepairError, match=r"data is a Photos; expected RepairData: RepairData.of"):
            act(Photos())
