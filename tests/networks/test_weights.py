"""Weights as people keep them: every kind loads to the last bit and is said, or is one line that leaves the network alone."""
import argparse
import copy
import pathlib
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from archrepair.core.errors import ArchrepairError, Notice
from archrepair.networks.models import create_model
from archrepair.networks.weights import load_weights, match, save_weights, split_entry
from support.states import same_state


class Small(nn.Module):
    "A convolution, a BatchNorm and a classifier; its weights are those of a seed."

    def __init__(self, seed: int = 0, classes: int = 5):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, classes)
            self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).mean((2, 3)))


def state(seed: int = 0, prefix: str = "") -> dict:
    return {f"{prefix}{name}": value for name, value in Small(seed).state_dict().items()}


def loaded(path, model: nn.Module | None = None) -> tuple[nn.Module, list[str]]:
    "The network with the weights of a file, and what was said about it, without the folder."
    model = Small(9) if model is None else model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_weights(model, path)
    assert all(warning.category is Notice for warning in caught)
    return model, [str(warning.message).replace(f"{pathlib.Path(path).parent}/", "") for warning in caught]


def refused(path, model: nn.Module | None = None) -> str:
    "The one line by which a file is refused; the network stays as it is."
    model = Small(9) if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(ArchrepairError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert same_state(before, model) and "\n" not in message and "\x1b" not in message and len(message) < 500
    return message.replace(f"{pathlib.Path(path).parent}/", "")


def without(names: dict, part: str) -> dict:
    return {name: value for name, value in names.items() if part not in name}


OLD = without(state(), "num_batches_tracked")
PROFILED = {**state(), "total_ops": torch.zeros(1), "conv.total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)}
OPTIMIZER = torch.optim.Adam(Small().parameters())
sum(p.sum() for p in OPTIMIZER.param_groups[0]["params"]).backward()
OPTIMIZER.step()

KINDS = {  # what is saved, and what is said; the weights are those of seed 0
    "plain": (state(), ""),
    "state_dict": ({"state_dict": state()}, "entry state_dict taken"),
    "model_state_dict": ({"epoch": 3, "model_state_dict": state(), "optimizer_state_dict": OPTIMIZER.state_dict()},
                         "entry model_state_dict taken"),
    "model": ({"model": state(), "loss": torch.tensor(0.1)}, "entry model taken"),
    "net": ({"net": state(), "acc": 91.2, "epoch": 1}, "entry net taken"),
    "any name": ({"my_net": state()}, "entry my_net taken"),
    "two levels": ({"state": {"model": state()}, "config": {"lr": 0.1}}, "entry state.model taken"),
    "plain beside ema": ({"state_dict_ema": state(1), "model": state(), "epoch": 7}, "entry model taken, not state_dict_ema"),
    "student beside teacher": ({"teacher": state(1), "student": state()}, "entry student taken, not teacher"),
    "beside another network": ({"discriminator": {"w": torch.zeros(2)}, "generator": state()}, "entry generator taken, not discriminator"),
    "only ema": ({"ema": state()}, "entry ema taken"),
    "DataParallel": (nn.DataParallel(Small()).state_dict(), "prefix module. removed"),
    "compiled": (torch.compile(Small()).state_dict(), "prefix _orig_mod. removed"),
    "Lightning": ({"state_dict": state(prefix="model."), "pytorch-lightning_version": "2.0", "callbacks": {}, "optimizer_states": []},
                  "entry state_dict taken; prefix model. removed"),
    "net.": (state(prefix="net."), "prefix net. removed"),
    "two wrappers": (state(prefix="module._orig_mod."), "prefix module._orig_mod. removed"),
    "average": (AveragedModel(Small()).state_dict(), "prefix module. removed; 1 n_averaged ignored"),
    "old torch": (OLD, "the file has no num_batches_tracked, as those of old torch"),
    "profiled": (PROFILED, "2 total_ops, 1 total_params ignored"),
    "half": ({name: value.half() if value.is_floating_point() else value for name, value in state().items()}, "converted from float16"),
    "bfloat16": ({name: value.bfloat16() if value.is_floating_point() else value for name, value in state().items()},
                 "converted from bfloat16"),
    "numpy scalars": ({"state_dict": state(), "best": np.float64(98.8), "epoch": np.int64(3), "amp": np.bool_(True)},
                      "entry state_dict taken"),
    "Namespace": ({"state_dict": state(), "args": argparse.Namespace(lr=0.1, arch="small")}, "entry state_dict taken"),
    "numbers beside the names": ({**state(), "mean": {"rgb": torch.zeros(3)}, "epoch": 3}, ""),
    "parameters": (dict(Small().named_parameters()) | dict(Small().named_buffers()), ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_to_the_last_bit_and_is_said(tmp_path, kind):
    content, said = KINDS[kind]
    torch.save(content, tmp_path / "w.pt")
    model, notices = loaded(tmp_path / "w.pt")
    expected = Small()
    if kind in ("half", "bfloat16"):
        expected.to(torch.float16 if kind == "half" else torch.bfloat16).float()
    assert same_state(model, expected)
    assert notices == ([f"w.pt: {said}"] if said else [])


@pytest.mark.parametrize("suffix", ["pt", "pth", "th", "ckpt", "bin", "pth.tar", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_suffixes_of_torch(tmp_path, suffix, zipped):
    torch.save(state(), tmp_path / f"w.{suffix}", _use_new_zipfile_serialization=zipped)
    assert same_state(loaded(tmp_path / f"w.{suffix}")[0], Small())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_safetensors_are_known_by_their_content(tmp_path, suffix):
    save_file(state(prefix="module."), tmp_path / f"w.{suffix}")
    model, notices = loaded(tmp_path / f"w.{suffix}")
    assert same_state(model, Small()) and notices == [f"w.{suffix}: prefix module. removed"]


def test_a_prefix_of_the_network_is_added(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    wrapped, notices = loaded(tmp_path / "w.pt", nn.DataParallel(Small(9)))
    assert same_state(wrapped.module, Small()) and notices == ["w.pt: prefix module. added"]


def test_an_entry_can_be_asked_for(tmp_path):
    torch.save({"model": state(), "ema": {"module": state(1, "module.")}}, tmp_path / "w.pt")
    model, notices = loaded(f"{tmp_path}/w.pt#ema.module")
    assert same_state(model, Small(1)) and notices == ["w.pt: entry ema.module taken, not model; prefix module. removed"]
    assert same_state(loaded(f"{tmp_path}/w.pt#ema")[0], Small(1))
    assert refused(f"{tmp_path}/w.pt#modell") == "unknown entry of w.pt 'modell': did you mean 'model'? known: model, ema.module"
    torch.save(state(2), tmp_path / "run#3.pt")  # the name of a file, not of an entry
    assert same_state(loaded(tmp_path / "run#3.pt")[0], Small(2)) and split_entry(tmp_path / "run#3.pt") == (tmp_path / "run#3.pt", "")


def test_equally_plain_entries_are_named_and_none_is_taken(tmp_path):
    torch.save({"first": state(), "second": state(1)}, tmp_path / "w.pt")
    assert re.search(r"w.pt holds several state dicts that fit \(first, second\); expected one: give .*w.pt#first, or another",
                     refused(tmp_path / "w.pt"))
    assert same_state(loaded(f"{tmp_path}/w.pt#second")[0], Small(1))


class Tied(Small):
    def __init__(self, seed: int = 0):
        super().__init__(seed, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.out.weight


def test_tied_weights_kept_under_one_name(tmp_path):
    save_model(Tied(), tmp_path / "tied.safetensors")
    model, notices = loaded(tmp_path / "tied.safetensors", Tied(9))
    assert torch.equal(model.again.weight, Tied().out.weight) and model.again.weight is model.out.weight
    assert len(notices) == 1 and "tied weights kept under one of their names" in notices[0]
    save_weights(Tied(), tmp_path / "both.safetensors")
    assert loaded(tmp_path / "both.safetensors", Tied(9))[1] == []


def test_tied_names_that_differ_in_the_file_are_refused(tmp_path):
    torch.save({**Tied().state_dict(), "again.weight": torch.zeros(4, 4)}, tmp_path / "w.pt")
    assert "out.weight other than again.weight though they are one tensor" in refused(tmp_path / "w.pt", Tied(9))


class Meter:
    best = 98.8


QUANTIZED = {**state(), "conv.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int8)}
REFUSED = {  # what is saved, and the pattern of the line
    "whole network": (Small(), r"w.pt holds a \S*test_weights.Small, an object that could run code .*torch.save\(network.state_dict\(\)"),
    "an object beside": ({"state_dict": state(), "meter": Meter()}, r"w.pt holds a \S*test_weights.Meter, an object"),
    "a path beside": ({"state_dict": state(), "args": argparse.Namespace(out=pathlib.PurePosixPath("x"))}, "holds a pathlib"),
    "a list": ([1, 2], "w.pt holds no weights; expected safetensors or a state dict"),
    "an empty one": ({}, "w.pt holds no weights"),
    "numbers": ({**state(), "out.bias": 3}, r"another architecture: 1 missing \(out.bias\); give"),
    "lacking": (without(state(), "norm"), r"4 missing \(norm.bias, norm.running_mean, norm.running_var, …\); give"),
    "unexpected": ({**state(), "aux.weight": torch.zeros(1)}, r"architecture: 1 unexpected \(aux.weight\); give"),
    "another shape": (Small(classes=7).state_dict(),
                      r"2 of another shape or kind \(out.weight \(7, 4\) where \(5, 4\) is expected, out.bias \(7,\)"),
    "two networks": (state(prefix="student.") | state(1, "teacher."), "missing .*unexpected"),
    "one without the prefix": (state(prefix="module.") | {"head": torch.zeros(1)}, "missing .*unexpected"),
    "integers": (QUANTIZED, r"conv.weight of torch.int8 where torch.float32 is expected"),
    "optimizer alone": ({"optimizer": OPTIMIZER.state_dict()}, "w.pt holds no weights"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_one_line_that_names_it(tmp_path, kind):
    content, pattern = REFUSED[kind]
    torch.save(content, tmp_path / "w.pt")
    assert re.search(pattern, refused(tmp_path / "w.pt")), refused(tmp_path / "w.pt")


def _spoil(path, kind):
    match kind:
        case "text": path.write_text("hello")
        case "empty": path.write_bytes(b"")
        case "folder": path.mkdir()
        case "noise": path.write_bytes(bytes(range(256)) * 20)
        case "truncated":
            save_weights(Small(), path) if path.suffix == ".safetensors" else torch.save(state(), path)
            path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", ["missing", "text", "empty", "folder", "noise", "truncated"])
def test_files_that_cannot_be_read(tmp_path, kind, suffix):
    _spoil(tmp_path / f"w.{suffix}", kind)
    message = refused(tmp_path / f"w.{suffix}")
    assert message.startswith(("no weights at", "cannot read weights from")) and f"w.{suffix}" in message


def test_globals_are_allowed_for_one_file_only(tmp_path):
    torch.save({"state_dict": state(), "best": np.float64(1)}, tmp_path / "w.pt")
    before = set(torch.serialization.get_safe_globals())
    loaded(tmp_path / "w.pt")
    assert set(torch.serialization.get_safe_globals()) == before and argparse.Namespace not in before


def test_match_only_looks(untouched):
    model = Small(9)
    with untouched(model):
        assert match(model, state()).fits and not match(model, {}).fits


def test_files_without_counters_keep_those_of_the_network(tmp_path):
    torch.save(OLD, tmp_path / "w.pt")
    model = Small(9)
    model.norm.num_batches_tracked.fill_(7)
    assert int(loaded(tmp_path / "w.pt", model)[0].norm.num_batches_tracked) == 7


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_safetensors_of_ours_round_trip_in_silence(tmp_path, name):
    model = create_model(name, 10, width=0.125, seed=1)
    save_weights(model, tmp_path / "w.safetensors")
    other, notices = loaded(tmp_path / "w.safetensors", create_model(name, 10, width=0.125, seed=2))
    assert same_state(model, other) and not notices and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_unwritable_weights_leave_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchrepairError, match="cannot write"):
        save_weights(Small(), tmp_path / "file" / "w.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
