"""One repair from end to end: what comes in stays, what comes out says what it is, and the better network wins."""
import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import archrepair.repair.archrepair as module
from archrepair.core.errors import ArchrepairError, NoFailures, TrainingDiverged
from archrepair.data.scenario import build_scenario
from archrepair.nas.genotype import Genotype
from archrepair.nas.graph import extract
from archrepair.nas.reading import CannotRelax
from archrepair.networks.blocks import replace_block, split
from archrepair.networks.models import create_model
from archrepair.repair.archrepair import ArchRepair, choose_strategy
from archrepair.repair.conditional import ConditionalRepair
from archrepair.repair.blockdata import layer_names, prepare, prepare_layer
from archrepair.repair.finetuning import PRESETS, finetune
from archrepair.repair.localization import localize
from archrepair.repair.result import RepairResult, changes, load
from archrepair.repair.search import search
from archrepair.training.fit import Recipe
from support.finished import REPAIR, command, furnish
from support.states import assert_same_state, state_of

SETTINGS = dict(strategy="pc-darts", block="layer3", search_epochs=1, finetune_epochs=1)


def returning(result: RepairResult, chosen: str, **changes) -> RepairResult:
    "The same result with another candidate chosen."
    return dataclasses.replace(result, verdict=dataclasses.replace(result.verdict, chosen=chosen), **changes)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.fixture(scope="module")
def result(_problem) -> RepairResult:
    return ArchRepair(**SETTINGS).repair(_problem.network, _problem.scenario.data)


@pytest.fixture(scope="module")
def images(_problem):
    "A few network inputs."
    scenario = _problem.scenario
    return scenario.data.transform(scenario.test.images[:8])


@pytest.fixture(scope="module")
def searched(_problem):
    "A network whose third block has added operations that do something, and its genotype."
    cut = split(_problem.network, "layer3")
    with torch.no_grad():
        example = cut.features(_problem.scenario.data.transform(_problem.scenario.test.images[:2]))
    graph = extract(cut.block, example)
    plain = Genotype.original(graph)
    extra = [e.key for e in graph.edges if e.inherited is None and "sep_conv" in e.candidates][:2]
    choices = tuple("sep_conv" if e.key in extra else c for e, c in zip(graph.edges, plain.choices))
    genotype = Genotype(graph, choices, plain.coefficients, tuple(2 for _ in choices))
    block, generator = genotype.build(cut.block), torch.Generator().manual_seed(3)
    for name, p in block.named_parameters():
        if name.startswith("added"):
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    assert extra and len(block.added) == 2
    return genotype, replace_block(_problem.network, "layer3", block).eval()


# --- the network that comes in

def test_the_network_that_comes_in_stays_and_the_same_seed_gives_the_same_result(_problem, result):
    network = copy.deepcopy(_problem.network)
    network.layer2.train()
    network.layer3[0].bn1.train()
    network.conv1.weight.requires_grad_(False)
    network.layer3[0].conv1.weight.grad = torch.full_like(network.layer3[0].conv1.weight, 0.5)
    before, stream = state_of(network), torch.random.get_rng_state()
    again = ArchRepair(**SETTINGS).repair(network, _problem.scenario.data)
    assert_same_state(before, network)
    assert torch.equal(network.layer3[0].conv1.weight.grad, torch.full_like(network.layer3[0].conv1.weight, 0.5))
    assert torch.equal(stream, torch.random.get_rng_state())
    for name, candidate in result.candidates.items():  # of two runs, every candidate is the same, bit for bit
        assert same(candidate.state_dict(), again.candidates[name].state_dict()), name
    assert same(result.model.state_dict(), again.model.state_dict())
    assert (result.genotype, result.chosen, result.validation) == (again.genotype, again.chosen, again.validation)
    assert (result.cost.forwards, result.cost.backwards) == (again.cost.forwards, again.cost.backwards)
    assert not any(m.training for m in again.model.modules())


def test_the_network_returned_shares_no_memory_with_the_one_given(_problem, result):
    own = {p.untyped_storage().data_ptr() for p in _problem.network.state_dict().values()}
    assert not own & {p.untyped_storage().data_ptr() for p in result.model.state_dict().values()}


def test_another_seed_gives_another_result(_problem, result):
    other = ArchRepair(**SETTINGS | {"search_epochs": 0}, seed=1).repair(_problem.network, _problem.scenario.data)
    third = ArchRepair(**SETTINGS | {"search_epochs": 0}, seed=2).repair(_problem.network, _problem.scenario.data)
    assert other.validation["repaired"] != third.validation["repaired"]


# --- what it says of itself

def test_changed_is_exactly_what_differs_and_lies_in_the_block(_problem, result):
    for chosen, candidate in result.candidates.items():
        before, after = _problem.network.state_dict(), candidate.state_dict()
        said = changes(before, after)
        expected = {}
        for name in before.keys() | after.keys():
            if name not in after:
                expected[name] = "removed"
            elif name not in before or before[name].shape != after[name].shape:
                expected[name] = "added"
            elif not torch.equal(before[name], after[name]):
                expected[name] = f"{int((before[name] != after[name]).sum())}/{after[name].numel()}"
        assert said == expected and all(name.startswith("layer3.") for name in said)
        assert bool(said) == (chosen != "original")
    winner = result.candidates[result.chosen]
    assert result.changed == changes(_problem.network.state_dict(), winner.state_dict())
    assert same(result.model.state_dict(), winner.state_dict())


def test_changes_by_hand():
    before = {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor(3), "c": torch.ones(2), "d": torch.ones(2)}
    after = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(4), "c": torch.ones(3), "e": torch.ones(1)}
    assert changes(before, after) == {"a": "1/2", "b": "1/1", "c": "added", "d": "removed", "e": "added"}
    assert changes(after, copy.deepcopy(after)) == {}


def test_losses_cost_and_history_are_those_of_the_candidates(_problem, result):
    data, loss = _problem.scenario.data, torch.nn.functional.cross_entropy

    def expected(model):
        parts = []
        for part in (data.val, data.val_failures):
            with torch.no_grad():
                parts.append(float(loss(model(data.transform(part.images)), part.labels)))
        return (1 - data.failure_rate) * parts[0] + data.failure_rate * parts[1]

    precise = "fp32" if result.config["precision"] == "fp32" else "bf16"
    for name, candidate in result.candidates.items():
        assert result.validation[name] == pytest.approx(expected(candidate), rel=1e-4 if precise == "fp32" else 0.05)
    assert result.cost.forwards > len(data.train) and result.cost.backwards > 0
    assert result.control_cost.backwards > 0 and result.control_cost.seconds < result.cost.seconds + result.control_cost.seconds
    assert [e["epoch"] for e in result.history["search"]] == [1] and result.history["finetune"][-1]["epoch"] == 1
    assert result.history["control"][-1]["epoch"] == result.config["control_epochs"] > 1  # the search's passes, spent on plain training
    assert (result.config["block"], result.config["localized"], result.localization) == ("layer3", False, None)
    control, own = result.control_cost, result.cost
    assert 0.5 < (control.forwards + control.backwards) / (own.forwards + own.backwards) < 2  # the same budget, but for preparation


def test_everything_it_says_is_json(result):
    said = json.loads(json.dumps(result.to_dict()))
    assert {"method", "block", "accepted", "chosen", "verdict", "rule", "validation", "changed", "history", "cost", "control_cost",
            "config", "genotype", "metrics", "warnings", "footprint", "localization"} == said.keys()
    assert said["accepted"] == (said["chosen"] == "repaired") and set(said["validation"]) == {"original", "repaired", "control"}
    assert set(said["cost"]) == {"forwards", "backwards", "seconds", "cpu_seconds", "peak_bytes"} and said["cost"]["peak_bytes"] > 1 << 20


# --- who wins

@pytest.mark.parametrize(("losses", "winner"), [((1.0, 0.5, 0.7), "repaired"), ((1.0, 0.7, 0.5), "control"), ((0.3, 0.7, 0.5), "original")])
def test_the_winner_is_the_network_returned(_problem, result, monkeypatch, losses, winner):
    "The verbs in the middle are replaced; what is left is who is compared with whom and what comes back."
    others = {name: create_model("resnet18", 10, width=0.125, stem_stride=2, seed=seed) for name, seed in (("repaired", 1), ("control", 2))}
    calls, starts = [], {}

    def tune(prepared, *, start=None, origin=None, epochs, **more):
        name = "repaired" if origin is not None else "control"
        calls.append((name, epochs))
        starts[name] = start
        return SimpleNamespace(model=others[name], val_before=losses[0], val=losses[1 if name == "repaired" else 2], point=1.0,
                               history=SimpleNamespace(epochs=[]))

    found = SimpleNamespace(genotype=result.genotype, block=torch.nn.Identity(), warnings=["a note"], history=[], touch=None)
    monkeypatch.setattr(module, "finetune", tune)
    monkeypatch.setattr(module, "search", lambda *arguments, **more: found)
    got = ArchRepair(**SETTINGS).repair(_problem.network, _problem.scenario.data)
    assert got.chosen == winner and got.accepted == (winner == "repaired") and got.warnings[0] == "a note"
    assert same(got.model.state_dict(), others.get(winner, _problem.network).state_dict())
    assert got.model is not _problem.network and got.candidates["original"] is _problem.network
    assert got.changed == changes(_problem.network.state_dict(), got.model.state_dict()) and bool(got.changed) == (winner != "original")
    assert [name for name, _ in calls] == ["repaired", "control"] and calls[1][1] >= calls[0][1] == SETTINGS["finetune_epochs"]
    assert got.validation == dict(zip(("original", "repaired", "control"), losses))
    fresh = changes(_problem.network.layer3.state_dict(), starts["control"].state_dict())  # as fresh as the searched block's
    assert fresh and all(name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in fresh)


def test_a_search_of_conditional_candidates_touches_nothing_on_which_the_gate_does_not_fire(_problem, tmp_path):
    data = _problem.scenario.data
    negative = lambda images: dataclasses.replace(images, images=255 - images.batch(torch.arange(len(images))))
    data = dataclasses.replace(data, failures=negative(data.failures), val_failures=negative(data.val_failures))
    got = ArchRepair(**SETTINGS | {"search_options": {"candidates": "conditional"}}).repair(_problem.network, data)
    network = got.candidates["repaired"]
    x, fires = torch.cat([data.transform(part.batch(torch.arange(24))) for part in (data.train, data.failures)]), []
    handle = network.layer3.register_forward_pre_hook(lambda block, arguments: fires.append(block.gate(arguments[0])[:, 0, 0, 0]))
    with torch.no_grad():
        answers, expected = network(x), _problem.network(x)
    handle.remove()
    assert 0 < int(fires[0].sum()) < 48 and torch.equal(answers[~fires[0]], expected[~fires[0]])
    assert got.verdict.touch.n == len(data.val) and json.loads(got.genotype.to_json())["gated"] is True
    returning(got, "repaired", model=network).save(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, _problem.network)(x), answers)


def test_where_no_gate_can_tell_weights_are_repaired(_problem):
    got = ArchRepair(**SETTINGS | {"search_options": {"candidates": "conditional"}}).repair(_problem.network, _problem.scenario.data)
    assert got.genotype is None and got.warnings[0].startswith("weights only: no gate on what enters layer3 tells failures")


def test_several_blocks_are_not_searched_but_their_weights_are_repaired(_problem):
    got = ArchRepair(**SETTINGS | {"block": "layer3..layer4"}).repair(_problem.network, _problem.scenario.data)
    assert got.genotype is None and "layer3..layer4 is several blocks" in got.warnings[0]
    assert {name.partition(".")[0] for name in got.changed} <= {"layer3", "layer4"}


def test_a_block_that_cannot_be_relaxed_is_repaired_by_its_weights(_problem, monkeypatch, tmp_path):
    def cannot(*arguments, **more):
        raise CannotRelax("two layers of the block lead from one feature to another")

    monkeypatch.setattr(module, "search", cannot)
    got = ArchRepair(**SETTINGS).repair(_problem.network, _problem.scenario.data)
    assert got.genotype is None and got.warnings[0] == "weights only: two layers of the block lead from one feature to another"
    assert set(got.validation) == {"original", "repaired"} and "search" not in got.history and got.control_cost.backwards == 0
    assert got.model.state_dict().keys() == _problem.network.state_dict().keys()
    weights = ArchRepair(**SETTINGS | {"search_epochs": 0}).repair(_problem.network, _problem.scenario.data)
    assert same(got.model.state_dict(), weights.model.state_dict()) and weights.warnings == got.warnings[1:]
    (tmp_path / "genotype.json").write_text("an earlier repair's")
    got.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["MODEL_CARD.md", "repair.json", "repaired.safetensors"]
    assert same(load(tmp_path, _problem.network).state_dict(), got.model.state_dict())


def test_few_failures_for_validation_are_noted(_problem):
    data = _problem.scenario.data
    assert len(data.val_failures) < 10
    got = ArchRepair(**SETTINGS | {"search_epochs": 0}).repair(_problem.network, data)
    assert [w for w in got.warnings if f"only {len(data.val_failures)} failures are kept for validation" in w]
    more = dataclasses.replace(data, val_failures=data.failures)
    assert ArchRepair(**SETTINGS | {"search_epochs": 0}).repair(_problem.network, more).warnings == []


# --- one layer instead of a block

def test_the_layers_of_a_network(_problem, images):
    names = layer_names(_problem.network, images[:1])
    assert names[:2] == ["layer1.0.conv1", "layer1.0.conv2"] and len(names) == 19 and names[-1] == "layer4.1.conv2"
    inside = [name for name in names if name.startswith("layer2.")]
    assert layer_names(_problem.network, images[:1], ["layer2"]) == inside and "layer2.0.downsample.0" in inside
    assert layer_names(_problem.network, images[:1], ["layer2.0.conv1"]) == ["layer2.0.conv1"]
    with pytest.raises(ArchrepairError, match="layer2.0.bn1 holds no convolution"):
        layer_names(_problem.network, images[:1], ["layer2.0.bn1"])
    with pytest.raises(ArchrepairError, match="layer9"):
        layer_names(_problem.network, images[:1], ["layer9"])


def test_a_layer_owns_the_neurons_behind_its_batchnorm(_problem, images):
    "Counted by hand: outputs of a BatchNorm whose mean over the map is above zero, on images the network gets wrong and right."
    network, data = _problem.network, _problem.scenario.data
    names = layer_names(network, images[:1])
    found = localize(network, data, names)
    assert dict(found.summary["size"]) == {n: network.get_submodule(n).out_channels for n in names}
    assert set(found.neurons["layer"]) == {*names, "conv1"}
    pixels = data.transform(torch.cat([data.failures.images, data.train.images]))
    labels = torch.cat([data.failures.labels, data.train.labels])
    for layer, norm in (("layer2.0.conv1", "layer2.0.bn1"), ("layer3.0.downsample.0", "layer3.0.downsample.1")):
        seen = []
        hook = network.get_submodule(norm).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.mean((2, 3)) > 0))
        with torch.no_grad():
            wrong = network(pixels).argmax(1) != labels
        hook.remove()
        rows = found.neurons[found.neurons["layer"] == layer]
        assert list(rows["Am"]) == seen[0][wrong].sum(0).tolist() and list(rows["Ac"]) == seen[0][~wrong].sum(0).tolist()


@pytest.fixture(scope="module")
def at_layer(_problem) -> RepairResult:
    method = ArchRepair(**SETTINGS | {"block": "layer3", "level": "layer", "search_epochs": 2})
    return method.repair(_problem.network, _problem.scenario.data)


def test_the_most_suspicious_layer_of_a_block_is_searched_alone(_problem, at_layer, images, tmp_path):
    located, network = at_layer.localization, _problem.network
    assert located.blocks == layer_names(network, images[:1], ["layer3"])
    assert at_layer.block == located.block == located.summary["count"].idxmax()
    assert (at_layer.config["level"], at_layer.config["block"], at_layer.config["localized"]) == ("layer", at_layer.block, True)
    graph = at_layer.genotype.graph
    assert (len(graph.nodes), [(e.key, e.inherited) for e in graph.edges]) == (2, [("0_1", ("",))])
    for name, candidate in at_layer.candidates.items():
        assert all(changed.startswith(f"{at_layer.block}.") for changed in changes(network.state_dict(), candidate.state_dict())), name
    again = ArchRepair(**SETTINGS | {"block": at_layer.block, "level": "layer", "search_epochs": 2}).repair(network, _problem.scenario.data)
    assert again.localization is None and again.genotype == at_layer.genotype  # a layer that is named is not looked for
    assert all(same(again.candidates[n].state_dict(), at_layer.candidates[n].state_dict()) for n in again.candidates)
    one = returning(at_layer, "repaired", model=at_layer.candidates["repaired"])
    loaded = load(one.save(tmp_path), network)
    with torch.inference_mode():
        assert torch.equal(loaded(images), one.model(images))


def test_a_layer_is_searched_and_tuned_as_it_would_be_without_the_cut_around_it(_problem):
    data, layer = _problem.scenario.data, "layer3.1.conv1"
    whole, inside = prepare(_problem.network, layer, data), prepare_layer(_problem.network, layer, data)
    assert whole.cut.prefix is None and (whole.share, inside.cut.name) == (1.0, layer) and inside.share < 0.4
    found = [search(_problem.network, layer, prepared=p, epochs=1) for p in (whole, inside)]
    assert same(found[0].block.state_dict(), found[1].block.state_dict()) and found[0].genotype == found[1].genotype
    tuned = [finetune(_problem.network, data, where=layer, start=found[0].block, prepared=p, epochs=1) for p in (whole, inside)]
    assert same(tuned[0].model.state_dict(), tuned[1].model.state_dict()) and tuned[0].val == tuned[1].val
    clean = prepare_layer(create_model("vgg16", 10, width=0.125, stem_stride=2), "features.block2.3", data)
    assert clean.cut.prefix is not None and clean.cut.name == "features.block2.3"  # a chain can be cut anywhere


def test_a_layer_that_no_operation_fits_is_repaired_by_its_weights(_problem):
    class Shrinking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = torch.nn.Conv2d(3, 4, 3, 4), torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU())
            self.head = torch.nn.Linear(4, 10)

        def forward(self, x):
            return self.head(self.body(self.stem(x)).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Shrinking().eval()
    got = ArchRepair(block="body", level="layer", search_epochs=1, finetune_epochs=1).repair(network, _problem.scenario.data)
    assert got.block == "body.0" and got.genotype is None
    assert got.warnings[0] == ("weights only: cannot relax Conv2d: there is nothing to search, since no operation leads from 8×8 to "
                               "6×6 pixels; "
                               "repair its weights instead")


def test_the_layer_level_from_the_command_line(home):
    folder = furnish(home)
    assert command(*REPAIR, "--level", "layer", "--out", home / "layer") == 0
    record = json.loads((home / "layer" / "record.json").read_text())
    assert record["repair"]["config"]["level"] == "layer" and "conv" in record["repair"]["block"]
    assert ["level", "layer"] in record["cell"]["options"] and (folder / "layer" / "report.html").exists()


# --- to a folder and back

@pytest.mark.parametrize("chosen", ["repaired", "control", "original"])
def test_save_and_load(_problem, searched, result, images, chosen, tmp_path):
    genotype, network = searched
    model = {"repaired": network, "original": copy.deepcopy(_problem.network), "control": result.candidates["control"]}[chosen]
    one = returning(result, chosen, genotype=genotype, model=model)
    given = create_model("resnet18", 10, width=0.125, stem_stride=2, seed=9).train()  # its weights do not matter, its shape does
    before = state_of(given)
    again = load(one.save(tmp_path / "new" / "folder"), given)
    assert_same_state(before, given)
    assert same(again.state_dict(), model.state_dict()) and not any(m.training for m in again.modules())
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
        if chosen == "repaired":
            assert not torch.allclose(again(images), _problem.network(images))
    files = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert files == ["MODEL_CARD.md", "genotype.json", "repair.json", "repaired.safetensors"]
    assert Genotype.from_json((tmp_path / "new" / "folder" / "genotype.json").read_text()) == genotype


def test_the_real_result_comes_back(_problem, result, tmp_path):
    assert same(load(result.save(tmp_path), _problem.network).state_dict(), result.model.state_dict())


@pytest.mark.parametrize("spoil", [
    lambda d: (d / "repair.json").unlink(), lambda d: (d / "repair.json").write_text("{"), lambda d: (d / "repair.json").write_text("[]"),
    lambda d: (d / "repair.json").write_text("{}"), lambda d: (d / "genotype.json").unlink(),
    lambda d: (d / "genotype.json").write_text("{}"),
    lambda d: (d / "repaired.safetensors").unlink(), lambda d: (d / "repaired.safetensors").write_bytes(b"\x00" * 100),
    lambda d: (d / "repaired.safetensors").write_bytes((d / "repaired.safetensors").read_bytes()[:-50]),
], ids=["no info", "half info", "list", "empty info", "no genotype", "another genotype", "no weights", "zeros", "truncated"])
def test_a_damaged_folder_is_one_line(_problem, searched, result, tmp_path, spoil):
    genotype, network = searched
    returning(result, "repaired", genotype=genotype, model=network).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ArchrepairError) as error:
        load(tmp_path, _problem.network)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value) or "genotype" in str(error.value)


@pytest.mark.parametrize("other", ["width", "depth", "family"])
@pytest.mark.parametrize("chosen", ["repaired", "control"])
def test_load_on_another_architecture_is_one_line(searched, result, tmp_path, other, chosen):
    genotype, network = searched
    model = network if chosen == "repaired" else result.candidates["control"]
    returning(result, chosen, genotype=genotype, model=model).save(tmp_path)
    name, width = {"width": ("resnet18", 0.25), "depth": ("resnet50", 0.125), "family": ("vgg16", 0.125)}[other]
    with pytest.raises(ArchrepairError) as error:
        load(tmp_path, create_model(name, 10, width=width))
    assert "\n" not in str(error.value)


def test_export_takes_batches_of_any_size(searched, result, images, tmp_path):
    one = dataclasses.replace(result, model=searched[1])
    with torch.inference_mode():
        expected = searched[1](images)
    program = torch.export.load(one.export(tmp_path / "network.pt2", images[:1])).module()
    with torch.inference_mode():
        assert torch.allclose(program(images[:5]), expected[:5], atol=1e-5)


def test_export_says_what_it_lacks(result, images, tmp_path, monkeypatch):
    def absent(*arguments, **more):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(torch.onnx, "export", absent)
    messages = {"network.onnx": r"onnxscript: pip install 'archrepair\[export\]'", "network.h5": ".pt2 or .onnx", "network": ".pt2"}
    for name, expected in messages.items():
        with pytest.raises(ArchrepairError, match=expected) as error:
            result.export(tmp_path / name, images[:2])
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# --- mistakes

def test_a_perfect_network_has_nothing_to_repair(digits, digits_test):
    with pytest.raises(NoFailures, match="no failures"):
        build_scenario(digits, digits_test, torch.ones(len(digits_test), dtype=torch.bool))


@pytest.mark.parametrize("wrong", [
    {"search_epochs": -1}, {"finetune_epochs": -1}, {"finetune_epochs": 1.5}, {"views": 0}, {"failure_views": 0}, {"k": 0},
    {"preset": "papre"}, {"level": "neuron"}])
def test_settings_are_checked_before_any_work(wrong):
    with pytest.raises(ArchrepairError, match=next(iter(wrong))) as error:
        ArchRepair(**wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("wrong", "message"), [({"block": "layer9"}, "layer9.*layer4"), ({"strategy": "pcdarts"}, "pc-darts")])
def test_unknown_names(_problem, untouched, wrong, message):
    with untouched(_problem.network), pytest.raises(ArchrepairError, match=message):
        ArchRepair(**SETTINGS | wrong).repair(_problem.network, _problem.scenario.data)


def test_a_loss_that_is_no_number_leaves_the_network_alone(_problem, tmp_path):
    network = copy.deepcopy(_problem.network)
    network.layer2.train()
    before = state_of(network)
    wild = Recipe(epochs=2, lr=1e38, clip=None, momentum=0.0, schedule="constant")
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        ArchRepair(**SETTINGS | {"search_epochs": 0, "finetune_epochs": 2}, preset=wild).repair(network, _problem.scenario.data)
    assert_same_state(before, network)


def test_settings_of_the_search_reach_it(_problem, monkeypatch):
    seen = {}

    class Seen(Exception):
        pass

    def spy(*args, **options):
        seen.update(options)
        raise Seen

    monkeypatch.setattr(module, "search", spy)
    with pytest.raises(Seen):
        method = ArchRepair(strategy="darts", block="layer2", search_options=(("select", "perturb"), ("order", 2)))
        method.repair(_problem.network, _problem.scenario.data)
    recipe = seen["recipe"]
    assert recipe.select == "perturb" and recipe.strategy_options == {"order": 2} and recipe.strategy == "darts"
    for options, message in (({"select": "best"}, "unknown selection"), ({"order": 5}, "order is 5"),
                             ({"ordr": 2}, "unknown option of the search 'ordr': did you mean 'order'")):
        with pytest.raises(ArchrepairError, match=message):
            ArchRepair(strategy="darts", search_options=options)


def test_grad_is_an_option_and_is_what_localization_weighs_by(problem):
    data = problem.scenario.data
    for grad in ("weight", "activation"):
        method = ArchRepair(strategy="pc-darts", search_epochs=0, finetune_epochs=0, grad=grad, precision="fp32")
        result = method.repair(problem.network, data)
        assert result.config["grad"] == result.localization.settings["grad"] == grad
        assert result.localization.to_dict() == localize(problem.network, data, grad=grad).to_dict()
    with pytest.raises(ArchrepairError, match="unknown grad 'activations': did you mean 'activation'"):
        ArchRepair(grad="activations")


# --- the default

def test_the_default_is_a_repair_behind_a_gate_and_the_papers_preset_is_not():
    assert ArchRepair().strategy == ArchRepair(preset="default", level="block").strategy == "measured"
    assert ArchRepair(preset="paper").strategy == ArchRepair(level="layer").strategy == "pc-darts"
    assert ArchRepair(strategy="snas", preset="paper").strategy == "snas" and choose_strategy("auto", PRESETS["paper"]) == "measured"


def test_its_settings_reach_the_conditional_repair(monkeypatch, _problem):
    seen = {}
    monkeypatch.setattr(ConditionalRepair, "repair", lambda self, *problem, checkpoints: seen.update(vars(self), checkpoints=checkpoints))
    given = dict(block="layer2", form="norm", emulator="none", max_touched=0.1, label="fog", search_epochs=2, finetune_epochs=3, k=7,
                 grad="bias", views=2, failure_views=3, control=False, seed=4, precision="fp32", preset="default")
    options = {"trial_images": 100, "mixed": False, "measure": "drift"}
    method = ArchRepair(**given, search_options=options)
    method.repair(_problem.network, _problem.scenario.data, checkpoints="there")
    assert seen == given | options | {"blocks": None, "name": "archrepair", "checkpoints": "there"}


@pytest.mark.parametrize("wrong, message", [
    ({"strategy": "darts", "form": "norm"}, "form is a setting of strategy measured; strategy darts has no gate"),
    ({"preset": "paper", "max_touched": 0.1}, "max_touched is a setting of strategy measured; strategy pc-darts has no gate"),
    ({"strategy": "measured", "level": "layer"}, "strategy measured repairs blocks; for level=layer expected one of pc-darts"),
    ({"search_options": {"trial_image": 3}}, "unknown option of the search 'trial_image': did you mean 'trial_images'"),
    ({"search_options": {"trial_images": 0}}, "trial_images is 0"),
    ({"strategy": "measure"}, "unknown strategy 'measure': did you mean 'measured'"),
    ({"form": "norms"}, "unknown form 'norms': did you mean 'norm'"), ({"max_touched": 2.0}, "max_touched is 2.0"),
])
def test_settings_of_another_strategy_are_refused(wrong, message):
    with pytest.raises(ArchrepairError, match=message):
        ArchRepair(**wrong)
