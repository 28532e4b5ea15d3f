"""What holds for every method: the network that comes in stays, the one that goes out is what the result says, and a killed run goes on."""
import copy
import dataclasses
import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from archrepair.baselines.parts import common
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import METHODS
from archrepair.core.tiers import TIERS
from archrepair.data.images import Normalize
from archrepair.data.scenario import RepairData
from archrepair.experiments.cells import Cell, method_of
from archrepair.experiments.methods import method_class
from archrepair.networks.conditional import original_of
from archrepair.networks.models import create_model, list_models
from archrepair.repair.result import changes, load
from archrepair.training.evaluation import predict
from archrepair.training.fit import Recipe
from support.states import assert_same_state, same_state, state_of

# Settings that make a method quick on the digits network, where its own take more than a few seconds.
QUICK: dict[str, dict] = {
    "archrepair": {"block": "layer2", "finetune_epochs": 1, "failure_views": 2, "control": False},
    "archrepair:pc-darts": {"strategy": "pc-darts", "search_epochs": 1, "finetune_epochs": 1, "block": "layer3", "failure_views": 1},
    "retrain": {"epochs": 1},
    "finetune": {"epochs": 1},
    "surgical": {"epochs": 1},
    "mode": {"epochs": 2, "rounds": 2, "round_epochs": 1},
    "birdnn": {"epochs": 2},
    "arachne": {"population": 10, "iterations": 4, "positives": 40},
    "sensei": {"epochs": 1},
    "fewshot": {"epochs": 1, "candidates": 2},
    "deeprepair": {"epochs": 1},
    "apricot": {"epochs": 1, "reduced": 2, "subset": 0.2, "sweeps": 1, "retrain_epochs": 1},
}
NAMES = sorted([*METHODS, "archrepair:pc-darts"])  # a method, or a strategy of it


def method_of_name(name: str) -> str:
    return name.partition(":")[0]


def make(name: str, **changes):
    return method_class(method_of_name(name))(**QUICK.get(name, {}) | changes)


def data_of(name: str, problem: SimpleNamespace) -> RepairData:
    "Mistakes on clean digits; the default method repairs nothing where failures have nothing in common."
    return problem.dark if name == "archrepair" else problem.scenario.data


@pytest.fixture(scope="module")
def repaired(_problem):
    "Each method's result, made once; what it did to the network given and to torch's random stream beside it."
    done = {}

    def get(name: str) -> SimpleNamespace:
        if name not in done:
            network = copy.deepcopy(_problem.network)
            network.layer2.train()
            network.conv1.weight.requires_grad_(False)
            network.layer3[0].conv1.weight.grad = torch.full_like(network.layer3[0].conv1.weight, 0.5)
            before, stream = state_of(network), torch.random.get_rng_state()
            result = make(name).repair(network, data_of(name, _problem))
            quiet = torch.equal(stream, torch.random.get_rng_state())
            done[name] = SimpleNamespace(result=result, network=network, before=before, quiet=quiet)
        return done[name]

    return get


# --- every method


@pytest.mark.parametrize("name", NAMES)
def test_the_network_that_comes_in_stays(name, repaired):
    got = repaired(name)
    assert_same_state(got.before, got.network)
    assert torch.equal(got.network.layer3[0].conv1.weight.grad, torch.full_like(got.network.layer3[0].conv1.weight, 0.5))
    assert got.quiet, "the global random stream moved"
    storage = {p.untyped_storage().data_ptr() for p in got.network.state_dict().values()}
    for network in (got.result.model, got.result.candidates["repaired"]):
        assert not storage & {p.untyped_storage().data_ptr() for p in network.state_dict().values()}
        assert not any(m.training for m in network.modules())
        assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_network(name, repaired, _problem):
    "The modes, flags and gradients of the network given do not matter."
    again = make(name).repair(_problem.network, data_of(name, _problem))
    result = repaired(name).result
    assert same_state(again.candidates["repaired"], result.candidates["repaired"]) and same_state(again.model, result.model)
    assert again.validation == result.validation and again.chosen == result.chosen
    assert (again.cost.forwards, again.cost.backwards) == (result.cost.forwards, result.cost.backwards)


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_true(name, repaired, _problem):
    result, data = repaired(name).result, data_of(name, _problem)
    assert result.method == method_of_name(name) and set(result.validation) >= {"original", "repaired"}
    assert result.candidates.keys() == result.validation.keys()
    assert result.accepted == (result.chosen == "repaired")
    assert str(result.verdict).startswith("accepted" if result.accepted else "rejected")
    assert same_state(result.model, result.candidates[result.chosen])
    if name == "archrepair":  # has tests of its own in tests/repair: other names, and other validation images
        return
    assert result.changed == changes(_problem.network.state_dict(), result.model.state_dict())
    assert result.cost.forwards > 0 and result.cost.backwards >= 0 and result.cost.seconds > 0
    precision = result.config["precision"]
    for who in ("original", "repaired"):
        losses = []
        for part in (data.val, data.val_failures):
            logits = predict(result.candidates[who], part, data.transform, precision=precision)
            losses.append(float(nn.functional.cross_entropy(logits, part.labels)))
        expected = (1 - data.failure_rate) * losses[0] + data.failure_rate * losses[1]
        assert result.validation[who] == pytest.approx(expected, rel=0.02 if precision == "bf16" else 1e-4)
    if result.block is not None:
        outside = [k for k in changes(_problem.network.state_dict(), result.candidates["repaired"].state_dict())
                   if not k.startswith(f"{result.block}.")]
        assert not outside, f"changed beside {result.block}: {outside}"


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says_is_json_and_what_it_saves_comes_back(name, repaired, tmp_path, _problem):
    result = repaired(name).result
    record = json.loads(json.dumps(result.to_dict()))
    assert record["method"] == method_of_name(name) and {"seed", "precision", "name"} <= record["config"].keys()
    assert all(isinstance(entry, dict) for entries in record["history"].values() for entry in entries)
    accepted = dataclasses.replace(result.verdict, chosen="repaired")
    of_method = dataclasses.replace(result, model=result.candidates["repaired"], verdict=accepted)
    for folder, one in ((tmp_path / "returned", result), (tmp_path / "of-method", of_method)):
        assert same_state(load(one.save(folder), _problem.network), one.model)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_where_it_was(name, repaired, tmp_path, monkeypatch, _problem):
    "Killed after its first checkpoint and called again: the same network, and nothing done twice but preparations."
    from archrepair.training import fit as training

    def killing(write_atomic):
        def write(path, act):
            write_atomic(path, act)
            raise KeyboardInterrupt
        return write

    with monkeypatch.context() as patch:
        for module in (training, common):
            patch.setattr(module, "write_atomic", killing(module.write_atomic))
        with pytest.raises(KeyboardInterrupt):
            make(name).repair(_problem.network, data_of(name, _problem), checkpoints=tmp_path)
    assert [p for p in tmp_path.iterdir() if p.suffix == ".pt"]
    again, result = make(name).repair(_problem.network, data_of(name, _problem), checkpoints=tmp_path), repaired(name).result
    assert same_state(again.candidates["repaired"], result.candidates["repaired"])
    passes = again.cost.forwards + again.cost.backwards, result.cost.forwards + result.cost.backwards
    assert passes[0] == pytest.approx(passes[1], rel=0.5)  # what is prepared again is counted again; training is not done twice


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_registry(name):
    kind = method_class(name)
    assert inspect.getdoc(kind) and dataclasses.is_dataclass(kind) and kind().name == name
    tier = TIERS["smoke"]
    method = method_of(Cell(name, tier="smoke", seed=3), tier)
    assert method.seed == 3 and getattr(method, "epochs", 5) == tier.search_epochs + tier.finetune_epochs
    with pytest.raises(ArchrepairError, match=f"unknown option of {name} 'epcohs'"):
        method_of(Cell(name, tier="smoke", options=(("epcohs", 3),)), tier)
    if "block" not in kind.__dataclass_fields__:
        with pytest.raises(ArchrepairError, match=f"{name} does not take a block"):
            method_of(Cell(name, tier="smoke", block="layer1"), tier)
    else:
        assert method_of(Cell(name, tier="smoke", block="layer1"), tier).block == "layer1"


# --- the controls


# --- every family


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnet101", "vgg16", "densenet121", "efficientnet_b0"])
@pytest.mark.parametrize("name", [n for n in sorted(METHODS) if n != "archrepair"])
def test_every_method_on_every_network(name, model, _problem):
    "Runs, and returns a network of the same architecture; the network need not be good."
    network = create_model(model, 10, width=0.125, stem_stride=2, seed=1)
    data = _problem.scenario.data
    few = lambda images, n: images.select(torch.arange(min(n, len(images))))
    data = RepairData(few(data.failures, 24), few(data.train, 96), few(data.val, 32), data.transform, data.val_failures, data.failure_rate)
    result = make(name).repair(network, data)
    assert original_of(result.candidates["repaired"]).state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        assert result.model(data.transform(data.val.images[:2])).shape == (2, 10)


@pytest.mark.parametrize("model", list_models())
def test_augmentation_on_every_network(model, digits):
    "The three methods on all six networks of the paper, small: what comes back differs from what came in, in what it should."
    network = create_model(model, 10, image_size=32, width=0.125, stem_stride=2).eval()
    part = lambda a, b: digits.select(torch.arange(a, b))
    data = RepairData(part(0, 12), part(12, 36), part(36, 52), Normalize.of(digits), part(52, 56))
    for name in ("sensei", "fewshot", "deeprepair"):
        method = method_class(name)(epochs=1, keep="last", preset=Recipe(epochs=1, batch_size=18))
        result = method.repair(network, data)
        repaired = result.candidates["repaired"].state_dict()
        changed = {k for k, v in network.state_dict().items() if not torch.equal(v, repaired[k])}
        assert {k for k, p in network.named_parameters() if p.ndim > 1} <= changed, name
        assert all(torch.isfinite(v).all() for v in repaired.values() if v.is_floating_point())
        assert result.cost.backwards >= 36 and all(math.isfinite(v) for v in result.validation.values())
