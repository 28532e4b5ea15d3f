"""Fine-tuning changes what it names and nothing else, and by default never makes matters worse."""
import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.data.scenario import RepairData
from archrepair.networks.blocks import replace_block
from archrepair.repair.blockdata import BlockData, prepare
from archrepair.repair.finetuning import PRESETS, finetune
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import validation_loss
from archrepair.training.fit import Recipe
from archrepair.training.rows import image_features

FAST = dict(epochs=1, batch_size=64)


@pytest.fixture
def data(problem) -> RepairData:
    return problem.scenario.data.subset(130)


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    a, b = before.state_dict(), after.state_dict()
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


def loss(model: nn.Module, data: RepairData) -> float:
    return validation_loss(model, tuple(image_features(s, data.transform) for s in (data.val, data.val_failures)), data.failure_rate)


# --- what changes

@pytest.fixture
def learning(monkeypatch):
    "Every validation is better than the one before, so the weights of the last epoch are those that come out."
    losses = itertools.count(0, -1)
    monkeypatch.setattr(BlockData, "validate", lambda prepared, tail: float(next(losses)))


def test_block_level_changes_the_block_with_its_statistics(problem, data, learning):
    tuned = finetune(problem.network, data, where="layer3", line=(1.0,), lr=0.05, **FAST)
    names = {n for n in problem.network.state_dict() if n.startswith("layer3.")}
    assert changed(problem.network, tuned.model) == names and tuned.history.selected_epoch == 1


def test_layer_level_changes_one_layer_and_no_statistics(problem, data, learning):
    tuned = finetune(problem.network, data, level="layer", where="layer3.1.conv2", line=(1.0,), lr=0.05, **FAST)
    assert changed(problem.network, tuned.model) == {"layer3.1.conv2.weight"}


def test_layers_outside_every_block_can_be_trained(problem, data, learning):
    for where, names in (("fc", {"fc.weight", "fc.bias"}), ("conv1", {"conv1.weight"})):
        tuned = finetune(problem.network, data, level="layer", where=where, line=(1.0,), lr=0.02, **FAST)
        assert changed(problem.network, tuned.model) == names


@pytest.mark.parametrize(("layer", "channel"), [("layer2.0.conv1", 0), ("layer4.1.conv2", 7), ("fc", 9)])
def test_neuron_level_changes_one_row(problem, data, learning, layer, channel):
    tuned = finetune(problem.network, data, level="neuron", where=f"{layer}:{channel}", line=(1.0,), lr=0.05, momentum=0.9,
                     weight_decay=0.1, **FAST)
    names = {f"{layer}.weight"} | ({"fc.bias"} if layer == "fc" else set())
    assert changed(problem.network, tuned.model) == names
    for name in names:
        differs = problem.network.state_dict()[name] != tuned.model.state_dict()[name]
        rows = differs.flatten(1).any(1) if differs.ndim > 1 else differs
        assert rows.nonzero().tolist() == [[channel]]


def test_network_level_changes_everything(problem, learning):
    tuned = finetune(problem.network, problem.scenario.data, level="network", line=(1.0,), **FAST)
    assert changed(problem.network, tuned.model) == set(problem.network.state_dict()) and tuned.where is None


@pytest.mark.parametrize("level", ["neuron", "layer", "block", "network"])
def test_the_model_that_comes_in_is_never_changed(problem, data, untouched, quiet_stream, level):
    where = {"neuron": "layer4.0.conv1:3", "layer": "layer4.0.conv1", "block": "layer4", "network": None}[level]
    model = copy.deepcopy(problem.network).train()
    model.conv1.requires_grad_(False)
    with untouched(model):
        tuned = finetune(model, data.subset(64), level=level, where=where, **FAST)
        tuned.model(torch.zeros(1, 3, 32, 32))
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in tuned.model.parameters()}
    flags = {n: p.requires_grad for n, p in tuned.model.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}, "what could be trained can be trained again"
    assert not any(m.training for m in tuned.model.modules())


# --- how well


def test_default_never_validates_worse_than_the_original(problem, data):
    before = loss(problem.network, data)
    for lr in (0.01, 30.0):
        for level, where in (("block", "layer4"), ("network", None)):
            tuned = finetune(problem.network, data, level=level, where=where, lr=lr, **FAST)
            assert tuned.val <= tuned.val_before == pytest.approx(before, rel=1e-4)
            assert loss(tuned.model, data) == pytest.approx(tuned.val, rel=1e-4), "the loss told is that of the network returned"
    assert changed(problem.network, tuned.model) == set(), "an absurd rate gives the original back, bit for bit"


def test_default_repairs_failures(problem):
    data = problem.scenario.data
    tuned = finetune(problem.network, data, where="layer3", epochs=3)
    assert tuned.val < tuned.val_before - 0.02 and tuned.point > 0 and tuned.history.selected_epoch > 0


def test_the_point_on_the_line_is_where_it_says(problem, data):
    end = finetune(problem.network, data, where="layer4", line=(1.0,), lr=0.05, **FAST)
    half = finetune(problem.network, data, where="layer4", line=(0.5,), lr=0.05, **FAST)
    a, b, mixed = (m.state_dict() for m in (problem.network, end.model, half.model))
    assert end.point == 1 and half.point == 0.5
    for name, value in a.items():
        if value.is_floating_point():
            assert torch.allclose(mixed[name], value + 0.5 * (b[name] - value), atol=1e-6), name
    best = finetune(problem.network, data, where="layer4", line=(0.5, 1.0), lr=0.05, **FAST)
    assert best.val == min(end.val, half.val) and best.point == (0.5 if half.val < end.val else 1.0)


def test_a_block_to_begin_from_and_the_origin_of_the_line(problem, data):
    start = copy.deepcopy(problem.network.layer4)
    with torch.no_grad():
        start[0].conv1.weight.mul_(0.5)
    kept = copy.deepcopy(start.state_dict())
    tuned = finetune(problem.network, data, where="layer4", start=start, line=(1e-9, 1.0), origin=problem.network.layer4, lr=0.0, **FAST)
    assert tuned.history.epochs[0]["val"] == pytest.approx(loss(replace_block(problem.network, "layer4", start), data), rel=1e-4)
    assert all(torch.equal(v, kept[k]) for k, v in start.state_dict().items()), "the block given is not trained in place"
    assert tuned.val_before == pytest.approx(loss(problem.network, data), rel=1e-4) and tuned.point in (1e-9, 1.0)
    if tuned.point < 1:
        assert torch.allclose(tuned.model.layer4[0].conv1.weight, problem.network.layer4[0].conv1.weight, atol=1e-6)


def test_same_seed_same_network(problem, data):
    a, b, c = (finetune(problem.network, data, where="layer4", seed=s, line=(1.0,), lr=0.03, **FAST).model for s in (1, 1, 2))
    assert not changed(a, b) and changed(a, c)


# --- options


def test_the_papers_preset_is_that_of_the_paper(problem, data):
    paper = PRESETS["paper"]
    assert (paper.epochs, paper.lr, paper.weight_decay, paper.batch_size, paper.patience) == (500, 0.1, 5e-4, 128, 10)
    assert paper.failure_ratio is None and paper.imitation == 0
    assert PRESETS["default"].failure_ratio and PRESETS["default"].imitation
    tuned = finetune(problem.network, data, where="layer4", preset="paper", **FAST)
    assert tuned.point == 1.0


def test_a_recipe_of_ones_own(problem, data):
    recipe = Recipe(epochs=3, lr=0.02, batch_size=64)
    tuned = finetune(problem.network, data, where="layer4", preset=recipe, epochs=1)
    assert [e["epoch"] for e in tuned.history.epochs] == [0, 1]


def test_prepared_features_are_shared_and_must_be_of_the_same_block(problem, data):
    prepared = prepare(problem.network, "layer4", data)
    a, b = (finetune(problem.network, data, where="layer4", prepared=p, **FAST) for p in (prepared, None))
    assert not changed(a.model, b.model) and a.cost is prepared.meter
    inner = finetune(problem.network, data, level="layer", where="layer4.1.conv1", prepared=prepared, **FAST)
    assert changed(problem.network, inner.model) <= {"layer4.1.conv1.weight"}
    for level, where in (("block", "layer3"), ("network", None), ("layer", "fc")):
        with pytest.raises(ArchrepairError, match="prepared features are those of layer4"):
            finetune(problem.network, data, level=level, where=where, prepared=prepared, **FAST)


def test_cost_counts_preparation_and_training(problem, data):
    meter = CostMeter()
    tuned = finetune(problem.network, data, where="layer4", meter=meter, **FAST)
    n = sum(map(len, (data.train, data.failures, data.val, data.val_failures)))
    assert tuned.cost is meter and meter.forwards > n and 0 < meter.backwards < n and meter.seconds > 0


def test_a_killed_fine_tuning_resumes(problem, data, tmp_path, monkeypatch):
    import archrepair.repair.finetuning as module

    straight = finetune(problem.network, data, where="layer4", epochs=2, batch_size=64)
    whole, calls = module.fit, []

    def killed(*args, **options):
        def stop(epoch, step):
            calls.append(epoch)
            if epoch == 2:
                raise KeyboardInterrupt
        return whole(*args, **options, before_step=stop)

    monkeypatch.setattr(module, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(problem.network, data, where="layer4", epochs=2, batch_size=64, checkpoint=tmp_path / "c.pt")
    monkeypatch.setattr(module, "fit", whole)
    resumed = finetune(problem.network, data, where="layer4", epochs=2, batch_size=64, checkpoint=tmp_path / "c.pt")
    assert 1 in calls and not changed(straight.model, resumed.model) and (straight.point, straight.val) == (resumed.point, resumed.val)


def test_networks_without_blocks_still_have_layers(data):
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    tuned = finetune(model, data, level="layer", where="1", line=(1.0,), **FAST)
    assert changed(model, tuned.model) == {"1.weight", "1.bias"}


# --- mistakes


@pytest.mark.parametrize(("change", "message"), [
    ({"level": "blok"}, "unknown level 'blok': did you mean 'block'"), ({"where": None}, "level block needs `where`"),
    ({"where": "layer9"}, "unknown block 'layer9'"), ({"level": "layer"}, "nothing to train|unknown block"),
    ({"level": "layer", "where": "layer3.9.conv1"}, "unknown block"), ({"level": "layer", "where": None}, "level layer needs"),
    ({"level": "neuron", "where": "layer3.0.conv1"}, "no neuron"), ({"level": "neuron", "where": "layer3.0.conv1:999"}, "no neuron"),
    ({"level": "neuron", "where": "layer3.0.conv1:-1"}, "no neuron"), ({"level": "neuron", "where": "layer3.0.conv1:x"}, "no neuron"),
    ({"level": "neuron", "where": "layer3.0.bn1:3"}, "no neuron"), ({"level": "neuron", "where": "layer3.0.relu:3"}, "no neuron"),
    ({"level": "neuron", "where": None}, "layer:channel"), ({"preset": "papr"}, "unknown preset 'papr': did you mean 'paper'"),
], ids=str)
def test_mistakes_in_one_line(problem, data, untouched, change, message):
    arguments = {"where": "relu"} | change
    with untouched(problem.network), pytest.raises(ArchrepairError, match=message) as caught:
        finetune(problem.network, data.subset(20), **arguments, **FAST)
    assert "\n" not in str(caught.value)


def test_images_of_the_wrong_kind_are_refused_before_any_work(problem, data):
    with pytest.raises(ArchrepairError, match="not among the classes"):
        replace(data, val=replace(data.val, classes=tuple(f"other {c}" for c in data.val.classes)))
