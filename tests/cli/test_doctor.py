"""`archrepair doctor`: what it prints is what the doctor found, and its status says whether a repair could start."""
import inspect
import json

import pytest
import torch

import archrepair.experiments.originals as originals
from archrepair.cli.app import repair
from archrepair.cli.doctor import doctor_command
from archrepair.networks.models import create_model
from support.finished import DATASET, command, fails, furnish, tree
from support.pictures import save_tree


@pytest.fixture
def photos(home, monkeypatch):
    "A folder of photos of three classes and weights that fit, in a home of its own, which is also the current folder."
    monkeypatch.chdir(home)
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))
    save_tree(home / "photos", {"cat": 20, "dog": 20, "fox": 20}, (32, 32))
    torch.save(create_model("resnet18", 3, width=0.125, stem_stride=2).state_dict(), home / "weights.pt")
    return home


def printed(capsys, *arguments) -> tuple[int, str, str]:
    "Status and words of the doctor on the photos."
    capsys.readouterr()
    status = command("doctor", "--tier", "smoke", "--dataset", "folder:photos", *arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_ready(photos, capsys):
    before = tree(photos)
    status, out, err = printed(capsys, "--weights", "weights.pt")
    assert status == 0 and not err and tree(photos) == before
    *lines, verdict = out.splitlines()
    assert verdict.startswith("ready: a repair can start")
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    assert "ok       dataset        48 training and 12 test images of 32 px, photos" in lines
    assert "ok       weights        weights.pt, all tensors fit" in lines


def test_not_ready(photos, capsys):
    status, out, err = printed(capsys, "--weights", "none.pt", "--method", "archrepare", "--out", "weights.pt")
    assert status == 1 and not err
    problems = [line.split()[1] for line in out.splitlines() if line.startswith("problem")]
    assert problems == ["output", "method", "weights"] and out.splitlines()[-1].startswith("not ready: 3 problems")


@pytest.mark.parametrize("weights", ["weights.pt", "none.pt"])
def test_json_agrees_with_the_lines(photos, capsys, weights):
    status, out, _ = printed(capsys, "--weights", weights)
    status_of_json, text, err = printed(capsys, "--weights", weights, "--json")
    found = json.loads(text)
    assert status == status_of_json == (not found["ready"]) and not err
    steady = lambda name: name not in ("time", "memory", "disk")  # measured anew by each
    lines = [line for line in out.splitlines()[:-1] if steady(line.split()[1])]
    assert lines == [f"{c['status']:<9}{c['name']:<15}{c['text']}" for c in found["checks"] if steady(c["name"])]
    assert found["verdict"] == out.splitlines()[-1] and set(found) == {"ready", "verdict", "checks"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["-S", "selekt=perturb"], "selekt"),
    (["-S", "select"], "'select' is not a setting; expected NAME=VALUE"),
    (["--strategy", "dart"], "unknown strategy 'dart'"),
    (["--preset", "papre"], "did you mean 'paper'"),
    (["--level", "neuron"], "unknown level 'neuron'"),
    (["--views", "0"], "views is 0; expected a whole number from 1"),
    (["--method", "retrain", "--strategy", "darts"], "unknown option of retrain 'strategy'"),
    (["--block", "layer1", "--blocks", "layer2"], "expected one of the two"),
    (["--blocks", "layer1,layer7"], "unknown block 'layer7'"),
])
def test_settings(photos, capsys, arguments, words):
    status, out, err = printed(capsys, "--weights", "weights.pt", *arguments)
    problems = [line for line in out.splitlines() if line.startswith("problem")]
    assert status == 1 and not err and any(words in line for line in problems), out
    assert "ok       dataset" in out and "ok       network" in out, "the rest is looked at all the same"


def test_settings_that_are_right(photos, capsys):
    status, out, _ = printed(capsys, "--weights", "weights.pt", "-S", "select=perturb", "--strategy", "darts", "--search-epochs", "1",
                             "--blocks", "layer2,layer3")
    assert status == 0 and "search_epochs 1" in out and "strategy darts" in out and "4 epochs at the smoke tier" in out
    assert "blocks layer2 layer3" in out and "search_options select=perturb" in out
    assert "2 to choose from (layer2, layer3), all can be searched" in out
    status, out, _ = printed(capsys, "--weights", "weights.pt", "--method", "retrain")
    assert status == 0 and "retrain at the smoke tier, protocol clean" in out


def test_it_takes_the_options_of_repair():
    mine, theirs = (inspect.signature(one).parameters for one in (doctor_command, repair))
    assert list(mine) == [name for name in theirs if name != "force"]
    assert all(mine[name].annotation == theirs[name].annotation and mine[name].default == theirs[name].default for name in mine)


def test_an_unknown_option_is_wrong_usage(capsys):
    assert command("doctor", "--wieghts", "x") == 2
    assert "--weights" in capsys.readouterr().err


def test_what_it_calls_wrong_the_repair_refuses(photos, capsys):
    status, out, _ = printed(capsys, "--weights", "weights.pt", "--block", "layer9")
    problem = next(line for line in out.splitlines() if line.startswith("problem")).split(maxsplit=2)[2]
    said = fails(capsys, "repair", "--tier", "smoke", "--dataset", "folder:photos", "--weights", "weights.pt", "--block", "layer9")
    assert status == 1 and said == problem


def test_a_finished_repair_is_ready(home, capsys):
    furnish(home)
    assert command("doctor", "--tier", "smoke", "--dataset", DATASET) == 0
    assert "holds a repair already" in capsys.readouterr().out
