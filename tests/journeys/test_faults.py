"""What users get wrong and machines do to them: one line, status 1, and nothing half-written."""
import errno
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import archrepair.core.errors as errors
import archrepair.experiments.cells as experiments
import archrepair.experiments.originals as originals
from archrepair.networks.models import create_model
from archrepair.networks.weights import save_weights
from archrepair.repair.finetuning import PRESETS
from archrepair.training.fit import Recipe
from support.finished import DATASET, FILES, ORIGINAL, REPAIR, command, fails, finished, furnish, tree

SMOKE = ("--tier", "smoke")


@pytest.fixture
def room(home):
    "A home with the trained original and nothing else."
    return furnish(home, repaired=False)


@pytest.fixture
def idle(monkeypatch):
    "Nothing is trained, and no repair goes as far as its search."
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))
    monkeypatch.setattr("archrepair.repair.archrepair.prepare", lambda *a, **k: pytest.fail("was begun"))


def npz(path: Path, n: int = 60, size: int = 32, n_classes: int = 10, **changes) -> str:
    "Arrays of one's own, as a dataset name; `changes` replace arrays, None leaves one out."
    generator = np.random.default_rng(0)
    arrays = {"images": generator.integers(0, 256, (n, size, size, 3), dtype=np.uint8), "labels": np.arange(n) % n_classes} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return f"npz:{path}"


def one_line(capsys, home: Path, message: str, *arguments) -> None:
    "The command fails with this message and changes nothing below `home`."
    before = tree(home)
    assert re.search(message, fails(capsys, *arguments)), message
    assert tree(home) == before


# --- names and numbers

@pytest.mark.parametrize(("change", "message"), [
    (["--model", "resnet_18"], "unknown model 'resnet_18': did you mean 'resnet18'"),
    (["--dataset", "digit"], "did you mean 'digits'"),
    (["--dataset", "digits:fogg:3"], "unknown corruption 'fogg': did you mean 'fog'"),
    (["--dataset", "digits:fog:9"], "severity of .* is 9; .*1 to 5"),
    (["--dataset", "digits:fog:0"], "severity of .* is 0; .*1 to 5"),
    (["--dataset", "digits:fog"], "not a version of a dataset"),
    (["--dataset", "npz:/nowhere.npz"], "/nowhere.npz does not exist"),
    (["--block", "layer9"], "unknown block 'layer9'.*layer4"),
    (["--method", "archrepare"], "did you mean 'archrepair'"),
    (["--strategy", "pcdarts"], "did you mean 'pc-darts'"),
    (["--tier", "smok"], "did you mean 'smoke'"),
    (["--protocol", "papers"], "did you mean 'paper'"),
    (["--preset", "defalt"], "did you mean 'default'"),
    (["--device", "tpu9"], "unknown device 'tpu9'"),
    (["--device", "meta"], "device meta"),
    (["--search-epochs", "-1"], "search_epochs is -1"),
    (["--finetune-epochs", "-3"], "finetune_epochs is -3"),
    (["--views", "0"], "views is 0"),
    (["--weights", "none.safetensors"], "no weights at"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
@pytest.mark.parametrize("out", ["new", "old"])
def test_repair(room, idle, capsys, change, message, out):
    folder = room / "outputs" / out
    if out == "old":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    one_line(capsys, room, message, *REPAIR, *change, "--out", folder)


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "--model", "vgg"], "unknown model 'vgg': did you mean 'vgg16'"),
    (["train", "--dataset", "mnist"], "unknown dataset"),
    (["train", "--tier", "x"], "unknown tier"),
    (["train", "--device", "tpu"], "unknown device"),
    (["train", "--out", "w.pt"], "ends in .safetensors"),
    (["localize", "--blocks", "layer1,layer9"], "unknown block 'layer9'"),
    (["localize", "--measure", "tarantul"], "did you mean 'tarantula'"),
    (["localize", "-k", "0"], "k is 0"),
    (["localize", "--protocol", "x"], "unknown protocol"),
    (["evaluate", "--model", "x"], "unknown model"),
    (["evaluate", "--dataset", "digits,fog"], "unknown dataset 'fog'"),
    (["evaluate", "--repaired", "nowhere"], "holds no saved repair"),
    (["corrupt", "--dataset", "digits", "--corruption", "haze"], "unknown corruption 'haze'"),
    (["corrupt", "--dataset", "x"], "unknown dataset"),
    (["corrupt", "--dataset", "digits", "--severity", "9"], "severity is 9"),
    (["corrupt", "--dataset", "digits", "--limit", "0"], "limit is 0"),
    (["list", "layers"], "unknown list"),
    (["list", "blocks", "--model", "x"], "unknown model"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_other_commands(room, idle, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(room)
    one_line(capsys, room, message, *arguments, *(() if arguments[0] in ("corrupt", "list") or "--tier" in arguments else SMOKE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(room, idle, capsys):
    one_line(capsys, room, "no GPU", *REPAIR, "--device", "cuda")


# --- weights

class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def weights(path: Path, kind: str) -> Path:
    "A file of weights that is none."
    good = (finished() / ORIGINAL).read_bytes()
    if kind in ("another width", "another network"):
        name, width = ("resnet18", 0.25) if kind == "another width" else ("vgg16", 0.125)
        save_weights(create_model(name, 10, width=width, stem_stride=2), str(path))
    elif kind == "other classes":
        save_weights(create_model("resnet18", 7, width=0.125, stem_stride=2), str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "whole model":
        path = path.with_suffix(".pt")
        torch.save(create_model("resnet18", 10, width=0.125), path)
    elif kind == "code":
        path = path.with_suffix(".pt")
        path.write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=2))
    elif kind == "code in an archive":
        path = path.with_suffix(".pth")
        torch.save({"fc.weight": Bomb()}, path)
    elif kind == "no tensors":
        path = path.with_suffix(".pt")
        torch.save({"epoch": 3}, path)
    else:
        path.write_bytes({"truncated": good[:-1000], "half header": good[:100], "empty": b"", "text": b"weights"}[kind])
    return path


@pytest.mark.parametrize("kind", [
    "another width", "another network", "other classes", "folder", "whole model", "code", "code in an archive", "no tensors", "truncated",
    "half header", "empty", "text",
])
def test_weights_that_do_not_fit(room, idle, capsys, monkeypatch, kind):
    monkeypatch.chdir(room)
    path = weights(room / "w.safetensors", kind)
    expected = "another architecture" if kind in ("another width", "another network", "other classes") else "w\\."
    for arguments in (("evaluate", *SMOKE), REPAIR):
        one_line(capsys, room, expected, *arguments, "--weights", path)
    assert not (room / "exploded").exists()


def test_a_cached_original_that_is_damaged(room, idle, capsys):
    (room / ORIGINAL).write_bytes((room / ORIGINAL).read_bytes()[:-1000])
    one_line(capsys, room, "cannot read weights from .*safetensors", *REPAIR)


# --- data

@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": np.arange(60) % 10 - 1}, "labels run from -1 to 8; expected 0 to"),
    ({"labels": np.arange(60) % 12, "classes": np.arange(10).astype(str)}, "labels run from 0 to 11; expected 0 to 9"),
    ({"labels": np.zeros(59, int)}, r"labels are int64 \(59,\) for 60 images"),
    ({"labels": np.zeros(60)}, "labels are float64"),
    ({"labels": None}, "labels"),
    ({"images": None}, "images"),
    ({"images": np.zeros((60, 32, 32, 3), np.float32)}, "float32.*uint8 N×H×W×3"),
    ({"images": np.zeros((60, 3, 32, 32), np.uint8)}, "expected uint8 N×H×W×3"),
    ({"images": np.zeros((60, 32, 32), np.uint8)}, "uint8 N×H×W×3"),
    ({"labels": np.array(["a"] * 60)}, r"training images of one class \(a\)"),
    ({"labels": np.array([["a", "b"]] * 60)}, r"labels are <U1 \(60, 2\)"),
    ({"images": np.array([{}] * 60, dtype=object)}, "cannot read"),
])
def test_arrays_that_are_no_images(room, idle, capsys, changes, message):
    one_line(capsys, room, message, *REPAIR, "--dataset", npz(room / "own.npz", **changes))


def test_images_of_another_size_than_those_trained_on(room, capsys, monkeypatch):
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: None)
    npz(room / "own" / "train.npz")
    npz(room / "own" / "test.npz", size=28)
    assert "has images of 28×28 px and the file beside it of 32×32" in fails(capsys, *REPAIR, "--dataset", f"npz:{room / 'own'}")
    assert not (room / "outputs" / "repair").exists()


def test_labels_beyond_the_networks_outputs(room, idle, capsys):
    npz(room / "own" / "train.npz")
    alone = npz(room / "own" / "test.npz", labels=np.arange(60) % 11)
    for name in (f"npz:{room / 'own'}", alone):  # both have eleven classes, whichever file uses the last
        for arguments in (("evaluate", *SMOKE), REPAIR):
            one_line(capsys, room, r"\(11,\) is expected", *arguments, "--dataset", name, "--weights", room / ORIGINAL)


def test_no_failures(room, idle, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "is_correct", lambda logits, labels: torch.ones(len(labels), dtype=torch.bool))
    one_line(capsys, room, "no failures to repair", *REPAIR)
    one_line(capsys, room, "no failures to repair", "localize", *SMOKE, "--dataset", DATASET)


# --- places

@pytest.mark.parametrize("place", ["a file", "below a file", "no file system", "a folder for a record"])
def test_repair_has_nowhere_to_write(room, idle, capsys, place):
    (room / "file").write_text("mine")
    (room / "taken" / "record.json").mkdir(parents=True)
    places = {"a file": room / "file", "below a file": room / "file" / "x", "no file system": Path("/proc/x"),
              "a folder for a record": room / "taken"}
    out = places[place]
    message = "is not a record" if place == "a folder for a record" else "cannot write"
    one_line(capsys, room, message, *REPAIR, "--out", out)


def test_other_commands_have_nowhere_to_write(room, capsys, monkeypatch):
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: None)
    (room / "file").write_text("mine")
    for place in (room / "file" / "x.npz", Path("/proc/x/y.npz"), room / "outputs"):
        one_line(capsys, room, "cannot write", "corrupt", "--dataset", "digits", "--limit", 5, "--out", place)
    for place in (room / "file" / "w.safetensors", Path("/proc/x/w.safetensors")):
        one_line(capsys, room, "cannot write", "train", *SMOKE, "--out", place)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_one_may_not_write_to(room, idle, capsys):
    (room / "locked").mkdir(mode=0o500)
    one_line(capsys, room, "cannot write", *REPAIR, "--out", room / "locked")


# --- misfortunes

@pytest.fixture
def fixed(home):
    "A home with a finished repair."
    return furnish(home)


def test_a_loss_that_is_no_number_leaves_the_last_repair(fixed, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "default", Recipe(epochs=6, lr=1e38, clip=None, momentum=0.0, schedule="constant"))
    one_line(capsys, fixed, "loss is nan|loss is inf", *REPAIR, "--force", "--search-epochs", 0)
    one_line(capsys, fixed, "loss is nan|loss is inf", *REPAIR, "--search-epochs", 0, "--out", fixed / "new")


def test_training_that_diverges_leaves_the_last_weights(room, capsys, monkeypatch):
    monkeypatch.setattr(Recipe, "loss", lambda self, logits, *more: logits.sum() * float("nan"))
    one_line(capsys, room, "training on digits.*loss is nan", "train", *SMOKE, "--force")


@pytest.mark.parametrize("name", ["repaired.safetensors", "record.json"])  # the first file written and the last
def test_a_disk_that_is_full_at_any_file(fixed, capsys, monkeypatch, name):
    "No file is lost or halved; the record is gone if anything it vouched for was to change, and the next call ends the work."
    before, replace = tree(fixed), os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(errors.os, "replace", full)
    short = (*REPAIR, "--force", "--search-epochs", 1, "--finetune-epochs", 1)
    assert re.search(f"cannot write .*{re.escape(name)}: No space left on device", fails(capsys, *short))
    after = tree(fixed)
    assert not [p for p in after if ".part" in p] and "outputs/repair/record.json" not in after
    assert after.get(f"outputs/repair/{name}") == (None if name == "record.json" else before[f"outputs/repair/{name}"])
    monkeypatch.setattr(errors.os, "replace", replace)
    monkeypatch.setattr("torch.optim.SGD.step", lambda *a, **k: pytest.fail("was trained again"))
    assert command(*REPAIR, "--search-epochs", 1, "--finetune-epochs", 1) == 0
    assert tree(fixed).keys() == before.keys()


def test_a_disk_that_is_full_for_large_files(room, capsys):
    "What torch, safetensors and numpy make of it: a limit on the size of files, in earnest."
    before, (soft, hard) = tree(room), resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments in (["train", *SMOKE, "--force"], ["train", *SMOKE, "--out", room / "w.safetensors"],
                      ["corrupt", "--dataset", "digits", "--out", room / "c.npz"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            assert "cannot write" in fails(capsys, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert tree(room) == before


def test_a_folder_that_vanishes_during_the_repair_is_made_again(room, capsys, monkeypatch):
    folder = room / "outputs" / "repair"
    measure = experiments.measure
    monkeypatch.setattr(experiments, "measure", lambda *a: (shutil.rmtree(folder), measure(*a))[1])
    assert command(*REPAIR, "--search-epochs", 0, "--finetune-epochs", 1) == 0
    assert {p.name for p in folder.iterdir()} == FILES
