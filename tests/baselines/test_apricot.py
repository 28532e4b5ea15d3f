"""Apricot: one weighted sum is the loop over the failures, undivided failures count for nothing, and without a step nothing moves."""
import copy
import math

import pytest
import torch
from torch import nn

from archrepair.baselines.apricot import DIRECTIONS, PRESETS, Apricot, adjust, combination, flat, fresh, signs_of, unflatten
from archrepair.baselines.parts import common
from archrepair.baselines.parts.common import Problem
from archrepair.core.errors import ArchrepairError
from archrepair.data.scenario import RepairData
from archrepair.networks.blocks import freeze
from archrepair.networks.models import create_model
from archrepair.repair.result import changes
from support.families import NETWORKS

QUICK = {"epochs": 1, "reduced": 2, "subset": 0.1, "reduced_epochs": 1, "sweeps": 1, "retrain_epochs": 1}


@pytest.fixture
def small(problem):
    "The failures and 300 of the training images."
    data = problem.scenario.data
    return RepairData(data.failures, data.train.select(torch.arange(300)), data.val.select(torch.arange(60)), data.transform,
                      data.val_failures, data.failure_rate)


def hits(failures, networks, seed=0, rate=0.4):
    return torch.rand(failures, networks, generator=torch.Generator().manual_seed(seed)) < rate


def one_by_one(w, networks, right, eta, direction="both"):
    "The published loop: means of the networks that are right (C) and wrong (I) on a failure, a step towards the one, away from the other."
    w = w.clone()
    for row in right:
        if row.all() or not row.any():
            continue
        share_right, share_wrong = row.double().mean(), (~row).double().mean()
        towards, away = share_right * (networks[row].mean(0) - w), share_wrong * (networks[~row].mean(0) - w)
        step = {"both": towards - away, "correct": towards, "incorrect": -away, "reversed": away - towards}[direction]
        w = w + eta * step
    return w


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("eta", [1e-3, 0.05, 0.3])
def test_one_sum_is_the_loop_over_the_failures(direction, eta):
    right = hits(60, 5)
    networks, w = torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 30).double()
    alpha, beta = combination(signs_of(right, direction), eta)
    expected = one_by_one(w, networks, right, eta, direction)
    assert torch.allclose(alpha * w + beta @ networks, expected, rtol=1e-9, atol=1e-9)
    assert alpha + float(beta.sum()) == pytest.approx(1, abs=1e-9)
    assert not torch.allclose(expected, w, atol=1e-4)


def test_the_order_of_the_failures_counts():
    right = hits(30, 4)
    forth, back = (combination(signs_of(r), 0.3) for r in (right, right.flip(0)))
    assert forth[0] == pytest.approx(back[0]) and not torch.allclose(forth[1], back[1])


def test_failures_that_do_not_divide_the_networks_give_no_direction():
    right = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    for direction, (towards, away) in DIRECTIONS.items():
        assert signs_of(right, direction).tolist() == [[0, 0, 0], [0, 0, 0], [towards, away, towards]]
    assert combination(signs_of(right[:2]), 0.5)[0] == 1 and not combination(signs_of(right[:2]), 0.5)[1].any()
    together = combination(signs_of(right), 0.5)
    alone = combination(signs_of(right[2:]), 0.5)
    assert together[0] == alone[0] and torch.equal(together[1], alone[1])


def test_steps_that_move_nothing():
    nothing = torch.zeros(7, 4).double()
    for signs, eta in ((nothing[:0], 1.0), (nothing, 1.0), (signs_of(hits(9, 4)), 0.0), (nothing[:, :0], 0.1)):
        alpha, beta = combination(signs, eta)
        assert alpha == 1 and not beta.any() and len(beta) == signs.shape[1]


def test_as_many_right_as_wrong_is_no_reason_to_stay_where_their_means_differ():
    "The step is η(p_c − p_i)(m − w) where both halves have the mean m, so 3 : 1 moves and 2 : 2 does not; w = m never does."
    networks, w = torch.ones(4, 1).double(), torch.zeros(1).double()
    move = lambda row: (lambda a, b: float(a * w + b @ networks))(*combination(signs_of(torch.tensor([row])), 0.1))
    assert move([True, True, False, False]) == 0
    assert move([True, True, True, False]) == pytest.approx(0.1 * (0.75 - 0.25))
    alpha, beta = combination(signs_of(torch.tensor([[True, True, True, False]])), 0.1)
    assert float(alpha * networks[0] + beta @ networks) == pytest.approx(1)


def test_parameters_as_one_vector(problem):
    network = copy.deepcopy(problem.network).to(memory_format=torch.channels_last)
    values = flat(network)
    assert torch.equal(values, flat(problem.network)), "the order of memory is not the order of values"
    assert len(values) == sum(p.numel() for p in network.parameters())
    before = values.clone()
    moved = unflatten(values * 2, copy.deepcopy(network))
    assert all(torch.equal(a * 2, b) for a, b in zip(network.parameters(), moved.parameters())) and torch.equal(flat(network), before)


def test_a_fresh_network_is_drawn_anew(problem, quiet_stream):
    one, two, other = fresh(problem.network, 1), fresh(problem.network, 1), fresh(problem.network, 2)
    assert torch.equal(flat(one), flat(two)) and not torch.equal(flat(one), flat(other))
    for name, p in problem.network.named_parameters():
        if p.ndim > 1:
            assert not torch.equal(p, dict(one.named_parameters())[name]), name
    assert not one.bn1.running_mean.any() and one.bn1.num_batches_tracked == 0 and problem.network.bn1.running_mean.any()


# --- the method


def problem_of(problem, seed=0):
    return Problem(freeze(copy.deepcopy(problem.network)), problem.scenario.data, seed=seed)


def test_an_adjustment_moves_all_parameters_and_gathers_statistics_anew(problem):
    one = problem_of(problem)
    network, rows = one.network(), one.rows()
    others = torch.stack([flat(fresh(problem.network, s)) for s in (0, 1, 2)])
    signs = signs_of(torch.tensor([[True, False, False], [True, True, False]]))
    moved = adjust(one, network, others, signs, rows, 0.3)
    alpha, beta = combination(signs, 0.3)
    expected = alpha * flat(problem.network) + beta.float() @ others
    assert torch.allclose(flat(network), expected, atol=1e-6)
    assert moved == pytest.approx(float((expected - flat(problem.network)).norm() / flat(problem.network).norm()), rel=1e-4)
    assert one.meter.forwards == min(2000, len(rows))
    first = network.bn1
    with torch.no_grad():
        sample = torch.randperm(len(rows), generator=one.generator("statistics"))[:2000]
        seen = torch.stack([network.conv1(rows.inputs(some)[0]).mean((0, 2, 3)) for some in sample.split(250)]).mean(0)
    assert torch.allclose(first.running_mean, seen, atol=1e-4)
    assert not any(m.training for m in network.modules())


def test_without_a_step_and_without_retraining_it_is_the_identity(problem, small):
    result = Apricot(eta=0.0, retrain_epochs=0, reduced=2, subset=0.1, reduced_epochs=1).repair(problem.network, small)
    assert not changes(problem.network.state_dict(), result.candidates["repaired"].state_dict()), "buffers included"
    assert all(entry["moved"] == 0 and not entry["kept"] for entry in result.history["adjustments"])


@pytest.mark.parametrize("start", ["hot", "scratch"])
def test_a_repair(problem, small, start):
    data = small
    result = Apricot(**QUICK | {"start": start, "sweeps": 2, "reduced": 3}).repair(problem.network, data)
    reduced, adjustments = result.history["reduced"], result.history["adjustments"]
    assert [r["network"] for r in reduced] == [0, 1, 2] and len({r["training_loss"] for r in reduced}) == 3
    assert all(0 <= r["right"] <= 1 for r in reduced)
    assert 0 <= result.config["partition_rate"] <= 1
    best = result.validation["original"]
    assert [entry["epoch"] for entry in adjustments] == list(range(1, len(adjustments) + 1))
    for entry in adjustments:
        assert entry["divided"] <= entry["failures"] <= len(data.failures) and entry["val"] <= entry["adjusted"]
        assert entry["kept"] == (entry["val"] < best - 1e-9)
        best = min(best, entry["val"])
    assert result.validation["repaired"] == pytest.approx(best, rel=1e-5) and result.accepted
    assert sum(p.shape != q.shape for p, q in zip(problem.network.parameters(), result.model.parameters())) == 0


def test_what_it_costs(problem, small):
    data = small
    result = Apricot(**QUICK).repair(problem.network, data)
    subset, repair_set, failures = 0.1 * len(data.train), len(data.train) + len(data.failures), len(data.failures)
    val = len(data.val) + len(data.val_failures)
    assert result.cost.backwards == pytest.approx(2 * subset + repair_set, rel=0.1)
    moved = bool(result.history["adjustments"][0]["moved"])
    assert result.cost.forwards == pytest.approx(result.cost.backwards + 3 * failures + 5 * val + moved * repair_set, rel=0.02)


def test_the_failures_are_taken_in_batches(problem, small):
    data = small
    n = len(data.failures)
    result = Apricot(**QUICK | {"batch": 20, "retrain_epochs": 0, "patience": 50, "sweeps": 2}).repair(problem.network, data)
    adjustments = result.history["adjustments"]
    assert len(adjustments) == 2 * math.ceil(n / 20) and all(entry["failures"] <= 20 for entry in adjustments)
    still = {"batch": 20, "retrain_epochs": 0, "eta": 0.0, "precision": "fp32"}  # nothing moves, so every failure stays one
    seen = Apricot(**QUICK | still | {"patience": 50}).repair(problem.network, data)
    assert sum(entry["failures"] for entry in seen.history["adjustments"]) == n, "each failure once per sweep"
    short = Apricot(**QUICK | still | {"patience": 2}).repair(problem.network, data)
    assert len(short.history["adjustments"]) == 2


def test_networks_that_agree_are_warned_of(problem, small):
    "Hot networks that were not trained at all are the original: wrong on every failure."
    result = Apricot(start="hot", reduced_epochs=0, reduced=2, retrain_epochs=0).repair(problem.network, small)
    assert result.config["partition_rate"] == 0 and any("divided over 0.0 % of the failures" in w for w in result.warnings)
    assert not changes(problem.network.state_dict(), result.candidates["repaired"].state_dict())


def test_an_adjustment_that_destroys_the_network_is_undone(problem, small):
    result = Apricot(**QUICK | {"lr": 1e30, "reduced_epochs": 0}).repair(problem.network, small)
    (entry,) = result.history["adjustments"]
    assert not entry["kept"] and math.isnan(entry["val"]) and any("adjustment 1 was given up" in w for w in result.warnings)
    assert not changes(problem.network.state_dict(), result.candidates["repaired"].state_dict())


@pytest.mark.parametrize("writes", [2, 3, 4, 6])
def test_killed_anywhere_it_goes_on_where_it_was(problem, small, tmp_path, monkeypatch, writes):
    data, method = small, lambda: Apricot(**QUICK | {"sweeps": 2})
    whole = method().repair(problem.network, data)
    from archrepair.training import fit as training
    written = []

    def dying(write_atomic):
        def write(path, act):
            write_atomic(path, act)
            written.append(path)
            if len(written) == writes:
                raise KeyboardInterrupt
        return write

    with monkeypatch.context() as patch:
        for module in (training, common):
            patch.setattr(module, "write_atomic", dying(module.write_atomic))
        with pytest.raises(KeyboardInterrupt):
            method().repair(problem.network, data, checkpoints=tmp_path)
    again = method().repair(problem.network, data, checkpoints=tmp_path)
    assert torch.equal(flat(again.candidates["repaired"]), flat(whole.candidates["repaired"]))
    assert again.history["reduced"] == whole.history["reduced"] and len(again.history["adjustments"]) == len(whole.history["adjustments"])
    assert again.cost.backwards == whole.cost.backwards
    assert again.cost.forwards == pytest.approx(whole.cost.forwards, rel=0.15)  # the original is validated again
    assert {p.stem for p in tmp_path.iterdir()} == {"reduced-0", "reduced-1", "sweeps"}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name, digits):
    some = digits.select(torch.arange(60))
    data = RepairData.of(some.select(torch.arange(10)), some.select(torch.arange(10, 60)))
    network = create_model(name, 10, width=0.125, stem_stride=2).eval()
    result = Apricot(**QUICK | {"subset": 0.4, "eta": 0.1}).repair(network, data)
    assert all(math.isfinite(entry["val"]) for entry in result.history["adjustments"])
    assert all(torch.isfinite(v).all() for v in result.candidates["repaired"].state_dict().values())


def test_a_network_without_batch_norm(digits):
    some = digits.select(torch.arange(60))
    data = RepairData.of(some.select(torch.arange(10)), some.select(torch.arange(10, 60)))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))
    result = Apricot(**QUICK | {"subset": 0.4}).repair(network, data)
    assert result.cost.backwards > 0


def test_a_subset_without_images(problem, small):
    with pytest.raises(ArchrepairError, match="a subset of 0.001 of 300 training images leaves 0.*raise subset"):
        Apricot(**QUICK | {"subset": 0.001}).repair(problem.network, small)


def test_settings():
    lite = Apricot(epochs=9)
    passes = lite.reduced * lite.subset * lite.reduced_epochs, lite.sweeps * lite.retrain_epochs
    assert passes == (5.0, 4), "together the nine passes of ArchRepair at that tier"
    paper = Apricot(preset="paper", epochs=9)
    assert {k: getattr(paper, k) for k in PRESETS["paper"]} == PRESETS["paper"] and paper.eta == 1e-3
    assert Apricot(preset="paper", reduced=5).reduced == 5 and Apricot(epochs=0).retrain_epochs == 0
    for options, message in (({"preset": "papr"}, "unknown preset of Apricot 'papr': did you mean 'paper'"),
                             ({"start": "warm"}, "hot, scratch"), ({"direction": "up"}, "unknown direction"),
                             ({"reduced": 0}, "reduced is 0"), ({"subset": 0.0}, "subset is 0.0"),
                             ({"subset": 1.5}, "up to 1"), ({"eta": -1.0}, "eta is -1"), ({"patience": 0}, "patience is 0"),
                             ({"batch": -1}, "batch is -1"), ({"retrain_epochs": -1}, "retrain_epochs is -1"), ({"lr": -0.1}, "lr is")):
        with pytest.raises(ArchrepairError, match=message):
            Apricot(**options)
