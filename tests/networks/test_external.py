"""Networks that the code does not know by name, from torchvision, timm and a user's module: repaired from the command line."""
import contextlib
import copy
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import archrepair.experiments.cells as experiments
import archrepair.experiments.originals as originals
from archrepair.core.registry import MODELS
from archrepair.data.datasets import load_dataset
from archrepair.data.images import holdout
from archrepair.deploy.export import export_network
from archrepair.experiments.originals import original
from archrepair.nas.genotype import Genotype
from archrepair.networks.blocks import block_names, replace_block
from archrepair.networks.neurons import watch, wire
from archrepair.repair.archrepair import ArchRepair
from archrepair.repair.localization import localize
from archrepair.repair.result import load
from support.finished import FILES, command, fails

OWN = '''
import torch
from torch import nn
from torchvision.models import VisionTransformer


class Unit(nn.Module):
    "A residual unit without BatchNorm, its activations functions."

    def __init__(self, a, b, stride):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(a, b, 3, stride, 1), nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(2, b)
        self.short = nn.Identity() if a == b else nn.Conv2d(a, b, 1, stride)

    def forward(self, x):
        return nn.functional.gelu(self.norm(self.two(nn.functional.gelu(self.one(x)))) + self.short(x))


class Net(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.begin = nn.Conv2d(3, 8, 3, 2, 1)
        self.units = nn.ModuleList([Unit(8, 8, 1), Unit(8, 16, 2), Unit(16, 16, 1)])
        self.out = nn.Linear(16, n_classes)

    def forward(self, x):
        x = self.begin(x)
        for unit in self.units:
            x = unit(x)
        return self.out(x.mean((2, 3)))


def vit(num_classes):
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=num_classes)


def usual(num_classes, momentum=0.1):
    unit = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b, momentum=momentum), nn.ReLU())
    return nn.Sequential(unit(3, 4), unit(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def slow(num_classes):
    return usual(num_classes, 0.01)


def trained():
    network = Net(10)
    network.load_state_dict(torch.load(__file__.replace("net.py", "w.pt")))
    return network
'''
EPOCHS = ("--tier", "smoke", "--search-epochs", "1", "--finetune-epochs", "2")
SMOKE = (*EPOCHS, "--strategy", "pc-darts")
NETWORKS = ("torchvision:shufflenet_v2_x0_5", "timm:test_efficientnet", "othernets.net:Net")


@functools.cache
def place() -> Path:
    "A folder with a package `othernets` of networks and a few hundred digits; for all tests, which add originals and repairs to it."
    folder = Path(tempfile.mkdtemp())
    (folder / "othernets").mkdir()
    (folder / "othernets" / "net.py").write_text(OWN)
    for split, rows in (("train", slice(0, 600)), ("test", slice(0, 300))):
        digits = load_dataset("digits", split)
        np.savez(folder / f"{split}.npz", images=digits.images[rows].numpy(), labels=digits.labels[rows].numpy())
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch):
    "Every test begins in that folder."
    monkeypatch.chdir(place())
    monkeypatch.setenv("ARCHREPAIR_HOME", str(place()))
    path = list(sys.path)
    yield
    assert sys.path == path, "the search path of modules has changed"


def data() -> str:
    return f"npz:{place()}"


@functools.cache
def repaired(model: str, *options: str) -> SimpleNamespace:
    "One repair by the command line, from an untrained network to its folder."
    folder, out, err = place() / f"repair{len(list(place().iterdir()))}", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command("repair", "--model", model, "--dataset", data(), *SMOKE, "--out", folder, *options)
    assert status == 0, err.getvalue()
    record = json.loads((folder / "record.json").read_text())
    return SimpleNamespace(folder=folder, out=out.getvalue(), err=err.getvalue(), record=record, repair=record["repair"])


# --- three networks, end to end


@pytest.mark.parametrize("model", NETWORKS)
def test_repaired_from_the_command_line(model, capsys, monkeypatch, tmp_path):
    done = repaired(model)
    start = original(model, data(), "smoke")
    assert {p.name for p in done.folder.iterdir()} == FILES | {"genotype.json"} and done.record["cell"]["model"] == model
    assert done.repair["localization"]["blocks"] == block_names(start.network) and done.repair["block"] in block_names(start.network)
    assert done.repair["genotype"]["strategy"] == "pc-darts" and set(done.repair["validation"]) == {"original", "repaired", "control"}
    assert not [w for w in done.repair["warnings"] if "weights only" in w]
    assert f"archrepair on {model}" in done.out and done.repair["verdict"] in done.out
    assert all(name.startswith(f"{done.repair['block']}.") for name in done.repair["changed"])
    assert model in (done.folder / "report.html").read_text()
    assert done.record["metrics"]["after"]["held_out"]["n"] == 150
    evaluated_and_taken_up_again(model, done, capsys, monkeypatch)
    loaded_and_exported(done, start, tmp_path)


def evaluated_and_taken_up_again(model, done, capsys, monkeypatch):
    for module, name in ((originals, "train_original"), (experiments, "run_full")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("was run"))
    for options, when in (([], "before"), (["--repaired", done.folder], "after")):
        capsys.readouterr()
        assert command("evaluate", "--tier", "smoke", "--model", model, "--dataset", data(), *options, "--json") == 0
        assert json.loads(capsys.readouterr().out)[data()] == done.record["metrics"][when]["full"]
    assert command("repair", "--model", model, "--dataset", data(), *SMOKE, "--out", done.folder) == 0
    assert "is complete already" in capsys.readouterr().err
    other = next(n for n in NETWORKS if n != model)
    assert "holds another repair" in fails(capsys, "repair", "--model", other, "--dataset", data(), *SMOKE, "--out", done.folder)


def loaded_and_exported(done, start, tmp_path):
    before, x = copy.deepcopy(start.network.state_dict()), start.transform(load_dataset(data(), "test").batch(torch.arange(6)))
    network = load(done.folder, start.network)
    assert all(torch.equal(v, before[k]) for k, v in start.network.state_dict().items())
    exported = torch.export.load(export_network(network, tmp_path / "r.pt2", x)).module()
    with torch.no_grad():
        for batch in (x, x[:1]):
            assert torch.allclose(exported(batch), network(batch), atol=1e-4)
        genotype = Genotype.from_json((done.folder / "genotype.json").read_text())
        neutral = genotype.build(copy.deepcopy(start.network.get_submodule(done.repair["block"])), neutral=True)
        again = replace_block(start.network, done.repair["block"], neutral).eval()
        assert torch.allclose(again(x), start.network(x), atol=1e-5)
        assert (done.repair["chosen"] == "original") == torch.equal(network(x), start.network(x))


def test_names_of_files_are_safe_and_told_apart():
    repaired("othernets.net:Net")
    names = [p.name for p in (place() / "outputs").rglob("*")] + [p.name for p in repaired("othernets.net:Net").folder.iterdir()]
    assert len(names) >= 8 and not [n for n in names if not re.fullmatch(r"[\w~.,=+-]+", n)]
    models = (*NETWORKS, "shufflenet_v2_x0_5", "timm:resnet18.a1_in1k")
    paths = [experiments.Cell(model=m, tier="smoke").path(Path("o")).as_posix() for m in models]
    assert len(set(paths)) == len(models) and all(p.count("/") == 5 and ":" not in p for p in paths)
    assert paths[2].startswith("o/smoke/records/digits/othernets.net~Net/")


def test_the_installed_command_finds_modules_in_the_current_directory():
    script = Path(sys.executable).with_name("archrepair")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "archrepair"]  # only `-m` puts this directory on the path
    done = subprocess.run([*start, "list", "blocks", "--model", "othernets.net:Net"], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and [line.split() for line in done.stdout.splitlines()] == [[f"units.{i}", "Unit"] for i in range(3)]


@pytest.mark.parametrize(("arguments", "rows"), [
    (["models", "torchvision:mobile*"],
     [["torchvision:mobilenet_v2"], ["torchvision:mobilenet_v3_large"], ["torchvision:mobilenet_v3_small"]]),
    (["models", "timm:test_vit?"], [["timm:test_vit2"], ["timm:test_vit3"], ["timm:test_vit4"]]),
    (["models", "resnet18"], [["resnet18", "ResNet-18,", "in", "four", "stages"]]),
    (["blocks", "--model", "torchvision:shufflenet_v2_x0_5"], [[f"stage{i}", "Sequential"] for i in (2, 3, 4)]),
    (["blocks", "units.[01]", "--model", "othernets.net:Net"], [["units.0", "Unit"], ["units.1", "Unit"]]),
    (["tiers", "li*"], None), (["models"], None),
])
def test_lists(capsys, arguments, rows):
    capsys.readouterr()
    assert command("list", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    if rows is not None:
        assert [line.split() for line in lines] == rows
    elif arguments == ["models"]:
        assert [line.split()[0] for line in lines][-4:] == [
            "torchvision:NAME", "timm:NAME", "hub:OWNER/REPO:ENTRY", "package.module:factory"]
        assert len(lines) == len(MODELS) + 4
        assert max(map(len, lines)) < 130
    else:
        assert len(lines) == 1 and lines[0].startswith("lite ")


@pytest.mark.parametrize(("arguments", "message"), [
    (["models", "torchvision:x*"], r"no models match 'torchvision:x\*'"), (["tiers", "x"], "no tiers match 'x'"),
    (["models", "keras:*"], "unknown library of networks 'keras'.*known: torchvision, timm"),
    (["blocks", "--model", "othernets.net:Nte"], "did you mean 'Net'"),
    (["blocks", "--model", "torchvision:alexnot"], "did you mean 'torchvision:alexnet'"),
])
def test_lists_of_nothing(capsys, arguments, message):
    assert re.search(message, fails(capsys, "list", *arguments))


# --- what cannot be searched


def test_a_transformer_is_repaired_by_its_weights_and_everything_says_so(capsys):
    done = repaired("othernets.net:vit")
    (why,) = [w for w in done.repair["warnings"] if w.startswith("weights only: ")]
    assert "cannot relax EncoderBlock" in why and "self_attention (MultiheadAttention)" in why and "\n" not in why
    assert done.repair["genotype"] is None and set(done.repair["validation"]) == {"original", "repaired"}
    assert done.repair["block"] in ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")
    assert f"note: {why}" in done.err and done.repair["verdict"] in done.out
    assert not done.repair["accepted"] or "weights only" in done.repair["verdict"] and "control" not in done.repair["verdict"]
    assert "weights only: cannot relax EncoderBlock" in (done.folder / "report.html").read_text()
    assert {p.name for p in done.folder.iterdir()} == FILES
    capsys.readouterr()
    assert command("repair", "--model", "othernets.net:vit", "--dataset", data(), *SMOKE, "--out", done.folder, "--json") == 0
    assert why in json.loads(capsys.readouterr().out)["repair"]["warnings"]
    start = original("othernets.net:vit", data(), "smoke")
    x = start.transform(load_dataset(data(), "test").batch(torch.arange(5)))
    with torch.no_grad():
        assert torch.equal(load(done.folder, start.network)(x), start.network(x)) == (done.repair["chosen"] == "original")


# --- which block


@pytest.mark.parametrize("blocks", ["units.0,units.1", "units.2", "units.1.two, units.0.one"])
def test_candidates_for_localization(capsys, blocks):
    names = [name.strip() for name in blocks.split(",")]
    repaired("othernets.net:Net")
    capsys.readouterr()
    assert command("localize", "--tier", "smoke", "--model", "othernets.net:Net", "--dataset", data(), "--blocks", blocks, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == names and found["block"] in names
    if len(names) == 2:
        done = repaired("othernets.net:Net", "--blocks", blocks, "--search-epochs", "0")
        assert done.repair["block"] == found["block"] and done.repair["localization"]["blocks"] == names
        assert done.repair["config"]["blocks"] == names


def test_a_single_layer_is_a_block():
    done = repaired("othernets.net:Net", "--block", "units.1.two")
    assert done.repair["genotype"] is not None and done.repair["localization"] is None
    assert all(name.startswith("units.1.two.") for name in done.repair["changed"])
    assert bool(done.repair["changed"]) == (done.repair["chosen"] != "original")


@pytest.mark.parametrize(("options", "message"), [
    (["--blocks", "units.0,units.7"], "unknown block 'units.7': did you mean 'units.[012]'.*known: units.0, units.1, units.2"),
    (["--blocks", ""], "unknown block ''"),
    (["--block", "units"], "block units is a ModuleList.*name one of its parts: units.0, units.1, units.2"),
    (["--block", "units.1", "--blocks", "units.1"], "expected one of the two"),
    (["--blocks", "units.0,units.0.one"], "is a part of block units.0"),
    (["--model", "othernets.net:vit", "--block", "encoder.layers.encoder_layer_0.self_attention.out_proj"], "is never called"),
    (["--method", "retrain", "--blocks", "units.0"], "blocks"),
])
def test_mistakes_about_blocks(capsys, options, message):
    model = [] if "--model" in options else ["--model", "othernets.net:Net"]
    repaired("othernets.net:vit" if "--model" in options else "othernets.net:Net")
    settings = EPOCHS if "--method" in options else SMOKE
    assert re.search(message, fails(capsys, "repair", *model, "--dataset", data(), *settings, "--out", place() / "no", *options))
    assert not list(place().glob("no/*.*json"))


def test_block_and_candidates_are_fields_of_the_method(problem):
    method = ArchRepair(strategy="pc-darts", blocks=("layer1", "layer2"), search_epochs=0, finetune_epochs=1)
    result = method.repair(problem.network, problem.scenario.data)
    assert result.block in ("layer1", "layer2") and result.localization.blocks == ["layer1", "layer2"]


# --- a factory that brings trained weights


def test_trained_weights_are_repaired_and_not_trained_again(capsys, monkeypatch):
    start = original("othernets.net:Net", data(), "smoke")
    torch.save(start.network.state_dict(), place() / "othernets" / "w.pt")
    kept = set((place() / "outputs" / "smoke" / "originals").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(originals, "train_original", lambda *a, **k: pytest.fail("was trained"))
        again = original("othernets.net:trained", data(), "smoke", seed=5)
        done = repaired("othernets.net:trained", "--search-epochs", "0")
    assert all(torch.equal(v, again.network.state_dict()[k]) for k, v in start.network.state_dict().items())
    assert done.record["metrics"]["before"] == repaired("othernets.net:Net").record["metrics"]["before"]
    assert "othernets.net:trained has trained weights" in done.err
    new = {p.name for p in set((place() / "outputs" / "smoke" / "originals").iterdir()) - kept}
    assert all(name.endswith("-own.safetensors") for name in new) and len(new) == 2  # a seed each
    calls = []
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: calls.append(a))
    asked = ("--tier", "smoke", "--model", "othernets.net:trained", "--dataset", data())
    assert command("train", *asked, "--out", place() / "t.safetensors") == 0
    assert len(calls) == 1, "`train` trains what it is given"
    capsys.readouterr()


# --- a network made for a longer training


@pytest.mark.parametrize("name", ["slow", "usual"])
def test_statistics_that_move_too_slowly_are_gathered_anew(monkeypatch, name, tmp_path):
    "torchvision's mobile networks keep 99 % of a running mean at every step: after a short training it is still zero."
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: None)
    start = original(f"othernets.net:{name}", data(), "smoke", out=tmp_path / "w.safetensors")
    seen = start.train.select(holdout(start.train.labels, 0.1, 0)[0])
    with torch.no_grad():
        z = start.network[0][0](start.transform(seen.batch(torch.arange(len(seen)))))
    norm = start.network[0][1]
    if name == "usual":
        assert not norm.running_mean.any() and (norm.running_var == 1).all()
    else:
        assert torch.allclose(norm.running_mean, z.mean((0, 2, 3)), atol=0.02) and norm.running_mean.abs().max() > 0.05
        assert torch.allclose(norm.running_var, z.var((0, 2, 3)), rtol=0.1) and norm.momentum == 0.01
    assert not any(m.training for m in start.network.modules())


# --- neurons


def test_a_normalization_that_activates_is_read_before_its_activation(quiet_stream):
    "timm's BatchNormAct2d returns what is left after its ReLU: all of it looks active."
    from timm.layers import BatchNormAct2d

    with torch.random.fork_rng():
        network = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), BatchNormAct2d(6), nn.Conv2d(6, 4, 1), BatchNormAct2d(4, apply_act=False),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for norm in (network[1], network[3]):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    wiring, seen = wire(network, x[:1]), {}
    with torch.no_grad():
        with watch(network, wiring, lambda layer, z, view: seen.setdefault(layer, view(z).clone())):
            logits = network(x)
        normal = lambda norm, z: (z - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        one = normal(network[1], network[0](x))
        two = normal(network[3], network[2](one.relu()))
    assert list(wiring.layers.items()) == [("0", 6), ("2", 4)] and torch.equal(logits, network(x))
    assert torch.allclose(seen["0"], one.flatten(2), atol=1e-5) and torch.allclose(seen["2"], two.flatten(2), atol=1e-5)
    assert (seen["0"] < 0).any() and not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize("model", ["timm:test_efficientnet", "othernets.net:vit", "othernets.net:Net"])
def test_neurons_are_neither_all_on_nor_all_off(model):
    "With fused BatchNorm, without any, and on tokens."
    from archrepair.experiments.cells import Cell, scenario_of

    repaired(model)
    start, scenario = scenario_of(Cell(model=model, dataset=data(), tier="smoke"))
    found = localize(start.network, scenario.data)
    n = found.neurons
    active = ((n["Am"] + n["Ac"]) / (n["Am"] + n["Ac"] + n["Nm"] + n["Nc"])).groupby(n["layer"]).mean()
    assert active.between(0.15, 0.85).all(), active
    assert set(n["block"]) >= set(block_names(start.network))
