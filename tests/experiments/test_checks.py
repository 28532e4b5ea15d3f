"""One check, one line: its state and the numbers in its text, for what is right and for what is wrong."""
from pathlib import Path

import pytest
import torch
from torch import nn

import archrepair.experiments.checks as checks
from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import load_dataset
from archrepair.data.images import ImageSet, Normalize
from archrepair.experiments.checks import (
    Check,
    check_answers,
    check_blocks,
    check_classes,
    check_disk,
    check_duplicates,
    check_extras,
    check_failures,
    check_folder,
    check_layers,
    check_network,
    check_normalization,
    check_pixels,
    check_processor,
    check_software,
)
from archrepair.networks.blocks import block_names
from archrepair.networks.models import create_model
from support.nets import Net
from support.pictures import save_tree, tiny

CLASSES = ("cat", "dog", "fox")


def labelled(*labels: int) -> ImageSet:
    "Small images with these labels out of `CLASSES`."
    return tiny(len(labels), labels=torch.tensor(labels), classes=CLASSES)


# --- the machine

def test_the_machine_in_words():
    assert f"torch {torch.__version__}" in check_software().text
    assert f"{torch.get_num_threads()} is used" in check_processor("cpu").text
    with pytest.raises(ArchrepairError, match="unknown device 'tpu'"):
        check_processor("tpu")


def test_missing_extras_are_named_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name in ("timm", "onnx") else object())
    found = check_extras()
    assert found.status == "note" and "onnx (pip install 'archrepair[export]'); timm (pip install 'archrepair[timm]')" in found.text
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())
    assert check_extras().status == "ok"


def test_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_folder("output", tmp_path / "new" / "one") == Check("output", "ok", "new/one (to be made)")
    Path("file").touch()
    found = check_folder("output", Path("file", "inside"))
    assert found.status == "problem" and found.text == "file/inside cannot be used: file is a file; choose another folder"
    Path("done").mkdir()
    Path("done", "record.json").touch()
    assert check_folder("output", Path("done")).status == "note"
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    assert "no permission to write in done" in check_folder("output", Path("done", "x")).text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["done", "file", "record.json"], "something was written"


def test_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "free_disk", lambda folder: 5_000_000)
    assert check_disk(tmp_path, 4_000_000).status == "ok"
    full = check_disk(tmp_path, 6_000_000)
    assert full.status == "problem" and "about 6.0 MB will be written, 5.0 MB are free" in full.text


# --- the images

@pytest.mark.parametrize(("train", "test", "status", "words"), [
    ((0, 0, 1, 1, 2, 2), (0, 1, 2), "ok", "3 classes (cat, dog, fox), 2 training images of each"),
    ((0, 0, 1, 2, 2), (0, 1, 2), "ok", "from 1 (dog) to 2 (cat) training images each"),
    ((0, 1, 2), (0, 2), "note", "no test images of dog"),
    ((0, 0, 1), (0, 1), "note", "no training images of fox; no test images of fox"),
    ((0, *[1] * 11, *[2] * 5), (0, 1, 2), "note", "from 1 (cat) to 11 (dog) training images each"),
    ((1, 1, 1), (1,), "problem", "training images of one alone; expected two or more"),
])
def test_classes(train, test, status, words):
    found = check_classes(labelled(*train), labelled(*test))
    assert found.status == status and words in found.text


def test_pixels():
    color = tiny()
    assert check_pixels(color).text.startswith(f"from {int(color.images.min())} to {int(color.images.max())} of 0 to 255")
    assert check_pixels(color).text.endswith("in color")
    gray = tiny(images=color.images[..., :1].expand(-1, -1, -1, 3).contiguous())
    assert "gray" in check_pixels(gray).text and check_pixels(gray).status == "ok"
    black = check_pixels(tiny(images=(color.images > 99).to(torch.uint8)))
    assert black.status == "problem" and black.text.startswith("from 0 to 1 of 0 to 255, 1 on average")


def test_duplicates_in_memory():
    train, test = tiny(6), tiny(6).select(torch.tensor([4, 5]))
    assert check_duplicates(train.select(torch.arange(4)), test).status == "ok"
    assert check_duplicates(train, test).text.startswith("2 of 2 test images are training images as well, 0 of them under another label")
    contrary = ImageSet(test.images, 1 - test.labels, test.classes)
    assert "2 of them under another label" in check_duplicates(train, contrary).text


def test_duplicates_among_files(tmp_path):
    "Files are compared by their bytes, those of different length unread."
    save_tree(tmp_path / "photos" / "train", {"cat": 4, "dog": 4})
    save_tree(tmp_path / "photos" / "test", {"cat": 2, "dog": 1})
    train, test = (load_dataset(f"folder:{tmp_path / 'photos'}", split, lazy=True) for split in ("train", "test"))
    assert check_duplicates(train, test).text.startswith("3 of 3 test images")
    for path in (tmp_path / "photos" / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert check_duplicates(train, test).status == "ok"


# --- the answers

def test_answers_good_and_bad():
    labels = torch.tensor([0, 1, 2, 0])
    right = nn.functional.one_hot(labels, 3) * 5.0 - 1
    assert check_answers(right, labels, CLASSES, "photos") == Check("answers", "ok", "100.0 % of 4 images of photos are right")
    constant = check_answers(torch.tensor([[0.0, 3.0, 0.0]] * 4), labels, CLASSES, "photos")
    assert constant.status == "note" and "25.0 %" in constant.text and "4 answers are dog" in constant.text
    assert "hardly better than guessing (33.3 %)" in constant.text
    probable = check_answers(right.softmax(1), labels, CLASSES, "photos")
    assert probable.status == "note" and "take the softmax out" in probable.text
    broken = check_answers(torch.where(right == right.max(), torch.nan, right), labels, CLASSES, "photos")
    assert broken.status == "problem" and broken.text.startswith("4 of 4 outputs on photos are not finite")


class Bright(nn.Module):
    "Right (dog: bright, cat: dark) where its input is in [0, 1]; else it answers `otherwise`."

    def __init__(self, otherwise: int):
        super().__init__()
        self.threshold, self.otherwise = nn.Parameter(torch.tensor(0.5)), otherwise

    def forward(self, x):
        bright = (x.mean((1, 2, 3)) > self.threshold).long()
        expected = (x >= 0).all() and (x <= 1).all()
        return nn.functional.one_hot(bright if expected else torch.full_like(bright, self.otherwise), 2).float()


@pytest.mark.parametrize(("dark", "status", "words"), [
    (60, "problem", "0.5/0.25, under which 25.0 % of 80 images are right, and 100.0 % under none; give --normalize none"),
    (20, "note", "75.0 % of 80 images are right, and 100.0 % under none: is that the one"),
    (0, "ok", "under which 100.0 % of 80 images are right"),
])
def test_another_normalization(dark, status, words):
    bright = torch.arange(80) >= dark
    pixels = torch.where(bright, 250, 5).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).contiguous()
    images = ImageSet(pixels, bright.long(), ("cat", "dog"))
    found = check_normalization(Bright(otherwise=1), images, Normalize((0.5,) * 3, (0.25,) * 3), "0.5/0.25")
    assert found.status == status and words in found.text


def test_failures_are_counted_exactly_or_estimated():
    test = tiny(400)
    half = torch.arange(400) % 2 == 0  # wrong on every other image
    check, count = check_failures(half, test, "paper", 0, 1000)
    assert check.status == "ok" and count == 200 and check.text.startswith("200 of the 400 test images that a repair may see are wrong")
    check, count = check_failures(half[:100], test, "clean", 0, 1000)
    assert count == 100 and check.text.startswith("about 100 of the 200 test images")
    check, count = check_failures(half, test, "paper", 0, 30)
    assert count == 30 and check.status == "note" and "30 would be given to it, 3 of them for validation" in check.text
    check, count = check_failures(half | True, test, "clean", 0, 1000)
    assert check.status == "problem" and count == 0 and check.text.startswith("none of the 200 test images that a repair may see is wrong")
    assert check_failures((half | True)[:50], test, "clean", 0, 1000)[0].status == "note", "a sample may have missed them"


# --- the network

def test_a_network_in_words():
    network = create_model("resnet18", 3, width=0.125).eval()
    found = check_network(network, torch.zeros(2, 3, 32, 32), CLASSES, "resnet18")
    assert found.text.startswith("resnet18: 0.18 million parameters (0.7 MB), float32; takes 3×32×32, returns a tensor 3, for 3 classes")


def test_unusual_layers_are_named():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert check_layers(plain) == Check("layers", "ok", "nothing unusual")
    plain[0] = torch.nn.utils.parametrizations.weight_norm(plain[0])
    plain[0].bias.requires_grad_(False)
    plain.eval()[1].train()
    found = check_layers(plain)
    assert found.status == "note" and found.text.split("; ") == [
        "weights computed from other parameters: 0", "frozen, though a repair may change them: 0.bias",
        "in train mode even when the network is evaluated: 1"]


def test_blocks_that_can_be_searched_and_others(untouched):
    with untouched(create_model("resnet18", 3, width=0.125).eval()) as network:
        x = torch.rand(2, 3, 32, 32)
        found = check_blocks(network, x, block_names(network))
        assert found == Check("blocks", "ok", "4 to choose from (layer1, layer2, layer3, layer4), all can be searched")
        mixed = check_blocks(network, x, ["layer1", "fc"])
        assert mixed.status == "note" and "weights alone can be repaired in 1 (fc), e.g. in fc: cannot relax Linear" in mixed.text
        with pytest.raises(ArchrepairError, match="unknown block 'layer9'"):
            check_blocks(network, x, ["layer9"])
        assert check_blocks(network, x, ["layer2"]) == Check("blocks", "ok", "layer2 can be searched")
        assert check_blocks(network, x, block_names(network), seconds=-1).text.endswith("4 were not looked at")


def test_a_block_that_never_runs():
    net = Net()
    net.spare = nn.Sequential(nn.Conv2d(3, 3, 1))
    found = check_blocks(net.eval(), torch.rand(2, 3, 8, 8), ["stem", "spare"])
    assert found.status == "note" and "1 (spare), e.g. in spare: it does not run on one tensor" in found.text
