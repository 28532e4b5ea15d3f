"""Arrays, npz files, Datasets and transforms as they come out of people's code."""
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import transforms

from archrepair import ImageSet, Normalize, RepairData, load_dataset
from support.bring import Kind, Net, foggy, one_line, ordinary, repair
from support.finished import fails

FILES = Kind("npz files", "`--dataset npz:PATH`, or `load_dataset(\"npz:PATH\")`: PATH is a file, or a folder with train.npz and test.npz. "
                          "The arrays are images (uint8 N×H×W×3), labels and, optionally, classes.")
ARRAYS = Kind("Arrays and Datasets", "`RepairData.of(failures, train)`: pairs (images, labels) of tensors or numpy arrays, or Datasets of "
                                     "such pairs.")
TRANSFORMS = Kind("Transforms", "`RepairData.of(…, transform=…)`: what makes pixels the input of the network.")


# --- npz files

NAMES = ("cat", "dog", "owl")
LEVEL = {"cat": 10, "dog": 60, "owl": 200, "0": 10, "1": 60, "2": 200}  # the gray of a class, so that a picture tells what it shows


def write(path: str, labels, shown: list[str], side: tuple[int, int] = (8, 8), **arrays) -> None:
    images = np.stack([np.full((*side, 3), LEVEL[name], np.uint8) for name in shown])
    Path(path).parent.mkdir(exist_ok=True)
    np.savez(path, images=images, labels=labels, **arrays)


MATCHED = {
    "`classes` in another order in test.npz": ("matched by name", {"labels": [0, 1, 2], "classes": ["owl", "dog", "cat"]}),
    "labels that are names": ("matched by name", {"labels": ["owl", "dog", "cat"]}),
    "names as bytes": ("matched by name", {"labels": [b"owl", b"dog", b"cat"]}),
    "big-endian labels": ("taken", {"labels": np.array([2, 1, 0], ">u2"), "classes": NAMES}),
    "labels as a column": ("taken", {"labels": np.array([[2], [1], [0]]), "classes": NAMES}),
    "a class more, without images": ("left out", {"labels": [0, 1, 2], "classes": ["owl", "dog", "cat", "emu"]}),
}


@FILES.each("arrays", MATCHED)
def test_classes_of_two_files(here, arrays):
    write("n/train.npz", [0, 1, 2], ["cat", "dog", "owl"], classes=NAMES)
    write("n/test.npz", **arrays, shown=["owl", "dog", "cat"])
    for split in ("train", "test"):
        images = load_dataset("npz:n", split)
        assert images.classes == NAMES
        assert [LEVEL[images.classes[y]] for y in images.labels] == images.images[:, 0, 0, 0].tolist()


@FILES.works("numbers for labels, without `classes`", "the numbers, up to the highest in either file, are the classes")
def test_numbers(here):
    write("n/train.npz", [0, 1], ["0", "1"]), write("n/test.npz", [2, 0], ["2", "0"])
    images = load_dataset("npz:n", "test")
    assert images.classes == ("0", "1", "2") and images.labels.tolist() == [2, 0]


def save(**arrays) -> None:
    Path("n").mkdir()
    np.savez("n/train.npz", **arrays)


def two_files(*parts: dict) -> None:
    for split, part in zip(("train", "test"), parts):
        write(f"n/{split}.npz", **part)


REFUSED = {
    "train.npz and test.npz with images of two sizes": (
        "names both sizes, before any work",
        lambda: two_files(*({"labels": [0, 1], "shown": NAMES[:2], "side": (32, width)} for width in (48, 40))),
        "has images of 32×4[08] px and the file beside it of 32×4[08]; expected one size"),
    "a class in test.npz that train.npz lacks": (
        "names it and the others",
        lambda: two_files({"labels": [0, 1], "shown": NAMES[:2], "classes": NAMES[:2]}, {"labels": ["owl"], "shown": ["owl"]}),
        r"has images of owl, not among .*\(cat, dog\)"),
    "other names of arrays, such as `x_train`": (
        "names those that there are",
        lambda: save(x_train=np.zeros(3), y_train=np.zeros(3)), "n/train.npz: it has no array images but x_train, y_train"),
    "one array of `np.save` under the name of an npz file": (
        "says what it is", lambda: bare("n/train.npz"), "cannot read n/train.npz: it is one array without a name"),
    "a label of a billion": (
        "says it, and makes no list of a billion classes",
        lambda: write("n/train.npz", [0, 10**9], NAMES[:2]), "the highest label is 1000000000; expected the numbers of classes"),
    "labels that are NaN": (
        "says what is expected", lambda: write("n/train.npz", [0.0, np.nan], NAMES[:2]), "cannot read n/train.npz: .*NaN"),
    "labels below 0": (
        "says from where to where they run", lambda: write("n/train.npz", [-1, 1], NAMES[:2]), "labels run from -1 to 1; expected 0 to 1"),
    "float images, gray images, or channels first": (
        "says their type and shape, and what is expected",
        lambda: save(images=np.zeros((2, 3, 8, 8), np.uint8), labels=[0, 1]), r"images are uint8 \(2, 3, 8, 8\); expected uint8 N×H×W×3"),
    "Python objects": (
        "never unpickled", lambda: write("n/train.npz", np.array([{}, None]), NAMES[:2]), "cannot read n/train.npz: Object arrays"),
    "a file that promises terabytes": (
        "says so, without asking for them", lambda: promise("n/train.npz"), "cannot read n/train.npz: Unable to allocate"),
}


def bare(path: str) -> None:
    "One array, as `np.save` writes it."
    Path(path).parent.mkdir()
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def promise(path: str) -> None:
    "A file whose header speaks of 30 terabytes that are not there."
    Path(path).parent.mkdir()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 1000, 1000, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue())


@FILES.each("make, pattern", REFUSED, works=False)
def test_files_with_mistakes(here, capsys, make, pattern):
    make()
    with one_line(pattern):
        load_dataset("npz:n")
    assert fails(capsys, "repair", "--dataset", "npz:n", "--tier", "smoke", "--out", "r") and not Path("r").exists()


@FILES.one_line("fewer than five images in one file", "says that none could be kept for testing")
def test_too_few(here, capsys):
    write("n/few.npz", [0, 1], NAMES[:2], (32, 32))
    message = fails(capsys, "evaluate", "--dataset", "npz:n/few.npz", "--tier", "smoke")
    assert "npz:n/few.npz has 2 images, too few to keep a fifth" in message


# --- arrays

PIXELS = foggy().images.numpy()
LABELS = foggy().labels.numpy()
DIGITS = [f"digit {i}" for i in range(10)]

TAKEN = {
    "uint8 with channels first": ("taken", lambda: (PIXELS.transpose(0, 3, 1, 2), LABELS)),
    "floats from 0 to 1": ("taken, as multiples of 1/255", lambda: (PIXELS.transpose(0, 3, 1, 2) / 255, LABELS)),
    "big-endian floats": ("taken", lambda: ((PIXELS.transpose(0, 3, 1, 2) / 255).astype(">f4"), LABELS)),
    "images of one channel": ("the channel is taken three times", lambda: (PIXELS[..., :1], LABELS)),
    "labels of any integer type, unsigned or big-endian": ("taken", lambda: (PIXELS, LABELS.astype(">u2"))),
    "labels that are arrays of one number": ("taken", lambda: (PIXELS, [np.array([y]) for y in LABELS])),
    "labels that are names of `classes`": ("the places of the names", lambda: (PIXELS, [DIGITS[y] for y in LABELS])),
}


@ARRAYS.each("make", TAKEN)
def test_arrays(make):
    data = RepairData.of(make(), ordinary(), classes=DIGITS)
    expected = RepairData.of(foggy(), ordinary(), classes=DIGITS)
    assert torch.equal(data.failures.images, expected.failures.images) and data.failures.classes == tuple(DIGITS)
    assert data.failures.labels.tolist() == expected.failures.labels.tolist() and data.failures.labels.dtype == torch.int64


@ARRAYS.works("images turned from BGR to RGB by `[..., ::-1]`", "taken: torch itself refuses such arrays")
def test_negative_strides():
    bgr = PIXELS * np.array([0, 1, 2], np.uint8) // 2
    data = RepairData.of((bgr[..., ::-1], LABELS), (ordinary().images.numpy()[..., ::-1], ordinary().labels))
    assert torch.equal(data.failures.images, torch.from_numpy(bgr).flip(3)[data.failures.index])


class Items(Dataset):
    "Digits in fog, their labels changed."

    def __init__(self, label, classes: list[str] | None = None):
        self.label = label
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int):
        return PIXELS[i], self.label(int(LABELS[i]))


@ARRAYS.works("a Dataset whose labels are names of its `classes`", "matched by name with the training images")
def test_a_dataset_of_names():
    turned = DIGITS[::-1]
    train = ImageSet(ordinary().images, ordinary().labels, DIGITS)
    data = RepairData.of(Items(lambda y: DIGITS[y], turned), train)
    assert data.failures.classes == tuple(DIGITS)
    assert data.failures.labels.tolist() == RepairData.of(foggy(), ordinary()).failures.labels.tolist()


MISTAKES = {
    "classes that the training images do not have": (
        "names both lists", lambda: Items(lambda y: DIGITS[y], DIGITS), "images of digit 0, .*not among .*0, 1, 2"),
    "one-hot labels": (
        "says how to make numbers of them", lambda: Items(lambda y: F.one_hot(torch.tensor(y), 10)), r"labels.argmax\(1\)"),
    "labels that are None": (
        "names the first", lambda: Items(lambda y: None), "the label of item 0 is None; expected an integer or the name of a class"),
    "names without a list of classes": (
        "asks for the names", lambda: (PIXELS, [DIGITS[y] for y in LABELS]), "label 0 is 'digit .*the name of a class"),
    "images of another height than the training images": (
        "names both sizes, before any work",
        lambda: (PIXELS[:, :24], LABELS), "failures has images of 24×32 px but digits/train of 32 px; expected one size"),
    "images that were normalized": (
        "asks for pixels, and for the normalization as transform",
        lambda: (PIXELS.transpose(0, 3, 1, 2) / 127.5 - 1, LABELS), "float images run from -1 .*transform=Normalize"),
}


@ARRAYS.each("make, pattern", MISTAKES, works=False)
def test_arrays_with_mistakes(make, pattern):
    with one_line(pattern):
        RepairData.of(make(), ordinary())


@ARRAYS.one_line("failures 40 px wide and training images 32 px wide", "names both sizes, before any work")
def test_two_widths():
    scaled = lambda s, size: F.interpolate(s.images.permute(0, 3, 1, 2).float(), size).byte().permute(0, 2, 3, 1)
    with one_line("failures has images of 24×40 px but train of 24×32 px; expected one size"):
        RepairData.of((scaled(foggy(), (24, 40)), foggy().labels), (scaled(ordinary(), (24, 32)), ordinary().labels))


# --- transforms


def input_of(transform) -> torch.Tensor:
    "What a network would be given of the first failures."
    data = RepairData.of(foggy(), ordinary(), transform=transform)
    return data.transform(foggy().images[:3])


@TRANSFORMS.works("torchvision's `Compose([ToTensor(), Normalize(…)])`", "given one image at a time")
def test_stages_for_one_image():
    stages = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)])
    assert torch.allclose(input_of(stages), Normalize((0.5,) * 3, (0.25,) * 3)(foggy().images[:3]), atol=1e-6)
    data = RepairData.of(foggy(), ordinary(), transform=stages)
    assert repair(Net(), data).block in ("block1", "block2", "block3")


@TRANSFORMS.works("torchvision's v2 stages, for tensors", "given channels first")
def test_stages_for_tensors():
    from torchvision.transforms import v2

    stages = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)])
    assert torch.allclose(input_of(stages), Normalize((0.5,) * 3, (0.25,) * 3)(foggy().images[:3]), atol=1e-6)


@TRANSFORMS.one_line("torchvision's `Normalize` alone, or anything that is not a transform", "says what was tried, and what is expected")
@pytest.mark.parametrize(("transform", "pattern"), [
    (transforms.Normalize((0.5,) * 3, (0.25,) * 3), "transform Normalize makes no network input .*expected a callable"),
    (3, "transform is 3; expected a function"),
])
def test_what_is_not_a_transform(transform, pattern):
    with one_line(pattern):
        input_of(transform)
