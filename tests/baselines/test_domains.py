"Boxes, what samples can show, and the repair of a network that violates a property in a part of a box."
import copy
import math

import pytest
import torch
from torch import nn

from archrepair.baselines import domains
from archrepair.baselines.domains import (
    Box,
    DomainBIRDNN,
    DomainProblem,
    Property,
    Rate,
    halves,
    sample_size,
    sub_boxes,
    violation_rate,
)
from archrepair.core.errors import ArchrepairError
from archrepair.training.evaluation import predict
from support.states import assert_same_state, state_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- boxes


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_pieces_are_a_partition(count):
    box = Box((0.0, -1.0, 5.0), (2.0, 1.0, 5.5))
    pieces = sub_boxes(box, count)
    assert len(pieces) == count and sum(p.volume for p in pieces) == pytest.approx(box.volume)
    x = box.sample(2000, generator())
    assert box.contains(x).all() and torch.stack([p.contains(x) for p in pieces]).sum(0).float().mean() < 1.01
    assert torch.stack([p.contains(x) for p in pieces]).any(0).all()
    assert max(p.volume for p in pieces) <= 2.001 * min(p.volume for p in pieces)


def test_a_box_is_halved_along_its_longest_side():
    assert halves(Box((0.0, 0.0), (2.0, 1.0))) == (Box((0.0, 0.0), (1.0, 1.0)), Box((1.0, 0.0), (2.0, 1.0)))
    whole = Box((0.0, 0.0), (20.0, 1.0))
    assert halves(Box((0.0, 0.0), (2.0, 1.0)), whole)[0] == Box((0.0, 0.0), (2.0, 0.5))


def test_samples_fill_the_box_and_have_a_seed():
    box = Box((-1.0, 3.0), (1.0, 4.0))
    x = box.sample(4000, generator(1))
    assert torch.equal(x, box.sample(4000, generator(1))) and x.dtype == torch.float32
    assert x.mean(0).tolist() == pytest.approx([0, 3.5], abs=0.03)
    assert x.std(0).tolist() == pytest.approx([2 / math.sqrt(12), 1 / math.sqrt(12)], abs=0.02)
    assert not box.contains(torch.tensor([[0.0, 4.1], [-1.1, 3.5]])).any() and box.contains(torch.tensor([[1.0, 3.0]])).all()


@pytest.mark.parametrize("low, high", [((0.0,), (0.0,)), ((0.0, 1.0), (1.0,)), ((), ()), ((1.0,), (0.0,)), ((math.nan,), (1.0,))])
def test_no_box(low, high):
    with pytest.raises(ArchrepairError, match="expected as many lower as upper ends"):
        Box(low, high)


# --- what samples can show


@pytest.mark.parametrize("epsilon, delta", [(0.1, 0.05), (0.01, 0.001), (0.5, 0.5), (0.3, 1e-6)])
def test_sample_size_is_the_least(epsilon, delta):
    n = sample_size(epsilon, delta)
    assert (1 - epsilon) ** n <= delta < (1 - epsilon) ** (n - 1)
    assert Rate(0, n, delta).upper <= epsilon


def test_the_upper_bound_holds_as_often_as_it_says():
    "Of 400 experiments with true share 0.03, about 5 in a hundred may fail at confidence 95 %."
    true, n = 0.03, 200
    hits = (torch.rand(400, n, generator=generator()) < true).sum(1).tolist()
    covered = sum(Rate(k, n, 0.05).upper >= true for k in hits) / 400
    assert 0.93 < covered <= 0.995
    assert Rate(5, 5, 0.05).upper == 1.0 and Rate(1, 4, 0.05).share == 0.25
    bounds = [Rate(k, 50, 0.05).upper for k in range(51)]
    assert bounds == sorted(bounds)
    assert Rate(0, 50, 0.05).upper == pytest.approx(1 - 0.05 ** (1 / 50))


@pytest.mark.parametrize("epsilon, delta", [(0, 0.1), (1, 0.1), (0.1, 0), (0.1, 1.5)])
def test_no_sample_size(epsilon, delta):
    with pytest.raises(ArchrepairError, match="expected both between 0 and 1"):
        sample_size(epsilon, delta)
    with pytest.raises(ArchrepairError, match="expected both between 0 and 1"):
        DomainBIRDNN(epsilon=epsilon, delta=delta)


def test_violation_rate_is_the_share_of_the_box():
    "The second output is larger where x > 0.25: in 3 of 8 parts of the box."
    network = nn.Linear(1, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0], [1.0]]))
        network.bias.copy_(torch.tensor([0.25, 0.0]))
    goal = Property("the first", Box((-1.0,), (1.0,)), (0,))
    rate = violation_rate(network, goal, goal.box, 4000, 0.01, generator())
    assert rate.share == pytest.approx(0.375, abs=0.03) and rate.n == 4000 and rate.share < rate.upper < rate.share + 0.03
    either = Property("either", goal.box, (0, 1))
    assert violation_rate(network, either, goal.box, 100, 0.01, generator()).violations == 0


# --- repair


GOAL = Property("on the right the answer is 1", Box((0.2, -1.0), (1.0, 1.0)), (1,))


@pytest.fixture
def network():
    """Answers 1 on the right (x > 0) and 0 on the left, but for a fault: further up than 0.5 a third neuron pulls towards 0.

    Where that pull is the stronger, y − 0.5 > x / 3, it violates the property: in 15 % of its box.
    """
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
        network[0].bias.copy_(torch.tensor([0.0, 0.0, -0.5]))
        network[2].weight.copy_(torch.tensor([[0.0, 4.0, 12.0], [4.0, 0.0, 0.0]]))
        network[2].bias.copy_(torch.tensor([0.1, 0.0]))
    return network


@pytest.fixture(scope="module")
def rest():
    "Points on the left, all of which the network gets right, and their label."
    return Box((-1.0, -1.0), (-0.1, 1.0)).sample(600, generator(5)), torch.zeros(600, dtype=torch.int64)


QUICK = {"pieces": 2, "epsilon": 0.1, "delta": 0.1, "rounds": 1, "round_epochs": 1}
SETTINGS = {"retraining": {"rounds": 8, "round_epochs": 4, "lr": 5e-3}, "fine-tuning": {"iterations": 40, "n_neurons": 2}}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("style", SETTINGS)
def test_repair_makes_the_hole_smaller_and_keeps_the_rest(style, seed, network, rest):
    before = state_of(network)
    result = DomainBIRDNN(style=style, pieces=16, epsilon=0.02, delta=0.1, seed=seed, **SETTINGS[style]).repair(network, GOAL, *rest)
    assert_same_state(before, network)
    assert all(p.requires_grad and p.grad is None for p in result.network.parameters()) and not result.network.training
    assert result.before.share == pytest.approx(0.15, abs=0.03) and result.after.share < 0.5 * result.before.share
    assert result.accuracy[0] == 1.0 and result.accuracy[1] >= 0.9
    true = violation_rate(result.network, GOAL, GOAL.box, 3000, 0.01, generator(77))
    assert true.share == pytest.approx(result.after.share, abs=0.03)
    changed = {name: value != result.network.state_dict()[name] for name, value in network.state_dict().items()}
    rows = sum(int(c.reshape(len(c), -1).any(1).sum()) for name, c in changed.items() if name.endswith("weight"))
    assert rows <= 2 if style == "fine-tuning" else rows > 2


@pytest.mark.parametrize("style", SETTINGS)
def test_what_a_repair_reports(style, network, rest):
    result = DomainBIRDNN(style=style, pieces=16, epsilon=0.02, delta=0.1, **SETTINGS[style]).repair(network, GOAL, *rest)
    assert len(result.pieces) == 16 and any(before.violations == 0 for _, before, _ in result.pieces)  # the lower sub-boxes are positive
    assert result.after.n == 16 * result.pieces[0][2].n
    assert result.before.violations == sum(before.violations for _, before, _ in result.pieces)
    assert result.after.violations == sum(after.violations for *_, after in result.pieces)
    assert result.cost.forwards > 0 and result.history and style in str(result.verdict) and "\n" not in str(result.verdict)


def test_the_same_seed_gives_the_same_repair(network, rest):
    repair = lambda seed: DomainBIRDNN(**QUICK, seed=seed).repair(network, GOAL, *rest)
    one, two, other = repair(0), repair(0), repair(1)
    assert_same_state(state_of(one.network), two.network)
    assert one.after == two.after
    streams = [DomainProblem(network, GOAL, [GOAL.box], *rest, 10, 0.1, seed).samples(network, "round 1")[0] for seed in (0, 1)]
    assert not torch.equal(*streams) and other.before.n == one.before.n


def test_targets_are_good_outputs(network, rest, monkeypatch):
    calls = []

    def spy(network, rows, recipe, **more):
        calls.append((copy.deepcopy(network), rows))
        return fit(network, rows, recipe, **more)

    fit = domains.fit
    monkeypatch.setattr(domains, "fit", spy)
    DomainBIRDNN(**{**QUICK, "pieces": 4, "rounds": 2, "lr": 1e-6}).repair(network, GOAL, *rest)  # too slow to close the hole in a round
    assert len(calls) == 2
    for trained, rows in calls:
        n = len(rows) - rows.failures
        targets, outputs = rows.teacher[n:], rows.teacher[:n]
        assert len(targets) and GOAL.holds(targets).all() and rows.imitate[n:].all() and not rows.imitate[:n].any()
        assert all((outputs == target).all(1).any() for target in targets)
        assert not GOAL.holds(predict(trained, rows.parts[1])).any()  # violating as the network is now


def test_retraining_ends_when_no_sample_violates(network, rest, monkeypatch):
    def close(network, rows, recipe, **more):
        with torch.no_grad():
            network[2].weight[0, 2] = 0.0  # the fault, switched off

    monkeypatch.setattr(domains, "fit", close)
    result = DomainBIRDNN(pieces=2, epsilon=0.05, delta=0.05).repair(network, GOAL, *rest)
    assert [entry["mended"] for entry in result.history] == [1.0] and result.after.violations == 0


def test_without_labels_its_own_answers_count(network, rest):
    assert DomainBIRDNN(**QUICK).repair(network, GOAL, rest[0]).accuracy[0] == 1.0
    wrong = DomainBIRDNN(**QUICK).repair(network, GOAL, rest[0], 1 - rest[1])
    assert wrong.accuracy[0] == 0.0


def test_what_cannot_be_repaired(network, rest):
    anything = Property("anything", GOAL.box, (0, 1))
    with pytest.raises(ArchrepairError, match="nothing to repair"):
        DomainBIRDNN().repair(network, anything, *rest)
    constant = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in constant.parameters():
            p.zero_()
        constant[2].bias[0] = 1.0
    with pytest.raises(ArchrepairError, match="never answers as it should"):
        DomainBIRDNN(**QUICK).repair(constant.eval(), GOAL, *rest)
    with pytest.raises(ArchrepairError, match="pieces is 6; expected a power of two"):
        DomainBIRDNN(pieces=6)
    with pytest.raises(ArchrepairError, match="unknown style of BIRDNN 'tuning'"):
        DomainBIRDNN(style="tuning")
