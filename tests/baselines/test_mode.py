"MODE: what is wrong with which label, where, on which images, and that nothing else moves."
import copy
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from archrepair.baselines import mode
from archrepair.baselines.mode import (
    MODE,
    bhattacharyya,
    choose_images,
    deployed_accuracy,
    diagnose,
    differential,
    feature_models,
    label_accuracy,
    normalize,
    round_rows,
    target_layer,
    worst_label,
)
from archrepair.baselines.parts.channels import own_parameters
from archrepair.baselines.parts.common import Problem
from archrepair.core.errors import ArchrepairError
from archrepair.data.scenario import build_scenario
from archrepair.networks.neurons import wire
from archrepair.training.evaluation import is_correct, predict

# --- which label


def test_diagnosis():
    nan = math.nan
    train = torch.tensor([0.99, 0.91, 0.91, 0.95, nan, 0.5, nan, 0.98])
    test = torch.tensor([0.95, 0.90, 0.93, 0.80, 0.99, nan, nan, 0.8801])
    assert diagnose(train, test) == {1: "under-fit", 3: "over-fit", 5: "under-fit", 6: "under-fit"}
    assert diagnose(train, test, theta=0.0, gamma=1.0) == {}
    assert diagnose(torch.tensor([0.5]), torch.tensor([0.1])) == {0: "under-fit"}  # both: it has not learned the training images either


def test_deployed_accuracy_of_the_original_is_its_accuracy_there():
    "In one class-balanced stream: of 60 inputs of label 0 all are right, of 40 of label 1 three quarters are wrong."
    labels = torch.tensor([0] * 60 + [1] * 40)
    wrong = torch.arange(100) >= 70
    none_repaired = torch.zeros(15, dtype=torch.bool)
    got = deployed_accuracy(torch.ones(70, dtype=torch.bool), labels[~wrong], none_repaired, labels[wrong][:15], labels[wrong], 0.3, 3)
    assert got[:2].tolist() == pytest.approx([1.0, 0.25]) and got[2].isnan()


def test_deployed_accuracy_counts_what_breaks_and_what_is_repaired():
    right, repaired = torch.tensor([True, True, False, True]), torch.tensor([True, False])
    got = deployed_accuracy(right, torch.tensor([0, 0, 0, 1]), repaired, torch.tensor([0, 1]), torch.tensor([0, 1]), 0.5, 2)
    first = (0.5 * 3 / 4 * 2 / 3 + 0.25 * 0.75) / (0.5 * 3 / 4 + 0.25)
    second = (0.5 / 4 * 1 + 0.25 * 0.25) / (0.5 / 4 + 0.25)
    assert got.tolist() == pytest.approx([first, second])
    none = torch.zeros(0, dtype=torch.bool)
    without = deployed_accuracy(right, torch.tensor([0, 0, 0, 1]), none, none.long(), torch.tensor([0]), 0.5, 2)
    assert without.isfinite().all() and without[1] == 1.0


def test_label_accuracy():
    got = label_accuracy(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 4)
    assert got[[0, 2]].tolist() == [0.5, 1.0] and got[[1, 3]].isnan().all()


# --- which layer


def test_feature_models_are_ridge_regressions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0, 1.0, 0.0]) + 3
    labels = torch.randint(3, (80,), generator=generator)
    standard = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0).clamp_min(1e-9)).numpy()
    model = Ridge(alpha=80 * 0.01).fit(standard, np.eye(3)[labels])
    assert feature_models({"one": x}, labels, 3)["one"].tolist() == model.predict(standard).argmax(1).tolist()
    clear = nn.functional.one_hot(labels, 3).float()
    assert (feature_models({"one": clear}, labels, 3)["one"] == labels).all()


def test_bhattacharyya():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.1, 0.6, 0.3])
    assert bhattacharyya(p, p) == pytest.approx(0, abs=1e-12) and bhattacharyya(p, q) == bhattacharyya(q, p)
    assert bhattacharyya(p, q) == pytest.approx(-math.log(math.sqrt(0.05) + math.sqrt(0.3)))
    assert bhattacharyya(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == math.inf


def test_target_layer_from_either_end():
    own = torch.ones(4, dtype=torch.bool)
    a, b, c = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2]), torch.tensor([2, 2, 2, 2])
    answers = dict(zip("stuvwx", (a, b, b, c, a, a)))
    layer, distances = target_layer(answers, own, "under-fit", 3)
    assert layer == "t" and len(distances) == 5 and distances[1] == pytest.approx(0, abs=1e-12)
    assert target_layer(answers, own, "over-fit", 3)[0] == "x"
    assert target_layer(answers, own, "lowest accuracy", 3)[0] == "t"
    different = dict(zip("stu", (a, b, c)))
    assert target_layer(different, own, "under-fit", 3)[0] == "u" and target_layer(different, own, "over-fit", 3)[0] == "s"
    assert target_layer({"s": a, "t": torch.tensor([0, 0, 2, 2])}, torch.tensor([True, True, False, False]), "under-fit", 3)[1] == [0.0]


# --- states and images


def test_differential_is_the_difference_of_means():
    generator = torch.Generator().manual_seed(1)
    state = normalize(torch.rand(30, 5, generator=generator))
    torch.testing.assert_close(state.norm(dim=1), torch.ones(30))
    labels, answers = torch.randint(3, (30,), generator=generator), torch.randint(3, (30,), generator=generator)
    got = differential(state, labels, answers, 1)
    hc, hm, hw = (torch.stack([state[i] for i in range(30) if want(int(labels[i]), int(answers[i]))]).mean(0) for want in (
        lambda y, a: y == 1 and a == 1, lambda y, a: y != 1 and a == 1, lambda y, a: y == 1 and a != 1))
    torch.testing.assert_close(got.importance, (hm - hc).abs() + (hw - hc).abs())
    assert torch.equal(got.typical, got.right)


def test_differential_of_a_label_that_is_never_right_or_never_wrong():
    state = torch.eye(4)
    labels, answers = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 0])
    got = differential(state, labels, answers, 1)
    assert torch.equal(got.right, torch.tensor([0.5, 0.5, 0, 0])) and got.wrong is None
    assert torch.equal(got.typical, torch.tensor([0, 0, 0.5, 0.5]))
    torch.testing.assert_close(got.importance, torch.full((4,), 0.5))
    assert not differential(state, labels, labels, 0).importance.any()
    nothing = differential(state, labels, 1 - labels, 0)  # no image at all is handled
    assert nothing.importance.isfinite().all() and nothing.importance.any()


def test_the_order_of_images_flips_between_the_two_bugs():
    state = normalize(torch.rand(40, 6, generator=torch.Generator().manual_seed(2)))
    candidates, typical = torch.arange(3, 40, 2), state[0]
    under, over = (choose_images(state, typical, candidates, len(candidates), bug) for bug in ("under-fit", "over-fit"))
    assert under.tolist() == over.flip(0).tolist() and set(under.tolist()) == set(candidates.tolist())
    scores = [float(state[i] @ typical) for i in under]
    assert scores == sorted(scores, reverse=True)
    assert choose_images(state, typical, candidates, 4, "over-fit").tolist() == over[:4].tolist()


# --- the method


def test_a_label_that_is_never_answered_is_found(problem, digits, digits_test):
    "By a network whose answer 7 is switched off."
    network = copy.deepcopy(problem.network)
    with torch.no_grad():
        network.fc.bias[7] = -1e4
    correct = is_correct(predict(network, digits_test, problem.transform), digits_test.labels)
    data = build_scenario(digits, digits_test, correct, n_failures=100, transform=problem.transform).data
    result = MODE(epochs=1, rounds=1, round_epochs=1).repair(network, data)
    [aim] = result.config["rounds"]
    assert aim["label"] == 7 and aim["bug"] == "under-fit" and aim["train"] == 0.0 and aim["test"] == 0.0


def changed_rows(before: nn.Module, after: nn.Module) -> dict[str, list[int]]:
    after = after.state_dict()
    return {name: torch.where((after[name] != value).reshape(len(value), -1).any(1))[0].tolist() if value.ndim else [0]
            for name, value in before.state_dict().items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("top_k", [0.1, 0.5])
def test_only_the_channels_it_names_change(problem, top_k, improving):
    data = problem.scenario.data
    result = MODE(epochs=4, rounds=2, round_epochs=1, top_k=top_k).repair(problem.network, data)
    allowed: dict[str, set[int]] = {}
    wiring = wire(problem.network, torch.zeros(1, 3, 32, 32))
    for aim in result.config["rounds"]:
        assert len(aim["channels"]) == max(1, round(top_k * wiring.layers[aim["layer"]]))
        for name in own_parameters(problem.network, wiring, aim["layer"]):
            allowed.setdefault(name, set()).update(aim["channels"])
    changed = changed_rows(problem.network, result.candidates["repaired"])
    assert changed and changed.keys() <= allowed.keys()
    assert all(set(rows) <= allowed[name] for name, rows in changed.items())


def test_the_whole_model_changes_where_it_may(problem, improving):
    result = MODE(epochs=1, rounds=1, round_epochs=1, scope="model").repair(problem.network, problem.scenario.data)
    changed = changed_rows(problem.network, result.candidates["repaired"])
    assert "conv1.weight" in changed and "bn1.running_mean" in changed and "fc.weight" in changed
    assert result.config["rounds"][0]["channels"] == "all"


def test_rounds_end_when_no_label_is_buggy(problem, monkeypatch):
    answers = iter([{3: "under-fit"}, {}])
    monkeypatch.setattr(mode, "diagnose", lambda *a: next(answers))
    result = MODE(epochs=3, rounds=3, round_epochs=1).repair(problem.network, problem.scenario.data)
    assert [aim["label"] for aim in result.config["rounds"]] == [3] and not any("no label" in w for w in result.warnings)


def test_each_buggy_label_comes_up_before_any_does_twice(problem, monkeypatch):
    monkeypatch.setattr(mode, "diagnose", lambda *a: {2: "under-fit", 5: "over-fit", 11: "under-fit"})
    result = MODE(epochs=2, rounds=4, round_epochs=1).repair(problem.network, problem.scenario.data)
    labels = [aim["label"] for aim in result.config["rounds"]]
    assert set(labels[:2]) == set(labels[2:]) == {2, 5}
    assert {aim["label"]: aim["bug"] for aim in result.config["rounds"]} == {2: "under-fit", 5: "over-fit"}


def test_the_worst_label_comes_first_and_none_twice_before_all_have_been():
    test = torch.tensor([0.9, 0.2, math.nan, 0.2])
    assert worst_label([0, 1, 3], test, []) == 1  # the first of equals
    assert worst_label([0, 1, 2, 3], test, []) == 2  # what is unknown counts as 0
    assert worst_label([0, 1, 3], test, [1]) == 3 and worst_label([0, 1, 3], test, [1, 3]) == 0
    assert worst_label([0, 1, 3], test, [1, 3, 0]) == 1


def test_where_nothing_is_buggy_the_worst_label_is_taken_and_it_says_so(problem):
    result = MODE(epochs=1, rounds=2, round_epochs=1, theta=0.0, gamma=1.0).repair(problem.network, problem.scenario.data)
    assert [aim["bug"] for aim in result.config["rounds"]] == ["lowest accuracy"] * 2
    assert any("lowest accuracy" in warning for warning in result.warnings)


def test_a_round_is_a_quarter_chosen_images(problem):
    data = problem.scenario.data
    pool = Problem(problem.network, data).rows(1, 3)
    n, failures = len(data.train), len(data.failures)
    images = torch.tensor([4, n + 2, 9, n])
    draw = lambda size: round_rows(pool, images, size, torch.Generator().manual_seed(0), alpha=0.25, failure_views=3)
    rows = draw(40)
    assert rows.failures == 2 + 2 * 3 and len(rows) == 30 + 8
    expected = [int(data.train.labels[i]) for i in (4, 9)] + [int(data.failures.labels[i]) for i in (2, 0)] * 3
    assert rows.labels[-8:].tolist() == expected
    batches = rows.order(1, 16, 0.25, 0)
    assert all(round(float((b >= 30).float().mean()), 2) == 0.25 for b in batches if len(b) == 16)
    assert len(draw(8).labels) == 6 + 1 + 3  # only the best two of the chosen
    assert failures > 2


def test_no_epochs_no_change(problem):
    result = MODE(epochs=0).repair(problem.network, problem.scenario.data)
    assert not changed_rows(problem.network, result.candidates["repaired"]) and result.config["rounds"] == []


@pytest.mark.parametrize("settings, words", [
    ({"scope": "layer"}, "unknown scope of MODE 'layer'"), ({"preset": "papre"}, "unknown preset 'papre'"), ({"rounds": 0}, "rounds is 0"),
    ({"batch": 0}, "batch is 0"), ({"n_train": 2.5}, "n_train is 2.5"), ({"alpha": 1.0}, "alpha is 1.0"), ({"top_k": 0.0}, "top_k is 0.0"),
    ({"theta": -0.1}, "theta is -0.1"), ({"round_epochs": True}, "round_epochs is True")])
def test_settings(settings, words):
    with pytest.raises(ArchrepairError, match=words) as caught:
        MODE(**settings)
    assert "\n" not in str(caught.value)
