"""The repair set as a block sees it equals the repair set as the network sees it."""
import copy

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.data.scenario import RepairData
from archrepair.networks.models import create_model
from archrepair.repair.blockdata import prepare, prepare_layer
from archrepair.repair.finetuning import finetune
from archrepair.repair.search import search
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import predict, validation_loss
from archrepair.training.rows import image_features


@pytest.fixture(scope="module")
def prepared(_problem):
    meter = CostMeter()
    return prepare(_problem.network, "layer3", _problem.scenario.data, meter=meter)


def test_the_originals_answers_come_out_of_the_cache_bit_for_bit(problem, prepared):
    data = problem.scenario.data
    for name, images in {"train": data.train, "failures": data.failures, "val": data.val, "val_failures": data.val_failures}.items():
        assert torch.equal(prepared.logits[name], predict(problem.network, images, data.transform)), name
        assert torch.equal(prepared.parts[name].labels, images.labels)


def test_preparing_leaves_the_network_alone(problem, untouched, quiet_stream):
    model = copy.deepcopy(problem.network).train()
    with untouched(model):
        made = prepare(model, "layer4", problem.scenario.data)
        made.tail().block.requires_grad_(True)
        for p in made.tail().parameters():
            p.data.add_(1)


def test_rows_hold_the_failures_last_with_answers_and_marks(problem, prepared):
    data, rows = problem.scenario.data, prepared.rows()
    assert rows.failures == len(data.failures) and len(rows) == len(data.train) + len(data.failures)
    assert torch.equal(rows.labels, torch.cat([data.train.labels, data.failures.labels]))
    assert torch.equal(rows.imitate.bool(), rows.teacher.argmax(1) == rows.labels)
    assert not rows.imitate[-rows.failures:].any(), "a failure is nothing to imitate"


def test_the_halves_are_disjoint_complete_and_hold_half_of_the_failures(prepared):
    seen = []
    for half in (0, 1):
        rows = prepared.rows(half, seed=4)
        assert abs(rows.failures - len(prepared.parts["failures"]) / 2) <= 1
        x, order = rows.inputs(torch.arange(len(rows)))
        seen += [tuple(r.flatten().tolist()) for r in x]
        with torch.inference_mode():
            answers = prepared.tail()(x)
        assert torch.allclose(answers, rows.teacher[order], atol=1e-4), "answers belong to their rows"
    x, _ = prepared.rows().inputs(torch.arange(len(prepared.rows())))
    assert sorted(seen) == sorted(tuple(r.flatten().tolist()) for r in x)
    assert prepared.rows(0, seed=4).labels.tolist() == prepared.rows(0, seed=4).labels.tolist() != prepared.rows(0, seed=5).labels.tolist()


def test_a_tail_is_a_copy_of_which_the_block_alone_can_learn(prepared):
    one, two = prepared.tail(), prepared.tail()
    assert {n for n, p in one.named_parameters() if p.requires_grad} == {n for n, _ in one.named_parameters() if n.startswith("block.")}
    assert not one.training and one.block is not two.block and one.block is not prepared.cut.block
    own = nn.Identity()
    assert prepared.tail(own).block is own


def test_validation_equals_that_of_the_whole_network(problem, prepared):
    data = problem.scenario.data
    parts = tuple(image_features(s, data.transform) for s in (data.val, data.val_failures))
    assert prepared.validate(prepared.tail()) == pytest.approx(validation_loss(problem.network, parts, data.failure_rate), rel=1e-5)


def test_cost_of_the_prefix_and_the_tail_add_up_to_one_pass(problem, prepared):
    data = problem.scenario.data
    n = sum(map(len, (data.train, data.failures, data.val, data.val_failures)))
    fresh = prepare(problem.network, "layer3", data, meter=CostMeter())
    assert 0 < fresh.share < 1 and fresh.meter.backwards == 0
    assert n <= fresh.meter.forwards <= n + 4  # one more image a part, to learn the shape


def test_early_blocks_have_more_of_the_work_behind_them(problem):
    shares = [prepare(problem.network, f"layer{i}", problem.scenario.data.subset(20)).share for i in (1, 4)]
    assert 1 > shares[0] > shares[1] > 0


def test_the_whole_network_and_networks_that_cannot_be_cut(problem):
    data = problem.scenario.data
    whole = prepare(problem.network, None, data)
    assert whole.cut is None and whole.share == 1 and all(p.requires_grad for p in whole.tail().parameters())

    class Uncut(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.shape[0] > 0 and x.max() > -100 else self.inner(x)

    other = prepare(Uncut(copy.deepcopy(problem.network)), "inner.layer3", data)
    assert other.cut.prefix is None and other.share == 1 and torch.equal(other.logits["val"], whole.logits["val"])
    tail = other.tail()
    assert {n for n, p in tail.named_parameters() if p.requires_grad} == {n for n, _ in tail.named_parameters() if ".layer3." in n}


def test_views_of_failures_are_rows_of_their_own(problem):
    data = problem.scenario.data
    made = prepare(problem.network, "layer4", data, views=2, failure_views=3)
    assert made.parts["train"].views == 2 and len(made.parts["failures"]) == 3 * len(data.failures)
    assert made.rows().failures == 3 * len(data.failures) and len(made.logits["failures"]) == 3 * len(data.failures)
    assert made.parts["val"].views == 1


def test_features_in_a_file(problem, prepared, tmp_path):
    made = prepare(problem.network, "layer3", problem.scenario.data, store="file", folder=tmp_path)
    assert len(list(tmp_path.glob("*.features"))) == 4 and torch.equal(made.logits["val"], prepared.logits["val"])


# --- the parcel that verbs take

def test_a_parcel_knows_whose_it_is(problem, prepared):
    data = problem.scenario.data
    the_same = RepairData(data.failures, data.train, data.val, data.transform, data.val_failures)
    prepared.check(copy.deepcopy(problem.network), "layer3", the_same)
    changed = copy.deepcopy(problem.network)
    with torch.no_grad():
        changed.fc.bias[0] += 1
    wider = create_model("resnet18", 10, width=0.25)
    for network, block, images, message in ((None, "layer1", None, "features are those of layer3; expected those of layer1"),
                                            (changed, None, None, "another network"), (wider, None, None, "another network"),
                                            (None, None, data.subset(20), "another repair set")):
        with pytest.raises(ArchrepairError, match=message):
            prepared.check(network, block, images)


@pytest.mark.parametrize("verb", [search, finetune])
def test_verbs_take_a_parcel_and_refuse_that_of_another_block(problem, prepared, verb):
    where = "block" if verb is search else "where"
    short = {"epochs": 1, "batch_size": 64}
    network = lambda result: (result.block if verb is search else result.model).state_dict()
    one = network(verb(prepared, **short))
    two = network(verb(problem.network, data=problem.scenario.data, **{where: "layer3"}, **short))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for arguments in ((prepared,), (problem.network,)):
        with pytest.raises(ArchrepairError, match="features are those of layer3; expected those of layer1"):
            verb(*arguments, **{where: "layer1"}, prepared=prepared, **short)


def test_statistics_are_gathered_anew_from_the_repair_set_alone(problem, prepared):
    block = prepared.recalibrate(copy.deepcopy(prepared.split.block), 64)
    again = prepared.recalibrate(copy.deepcopy(prepared.split.block), 64)
    before, after, twice = (module.state_dict() for module in (prepared.split.block, block, again))
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved <= {"running_mean", "running_var", "num_batches_tracked"} and "running_mean" in moved
    assert all(torch.equal(after[name], twice[name]) for name in after) and not block.training


@pytest.mark.parametrize("block", ["layer3", None])
def test_rows_of_other_images_are_what_a_part_of_them_would_be(problem, block):
    data = problem.scenario.data
    prepared = prepare(problem.network, block, data)
    before, rows = prepared.meter.forwards, prepared.rows_of(data.val)
    every = torch.arange(len(data.val))
    labels, answers, imitate = rows.answers(every)
    assert torch.allclose(rows.inputs(every)[0], prepared.parts["val"].batch(every)) and torch.equal(labels, data.val.labels)
    assert torch.allclose(answers, prepared.logits["val"], atol=1e-5) and torch.equal(imitate, (answers.argmax(1) == labels).float())
    assert rows.failures == 0 and prepared.meter.forwards - before == pytest.approx(len(data.val), rel=0.01)


def test_rows_of_other_images_are_refused_at_the_level_of_a_layer(problem):
    prepared = prepare_layer(problem.network, "layer3.0.conv2", problem.scenario.data)
    with pytest.raises(ArchrepairError, match="layer3.0.conv2 lies inside the block that was cut"):
        prepared.rows_of(problem.scenario.data.val)
