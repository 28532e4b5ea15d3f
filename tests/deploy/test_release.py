"""Originals become files to publish, once, which say what they are and load again; a damaged one is written anew."""
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from support.finished import ORIGINAL, command, fails, furnish

from archrepair.cli.entries import cached_originals
from archrepair.core.errors import ArchrepairError
from archrepair.deploy.release import is_released, read_release_card

NAME = "smoke-digits-resnet18-s0"


@pytest.fixture
def released(home, capsys):
    furnish(home, repaired=False)
    assert command("release", home / "out", "--tier", "smoke") == 0
    assert f"written: {home / 'out' / NAME}.safetensors" in capsys.readouterr().err
    return home / "out"


def test_what_is_cached_is_written_once_and_loads_again(home, released, capsys):
    weights, card = released / f"{NAME}.safetensors", json.loads((released / f"{NAME}.json").read_text())
    assert {p.name for p in released.iterdir()} == {weights.name, f"{NAME}.json", "SHA256SUMS"}
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=released, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("OK") == 2
    ours, theirs = load_file(home / ORIGINAL), load_file(weights)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert (card["model"], card["dataset"], card["tier"], card["seed"], card["n"]) == ("resnet18", "digits", "smoke", 0, 597)
    written = weights.stat().st_mtime_ns
    assert command("release", released, "--tier", "smoke", "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"] == [card] and weights.stat().st_mtime_ns == written
    words = card["use"].replace(weights.name, str(weights)).split()[1:]
    assert command(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["digits"]["accuracy"] == card["accuracy"]
    source, content = card["source"], weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not is_released(weights, source)
    assert command("release", released, "--tier", "smoke") == 0 and weights.read_bytes() == content
    assert is_released(weights, source) and not is_released(weights, "another")


def test_without_originals_it_says_so(home, capsys):
    assert "no trained originals of tier smoke are cached" in fails(capsys, "release", home / "out", "--tier", "smoke")


def test_only_originals_of_known_names_are_released(tmp_path):
    for name in ("tiny-imagenet-cifar-resnet20-s2", "cifar10-vgg16-s1", "folder~mine~0a1b-resnet18-s0", "cifar10-vgg16-s1-own"):
        (tmp_path / f"{name}.safetensors").touch()
    assert cached_originals(tmp_path) == [("vgg16", "cifar10", 1), ("cifar-resnet20", "tiny-imagenet", 2)]


def test_a_card_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ArchrepairError, match="cannot read the card of .*no digest"):
        read_release_card(tmp_path / "a.safetensors")
