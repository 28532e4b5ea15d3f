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
from archrepair.baselines.parts.common import Baseline, Problem, judge, require
from archrepair.core.errors import ArchrepairError
from archrepair.core.tiers import TIERS
from archrepair.data.scenario import RepairData
from archrepair.experiments.cells import Cell, method_of
from archrepair.experiments.methods import METHODS, method_class
from archrepair.networks.blocks import block_names
from archrepair.networks.models import create_model
from archrepair.repair.result import changes, load
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import predict
from archrepair.training.fit import Recipe
from support.states import assert_same_state, state_of

# Settings that make a method quick on the digits network, where its own take more than a few seconds.
QUICK: dict[str, dict] = {
    "archrepair": {"search_epochs": 1, "finetune_epochs": 1, "block": "layer3"},
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
    again = make(name).repair(_problem.network, _problem.scenario.data)
    result = repaired(name).result
    assert same(again.candidates["repaired"], result.candidates["repaired"]) and same(again.model, result.model)
    assert again.validation == result.validation and again.chosen == result.chosen
    assert (again.cost.forwards, again.cost.backwards) == (result.cost.forwards, result.cost.backwards)


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_true(name, repaired, _problem):
    result, data = repaired(name).result, _problem.scenario.data
    assert result.method == name and set(result.validation) >= {"original", "repaired"}
    assert result.candidates.keys() == result.validation.keys()
    assert result.accepted == (result.chosen == "repaired")
    assert result.verdict.startswith("accepted" if result.accepted else "not accepted")
    assert same(result.model, result.candidates[result.chosen])
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
    assert record["method"] == name and {"seed", "precision", "name"} <= record["config"].keys()
    assert all(isinstance(entry, dict) for entries in record["history"].values() for entry in entries)
    of_method = dataclasses.replace(result, model=result.candidates["repaired"], chosen="repaired")
    for folder, one in ((tmp_path / "returned", result), (tmp_path / "of-method", of_method)):
        assert same(load(one.save(folder), _problem.network), one.model)


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
    method = method_of(Cell(name, tier="smoke", seed=3), tier)
    assert method.seed == 3 and getattr(method, "epochs", 5) == tier.search_epochs + tier.finetune_epochs
    with pytest.raises(ArchrepairError, match=f"unknown option of {name} 'epcohs'"):
        method_of(Cell(name, tier="smoke", options=(("epcohs", 3),)), tier)
    if "block" not in kind.__dataclass_fields__:
        with pytest.raises(ArchrepairError, match=f"{name} does not take a block"):
            method_of(Cell(name, tier="smoke", block="layer1"), tier)
    else:
        assert method_of(Cell(name, tier="smoke", block="layer1"), tier).block == "layer1"


# --- the frame


@dataclasses.dataclass
class Step(Baseline):
    "Adds to the classifier's bias, in steps that are kept; for tests of the frame."

    steps: int = 4
    size: float = 0.0
    die_at: int = -1
    name: str = "step"

    def run_method(self, problem: Problem) -> nn.Module:
        network = problem.network()
        state = problem.resume("steps") or {"done": 0, "bias": network.fc.bias.detach().clone()}
        for i in range(state["done"], self.steps):
            if i == self.die_at:
                raise KeyboardInterrupt
            problem.meter.add(10, 3, share=0.5)
            noise = torch.rand(len(state["bias"]), generator=problem.generator(f"step {i}"))
            state = {"done": i + 1, "bias": state["bias"] + self.size * noise}
            problem.save_checkpoint("steps", **state)
        network.fc.bias.data = state["bias"]
        problem.findings["steps"], problem.history["steps"] = state["done"], [{"step": state["done"]}]
        problem.warnings.append("a note")
        return network


def test_a_network_that_did_not_change_is_accepted_and_costs_what_was_counted(_problem):
    result = Step().repair(_problem.network, _problem.scenario.data)
    data = _problem.scenario.data
    assert result.accepted and result.changed == {} and result.validation["original"] == result.validation["repaired"]
    assert result.cost.forwards == 4 * 5 + 2 * (len(data.val) + len(data.val_failures)) and result.cost.backwards == 4 * 1.5
    assert result.config["steps"] == 4 and result.config["size"] == 0.0
    assert result.warnings[0] == "a note" and result.history == {"steps": [{"step": 4}]}
    assert (result.cost.as_dict()["seconds"] > 0) and result.control_cost.forwards == 0 and result.genotype is None


def test_a_worse_network_is_a_candidate_but_not_returned(_problem):
    result = Step(size=50.0).repair(_problem.network, _problem.scenario.data)
    own = result.candidates["repaired"]
    assert not result.accepted and result.chosen == "original" and same(result.model, _problem.network) and result.changed == {}
    assert changes(_problem.network.state_dict(), own.state_dict()) == {"fc.bias": "10/10"} and result.model is not _problem.network
    nothing = Step(size=math.nan).repair(_problem.network, _problem.scenario.data)
    assert nothing.chosen == "original" and "is no number" in nothing.verdict


def test_a_checkpoint_goes_on_and_counts_once(_problem, tmp_path):
    data, one_go = _problem.scenario.data, Step(size=0.01).repair(_problem.network, _problem.scenario.data)
    with pytest.raises(KeyboardInterrupt):
        Step(size=0.01, die_at=3).repair(_problem.network, data, checkpoints=tmp_path)
    with pytest.raises(ArchrepairError, match="run with other settings; remove it"):
        Step(size=0.02).repair(_problem.network, data, checkpoints=tmp_path)
    path = tmp_path / "steps.pt"
    content = torch.load(path, weights_only=True)
    content["settings"] = json.dumps(dataclasses.asdict(Step(size=0.01)), sort_keys=True)
    content["cost"][2] += 1000
    torch.save(content, path)
    again = Step(size=0.01).repair(_problem.network, data, checkpoints=tmp_path)
    assert same(again.candidates["repaired"], one_go.candidates["repaired"])
    assert (again.cost.forwards, again.cost.backwards) == (one_go.cost.forwards, one_go.cost.backwards) and 1000 < again.cost.seconds < 1100
    path.write_text("half")
    with pytest.raises(ArchrepairError, match="cannot resume from .*steps.pt .*remove it to start afresh"):
        Step(size=0.01).repair(_problem.network, data, checkpoints=tmp_path)


def test_a_network_with_other_parameters_is_refused(_problem):
    class Wider(Step):
        def run_method(self, problem):
            network = problem.network()
            network.extra = nn.Linear(2, 2)
            return network

    with pytest.raises(TypeError, match="fold what was added"):
        Wider().repair(_problem.network, _problem.scenario.data)


def test_few_validation_failures_are_a_warning(_problem):
    data = dataclasses.replace(_problem.scenario.data, val_failures=_problem.scenario.data.val_failures.select(torch.arange(2)))
    assert "only 2 failures are kept for validation" in Step().repair(_problem.network, data).warnings[-1]


@pytest.mark.parametrize(("before", "after", "chosen"), [
    (1.0, 0.5, "repaired"), (0.5, 0.5, "repaired"), (0.5, 0.6, "original"), (0.5, math.nan, "original"),
    (math.nan, 0.5, "repaired"), (math.inf, 9.0, "repaired"), (math.nan, math.nan, "original")])
def test_who_is_returned(before, after, chosen):
    winner, verdict = judge({"original": before, "repaired": after}, "x")
    assert winner == chosen and verdict.startswith("accepted" if chosen == "repaired" else "not accepted") and "\n" not in verdict


def test_settings_are_checked():
    wrong = (("steps", -1, 0), ("steps", 1.5, 0), ("steps", "3", 0), ("steps", True, 0), ("size", -0.1, 0.0), ("size", math.nan, 0.0))
    for name, value, bound in wrong:
        kind = "number" if isinstance(bound, float) else "whole number"
        with pytest.raises(ArchrepairError, match=f"{name} is .*; expected a {kind} from {bound}"):
            require(Step(**{name: value}), **{name: bound})
    require(Step(steps=0, size=1), steps=0, size=0.0)


def test_a_problem_answers_once_and_in_order(_problem):
    problem = Problem(copy.deepcopy(_problem.network), _problem.scenario.data)
    data = problem.data
    assert torch.equal(problem.logits("val"), problem.logits("val")) and problem.meter.forwards == len(data.val)
    assert not problem.correct("failures").any()  # that is what failures are
    rows = problem.rows(failure_views=3, teacher=True)
    assert len(rows) == len(data.train) + 3 * len(data.failures) and rows.failures == 3 * len(data.failures)
    assert torch.equal(rows.labels, torch.cat([data.train.labels, data.failures.labels.repeat(3)]))
    assert torch.equal(rows.teacher[-len(data.failures):], problem.logits("failures"))
    assert rows.imitate.sum() == problem.correct("train").sum()
    assert problem.rows().teacher is None
    assert torch.equal(problem.rows().inputs(torch.tensor([0]))[0], data.transform(data.train.images[:1]))
    draw = lambda purpose, seed=0: torch.rand(4, generator=dataclasses.replace(problem, seed=seed).generator(purpose))
    assert torch.equal(draw("a"), draw("a")) and not torch.equal(draw("a"), draw("b")) and not torch.equal(draw("a"), draw("a", 1))
    assert all(p.requires_grad for p in problem.network().parameters()) and problem.network() is not problem.original
    assert problem.at("x") is None and problem.resume("x") is None and problem.save_checkpoint("x", a=1) is None


def test_a_problem_trains_with_the_one_loop(_problem, tmp_path):
    from archrepair.training.fit import fit

    problem = Problem(copy.deepcopy(_problem.network), _problem.scenario.data, checkpoints=tmp_path)
    network, other, recipe = problem.network(), problem.network(), Recipe(epochs=1, lr=0.01)
    history = problem.train(network, problem.rows(), recipe, "tuning")
    fit(other, problem.rows(), recipe, validate=lambda: problem.validate(other))
    assert same(network, other) and problem.history["tuning"] == history.epochs and (tmp_path / "tuning.pt").exists()
    assert history.epochs[0]["val"] == pytest.approx(problem.validate(problem.original))


def test_time_is_counted_once():
    meter = CostMeter()
    with meter.running():
        with meter.running(), meter.running():
            sum(range(100_000))
        inside = meter.seconds
    assert inside == 0 and meter.seconds > 0
    spent = meter.seconds
    with pytest.raises(ZeroDivisionError), meter.running():
        1 / 0  # noqa: B018
    with meter.running():
        pass
    assert meter.seconds > spent and "runs" not in str(meter.as_dict())


# --- the controls


def test_retrain_is_fine_tuning_of_everything(_problem, repaired):
    from archrepair.repair.finetuning import finetune

    result = repaired("retrain").result
    plain = finetune(_problem.network, _problem.scenario.data, level="network", epochs=1, precision=result.config["precision"])
    assert same(plain.model, result.candidates["repaired"])
    assert result.validation["repaired"] == plain.val and result.config["point"] == plain.point
    assert result.cost.backwards == plain.cost.backwards > 0 and result.block is None
    none = make("retrain", epochs=0).repair(_problem.network, _problem.scenario.data)
    assert same(none.candidates["repaired"], _problem.network) and none.cost.backwards == 0
    views = make("retrain", failure_views=2).repair(_problem.network, _problem.scenario.data)
    assert views.cost.backwards > result.cost.backwards


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("retrain", {"preset": "papre"}, "did you mean 'paper'"), ("retrain", {"epochs": -1}, "epochs is -1"),
    ("retrain", {"views": 0}, "views is 0"), ("surgical", {"variant": "blok"}, "did you mean 'block'"),
    ("surgical", {"preset": "x"}, "unknown preset"), ("surgical", {"epochs": 1.0}, "epochs is 1.0"),
    ("surgical", {"variant": "auto-rgn", "block": "layer1"}, "tunes every layer and takes no block")])
def test_controls_check_their_settings(name, settings, message):
    with pytest.raises(ArchrepairError, match=message):
        method_class(name)(**settings)


def test_gradients_of_the_failures_equal_a_plain_loop(_problem):
    from archrepair.baselines.surgical import failure_gradient

    problem = Problem(copy.deepcopy(_problem.network).eval(), _problem.scenario.data)
    gradient, failures = failure_gradient(problem, batch_size=7), problem.data.failures
    network = copy.deepcopy(problem.original).requires_grad_(True)
    for image, label in zip(failures.images, failures.labels):  # one at a time
        nn.functional.cross_entropy(network(problem.data.transform(image[None])), label[None]).backward()
    for name, p in network.named_parameters():
        assert torch.allclose(gradient[name], p.grad / len(failures), atol=1e-5, rtol=1e-3), name
    assert (problem.meter.forwards, problem.meter.backwards) == (len(failures), len(failures))


def test_relative_norms_by_hand():
    from archrepair.baselines.surgical import layer_rates, layers, relative_norms

    network = nn.Sequential(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2)), nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0][0].weight.copy_(torch.tensor([[3.0, 0.0]]))
        network[0][1].weight.copy_(torch.tensor([[4.0], [0.0]]))
        network[2].weight.zero_()
    gradient = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    gradient["0.0.weight"], gradient["0.1.weight"] = torch.tensor([[6.0, 0.0]]), torch.tensor([[0.0], [8.0]])
    gradient["0.0.bias"] += 100  # biases and BatchNorm do not count
    gradient["1.weight"] += 100
    assert relative_norms(network, gradient, {"all": network[0], "last": network[2]}) == {"all": 10 / 5, "last": 0.0}  # 0 of 0 weights
    assert set(layers(network)) == {"0.0", "0.1", "2"}
    assert relative_norms(network, gradient, layers(network)) == {"0.0": 2.0, "0.1": 2.0, "2": 0.0}
    groups = layer_rates(network, {"0.0": 1.0, "2": 0.25}, Recipe(epochs=1, lr=0.1, weight_decay=0.01))
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [(1, 0.1, 0.01), (1, 0.1, 0.0), (1, 0.025, 0.01)]
    with pytest.raises(ArchrepairError, match="no weights to tune"):
        relative_norms(network, gradient, {"norm": network[1]})
    gradient["0.0.weight"][0, 0] = math.nan
    with pytest.raises(ArchrepairError, match="not finite"):
        relative_norms(network, gradient, layers(network))


def test_surgery_is_on_the_block_with_the_largest_norm(_problem, repaired):
    result = repaired("surgical").result
    norms = result.config["relative_norms"]
    assert set(norms) == set(block_names(_problem.network)) and result.block == max(norms, key=norms.get)
    fixed = make("surgical", block="layer4").repair(_problem.network, _problem.scenario.data)
    assert fixed.block == "layer4" and "relative_norms" not in fixed.config


def test_auto_rgn_tunes_layers_by_their_norms(_problem, monkeypatch):
    "Every layer has its rate, in proportion to its norm; what belongs to no layer is not trained."
    from archrepair.baselines import surgical

    calls = []

    def spy(network, data, **settings):
        calls.append(settings)
        return finetune(network, data, **settings)

    finetune = surgical.finetune
    monkeypatch.setattr(surgical, "finetune", spy)
    result = make("surgical", variant="auto-rgn").repair(_problem.network, _problem.scenario.data)
    [settings], norms = calls, result.config["relative_norms"]
    assert result.block is None and settings["level"] == "network"
    network = copy.deepcopy(_problem.network)
    rates = {id(p): group["lr"] for group in settings["groups"](network) for p in group["params"]}
    layer_of = {f"{name}.{kind}": name for name in norms for kind in ("weight", "bias")}
    rate = surgical.PRESETS["default"].lr / max(norms.values())
    for name, p in network.named_parameters():
        assert (id(p) in rates) == (name in layer_of), name
        if name in layer_of:
            assert rates[id(p)] == pytest.approx(rate * norms[layer_of[name]])
    before, after = _problem.network.state_dict(), result.candidates["repaired"].state_dict()
    affine = [k for k in before if "bn" in k and k.endswith((".weight", ".bias"))]
    assert affine and all(torch.equal(before[k], after[k]) for k in affine)


def test_without_gradients_everything_is_tuned_alike(_problem):
    "A network that makes no loss on its failures has no relative norms; it is then fine-tuned as a whole."
    from archrepair.baselines import surgical

    with pytest.MonkeyPatch.context() as patch:
        zero = lambda problem: {name: torch.zeros_like(p) for name, p in problem.original.named_parameters()}
        patch.setattr(surgical, "failure_gradient", zero)
        got = make("surgical", variant="auto-rgn").repair(_problem.network, _problem.scenario.data)
    whole = make("retrain").repair(_problem.network, _problem.scenario.data)
    assert same(got.candidates["repaired"], whole.candidates["repaired"])


# --- every family


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnet101", "vgg16", "densenet121", "efficientnet_b0"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "archrepair"])
def test_every_method_on_every_network(name, model, _problem):
    "Runs, and returns a network of the same architecture; the network need not be good."
    network = create_model(model, 10, width=0.125, stem_stride=2, seed=1)
    data = _problem.scenario.data
    few = lambda images, n: images.select(torch.arange(min(n, len(images))))
    data = RepairData(few(data.failures, 24), few(data.train, 96), few(data.val, 32), data.transform, data.val_failures, data.failure_rate)
    result = make(name).repair(network, data)
    assert result.candidates["repaired"].state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        assert result.model(data.transform(data.val.images[:2])).shape == (2, 10)
