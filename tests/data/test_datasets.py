"""From a name to a set of images: names, digits, ImageNet, caches and downloads."""
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from archrepair.core.errors import ArchrepairError
from archrepair.core.names import parse_version
from archrepair.data import datasets
from archrepair.data.datasets import fingerprint, load_dataset
from archrepair.data.files import read_arrays
from archrepair.data.images import STATISTICS, Normalize
from support.pictures import pixels, save_tree, write_npz

# --- names


@pytest.mark.parametrize("name", ["cifar11", "folder:", "npz:", "digits:nothing:3", "digits:fog:9", "cifar10:a:b:3", ""])
def test_unknown_datasets(home, name):
    with pytest.raises(ArchrepairError) as caught:
        load_dataset(name, download=False)
    assert "\n" not in str(caught.value)


def test_unknown_split():
    with pytest.raises(ArchrepairError, match="unknown split 'val'"):
        load_dataset("digits", "val")


# --- digits


def test_digits_are_deterministic_disjoint_and_complete(digits, digits_test):
    from sklearn.datasets import load_digits

    again = load_dataset("digits", "train")
    assert torch.equal(again.images, digits.images) and torch.equal(again.labels, digits.labels)
    assert (len(digits), len(digits_test), digits.size) == (1200, 597, 32) and digits.images.dtype == torch.uint8
    both = torch.cat([digits.labels, digits_test.labels]).bincount()
    assert both.tolist() == np.bincount(load_digits().target).tolist()
    shrink = lambda s: s.images[..., 0].float().reshape(len(s), 8, 4, 8, 4).mean((2, 4))  # back to 8×8, roughly
    raw = torch.from_numpy(load_digits().images).float() * 255 / 16
    nearest = torch.cdist(shrink(digits_test).flatten(1), raw.flatten(1)).argmin(1)
    assert (torch.from_numpy(load_digits().target)[nearest] == digits_test.labels).float().mean() > 0.99


def test_corrupted_digits_keep_labels_and_order(digits_test):
    noisy = load_dataset("digits:gaussian_noise:3", "test")
    assert torch.equal(noisy.labels, digits_test.labels) and torch.equal(noisy.index, digits_test.index)
    assert not torch.equal(noisy.images, digits_test.images) and noisy.name == "digits:gaussian_noise:3/test"
    assert torch.equal(noisy.images, load_dataset("digits:gaussian_noise:3", "test").images)


# --- ImageNet


def test_imagenet_says_where_its_images_belong(home):
    with pytest.raises(ArchrepairError, match="imagenet"):
        load_dataset("imagenet")
    save_tree(home / "data" / "imagenet" / "val", {"n01": 1}, (50, 40))
    assert load_dataset("imagenet", "test").size == 224
    with pytest.raises(ArchrepairError, match="train/<wnid>"):
        load_dataset("imagenet", "train")


# --- caches


def test_a_cache_in_the_projects_data_folder_is_found(home):
    (home / "data" / "cifar10").mkdir(parents=True)
    write_npz(home / "data" / "cifar10" / "test.npz", classes=np.array(["a", "b"]))
    images = load_dataset("cifar10", "test", download=False)
    assert len(images) == 20 and images.name == "cifar10/test" and images.classes == ("a", "b")
    assert Normalize.of(images) == Normalize(*STATISTICS["cifar10"])


def test_an_absent_cache_without_network_names_the_file(home, monkeypatch):
    target = str(home / "data" / "cifar10" / "test.npz")
    with pytest.raises(ArchrepairError) as caught:
        load_dataset("cifar10", "test", download=False)
    assert target in str(caught.value) and "\n" not in str(caught.value)
    for error in (urllib.error.URLError("Name or service not known"), RuntimeError("File not found or corrupted.\nmore"), OSError()):
        monkeypatch.setattr(datasets, "_download", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ArchrepairError) as caught:
            load_dataset("cifar10", "test")
        assert target in str(caught.value) and "\n" not in str(caught.value)


def test_a_download_writes_both_caches_once(home, monkeypatch):
    import torchvision.datasets

    calls = []

    class Fake:
        def __init__(self, root, train, download):
            calls.append(train)
            self.data, self.targets, self.classes = pixels(4 if train else 2, seed=train), [1, 0, 1, 0][:4 if train else 2], ["x", "y"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    test = load_dataset("cifar100", "test")
    train = load_dataset("cifar100", "train")
    assert sorted(calls) == [False, True] and len(train) == 4 and torch.equal(test.images, torch.from_numpy(pixels(2, seed=0)))
    with np.load(home / "data" / "cifar100" / "train.npz") as arrays:
        assert {k: arrays[k].dtype.kind for k in arrays} == {"images": "u", "labels": "i", "classes": "U"}


def test_the_official_tiny_imagenet_tree_is_packed(tmp_path):
    source = tmp_path / "tiny-imagenet-200"
    for wnid, n in (("n2", 2), ("n1", 1)):
        save_tree(source / "train" / wnid, {"images": n}, (64, 64))
        for file in (source / "train" / wnid / "images").glob("*.png"):
            file.rename(file.with_suffix(".JPEG"))
    save_tree(source / "val", {"images": 2}, (64, 64))
    (source / "wnids.txt").write_text("n2\nn1\n")
    (source / "val" / "val_annotations.txt").write_text("001.png\tn1\t0\t0\t9\t9\n000.png\tn2\t0\t0\t9\t9\n")
    datasets._pack_tiny(source, tmp_path)
    train, test = (read_arrays(tmp_path / f"{s}.npz", "tiny") for s in ("train", "test"))
    assert train.classes == ("n1", "n2") and train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1]
    assert torch.equal(test.images[0], torch.from_numpy(np.array(Image.open(source / "val" / "images" / "001.png"))))


# --- one's own data by name


@pytest.mark.parametrize("name", ["a,b", "a:b", "12:30:5", "fog:fog:3", "my photos", "photos#1", "ünï"])
def test_folders_of_any_name(tmp_path, monkeypatch, name):
    save_tree(tmp_path / name, {"cat": 5, "dog": 5}, (32, 32))
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        images, foggy = load_dataset(f"folder:{path}", "train"), load_dataset(f"folder:{path}:fog:3", "train")
        assert len(images) == len(foggy) == 8 and not torch.equal(images.images, foggy.images)
        assert parse_version(f"folder:{path}:fog:3") == (f"folder:{path}", "fog", 3)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tree(tmp_path / "photos", {"cat": 5, "dog": 5})
    assert len(load_dataset("folder:~/photos", "train")) == 8 and fingerprint("folder:~/photos") == fingerprint(f"folder:{tmp_path}/photos")


def test_a_fingerprint_is_that_of_the_content(tmp_path):
    for place in ("here", "there"):
        save_tree(tmp_path / place / "photos", {"cat": 2, "dog": 2})
    here, there = (f"folder:{tmp_path}/{place}/photos" for place in ("here", "there"))
    assert fingerprint(here) == fingerprint(there) == fingerprint(f"{there}:fog:3")
    Image.new("RGB", (8, 8)).save(tmp_path / "there" / "photos" / "cat" / "000.png")
    assert fingerprint(here) != fingerprint(there)
    assert fingerprint("digits") is fingerprint("cifar10:fog:3") is fingerprint("folder:/nowhere") is None


def test_imagenets_validation_images_have_the_classes_of_its_training_images(home):
    for split, classes in (("train", ("n01", "n02", "n03")), ("val", ("n02", "n03"))):
        save_tree(home / "data" / "imagenet" / split, {name: 1 for name in classes}, (50, 40))
    test = load_dataset("imagenet", "test")
    assert test.classes == ("n01", "n02", "n03") and test.labels.tolist() == [1, 2]
