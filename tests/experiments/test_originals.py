"""An original is trained once and found again; its training resumes; devices and places are what was asked for."""
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import archrepair.experiments.originals as originals
from archrepair.core.errors import ArchrepairError, Notice, note_once
from archrepair.core.tiers import TIERS
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize, normalization
from archrepair.data.transforms import ToChannels
from archrepair.experiments.cells import Cell
from archrepair.experiments.originals import Original, accuracy_of, original, slug, weights_of, write_version
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

    def interrupted(run, path):
        save(run, path)
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


# --- data of one's own


class Gray(nn.Module):
    "A network that knows the gray level of every class."

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels))

    def forward(self, images):
        return -(images.mean((1, 2, 3))[:, None] - self.levels / 255).abs()


def _gray_photos(root: Path, parts: dict[str, dict[str, int]], size: int = 8, copies: int = 3) -> Path:
    for part, levels in parts.items():
        for name, level in levels.items():
            (root / part / name).mkdir(parents=True)
            for i in range(copies):
                Image.new("RGB", (size, size), (level,) * 3).save(root / part / name / f"{i}.png")
    return root


def _knowing(dataset: str, levels) -> Original:
    return Original(Gray([float(level) for level in levels]), dataset, load_dataset(dataset, "train"), Normalize((0.0,) * 3, (1.0,) * 3),
                    TIERS["smoke"], Path("none"))


@pytest.mark.parametrize("missing", ["cat", "dog", "owl", None])
def test_the_accuracy_does_not_hang_on_which_classes_are_tested(tmp_path, missing):
    levels = {"cat": 10, "dog": 100, "owl": 240}
    root = _gray_photos(tmp_path, {"train": levels, "test": {name: level for name, level in levels.items() if name != missing}})
    score = accuracy_of(_knowing(f"folder:{root}", levels.values()), f"folder:{root}")
    assert (score.accuracy, score.n) == (100, 6 if missing else 9)


def test_npz_files_in_another_order_have_the_same_accuracy(tmp_path):
    images = np.repeat(np.array([10, 100, 240], np.uint8), 4)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.repeat([0, 1, 2], 4), classes=["cat", "dog", "owl"])
    np.savez(tmp_path / "test.npz", images=images, labels=np.repeat([1, 2, 0], 4), classes=["owl", "cat", "dog"])
    assert accuracy_of(_knowing(f"npz:{tmp_path}", (10, 100, 240)), f"npz:{tmp_path}").accuracy == 100


def test_a_network_is_judged_on_another_folder_with_its_own_classes_and_size(tmp_path):
    levels = {"cat": 10, "dog": 100, "owl": 240}
    _gray_photos(tmp_path / "a", {"train": levels, "test": levels})
    _gray_photos(tmp_path / "b", {"train": {"owl": 240, "dog": 100}, "test": {"owl": 240, "dog": 100}}, size=300)
    _gray_photos(tmp_path / "c", {"train": {"owl": 240, "emu": 100}, "test": {"owl": 240, "emu": 100}})
    network = _knowing(f"folder:{tmp_path}/a", levels.values())
    seen = []
    network.network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    assert accuracy_of(network, f"folder:{tmp_path}/b").accuracy == 100 and set(seen) == {(8, 8)}
    with pytest.raises(ArchrepairError, match=r"has images of emu, not among the classes it is matched with \(cat, dog, owl\)"):
        accuracy_of(network, f"folder:{tmp_path}/c")


def test_two_folders_of_one_name_have_two_originals(tmp_path, home, monkeypatch):
    "The second is trained on what lies there, and a copy of the first is recognized."
    trained = []
    monkeypatch.setattr(originals, "train_original", lambda network, images, *a, **k: trained.append(int(images.images.float().mean())))
    levels = {"a": {"cat": 10, "dog": 100}, "b": {"cat": 240, "dog": 50}, "copy": {"cat": 10, "dog": 100}}
    paths = {}
    for place, part in levels.items():
        (tmp_path / place).mkdir()
        _gray_photos(tmp_path / place / "photos", {"train": part, "test": part}, copies=10)
        monkeypatch.chdir(tmp_path / place)
        paths[place] = original(dataset="folder:photos", tier="smoke").path
    assert trained == [55, 145] and paths["a"] == paths["copy"] != paths["b"]
    assert Cell(dataset="folder:photos", tier="smoke").path() != Cell(dataset=f"folder:{tmp_path}/b/photos", tier="smoke").path()


def test_names_of_published_datasets_keep_their_files():
    assert [slug(name) for name in ("cifar10", "cifar10:fog:3", "timm:resnet18", "package.module:factory")] == [
        "cifar10", "cifar10~fog~3", "timm~resnet18", "package.module~factory"]


def test_one_class_is_refused_before_training(tmp_path, home, monkeypatch):
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))
    _gray_photos(tmp_path, {"train": {"cat": 10}, "test": {"cat": 10}})
    with pytest.raises(ArchrepairError, match=r"has training images of one class \(cat\); expected two or more"):
        original(dataset=f"folder:{tmp_path}", tier="smoke")


# --- normalization

@pytest.mark.parametrize(("name", "mean", "std"), [
    ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ("0.5/0.25", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), ("0.1,0.2,0.3/1,2,3", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
])
def test_normalizations_by_name_and_by_numbers(name, mean, std):
    assert normalization(name, load_dataset("digits", "test")) == Normalize(mean, std)


@pytest.mark.parametrize("name", ["imagnet", "", "0.5", "0.5/0", "0.5/-1", "nan/1", "0.1,0.2/0.3", "a/b", "1/2/3"])
def test_other_normalizations_are_one_line(name):
    with pytest.raises(ArchrepairError, match="expected cifar10, cifar100, tiny-imagenet, imagenet, none, dataset"):
        normalization(name, load_dataset("digits", "test"))


def test_a_normalization_is_for_weights_from_elsewhere(home):
    furnish(home, repaired=False)
    with pytest.raises(ArchrepairError, match="expected your own weights with it: --weights FILE"):
        original(tier="smoke", normalize="imagenet")
    usual = original(tier="smoke")
    same = original(tier="smoke", weights=home / ORIGINAL, normalize="/".join(",".join(map(str, part)) for part in (
        usual.transform.mean, usual.transform.std)))
    assert same.transform == usual.transform and accuracy_of(same, "digits") == accuracy_of(usual, "digits")
    assert original(tier="smoke", weights=home / ORIGINAL, normalize="none").transform == Normalize((0.0,) * 3, (1.0,) * 3)


def test_a_wrong_normalization_of_weights_from_elsewhere_is_said(home):
    furnish(home, repaired=False)
    note_once.cache_clear()
    with pytest.warns(Notice, match=r"by 3.0/0.01 the network is right on \d+ % of 400 images .*: if it was trained that way") as caught:
        original(tier="smoke", weights=home / ORIGINAL, normalize="3/0.01")
    assert sum("normalized by" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        original(tier="smoke", weights=home / ORIGINAL)


# --- networks from elsewhere


GRAY = """
import torch
from torch import nn

def net(num_classes, channels=1):
    body = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def configured(num_classes):
    network = net(num_classes, 3)
    network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return network

def pretrained(pretrained=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5 if pretrained else torch.seed())
        return configured(12)
"""


@pytest.fixture
def elsewhere(home, monkeypatch):
    "A project with a module and a repository of torch.hub, where nothing is trained."
    for name in ("graynet.py", "hubconf.py"):
        (home / name).write_text(GRAY)
    monkeypatch.chdir(home)
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: None)
    monkeypatch.delitem(sys.modules, "graynet", raising=False)
    return home


@pytest.mark.parametrize("weights", [None, "gray.pt"])
def test_a_gray_network_gets_one_channel_trained_here_or_not(elsewhere, weights):
    import archrepair

    if weights:
        torch.save(archrepair.create_model("graynet:net", 10).state_dict(), weights)
    unrepaired = original("graynet:net", "digits", "smoke", weights=weights)
    assert unrepaired.transform == ToChannels(Normalize.of(unrepaired.train), 1)
    assert accuracy_of(unrepaired, "digits").n == 597


@pytest.mark.parametrize(("normalize", "expected", "configured"), [
    (None, "0.5/0.5", "0.5/0.5"), ("none", "none", ""), ("dataset", "dataset", ""),
])
def test_the_normalization_of_weights_is_the_networks_own_unless_another_is_asked_for(elsewhere, normalize, expected, configured):
    import archrepair

    torch.save(archrepair.create_model("graynet:configured", 10).state_dict(), "w.pt")
    unrepaired = original("graynet:configured", "digits", "smoke", weights="w.pt", normalize=normalize)
    assert unrepaired.transform == normalization(expected, unrepaired.train)
    assert (unrepaired.normalize, unrepaired.configured) == (normalize or "", configured)
    trained_here = original("graynet:configured", "digits", "smoke")
    assert trained_here.transform == Normalize.of(trained_here.train) and not trained_here.configured


def test_a_hub_network_comes_with_the_weights_that_it_publishes(elsewhere):
    name = f"hub:{elsewhere}:pretrained"
    with pytest.raises(ArchrepairError, match="if you trust it, say so"):
        original(name, "digits", "smoke", weights="published")
    one = original(name, "digits", "smoke", weights="published", trust=True)
    other = original(f"{name}:weights=published;trust=yes", "digits", "smoke", seed=0)
    assert one.path == other.path and one.path.stem.endswith("-published") and one.path.exists()
    assert torch.equal(one.network[3].weight, other.network[3].weight) and one.configured == "0.5/0.5"
    assert accuracy_of(one, "digits").n == 597  # its twelve outputs are said, and do


@pytest.mark.parametrize(("name", "expected"), [
    ("cifar-resnet20:weights=published", "cifar-resnet20~published"),
    ("cifar-resnet20:weights=published;normalize=cifar10", "cifar-resnet20~published~cifar10"),
    ("resnet18:weights=my net.pt;normalize=0.5/0.25", "resnet18~my_net~2c26b46b~0.5_0.25"),
    ("resnet18:weights=a/none.pt", "resnet18~none~bfa2d26e"), ("hub:owner/repo:net:trust=yes", slug("hub:owner/repo:net")),
])
def test_files_are_named_by_what_the_weights_hold(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    Path("my net.pt").write_bytes(b"foo")
    assert slug(name) == expected
