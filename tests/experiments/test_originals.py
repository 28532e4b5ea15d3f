"""An original is trained once and found again; its training resumes; devices and places are what was asked for."""
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import archrepair.experiments.originals as originals
from archrepair.core.errors import ArchrepairError
from archrepair.core.tiers import TIERS
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize
from archrepair.experiments.originals import accuracy_of, normalization, original, slug, weights_of, write_version
from support.finished import ORIGINAL, finished, furnish, tree


def test_the_original_is_trained_once(home, monkeypatch):
    furnish(home, repaired=False)
    before = tree(home)
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))
    unrepaired = original(tier="smoke")
    assert unrepaired.path == home / ORIGINAL and not unrepaired.network.training and tree(home) == before
    monkeypatch.setattr(originals, "train_original", lambda network, *a, **k: network.fc.bias.data.fill_(7))
    original(tier="smoke", force=True)
    assert load_file(home / ORIGINAL)["fc.bias"].eq(7).all() and tree(home).keys() == before.keys()


def test_the_training_of_an_original_resumes(home, monkeypatch):
    from archrepair.training import fit as training

    save, saved = training._save, []

    def interrupted(path, *more):
        save(path, *more)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        original(tier="smoke")
    assert saved[1].exists() and not (home / ORIGINAL).exists()
    original(tier="smoke")
    assert len(saved) == TIERS["smoke"].train_epochs  # none was trained twice
    assert (home / ORIGINAL).read_bytes() == (finished() / ORIGINAL).read_bytes()
    assert [path.name for path in saved[0].parent.iterdir()] == [ORIGINAL.name]


@pytest.mark.parametrize("device", ["cpu:x", "tpu9", "meta", "mps", "cuda:99"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ArchrepairError, match="device") as error:
        originals.pick_device(device)
    assert "\n" not in str(error.value)
    assert originals.pick_device("cpu").type == "cpu"


def test_all_versions_of_a_dataset_share_one_original():
    paths = {weights_of("resnet18", name, "smoke", 0, Path("o")).as_posix() for name in ("digits", "digits:fog:3", "digits:snow:5")}
    assert paths == {"o/smoke/originals/digits-resnet18-s0.safetensors"}


def test_names_of_files_hold_no_path():
    names = [slug(name) for name in ("npz:/a/b.npz", "npz:/c/b.npz", "timm:vit_tiny", "folder:/a/b")]
    assert len(set(names)) == 4 and not any(set(name) & set("/:") for name in names)


def test_accuracy_of_a_version_is_that_of_its_images(home):
    furnish(home, repaired=False)
    unrepaired = original(tier="smoke")
    clean, fog = (accuracy_of(unrepaired, name) for name in ("digits", "digits:fog:3"))
    assert clean.n == fog.n == 597 and clean.accuracy > fog.accuracy  # an easy and a hard version, for a network that was trained


def test_a_version_is_written_in_test_order(tmp_path):
    write_version("digits:fog:3", tmp_path / "fog", limit=7)
    expected = load_dataset("digits:fog:3", "test")
    with np.load(tmp_path / "fog") as file:
        assert np.array_equal(file["images"], expected.images[:7].numpy()) and file["labels"].tolist() == expected.labels[:7].tolist()
        assert tuple(file["classes"]) == expected.classes
    with pytest.raises(ArchrepairError, match="limit is 0"):
        write_version("digits", tmp_path / "none", limit=0)


@pytest.mark.parametrize(("name", "mean", "std"), [
    ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ("0.5/0.25", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), ("0.1,0.2,0.3/1,2,3", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
])
def test_normalizations_by_name_and_by_numbers(name, mean, std):
    assert normalization(name, load_dataset("digits", "test")) == Normalize(mean, std)


@pytest.mark.parametrize("name", ["imagnet", "", "0.5", "0.5/0", "0.5/-1", "nan/1", "0.1,0.2/0.3", "a/b", "1/2/3"])
def test_other_normalizations_are_one_line(name):
    with pytest.raises(ArchrepairError, match="expected cifar10, cifar100, tiny-imagenet, imagenet, none, or MEAN/STD"):
        normalization(name, load_dataset("digits", "test"))


def test_a_normalization_is_for_weights_from_elsewhere(home):
    furnish(home, repaired=False)
    with pytest.raises(ArchrepairError, match="expected weights of yours beside it: --weights FILE"):
        original(tier="smoke", normalize="imagenet")
    usual = original(tier="smoke")
    same = original(tier="smoke", weights=home / ORIGINAL, normalize="/".join(",".join(map(str, part)) for part in (
        usual.transform.mean, usual.transform.std)))
    assert same.transform == usual.transform and accuracy_of(same, "digits") == accuracy_of(usual, "digits")
    assert original(tier="smoke", weights=home / ORIGINAL, normalize="none").transform == Normalize((0.0,) * 3, (1.0,) * 3)
