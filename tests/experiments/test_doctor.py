"""The doctor names what a repair would stop at, all of it, and touches nothing; what it calls ready can be repaired."""
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import archrepair
import archrepair.experiments.checks as checks
import archrepair.experiments.originals as originals
from archrepair.core.errors import ArchrepairError
from archrepair.experiments.cells import Cell, repair_into
from archrepair.experiments.checks import Diagnosis
from archrepair.experiments.doctor import doctor
from archrepair.networks.models import create_model
from support.finished import DATASET, ORIGINAL, finished, furnish, tree
from support.pictures import pixels, save_tree, write_npz

LINES = ["software", "processor", "extras", "output", "cache", "method", "dataset", "classes", "pixels", "duplicates", "network", "layers",
         "weights", "normalization", "answers", "failures", "blocks", "localization", "time", "memory", "disk"]


@pytest.fixture
def untrained(monkeypatch):
    "Nothing is trained."
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))


@pytest.fixture
def trained(home, request):
    "A home with a finished repair, in which nothing more is trained."
    furnish(home)
    request.getfixturevalue("untrained")
    return home


@pytest.fixture
def photos(home, monkeypatch, untrained):
    "A divided folder of photos of three classes, as `folder:photos`."
    monkeypatch.chdir(home)
    save_tree(home / "photos" / "train", {"cat": 12, "dog": 12, "fox": 12}, (32, 32))
    save_tree(home / "photos" / "test", {"cat": 8, "dog": 8, "fox": 8}, (32, 32))
    for path in (home / "photos" / "test").rglob("*.png"):  # other bytes than those of the training images
        path.write_bytes(path.read_bytes() + b"\0")
    return home


def factory(folder: Path, code: str) -> str:
    "A module of the user's with a function `net`, and its name; each has a name of its own, since imports last."
    name = f"doctored_{abs(hash(code))}"
    (folder / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n\n\n{code}\n")
    return f"{name}:net"


def weights(n_classes: int, path: Path = Path("weights.pt"), **changes) -> Path:
    "Weights of an untrained network of the smoke tier, in a file."
    torch.save(create_model("resnet18", n_classes, width=0.125, stem_stride=2).state_dict() | changes, path)
    return path


def lines(diagnosis: Diagnosis, name: str) -> str:
    return "\n".join(f"{check.status}: {check.text}" for check in diagnosis.checks if check.name == name)


# --- what is right

def test_a_repair_that_can_start(photos):
    before = tree(photos)
    found = doctor("resnet18", "folder:photos", "smoke", weights=weights(3, photos / "weights.pt"), normalize="0.5/0.25")
    (photos / "weights.pt").unlink()
    assert tree(photos) == before, "something was written"
    assert found.ready and list(dict.fromkeys(check.name for check in found.checks)) == LINES
    assert lines(found, "dataset") == "ok: 36 training and 24 test images of 32 px, photos"
    assert lines(found, "classes") == "ok: 3 classes (cat, dog, fox), 12 training images of each"
    assert lines(found, "duplicates") == "ok: no test image is a training image"
    assert "0.18 million parameters" in lines(found, "network") and "takes 3×32×32" in lines(found, "network")
    assert lines(found, "weights") == "ok: weights.pt, all tensors fit"
    assert "of 24 images of folder:photos are right" in lines(found, "answers")
    assert "of the 12 test images that a repair may see are wrong" in lines(found, "failures")
    assert lines(found, "blocks") == "ok: 4 to choose from (layer1, layer2, layer3, layer4), all can be searched"
    assert "32 training images, " in lines(found, "time") and "5 epochs at the smoke tier" in lines(found, "time")


def test_the_doctor_takes_seconds(photos):
    started = time.process_time()
    doctor("resnet18", "folder:photos", "smoke", weights=weights(3))
    assert time.process_time() - started < 10


def test_it_agrees_with_the_repair(trained):
    "What the doctor says of accuracy and failures is what the repair finds; a finished folder is seen as such."
    found = doctor(dataset=DATASET, tier="smoke")
    record = archrepair.Record.read(finished() / "outputs" / "repair" / "record.json")
    assert found.ready and "trained by an earlier command" in lines(found, "weights")
    right = record.metrics["before"]["full"]
    accuracy = float(lines(found, "answers").split(" %")[0].split()[-1])
    assert abs(accuracy - right["accuracy"]) < 5, "a sample of 500 of the 597"
    given = record.metrics["images"]["failures"] + record.metrics["images"]["val_failures"]
    estimate = int(lines(found, "failures").split(" would be given")[0].split()[-1].replace(",", ""))
    assert abs(estimate - given) <= 0.5 * given
    assert "holds a repair already" in lines(found, "output")


@pytest.mark.parametrize("dataset", ["npz", "divided npz", "version", "absolute"])
def test_every_kind_of_dataset(photos, dataset):
    names = np.array(["a", "b"])
    write_npz(photos / "all.npz", images=pixels(40, 32), labels=np.arange(40) % 2, classes=names)
    (photos / "two").mkdir()
    write_npz(photos / "two" / "train.npz", images=pixels(20, 32), classes=names)
    write_npz(photos / "two" / "test.npz", images=pixels(20, 32, seed=1), classes=names)
    name, counts = {"npz": ("npz:all.npz", "32 training and 8 test images of 32 px, all.npz"),
                    "divided npz": ("npz:two", "20 training and 20 test images of 32 px, two"),
                    "version": ("folder:photos:fog:2", "36 training and 24 test images of 32 px, photos"),
                    "absolute": (f"folder:{photos / 'photos'}", "36 training and 24 test images of 32 px, photos")}[dataset]
    found = doctor("resnet18", name, "smoke")
    assert found.ready and lines(found, "dataset") == f"ok: {counts}"
    assert lines(found, "weights").startswith("note: none given and none in the cache: the network would be trained first, 6 epochs")


def test_a_dataset_that_is_not_there_is_not_downloaded(home, monkeypatch, untrained):
    monkeypatch.setattr("archrepair.data.datasets._download", lambda *a: pytest.fail("was downloaded"))
    monkeypatch.chdir(home)
    found = doctor("resnet18", "cifar10:fog:3", "lite")
    assert lines(found, "dataset") == "note: cifar10 is not in data/cifar10 and would be downloaded (170 MB)"
    assert lines(found, "network") == "note: not checked: needs training images" and found.ready
    assert not list(home.iterdir())
    assert "unknown model 'resnet19'" in lines(doctor("resnet19", "cifar10", "lite"), "network")


def test_a_network_that_brings_its_weights(photos):
    layers = "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)"
    model = factory(photos, f"def net(num_classes):\n    torch.manual_seed(1)\n    return nn.Sequential({layers})")
    found = doctor(model, "folder:photos", "smoke", normalize="none")
    assert found.ready and lines(found, "weights") == f"ok: those that {model} brings"
    assert lines(found, "normalization").startswith("ok: none, under which ")


def test_another_method(photos):
    found = doctor("resnet18", "folder:photos", "smoke", weights=weights(3), method="retrain:epochs=2", out=photos / "results")
    assert found.ready and lines(found, "method") == "ok: retrain at the smoke tier, epochs 2, protocol clean"
    assert not lines(found, "localization") and lines(found, "output") == "ok: results (to be made)"


# --- what is wrong

def extra_class(folder):
    save_tree(folder / "photos" / "test", {"wolf": 1}, (32, 32))


def no_class(folder):
    for path in (folder / "photos" / "test" / "dog").iterdir():
        path.unlink()


def broken_file(folder):
    (folder / "photos" / "train" / "cat" / "new.png").write_bytes(b"not a picture")


def larger(folder):
    for split in ("train", "test"):
        for name in ("cat", "dog", "fox"):
            save_tree(folder / "photos" / split, {name: 12}, (40, 40))


WRONG = {  # what is done to the folder, arguments of the doctor, the line that names it, its state and words
    "a class that only the test images have": (extra_class, {}, "dataset", "problem", "has images of wolf, not among those of"),
    "a class without test images": (no_class, {}, "classes", "note", "no test images of dog"),
    "a file that is not an image": (broken_file, {}, "dataset", "problem", "cannot decode"),
    "no such folder": (None, {"dataset": "folder:fotos"}, "dataset", "problem", "fotos does not exist"),
    "no such dataset": (None, {"dataset": "cifar11"}, "dataset", "problem", "did you mean 'cifar10'"),
    "a size that no corruption is made for": (larger, {"dataset": "folder:photos:fog:2"}, "dataset", "problem",
                                              "expected N×n×n×3 with n = 32, 64 or 224"),
    "no such corruption": (None, {"dataset": "folder:photos:smog:3"}, "dataset", "problem", "unknown corruption 'smog'"),
    "no such network": (None, {"model": "resnet19"}, "network", "problem", "did you mean 'resnet18'"),
    "weights of another number of classes": (None, {"weights": 5}, "weights", "problem", "fc.weight (5, 64) where (3, 64) is expected"),
    "no such weights": (None, {"weights": "lost.pt"}, "weights", "problem", "no weights at lost.pt"),
    "another normalization with nothing to normalize": (None, {"normalize": "imagenet"}, "weights", "problem", "--weights FILE"),
    "no such normalization": (None, {"weights": 3, "normalize": "0.5"}, "normalization", "problem", "normalize is '0.5'; expected cifar10"),
    "no such device": (None, {"device": "tpu"}, "processor", "problem", "unknown device 'tpu'"),
    "no such tier": (None, {"tier": "light"}, "tier", "problem", "did you mean 'lite'"),
    "no such protocol": (None, {"protocol": "dirty"}, "method", "problem", "unknown protocol 'dirty'"),
    "no such method": (None, {"method": "archrepare"}, "method", "problem", "did you mean 'archrepair'"),
    "no such option": (None, {"options": {"search_epoch": 3}}, "method", "problem", "did you mean 'search_epochs'"),
    "no such strategy": (None, {"options": {"strategy": "dart"}}, "method", "problem", "unknown strategy 'dart'"),
    "no such block": (None, {"block": "layer9"}, "blocks", "problem", "did you mean 'layer4'"),
    "no such candidate": (None, {"options": {"blocks": ("layer1", "stem")}}, "blocks", "problem", "unknown block 'stem'"),
    "a file in the way of the results": (None, {"out": "photos/train/cat/000.png"}, "output", "problem", "000.png is a file"),
    "few failures": (None, {"weights": 3}, "failures", "note", "below ten the verdict rests on ordinary images"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_what_is_wrong(photos, case):
    damage, arguments, name, status, words = WRONG[case]
    if damage:
        damage(photos)
    if isinstance(arguments.get("weights"), int):
        arguments = arguments | {"weights": weights(arguments["weights"])}
    found = doctor(**{"model": "resnet18", "dataset": "folder:photos", "tier": "smoke"} | arguments)
    named = [check for check in found.checks if check.name == name and check.status == status and words in check.text]
    assert len(named) == 1, str(found)
    assert found.ready == (status == "note") and found.problems == tuple(c for c in found.checks if c.status == "problem")
    assert all("\n" not in check.text for check in found.checks)


def test_no_room_on_the_disk(photos, monkeypatch):
    monkeypatch.setattr(checks, "free_disk", lambda place: 1_000_000)
    found = doctor("resnet18", "folder:photos", "smoke", weights=weights(3))
    assert [check.name for check in found.problems] == ["disk"] and "1.0 MB are free at ." in lines(found, "disk")


def test_all_problems_are_named(photos):
    found = doctor("resnet19", "folder:fotos", "smoke", device="tpu", protocol="dirty", weights="lost.pt", out="photos/train/cat/000.png")
    assert [check.name for check in found.problems] == ["processor", "output", "method", "dataset", "network", "weights"]
    assert found.verdict.startswith("not ready: 6 problems")


@pytest.mark.parametrize(("code", "words"), [
    ("def net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))",
     "gives outputs of shape (2,) for an image; expected 3 logits"),
    ("def net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))", "cannot take 32 px images"),
    ("def net(num_classes):\n    raise OSError('the license has expired')", "OSError: the license has expired"),
    ("class Thin(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n        self.fc = nn.Linear(3, n)\n\n"
     "    def forward(self, x):\n        return self.fc(x.mean((2, 3))).detach()\n\n\ndef net(num_classes):\n    return Thin(num_classes)",
     "a step of training fails (RuntimeError"),
], ids=["too-few-outputs", "another-size", "a-factory-that-fails", "no-gradients"])
def test_networks_that_cannot_be_repaired(photos, code, words):
    found = doctor(factory(photos, code), "folder:photos", "smoke")
    assert not found.ready and words in lines(found, "network") and lines(found, "network").startswith("problem: ")
    assert lines(found, "blocks").startswith("note: not checked: needs the network")


def test_the_wrong_normalization(trained):
    "The digits are gray between 0 and 1; a network that learned them as they are gets them wrong when they are shifted far."
    weights = finished() / ORIGINAL
    right = doctor("resnet18", "digits", "smoke", weights=weights)
    wrong = doctor("resnet18", "digits", "smoke", weights=weights, normalize="0.95/0.02")
    assert right.ready and lines(right, "normalization").startswith("ok: that of the dataset, under which ")
    assert [check.name for check in wrong.problems] == ["normalization"]
    text = lines(wrong, "normalization")
    assert text.startswith("problem: 0.95/0.02, under which ") and "; give --normalize " in text


# --- in Python

def test_it_is_a_value_with_words(photos):
    found = archrepair.doctor("resnet18", "folder:photos", "smoke", weights=weights(3))
    assert isinstance(found, archrepair.Diagnosis) and repr(found) == str(found)
    assert str(found).splitlines()[-1] == found.verdict and len(str(found).splitlines()) == len(found.checks) + 1
    assert found.to_dict() == {"ready": True, "verdict": found.verdict,
                               "checks": [{"name": c.name, "status": c.status, "text": c.text} for c in found.checks]}


def test_what_a_folder_leaves_out_is_said_each_time(photos):
    (photos / "photos" / "train" / "cat" / "notes.txt").touch()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = doctor("resnet18", "folder:photos", "smoke")
        assert "note: folder:photos: files left out: 1 .txt" in lines(found, "dataset")


def test_it_leaves_the_random_stream_alone(photos, quiet_stream):
    doctor("resnet18", "folder:photos:gaussian_noise:3", "smoke", weights=weights(3))


def test_ready_means_that_a_repair_starts(home, monkeypatch):
    monkeypatch.chdir(home)
    save_tree(home / "photos", {"cat": 30, "dog": 30}, (32, 32))
    path = weights(2)
    assert doctor("resnet18", "folder:photos", "smoke", weights=path).ready
    options = (("strategy", "pc-darts"), ("search_epochs", 1), ("finetune_epochs", 1))
    cell = Cell("archrepair", "resnet18", "folder:photos", tier="smoke", options=options)
    assert repair_into(cell, home / "out", weights=path, log=lambda line: None).repair["block"]
    assert not doctor("resnet18", "folder:photos", "smoke", weights=weights(4)).ready
    with pytest.raises(ArchrepairError):
        repair_into(cell, home / "other", weights=weights(4), log=lambda line: None)
