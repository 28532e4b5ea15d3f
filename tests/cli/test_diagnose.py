"""`archrepair diagnose`: the same in words and as data, for a dataset and for folders, with the command that comes next."""
import json

import pytest
from PIL import Image

import archrepair.experiments.originals as originals
from archrepair.data.datasets import load_dataset
from support.finished import DATASET, command, fails, furnish


@pytest.fixture
def trained(home, monkeypatch):
    "A home with a trained original, in which nothing may be trained."
    furnish(home, repaired=False)
    monkeypatch.chdir(home)
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))
    return home


def said(capsys, *arguments) -> str:
    "What the command prints where it succeeds."
    capsys.readouterr()
    assert command("diagnose", "--tier", "smoke", *arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_words_and_json_agree(trained, capsys):
    out = said(capsys, "--dataset", DATASET)
    found = json.loads(said(capsys, "--dataset", DATASET, "--json"))
    lines = out.splitlines()
    assert lines[0] == f"{found['subject']}: {found['failures']:,} failures, compared with {found['ordinary']:,} ordinary images"
    assert lines[1] == found["verdict"] and f"next: {found['next'][0]}" in lines
    assert found["next"][0] == f"repair: archrepair repair --dataset {DATASET} --tier smoke" and "looks_like" not in found
    eyes = json.loads(said(capsys, "--dataset", DATASET, "--json", "--looks-like"))["looks_like"]
    assert len(eyes) == 3 and eyes[0]["corruption"] == "brightness"
    assert "looks most like (for your eyes; no repair uses this): brightness" in said(capsys, "--dataset", DATASET, "--looks-like")


def test_folders_need_neither_labels_nor_a_network(trained, capsys):
    for name, dataset, split in (("failing", "digits:gaussian_noise:5", "test"), ("ordinary", "digits", "train")):
        (trained / name).mkdir()
        for i, pixels in enumerate(load_dataset(dataset, split).images[:60].numpy()):
            Image.fromarray(pixels).save(trained / name / f"{i}.png")
    out = said(capsys, "--failures", "failing", "--ordinary", "ordinary")
    assert out.startswith("failing: 60 failures, compared with 60 ordinary images\none pattern in 60 of 60 failures: noise")
    assert "load_failures" in out
    assert "noise" in said(capsys, "--failures", "failing", "--dataset", "digits")
    found = json.loads(said(capsys, "--model", "resnet18", "--failures", "failing", "--dataset", "digits", "--json"))
    assert found["network"] and found["failures"] == 60


def test_mistakes(trained, capsys):
    assert "no images in" in fails(capsys, "diagnose", "--failures", "nowhere", "--ordinary", "nowhere")
    assert "without failures" in fails(capsys, "diagnose", "--tier", "smoke", "--ordinary", ".")
    assert "unknown dataset" in fails(capsys, "diagnose", "--tier", "smoke", "--dataset", "digit")
    assert "spectral" in fails(capsys, "diagnose", "--tier", "smoke", "--dataset", "digits", "--emulator", "spectrl")
