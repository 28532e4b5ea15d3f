"""Checkpoints as scripts, wrappers and downloads leave them: the accuracy is that of the plain weights, or one line says why not."""
import argparse
import collections
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from archrepair.networks.weights import load_weights
from support.bring import Kind, Net, one_line
from support.finished import fails

WEIGHTS = Kind("Weights", "`--weights FILE` or `--weights FILE#ENTRY`, and `load_weights(network, FILE)`: safetensors or a file of torch, "
                          "whatever its suffix. What was done to make it fit is said in one line; a pickle never runs code.")


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def other(weights: dict) -> dict:
    "Weights of the same network that are of no use."
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def profiled(weights: dict) -> dict:
    layers = {name.rpartition(".")[0] for name in weights}
    return {**weights, "total_params": torch.zeros(1), **{f"{layer}.total_ops": torch.zeros(1) for layer in layers}}


def converted(weights: dict, *kinds: torch.dtype) -> dict:
    for kind in kinds:
        weights = {name: value.to(kind) if value.is_floating_point() else value for name, value in weights.items()}
    return weights


def without(part: str, weights: dict) -> dict:
    return {name: value for name, value in weights.items() if part not in name}


TAKEN = {
    "a state dict saved from `nn.DataParallel`": (
        "the prefix is removed", lambda w: prefixed("module.", w), "prefix module. removed"),
    "a state dict saved from a compiled network": (
        "the prefix is removed", lambda w: prefixed("_orig_mod.", w), "prefix _orig_mod. removed"),
    "a network kept as an attribute, as PyTorch Lightning does": (
        "the entry is taken, the prefix removed",
        lambda w: {"state_dict": prefixed("model.", w), "epoch": 3}, "entry state_dict taken; prefix model. removed"),
    "a best accuracy that is a numpy scalar, beside `state_dict`": (
        "the entry is taken", lambda w: {"state_dict": w, "best_acc1": np.float64(98.8), "name": np.str_("a")}, "entry state_dict taken"),
    "the script's `argparse.Namespace` beside `state_dict`": (
        "the entry is taken", lambda w: {"state_dict": w, "args": argparse.Namespace(lr=0.1)}, "entry state_dict taken"),
    "weights beside their moving average": (
        "the plain ones are taken, and the others named",
        lambda w: {"model": w, "state_dict_ema": other(w), "epoch": 7}, "entry model taken, not state_dict_ema"),
    "one network under two names": ("taken once", lambda w: {"best": w, "last": w}, "entry best taken, not last"),
    "an averaged model, with `n_averaged`": (
        "the counter is left out",
        lambda w: {"n_averaged": torch.tensor(3), **prefixed("module.", w)}, "prefix module. removed; 1 n_averaged ignored"),
    "a profiler's `total_ops` and `total_params`": ("left out, and counted", profiled, "1 total_params, 41 total_ops ignored"),
    "a file of an old torch, without `num_batches_tracked`": (
        "the counters are not needed", lambda w: without("num_batches_tracked", w), "no num_batches_tracked, as those of old torch"),
    "double precision": ("converted to float32", lambda w: converted(w, torch.float64), "converted from float64"),
}


@WEIGHTS.each("make, said", TAKEN)
def test_checkpoints(evaluate, trained_weights, make, said):
    torch.save(trained_weights(), "plain.pt")
    torch.save(make(trained_weights()), "w.pth.tar")
    plain, taken = (evaluate("--dataset", "digits", "--weights", path) for path in ("plain.pt", "w.pth.tar"))
    assert taken.accuracy == plain.accuracy and plain.said == "" and said in taken.said and taken.said.count("\n") == 1


@WEIGHTS.works("half precision", "converted to float32: the accuracy is that of the rounded weights")
def test_half_precision(evaluate, trained_weights):
    torch.save(converted(trained_weights(), torch.float16), "half.pt")
    torch.save(converted(trained_weights(), torch.float16, torch.float32), "rounded.pt")
    half, rounded = (evaluate("--dataset", "digits", "--weights", path) for path in ("half.pt", "rounded.pt"))
    assert half.accuracy == rounded.accuracy and "converted from float16" in half.said


@WEIGHTS.works("safetensors, under any suffix", "known by their first bytes")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_safetensors(evaluate, trained_weights, suffix):
    torch.save(trained_weights(), "plain.pt")
    save_file(trained_weights(), f"w.{suffix}")
    assert evaluate("--dataset", "digits", "--weights", f"w.{suffix}") == evaluate("--dataset", "digits", "--weights", "plain.pt")


class Tied(Net):
    "Two convolutions share one weight."

    def __init__(self):
        super().__init__()
        self.block3[3].weight = self.block2[3].weight


@WEIGHTS.works("tied weights of which `save_model` kept one name", "both names get it")
def test_tied_weights(here):
    saved, loaded = Tied(), Tied()
    with torch.no_grad():
        loaded.block2[3].weight.zero_()
    save_model(saved, "tied.safetensors")
    load_weights(loaded, "tied.safetensors")
    assert loaded.block3[3].weight is loaded.block2[3].weight and torch.equal(loaded.block3[3].weight, saved.block2[3].weight)


@WEIGHTS.works("an entry asked for, `FILE#ema`", "that one")
def test_an_entry(evaluate, trained_weights):
    torch.save({"model": other(trained_weights()), "ema": trained_weights()}, "w.pt")
    torch.save(trained_weights(), "plain.pt")
    asked, plain = (evaluate("--dataset", "digits", "--weights", path) for path in ("w.pt#ema", "plain.pt"))
    assert asked.accuracy == plain.accuracy and "entry ema taken, not model" in asked.said


@WEIGHTS.works("`--weights=~/w.pt`, where no shell expands the tilde", "the home folder")
def test_tilde(evaluate, trained_weights, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    torch.save(trained_weights(), "w.pt")
    assert evaluate("--dataset", "digits", "--weights=~/w.pt") == evaluate("--dataset", "digits", "--weights", "w.pt")


class Meter:
    "An object of a training script."


REFUSED = {
    "two state dicts that fit, neither plainer than the other": (
        "names both, and how to ask for one",
        lambda w: {"best": w, "last": other(w)}, r"holds several state dicts that fit \(best, last\).*w.pt#best"),
    "another architecture": (
        "counts what is missing, unexpected or of another shape, with examples",
        lambda w: {name.replace("fc.", "head."): value for name, value in w.items()}, r"2 missing \(fc.*, 2 unexpected \(head"),
    "a whole network, or any other object that could run code": (
        "names the object, and how to save the weights alone",
        lambda w: {"state_dict": w, "meter": Meter()}, r"holds a \S*Meter, an object that could run code .*torch.save\("),
    "a `defaultdict`, or arrays of numpy": (
        "names the object, in the same way",
        lambda w: {"state_dict": w, "log": collections.defaultdict(list)}, "holds a collections.defaultdict"),
    "weights that are NaN or infinite": (
        "names them: the accuracy would be that of guessing",
        lambda w: {**w, "fc.bias": torch.full((10,), torch.nan), "fc.weight": torch.full((10, 64), torch.inf)},
        "w.pt has NaN or infinity in fc.weight, fc.bias.*earlier checkpoint"),
    "shapes without numbers, of the meta device": (
        "names them", lambda w: {**w, "fc.bias": w["fc.bias"].to("meta")}, "fc.bias without numbers"),
    "sparse tensors": ("names them", lambda w: {**w, "fc.weight": w["fc.weight"].to_sparse()}, "fc.weight as a sparse tensor"),
    "integers of a quantized network": (
        "names them", lambda w: {**w, "fc.weight": w["fc.weight"].to(torch.int8)}, "fc.weight of torch.int8 where torch.float32"),
    "a list, or an optimizer alone": (
        "says what is expected", lambda w: [w], "holds no weights; expected safetensors or a state dict"),
}


@WEIGHTS.each("make, pattern", REFUSED, works=False)
def test_checkpoints_that_do_not_fit(here, capsys, trained_weights, make, pattern):
    torch.save(make(trained_weights()), "w.pt")
    assert re.search(pattern, fails(capsys, "evaluate", "--tier", "smoke", "--dataset", "digits", "--weights", "w.pt"))


FILES = {
    "the pointer that Git LFS keeps in place of a file": (
        "says how to fetch the file", b"version https://git-lfs.github.com/spec/v1\n", "is the pointer .*git lfs pull"),
    "a web page that was saved in place of a download": ("says what it is", b"\n<!DOCTYPE html><html>", "is a page of the web"),
    "half a download": ("names the file", b"PK\x03\x04 and no more", "cannot read weights from w.pt"),
    "text, or anything else": (
        "says that it is not a file of torch", b"hello", "cannot read weights from w.pt: .*expected safetensors or a state dict"),
}


@WEIGHTS.each("content, pattern", FILES, works=False)
def test_files_without_weights(here, content, pattern):
    Path("w.pt").write_bytes(content)
    with one_line(pattern):
        load_weights(nn.Linear(2, 2), "w.pt")
