"""Command lines: any command with any options and values ends well, in one line, or in a line on its usage; nothing is trained."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.main import get_command

import archrepair.experiments.cells as cells
import archrepair.experiments.originals as originals
import archrepair.experiments.runs as runs
import archrepair.repair.localization as localization
from archrepair.cli.app import app
from archrepair.core.registry import CORRUPTIONS, METHODS, MODELS, STRATEGIES
from archrepair.core.tiers import TIERS
from archrepair.data.datasets import load_dataset
from archrepair.networks.weights import save_weights
from support.fuzz import command, fuzz, ground, text

KIND = "commands"
COMMANDS = get_command(app).commands
# What an option takes, right or nearly so; options without an entry get a number or any text.
VALUES = {
    "model": [
        *MODELS,
        "resnet_18",
        "torchvision:resnet18",
        "torchvision:",
        "timm:x",
        "os:system",
        "os.path:join",
        "a.b:c",
        ":",
        "json:loads",
        "this:x",
    ],
    "dataset": [
        "digits",
        "digits:fog:3",
        "digits:fog:9",
        "digits:fog",
        "auto",
        "npz:own.npz",
        "folder:.",
        "folder:",
        "npz:",
        "digits,digits:fog:2",
        "cifar10",
        "imagenet",
        ":::",
        ",",
    ],
    "tier": ["smoke", "smoke", "smoke", *TIERS, "smok"],
    "protocol": ["clean", "paper", "x"],
    "device": ["cpu", "auto", "cuda", "meta", "tpu", "cuda:99", "cpu:7"],
    "normalize": ["cifar10", "none", "0.5/0.25", "nan/1", "1/0", "1,2/3", "0.5/1e-400"],
    "weights": ["own.safetensors", "nowhere.pt", ".", "own.safetensors#x", "#"],
    "method": [
        *METHODS,
        "arachne:search=de",
        "archrepair:strategy=x",
        "retrain:epochs=-1",
        "surgical:variant=x",
        "finetune:level=9",
        "retrain:seed=x",
        "retrain:a=b=c",
        "retrain:block=layer1",
    ],
    "methods": ["archrepair,retrain", "retrain,", ",", "retrain:epochs=1;seed=2", "x"],
    "strategy": [*STRATEGIES, "pcdarts"],
    "search": ["select=perturb", "order=2", "max_skip=x", "lr=nan", "=", "x", "x=1", "order=[", "order={a: b}"],
    "block": ["layer1", "layer9", "conv1", "", "."],
    "blocks": ["layer1,layer2", "all", "layer1,,", "layer1,layer1", "x"],
    "level": ["block", "layer", "x"],
    "preset": ["default", "paper", "x"],
    "measure": ["tarantula", "ochiai", "dstar", "x"],
    "corruption": [*CORRUPTIONS, "all", "auto", "haze"],
    "corruptions": ["fog,snow:5", "own", "all", "clean", "fog:x", "fog:9"],
    "seeds": ["0", "0,1", "a", "0,", "1e3"],
    "what": ["models", "datasets", "blocks", "tiers", "layers"],
    "pattern": ["*", "torchvision:mobile*", "[", "[!"],
    "only": ["table5", "fig4", "x"],
    "models": ["resnet18", "resnet18,vgg16", ","],
    "datasets": ["digits", "digits:fog:3", ","],
    "notebook": ["rq3", "x.ipynb"],
    "parameter": ["model=resnet18", "x=1"],
    "folders": [".", "outputs/repair", "nowhere"],
    "repaired": [".", "nowhere"],
    "out": ["new", "new/deep/file.safetensors", "file.npz", ".", "own.safetensors", "own.safetensors/below", "a" * 300],
}
integers = st.one_of(st.integers(-2, 9), st.sampled_from([0, 1, 2**31, 2**64, -(2**63)])).map(str)


@functools.cache
def home() -> Path:
    "A project with an original that nobody has trained."
    folder = Path(tempfile.mkdtemp(prefix="fuzz-home"))
    tier = TIERS["smoke"]
    network = originals.build_network("resnet18", load_dataset("digits"), tier)
    save_weights(network, folder / "own.safetensors")
    save_weights(network, folder / "outputs" / "smoke" / "originals" / "digits-resnet18-s0.safetensors")
    return folder


def enough(*_: object, **__: object) -> None:
    "The last door before work: a command that comes here was understood."
    raise SystemExit(0)


@pytest.fixture(autouse=True, scope="module")
def stub():
    "Whatever trains, predicts, downloads or executes ends the command, and well."
    home()
    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (originals, ("train_original", "predict")),
            (cells, ("predict",)),
            (runs, ("predict",)),
            (localization, ("localize",)),
        ):
            for name in names:
                patch.setattr(module, name, enough)
        for name in ("archrepair.paper.reproduce.execute", "archrepair.paper.reproduce.run_tasks", "archrepair.data.datasets._download"):
            patch.setattr(name, enough)
        yield
    shutil.rmtree(home(), ignore_errors=True)


USUAL = {"tier", "dataset", "out"}  # options that most lines have


def values_of(parameter, sound: bool) -> st.SearchStrategy[str]:
    "Words for a parameter of a command: in a sound line what it takes, else anything."
    names = VALUES.get(parameter.name)
    if sound:
        return st.just(names[0] if names else "1")
    usual = st.sampled_from(names) if names else integers
    return st.one_of(usual, usual, usual, text.map(lambda word: word.lstrip("/")) if parameter.name == "out" else text)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    "A command line, half of them sound but for one value at most."
    name, sound = draw(st.sampled_from(sorted(COMMANDS))), draw(st.booleans())
    parameters = [each for each in COMMANDS[name].params if each.name != "help"]
    odd = draw(st.sampled_from(parameters)) if draw(st.booleans()) else None
    words, last = [name], []
    for parameter in parameters:
        value = draw(values_of(parameter, sound and parameter is not odd))
        if parameter.param_type_name == "argument":
            last += [value] if draw(st.integers(0, 9)) else []
        elif draw(st.integers(0, 4)) >= (1 if parameter.name in USUAL else 4):
            option = draw(st.sampled_from(parameter.opts))
            words += [option] if parameter.is_flag else [option, value]
    if draw(st.integers(0, 9)) == 0:
        more = draw(st.one_of(text, st.sampled_from(["--modle", "--json=1", "-x", "--", "--no-json", "--tier", "--help"])))
        words.insert(draw(st.integers(0, len(words))), more)
    every = [*words, *(["--"] if draw(st.booleans()) and last else []), *last]
    return [word.replace("\0", "") for word in every]  # no system passes a null byte


@given(lines())
@example(["localize", "--tier", "smoke", "-k", str(2**64)])
@example(["evaluate", "--tier", "smoke", "--dataset", f"digits:fog:{'9' * 5000}"])
@example(["evaluate", "--tier", "smoke", "--dataset", "npz:~no-such-user/a.npz"])
@example(["list", "models", "\udcff"])
@example(["corrupt", "--dataset", "digits", "--out", "a" * 300])
@example(["doctor", "--tier", "smoke", "--out", "a" * 300])
@example(["report", "a", "a" * 300])
@example(["compare", "--tier", "smoke", "--dataset", "npz:own.npz", "--blocks", "1", "--json"])
@fuzz(KIND)
def test_commands(words):
    with ground() as folder:
        shutil.copytree(home(), folder, dirs_exist_ok=True)
        here = folder / "a" / "b"  # from where a path may lead upwards and still lie where a command was told to write
        here.mkdir(parents=True)
        (here / "own.safetensors").symlink_to(folder / "own.safetensors")
        os.chdir(here)
        command(KIND, words, folder)
