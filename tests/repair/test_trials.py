"""Trials: what experts learn from and are judged by, and which place successive halving takes."""
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from archrepair.core.errors import ArchrepairError
from archrepair.data.pattern import Pattern
from archrepair.nas.operations import FILTERS
from archrepair.networks.conditional import FORMS, make_expert, own_parameters
from archrepair.repair.finetuning import PRESETS
from archrepair.repair.gatedata import Ordinary
from archrepair.repair.trials import SMALL, Material, Training, Trials, suitable_places
from archrepair.training.cost import CostMeter
from archrepair.training.evaluation import predict


@pytest.mark.parametrize("losses, chosen, rungs_made", [
    ({"layer1": 1.0, "layer2": 1.05, "layer3": 2.0}, "layer1", [1, 2, 4]),
    ({"layer1": 1.05, "layer2": 1.0, "layer3": 2.0}, "layer1", [1, 2, 4]),
    ({"layer1": 1.2, "layer2": 1.05, "layer3": 1.0}, "layer2", [1, 2, 4]),
    ({"layer1": 3.0, "layer2": 2.0, "layer3": 1.0}, "layer3", [1, 2, 4]),
    ({"layer1": 1.0, "layer2": 2.0, "layer3": 2.0}, "layer1", [1])])
def test_a_later_place_must_be_ahead_by_more_than_chance_and_a_tenth(problem, monkeypatch, losses, chosen, rungs_made):
    trials, rungs = Trials(training_of(problem), problem.scenario.data, 4), []

    def trial(places, epochs):
        rungs.append((list(places), epochs))
        return {place: torch.full((50,), losses[place[0]]) for place in places}

    monkeypatch.setattr(trials, "_try", trial)
    places = [(block, "copy") for block in losses]
    assert trials.choose(places) == (chosen, "copy")
    assert rungs[0] == (places, 1) and all((chosen, "copy") in tried for tried, _ in rungs)
    assert [epochs for _, epochs in rungs] == rungs_made


def test_within_one_standard_error_the_first_is_taken(problem, monkeypatch):
    "The second is ahead by a third on average: in the one case so unevenly that it may be chance, in the other on every image."
    ahead = torch.full((20,), 0.5)
    places = [("layer1", "copy"), ("layer2", "copy")]
    for gains, chosen in ((ahead + torch.tensor([5.0, -5.0] * 10), places[0]), (ahead, places[1])):
        losses = dict(zip(places, (torch.full((20,), 1.5), 1.5 - gains)))
        trials = Trials(training_of(problem), problem.scenario.data, 1)
        monkeypatch.setattr(trials, "_try", lambda places, epochs, losses=losses: losses)
        assert trials.choose(places) == chosen


def training_of(problem, meter=None) -> Training:
    return Training(problem.network, replace(PRESETS["default"], imitation=0.0, epochs=1), "fp32", meter or CostMeter())


def test_a_trial_is_run_once_and_counted(problem):
    data = problem.scenario.data
    meter = CostMeter()
    material = Material(data, Ordinary.of(data), Pattern.of(data.failures, data.train, emulator="none"))
    trials = Trials(training_of(problem, meter), material.trial(100), 1)
    places = [("layer3", "copy"), ("layer3", "affine")]
    first = trials.choose(places)
    forwards, rows = meter.forwards, list(trials.rows)
    assert [(row["block"], row["form"], row["epochs"]) for row in rows] == [(*place, 1) for place in places] and forwards > 0
    assert all(row["loss"] > 0 and row["before"] > 0 and row["passes"] > 0 for row in rows)
    assert trials.choose(places) == first and trials.rows == rows and meter.forwards == forwards


def test_failures_judge_trials_and_emulated_images_the_expert_where_they_are_faithful(problem, monkeypatch):
    data = problem.scenario.data
    monkeypatch.setattr(Pattern, "faithful", property(lambda pattern: pattern.emulator.name == "spectral"))
    failures = set(data.failures.index.tolist())
    for emulator in ("spectral", "none"):
        material = Material(data, Ordinary.of(data), Pattern.of(data.failures, data.train, emulator=emulator))
        trial, expert = material.trial(100), material.whole()
        learn, judge = set(trial.failures.index.tolist()), set(trial.val.index.tolist())
        assert learn and judge and not learn & judge and learn | judge == failures and 90 <= len(trial.train) <= 110
        assert (expert.val is data.val_failures) == (emulator == "none") and set(expert.failures.index.tolist()) == failures


@pytest.mark.parametrize("form", FORMS)
def test_what_begins_at_nothing_learns_faster_and_nothing_is_left_out(problem, form):
    training = training_of(problem)
    block = problem.network.layer2
    entering = torch.rand(2, block[0].conv1.in_channels, 16, 16)
    expert = make_expert(form, block, entering)
    groups = training._groups(expert, form)
    rates = {id(p): group["lr"] / training.recipe.lr for group in groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in own_parameters(expert, form)} and sum(len(group["params"]) for group in groups) == len(rates)
    if form in FILTERS:
        assert all(rates[id(p)] == (SMALL if name.startswith("filter.") else 1) for name, p in expert.named_parameters())
    else:
        assert set(rates.values()) == {1 if form == "copy" else SMALL}


def test_losses_are_those_of_the_network_with_the_expert_in_it(problem):
    data = Material(problem.scenario.data, Ordinary.of(problem.scenario.data), pattern_of_none(problem)).trial(100)
    training = training_of(problem)
    original = dict(problem.network.named_parameters())
    places = {"layer3": {"layer3"}, "layer1..layer3": {"layer1", "layer2", "layer3"}, "layer3..": {"layer3", "layer4", "fc"}}
    for block, parts in places.items():
        trained = training.run((block, "copy"), data, epochs=1)
        logits = predict(trained.tuned.model, data.val, data.transform)
        assert torch.allclose(trained.losses(), cross_entropy(logits, data.val.labels, reduction="none"), atol=1e-4)
        changed = {name for name, p in trained.tuned.model.named_parameters() if not torch.equal(p, original[name])}
        assert {name.partition(".")[0] for name in changed} == parts


def pattern_of_none(problem) -> Pattern:
    data = problem.scenario.data
    return Pattern.of(data.failures, data.train, emulator="none")


def test_forms_that_do_not_suit_a_block_are_left_out(problem, monkeypatch):
    x = torch.rand(2, 3, 32, 32)
    spans = [("layer2..layer3", "copy"), ("layer2..", "copy")]
    assert suitable_places(problem.network, "layer2", x) == [("layer2", form) for form in FORMS] + spans
    assert suitable_places(problem.network, "layer4", x)[-1] == ("layer4..", "copy")
    expected = [("layer2..layer3", "copy"), ("layer2..layer3", "norm"), ("layer2..", "copy")]
    assert suitable_places(problem.network, "layer2..layer3", x) == expected

    def picky(form, *args, **more):
        if form == "norm":
            raise ArchrepairError("no normalization layer")
        return make_expert(form, *args, **more)

    monkeypatch.setattr("archrepair.repair.trials.make_expert", picky)
    assert suitable_places(problem.network, "layer2", x) == [("layer2", form) for form in FORMS if form != "norm"] + spans
