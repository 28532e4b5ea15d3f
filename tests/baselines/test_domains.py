"Boxes, what samples can show, a network that advises, and its repair."
import copy
import math

import pytest
import torch
from torch import nn

from archrepair.baselines.parts import domains
from archrepair.baselines.parts.domains import (
    DOMAIN,
    FAULT,
    HEAD_ON,
    Box,
    DomainBIRDNN,
    Property,
    Rate,
    advise,
    as_features,
    make_advisor,
    sample_size,
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
    pieces = box.pieces(count)
    assert len(pieces) == count and sum(p.volume for p in pieces) == pytest.approx(box.volume)
    x = box.sample(2000, generator())
    assert box.contains(x).all() and torch.stack([p.contains(x) for p in pieces]).sum(0).float().mean() < 1.01
    assert torch.stack([p.contains(x) for p in pieces]).any(0).all()
    assert max(p.volume for p in pieces) <= 2.001 * min(p.volume for p in pieces)


def test_a_box_is_halved_along_its_longest_side():
    assert Box((0.0, 0.0), (2.0, 1.0)).halves() == (Box((0.0, 0.0), (1.0, 1.0)), Box((1.0, 0.0), (2.0, 1.0)))
    whole = Box((0.0, 0.0), (20.0, 1.0))
    assert Box((0.0, 0.0), (2.0, 1.0)).halves(whole)[0] == Box((0.0, 0.0), (2.0, 0.5))


def test_samples_fill_the_box_and_have_a_seed():
    box = Box((-1.0, 3.0), (1.0, 4.0))
    x = box.sample(4000, generator(1))
    assert torch.equal(x, box.sample(4000, generator(1))) and x.dtype == torch.float32
    assert x.mean(0).tolist() == pytest.approx([0, 3.5], abs=0.03) and x.std(0).tolist() == pytest.approx([2 / math.sqrt(12), 1 / math.sqrt(12)], abs=0.02)
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
    wanted = Property("the first", Box((-1.0,), (1.0,)), (0,))
    rate = violation_rate(network, wanted, wanted.box, 4000, 0.01, generator())
    assert rate.share == pytest.approx(0.375, abs=0.03) and rate.n == 4000 and rate.share < rate.upper < rate.share + 0.03
    both = Property("either", wanted.box, (0, 1))
    assert violation_rate(network, both, wanted.box, 100, 0.01, generator()).violations == 0


# --- the advisor


def test_advice_is_what_flying_straight_on_shows():
    "Against a simulation in steps of 0.02 s; encounters near a threshold are left out."
    x = torch.cat([DOMAIN.sample(400, generator()), HEAD_ON.box.sample(100, generator(1))])
    given, checked = advise(x), {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}
    t = torch.arange(0, 60, 0.02, dtype=torch.float64)
    for encounter, advice in zip(x.double(), given.tolist()):
        distance, bearing, heading = (float(encounter[0]) + 1) * 5000, float(encounter[1]) * math.pi, float(encounter[2]) * math.pi
        own, intruder = 200 + 100 * float(encounter[3]), 200 + 100 * float(encounter[4])
        ahead = distance * math.cos(bearing) + (intruder * math.cos(heading) - own) * t
        left = distance * math.sin(bearing) + intruder * math.sin(heading) * t
        apart = torch.hypot(ahead, left)
        i = int(apart.argmin())
        if min(abs(float(apart[i]) - 1500), abs(distance - 500)) < 20 or min(abs(float(t[i]) - limit) for limit in (0, 12, 40)) < 0.1 or abs(float(left[i])) < 5:
            continue
        danger = float(apart[i]) < 1500 and 0 < float(t[i]) < 40 or distance < 500
        expected = 0 if not danger else (1 if float(left[i]) < 0 else 2) + 2 * (float(t[i]) < 12)
        assert advice == expected, encounter
        checked[expected] += 1
    assert all(checked.values())


@pytest.fixture(scope="module")
def advisor():
    return make_advisor(n=6000, width=24, epochs=10)


@pytest.fixture(scope="module")
def rest():
    x = DOMAIN.sample(4000, generator(5))
    x = x[~HEAD_ON.box.contains(x)]
    return x, advise(x)


def test_the_advisor_is_good_but_for_its_fault(advisor, rest):
    x, labels = rest
    assert (predict(advisor, as_features(x)).argmax(1) == labels).float().mean() > 0.9
    inside = violation_rate(advisor, HEAD_ON, FAULT, 500, 0.01, generator())
    assert inside.share > 0.5 and not (advise(HEAD_ON.box.sample(500, generator())) == 0).any()
    small = {"n": 500, "width": 8, "epochs": 1}
    one, two, other = make_advisor(3, **small), make_advisor(3, **small), make_advisor(4, **small)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one[0].weight, other[0].weight)


# --- repair


SETTINGS = {"retraining": {"rounds": 4, "round_epochs": 4, "lr": 5e-3}, "fine-tuning": {"iterations": 40, "n_neurons": 12}}


@pytest.mark.parametrize("style", SETTINGS)
def test_repair_closes_the_hole_and_keeps_the_rest(style, advisor, rest):
    before = state_of(advisor)
    result = DomainBIRDNN(style=style, pieces=16, epsilon=0.02, delta=0.1, **SETTINGS[style]).repair(advisor, HEAD_ON, *rest)
    assert_same_state(before, advisor)
    assert all(p.requires_grad and p.grad is None for p in result.network.parameters()) and not result.network.training
    assert result.before.share > 0.2 and result.after.share < 0.1 * result.before.share
    assert result.accuracy[1] > result.accuracy[0] - (0.02 if style == "retraining" else 0.12)
    assert len(result.pieces) == 16 and any(b.violations == 0 for _, b, _ in result.pieces)  # some sub-boxes were positive
    assert sum(after.violations for *_, after in result.pieces) < 0.1 * sum(b.violations for _, b, _ in result.pieces)
    assert result.after.n == 16 * result.pieces[0][2].n and result.after.violations == sum(after.violations for *_, after in result.pieces)
    true = violation_rate(result.network, HEAD_ON, HEAD_ON.box, 3000, 0.01, generator(77))
    assert true.share == pytest.approx(result.after.share, abs=0.03)
    assert result.cost.forwards > 0 and result.history and style in result.verdict and "\n" not in result.verdict
    changed = {k: (v != result.network.state_dict()[k]) for k, v in advisor.state_dict().items()}
    rows = sum(int(c.reshape(len(c), -1).any(1).sum()) for k, c in changed.items() if k.endswith("weight"))
    assert rows <= 12 if style == "fine-tuning" else rows > 12


def test_the_same_seed_gives_the_same_repair(advisor, rest):
    make = lambda seed: DomainBIRDNN(pieces=2, epsilon=0.1, delta=0.1, rounds=1, round_epochs=1, seed=seed).repair(advisor, HEAD_ON, *rest)
    one, two, other = make(0), make(0), make(1)
    assert all(torch.equal(v, two.network.state_dict()[k]) for k, v in one.network.state_dict().items()) and one.after == two.after
    assert any(not torch.equal(v, other.network.state_dict()[k]) for k, v in one.network.state_dict().items())


def test_targets_are_good_outputs(advisor, rest, monkeypatch):
    taken = []

    def spy(network, rows, recipe, **more):
        taken.append((copy.deepcopy(network), rows))
        return fit(network, rows, recipe, **more)

    fit = domains.fit
    monkeypatch.setattr(domains, "fit", spy)
    DomainBIRDNN(pieces=4, epsilon=0.05, delta=0.05, rounds=2, round_epochs=1).repair(advisor, HEAD_ON, *rest)
    assert len(taken) == 2
    for network, rows in taken:
        n = len(rows) - rows.failures
        targets, own = rows.teacher[n:], rows.teacher[:n]
        assert HEAD_ON.holds(targets).all() and rows.imitate[n:].all() and not rows.imitate[:n].any()
        assert all((own == target).all(1).any() for target in targets[:20])
        assert not HEAD_ON.holds(predict(network, rows.parts[1])).any()  # violating as the network is now


def test_without_labels_its_own_answers_count(advisor, rest):
    method = DomainBIRDNN(pieces=2, epsilon=0.1, delta=0.1, rounds=1, round_epochs=1)
    assert method.repair(advisor, HEAD_ON, rest[0]).accuracy[0] == 1.0


def test_what_cannot_be_repaired(advisor, rest):
    fine = Property("anything", HEAD_ON.box, tuple(range(5)))
    with pytest.raises(ArchrepairError, match="nothing to repair"):
        DomainBIRDNN().repair(advisor, fine, *rest)
    constant = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))
    with torch.no_grad():
        for p in constant.parameters():
            p.zero_()
        constant[2].bias[0] = 1.0
    with pytest.raises(ArchrepairError, match="never answers as it should"):
        DomainBIRDNN(pieces=2, epsilon=0.1, delta=0.1).repair(constant.eval(), HEAD_ON, *rest)
    with pytest.raises(ArchrepairError, match="pieces is 6; expected a power of two"):
        DomainBIRDNN(pieces=6)
    with pytest.raises(ArchrepairError, match="unknown style of BIRDNN 'tuning'"):
        DomainBIRDNN(style="tuning")
