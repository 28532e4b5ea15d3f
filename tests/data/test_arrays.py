"""Images as people have them: arrays, tensors and datasets become the same sets, and what cannot be taken is refused in one line."""
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

import archrepair
from archrepair import ArchRepair, Normalize, RepairData, localize
from archrepair.core.errors import ArchrepairError, Notice
from archrepair.data.arrays import as_images, as_labels, as_pixels, as_sets
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


def objects(items) -> np.ndarray:
    "A one-dimensional array of these objects, whatever they are."
    array = np.empty(len(items), object)
    array[:] = items
    return array


class Items(Dataset):
    "What `turn` makes of each image, with its label."
    classes = ["cat", "dog", "owl"]

    def __init__(self, turn):
        self.turn = turn

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return self.turn(pixels()[i]), i % 3


STAGES = {  # of torchvision, as they stand in people's datasets
    "ToTensor": transforms.ToTensor(), "PILToTensor": transforms.PILToTensor(),
    "PIL stages": transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8)]), "v2 image": v2.ToImage(),
    "v2 floats": v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
}
FORMS |= {
    "list of PIL images": ([Image.fromarray(image) for image in pixels()], LABELS),
    "palettes": ([Image.fromarray(image).quantize(256) for image in pixels()], LABELS),
    "list of arrays": (list(pixels()), LABELS), "array of arrays": (objects(list(pixels())), LABELS),
    "array of PIL images": (objects([Image.fromarray(image) for image in pixels()]), objects(LABELS.tolist())),
    "Series": (pd.Series(list(pixels())), pd.Series(LABELS)),
    "read-only": (np.frombuffer(pixels().tobytes(), np.uint8).reshape(24, 8, 8, 3), LABELS),
    "float16": ((pixels() / 255).astype(np.float16), LABELS),
    "bfloat16": (torch.from_numpy(pixels()).permute(0, 3, 1, 2).bfloat16() / 255, LABELS),
    "floats that overshoot": (pixels() / 255 * 1.0009 - 4e-4, LABELS), "data frame": (pixels(), pd.DataFrame({"label": LABELS})),
    "joined": ConcatDataset([Subset(Photos(), range(10)), Subset(Photos(), range(10, 24))]),
    **{name: Items(lambda image, stages=stages: stages(Image.fromarray(image))) for name, stages in STAGES.items()},
}
NAMED = ("PIL dataset", "subset", "joined", *STAGES)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form):
    images = as_images(FORMS[form])
    assert torch.equal(images.images, torch.from_numpy(pixels()))
    assert images.labels.tolist() == LABELS.tolist() and images.labels.dtype == torch.int64
    assert images.classes == (("cat", "dog", "owl") if form in NAMED else ("0", "1", "2"))


@pytest.mark.parametrize("form", FORMS)
def test_a_repair_set_from_every_form(form):
    data = RepairData.of(FORMS[form], FORMS["numpy"], transform=Normalize(), classes=["a", "b", "c"])
    same = RepairData.of(*2 * [ImageSet(pixels(), LABELS, ("a", "b", "c"))], transform=Normalize())
    for part in ("failures", "train", "val", "val_failures"):
        assert torch.equal(getattr(data, part).images, getattr(same, part).images) and getattr(data, part).classes == ("a", "b", "c")
    assert len(RepairData.of(FORMS[form], FORMS["numpy"], FORMS["numpy"]).val) == 24


@pytest.mark.parametrize("form", ["pair", "dataset", "unscaled v2"])
def test_floats_that_are_gray_levels_are_taken_and_said(form):
    levels = pixels().astype(np.float32)
    source = {"pair": (levels, LABELS), "dataset": Items(lambda image: image.astype(np.float64)),
              "unscaled v2": Items(v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]))}[form]
    with pytest.warns(Notice, match=f"{form}: float images beyond 1 are taken for gray levels from 0 to 255"):
        images = as_images(source, name=form)
    assert torch.equal(images.images, torch.from_numpy(pixels()))


def test_a_set_of_floats_has_one_range():
    with pytest.raises(ArchrepairError, match="some float images run to 1 and others beyond; expected one range"):
        as_images(Items(lambda image: image / 255.0 if image[0, 0, 0] > 100 else image.astype(float)))


def test_black_fits_every_range():
    with pytest.warns(Notice):
        images = as_images(Items(lambda image: image * (0.0 if image[0, 0, 0] > 100 else 1.0)), name="some black")
    kept = torch.from_numpy(pixels())[:, 0, 0, 0] <= 100
    assert torch.equal(images.images[kept], torch.from_numpy(pixels())[kept]) and not images.images[~kept].any()


def test_bools_are_black_and_white():
    images = as_images((pixels() > 127, LABELS)).images
    assert torch.equal(images, torch.from_numpy(pixels() > 127) * torch.tensor(255, dtype=torch.uint8))


def test_gray_images_get_three_channels():
    flat = as_pixels(pixels()[..., 0])
    assert flat.shape == (24, 8, 8, 3) and all(torch.equal(flat[..., c], torch.from_numpy(pixels()[..., 0])) for c in range(3))
    assert torch.equal(as_pixels(pixels()[..., 0] / 255), flat) and torch.equal(as_pixels(list(pixels()[..., 0])), flat)
    gray = torch.arange(32, dtype=torch.uint8).view(2, 4, 4, 1)
    three = as_pixels(gray)
    assert three.shape == (2, 4, 4, 3) and torch.equal(three[..., 0], gray[..., 0]) and torch.equal(three[..., 0], three[..., 2])
    assert torch.equal(as_pixels(gray.permute(0, 3, 1, 2)), three) and torch.equal(as_pixels(gray.permute(0, 3, 1, 2) / 255), three)
    assert torch.equal(as_images(TensorDataset(gray[..., 0], torch.tensor([0, 1]))).images, three)


def test_sets_agree_on_their_classes():
    sets = as_sets({"failures": (pixels(3), [1, 0, 1]), "train": (pixels(), LABELS)})
    assert sets["failures"].classes == sets["train"].classes == ("0", "1", "2")
    assert as_sets({"failures": (pixels(3), [1, 0, 1]), "train": Photos()})["failures"].classes == ("cat", "dog", "owl")


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return 3


@pytest.mark.parametrize(("source", "message"), [
    ((pixels()[0], LABELS), r"failures: images are uint8 \(8, 8, 3\), which looks like a single one"),
    ((pixels().astype(np.int64), LABELS), "images are int64"), ((pixels(), LABELS[:5]), "one integer per image"),
    ((pixels(), LABELS + 0.5), "one integer per image"), ((pixels(), LABELS - 1), "labels run from -1"),
    ((torch.randn(24, 3, 8, 8), LABELS), r"float images run from .* expected 0 to 1: give them before normalization"),
    ((torch.full((2, 3, 8, 8), torch.nan), [0, 1]), "float images run from nan"),
    (pixels(), "failures are a ndarray; expected"), ("images.npz", "failures are a str; expected"),
    ((pixels() / 127.5 - 1, LABELS), "float images run from -1 to 1"), ((pixels() / 170, LABELS), "float images run from 0 to 1.5"),
    ((pixels().astype(np.uint16), LABELS), r"images are uint16 .* by images.astype\('uint8'\)"),
    ((np.zeros((24, 8, 8, 4), np.uint8), LABELS), r"images are uint8 \(24, 8, 8, 4\); expected"),
    ([[pixels()[0], pixels()[0][:4]], [0, 1]], "item 1 is 4×8 px and item 0 is 8×8; expected one size"),
    (DataLoader(Photos()), "failures are a DataLoader; expected .* give its dataset, loader.dataset"),
    (Endless(), "failures are a Endless; expected .* give one with a length"),
    (Items(transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)])),
     r"failures, item 0: float images run from -2 to .*; expected 0 to 1: give them before normalization"),
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
                lambda data: ArchRepair(strategy="pc-darts", search_epochs=0).repair(problem.network, data),
                lambda data: archrepair.search(problem.network, "layer4", data),
                lambda data: archrepair.finetune(problem.network, data, where="layer4")):
        with pytest.raises(ArchrepairError, match=r"data is a Photos; expected RepairData: RepairData.of"):
            act(Photos())


# --- what arrays may be


@pytest.mark.parametrize("turn", [lambda a: a[..., ::-1][..., ::-1], lambda a: np.asfortranarray(a), lambda a: a[::-1].copy()[::-1],
                                  lambda a: (a / 255).astype(">f4"), lambda a: (a / 255).astype("<f8"), lambda a: a.tolist,
                                  lambda a: np.require(a, requirements="W")],
                         ids=["two reversals", "Fortran", "reversed", "big-endian floats", "doubles", "no array", "plain"])
def test_arrays_of_any_layout_have_the_same_pixels(turn):
    array = turn(pixels())
    if callable(array):
        with pytest.raises(ArchrepairError, match="images are a builtin_function_or_method that is no array of numbers"):
            as_pixels(array)
        return
    assert torch.equal(as_pixels(array), torch.from_numpy(pixels()))


def test_a_negative_stride_turns_bgr_to_rgb():
    assert torch.equal(as_pixels(pixels()[..., ::-1]), torch.from_numpy(pixels()).flip(3))


NAMES = ("owl", "cat", "dog")  # not in order of the alphabet
LABEL_FORMS = {
    **{kind: np.array([0, 2, 1], kind) for kind in ("u1", "<u2", ">u2", ">u4", "u8", ">i8", "<i2")}, "reversed": np.array([1, 2, 0])[::-1],
    "list": [0, 2, 1], "names": ["owl", "dog", "cat"], "array of names": np.array(["owl", "dog", "cat"]),
    "objects": np.array(["owl", "dog", "cat"], object), "bytes": np.array([b"owl", b"dog", b"cat"]), "N×1": np.array([[0], [2], [1]]),
    "arrays of one number": [np.array([0]), np.array([2]), np.array([1])], "tensors of one number": [torch.tensor(i) for i in (0, 2, 1)],
    "Series of names": pd.Series(["owl", "dog", "cat"]), "categories": pd.Categorical(["owl", "dog", "cat"]),
    "Series": pd.Series([0, 2, 1]), "array of numbers as objects": np.array([0, 2, 1], object),
    "array of tensors": objects([torch.tensor(i) for i in (0, 2, 1)]),
    "uint16 tensor": torch.tensor([0, 2, 1], dtype=torch.uint16), "int8 tensor": torch.tensor([0, 2, 1], dtype=torch.int8),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_of_every_form(form):
    labels = as_labels(LABEL_FORMS[form], NAMES)
    assert labels.tolist() == [0, 2, 1] and labels.dtype == torch.int64
    assert as_images((pixels(3), LABEL_FORMS[form]), NAMES).labels.tolist() == [0, 2, 1]

    class Items(Dataset):
        classes = NAMES

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return pixels(3)[i], LABEL_FORMS[form][i]

    assert as_images(Items()).labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize(("label", "message"), [
    (None, "the label of item 0 is None; expected an integer or the name of a class"),
    ([0, 1, 0], r"of one-hot rows .* labels.argmax\(1\)"),
    ("emu", "label 0 is 'emu'; expected an integer or the name of a class: the classes are owl, cat, dog"), (1.5, "labels are float64"),
    (torch.tensor([0.0, 1.0, 0.0]), r"of one-hot rows or probabilities, labels.argmax\(1\)"), (-1, "labels run from -1"),
    (3, "labels run from 3 to 3; expected 0 to 2"), ({"boxes": []}, "label 0 is"),
    ([], "the label of item 0 is"), ({}, "the label of item 0"),
])
def test_labels_that_are_none_are_said_in_a_line(label, message):
    class Items(Dataset):
        classes = NAMES

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return pixels(3)[i], label

    with pytest.raises(ArchrepairError, match=message) as caught:
        as_images(Items(), name="failures")
    assert "\n" not in str(caught.value)


def test_names_without_a_list_of_classes_ask_for_one():
    with pytest.raises(ArchrepairError, match=r"label 0 is 'cat'; .*give their names in order: classes=\[…\]"):
        as_images((pixels(2), ["cat", "dog"]))


# --- classes by name


class Named(Dataset):
    "Gray images whose level is twenty times their label; a dataset that sorts its classes in its own way."

    def __init__(self, classes, labels):
        self.classes, self.labels = classes, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return np.full((4, 4, 3), 20 * i, np.uint8), self.labels[i]


@pytest.mark.parametrize(("classes", "labels"), [
    (["dog", "cat", "owl"], [0, 2, 1]), (["dog", "owl"], [0, 1]), (["zebra", "cat", "dog", "owl"], [2, 3, 1]),
    (["cat", "dog", "owl"], [1, 2, 0]),
])
def test_failures_are_matched_with_the_training_images_by_name(classes, labels):
    train = Named(["cat", "dog", "owl"], [0, 1, 2])
    names = [classes[y] for y in labels]
    for failures in (Named(classes, labels), as_images(Named(classes, labels))):
        for order in (("train", "failures"), ("failures", "train")):
            sets = as_sets({name: {"failures": failures, "train": train}[name] for name in order})
            assert [sets["failures"].classes[y] for y in sets["failures"].labels] == names
            assert sets["failures"].classes == sets["train"].classes == ("cat", "dog", "owl")
    assert as_sets({"failures": failures, "train": train}, ["owl", "dog", "cat"])["train"].labels.tolist() == [2, 1, 0]


def test_a_class_that_the_training_images_lack_is_named():
    with pytest.raises(ArchrepairError, match=r"has images of emu, not among the classes it is matched with \(cat, dog\)"):
        RepairData.of(Named(["cat", "emu"], [0, 1]), Named(["cat", "dog"], [0, 1]))


@pytest.mark.parametrize("part", ["failures", "val", "val_failures"])
def test_the_parts_of_repair_data_are_matched_by_name(part):
    train = as_images(Named(["cat", "dog"], [0, 1, 0, 1]), name="train")
    other = as_images(Named(["dog", "cat"], [0, 1, 1]), name="other")
    parts = {"failures": train, "train": train, "val": train, "val_failures": train, part: other}
    data = RepairData(**parts, transform=Normalize())
    assert getattr(data, part).labels.tolist() == [1, 0, 0] and getattr(data, part).classes == ("cat", "dog")


def test_names_given_to_numbers_are_theirs():
    numbers = ImageSet(pixels(3), [0, 1, 2], ("0", "1", "2"))
    sets = as_sets({"failures": (pixels(2), ["dog", "owl"]), "train": numbers}, ["cat", "dog", "owl"])
    assert sets["train"].classes == ("cat", "dog", "owl") and sets["train"].labels.tolist() == [0, 1, 2]
    assert sets["failures"].labels.tolist() == [1, 2]


@pytest.mark.parametrize("sides", [(8, 6), (6, 8)])
def test_height_and_width_are_compared(sides):
    wide = (np.zeros((20, *sides, 3), np.uint8), np.arange(20) % 2)
    with pytest.raises(ArchrepairError, match=f"failures has images of {sides[0]}×{sides[1]} px but train of 8 px; expected one size"):
        RepairData.of(wide, (pixels(), np.arange(24) % 2))


def test_one_class_is_not_a_dataset():
    with pytest.raises(ArchrepairError, match=r"train has one class \(cat\); expected two or more"):
        RepairData.of((pixels(), np.zeros(24, int)), (pixels(), np.zeros(24, int)), classes=["cat"])


def test_names_are_found_through_subsets_and_joined_datasets():
    one, same, other = Named(["cat", "dog"], [0, 1]), Named(["cat", "dog"], [1, 0]), Named(["dog", "cat"], [0, 1])
    joined = Subset(Subset(ConcatDataset([one, same]), [0, 3]), [1, 0])
    images = as_images(joined)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 0]
    with pytest.raises(ArchrepairError, match=r"have other classes \(cat, dog and dog, cat\)"):
        as_images(ConcatDataset([one, other]))


@pytest.mark.parametrize(("image", "level"), [
    (Image.fromarray(np.full((4, 4), 9000, np.uint16)), 35), (Image.new("L", (4, 4), 35), 35), (Image.new("1", (4, 4), 1), 255),
    (Image.fromarray(np.full((4, 4), 0.5, np.float32)), None),
], ids=["16 bits", "8 bits", "1 bit", "float"])
def test_pil_images_of_any_depth(image, level):
    class Items(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return image, i

    if level is not None:
        assert as_images(Items()).images.unique().tolist() == [level]
        return
    with pytest.raises(ArchrepairError, match=r"item 0: the image has 32 bits per pixel \(mode F\).*expected 8 or 16 bits"):
        as_images(Items())
