"""What holds for every method: the network that comes in stays, the one that goes out is what the result says, and a killed run goes on."""
import copy
import dataclasses
import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_state, state_of
from torch import nn

from archrepair.baselines import common
from archrepair.baselines.common import Baseline, Problem, judge, require
from archrepair.blocks import block_names
from archrepair.data import ImageSet
from archrepair.errors import ArchrepairError, TrainingDiverged
from archrepair.evaluation import predict
from archrepair.experiments import METHODS, Cell, method_class, method_of
from archrepair.models import create_model
from archrepair.repair import changes, load
from archrepair.scenario import RepairData
from archrepair.tiers import TIERS
from archrepair.training import CostMeter, Recipe, Rows

# Settings that make a method quick on the digits network, where its own take more than a few seconds.
QUICK: dict[str, dict] = {
    "archrepair": {"search_epochs": 1, "finetune_epochs": 1, "block": "layer3"},
    "retrain": {"epochs": 1},
    "surgical": {"epochs": 1},
}
NAMES = sorted(METHODS)


def make(name: str, **changes):
    return method_class(name)(**QUICK.get(name, {}) | changes)


def same(one: nn.Module, two: nn.Module) -> bool:
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


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
            result = make(name).repair(network, _problem.scenario.data)
            done[name] = SimpleNamespace(result=result, network=network, before=before, quiet=torch.equal(stream, torch.random.get_rng_state()))
        return done[name]

    return get


# --- every method


@pytest.mark.parametrize("name", NAMES)
def test_the_network_that_comes_in_stays(name, repaired):
    got = repaired(name)
    assert_same_state(got.before, got.network)
    assert torch.equal(got.network.layer3[0].conv1.weight.grad, torch.full_like(got.network.layer3[0].conv1.weight, 0.5))
    assert got.quiet, "the global random stream moved"
    own = {p.untyped_storage().data_ptr() for p in got.network.state_dict().values()}
    for network in (got.result.model, got.result.candidates["repaired"]):
        assert not own & {p.untyped_storage().data_ptr() for p in network.state_dict().values()}
        assert not any(m.training for m in network.modules())
        assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_network(name, repaired, _problem):
    "The modes, flags and gradients of the network given do not matter."
    again = make(name).repair(_problem.network, _problem.scenario.data)
    result = repaired(name).result
    assert same(again.candidates["repaired"], result.candidates["repaired"]) and same(again.model, result.model)
    assert again.validation == result.validation and again.chosen == result.chosen
    assert (again.cost.forwards, again.cost.backwards) == (result.cost.forwards, result.cost.backwards)


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_true(name, repaired, _problem):
    result, data = repaired(name).result, _problem.scenario.data
    assert result.method == name and set(result.validation) >= {"original", "repaired"} and result.candidates.keys() == result.validation.keys()
    assert result.accepted == (result.chosen == "repaired") and result.verdict.startswith("accepted" if result.accepted else "not accepted")
    assert same(result.model, result.candidates[result.chosen])
    assert result.changed == changes(_problem.network.state_dict(), result.model.state_dict())
    assert result.cost.forwards > 0 and result.cost.backwards >= 0 and result.cost.seconds > 0
    bf16 = result.config["precision"] == "bf16"
    for who in ("original", "repaired"):
        parts = []
        for part in (data.val, data.val_failures):
            parts.append(float(nn.functional.cross_entropy(predict(result.candidates[who], part, data.transform), part.labels)))
        expected = (1 - data.failure_rate) * parts[0] + data.failure_rate * parts[1]
        assert result.validation[who] == pytest.approx(expected, rel=0.05 if bf16 else 1e-4)
    if result.block is not None:
        outside = [k for k in changes(_problem.network.state_dict(), result.candidates["repaired"].state_dict())
                   if not k.startswith(f"{result.block}.")]
        assert not outside, f"changed beside {result.block}: {outside}"


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says_is_json_and_what_it_saves_comes_back(name, repaired, tmp_path, _problem):
    result = repaired(name).result
    said = json.loads(json.dumps(result.to_dict()))
    assert said["method"] == name and {"seed", "precision", "name"} <= said["config"].keys()
    assert all(isinstance(entry, dict) for entries in said["history"].values() for entry in entries)
    own = dataclasses.replace(result, model=result.candidates["repaired"], chosen="repaired")
    for folder, one in ((tmp_path / "returned", result), (tmp_path / "own", own)):
        assert same(load(one.save(folder), _problem.network), one.model)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_where_it_was(name, repaired, tmp_path, monkeypatch, _problem):
    "Killed after its first checkpoint and called again: the same network, and nothing done twice but preparations."
    from archrepair import training

    def killing(write_atomic):
        def write(path, act):
            write_atomic(path, act)
            raise KeyboardInterrupt
        return write

    with monkeypatch.context() as patch:
        for module in (training, common):
            patch.setattr(module, "write_atomic", killing(module.write_atomic))
        with pytest.raises(KeyboardInterrupt):
            make(name).repair(_problem.network, _problem.scenario.data, checkpoints=tmp_path)
    assert [p for p in tmp_path.iterdir() if p.suffix == ".pt"]
    again, result = make(name).repair(_problem.network, _problem.scenario.data, checkpoints=tmp_path), repaired(name).result
    assert same(again.candidates["repaired"], result.candidates["repaired"])
    passes = again.cost.forwards + again.cost.backwards, result.cost.forwards + result.cost.backwards
    assert passes[0] == pytest.approx(passes[1], rel=0.5)  # what is prepared again is counted again; training is not done twice


@pytest.mark.parametrize("name", NAMES)
def test_the_registry(name):
    kind = method_class(name)
    assert inspect.getdoc(kind) and dataclasses.is_dataclass(kind) and kind().name == name
    tier = TIERS["smoke"]
    made = method_of(Cell(name, tier="smoke", seed=3), tier)
    assert made.seed == 3 and getattr(made, "epochs", 5) == tier.search_epochs + tier.finetune_epochs
    with pytest.raises(ArchrepairError, match=f"unknown option of {name} 'epcohs'"):
        method_of(Cell(name, tier="smoke", options=(("epcohs", 3),)), tier)
    if "block" not in kind.__dataclass_fields__:
        with pytest.raises(ArchrepairError, match=f"{name} does not take a block"):
            method_of(Cell(name, tier="smoke", block="layer1"), tier)
    else:
        assert method_of(Cell(name, tier="smoke", block="layer1"), tier).block == "layer1"
