"BIRDNN: whom it imitates, when it undoes a round, and which neurons it scales."
import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from archrepair.baselines import birdnn
from archrepair.baselines.birdnn import BIRDNN, Imitation, Penultimate, imitate, nearest
from archrepair.baselines.parts.channels import last_layer
from archrepair.baselines.parts.common import Problem
from archrepair.baselines.parts.multipliers import scalable
from archrepair.baselines.parts.swarm import OptimizationResult
from archrepair.core.errors import ArchrepairError
from archrepair.data.images import ImageSet
from archrepair.data.scenario import RepairData
from archrepair.networks.models import create_model
from archrepair.networks.neurons import wire
from archrepair.training.evaluation import is_correct, predict
from support.families import NETWORKS
from support.states import assert_same_state, state_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, purpose)))


# --- whom to imitate


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_is_the_nearest(chunk):
    outputs, pool = draw(20, 4), draw(30, 4, seed=1)
    labels, pool_labels = torch.randint(3, (20,), generator=stream("a")), torch.randint(3, (30,), generator=stream("b"))
    distance = lambda i, j: float((outputs[i] - pool[j]).double().square().sum())
    assert nearest(outputs, pool, chunk=chunk).tolist() == [min(range(30), key=lambda j: distance(i, j)) for i in range(20)]
    got = nearest(outputs, pool, labels, pool_labels, chunk=chunk).tolist()
    assert got == [min((j for j in range(30) if pool_labels[j] == labels[i]), key=lambda j: distance(i, j)) for i in range(20)]
    assert nearest(outputs, pool, labels + 1, pool_labels).tolist().count(-1) == int((labels == 2).sum())
    assert nearest(pool, pool).tolist() == list(range(30))


def test_the_loss_is_two_means():
    outputs, targets, negative = draw(6, 3), draw(6, 3, seed=1), torch.tensor([1.0, 0, 0, 1, 0, 0])
    recipe = Imitation(1, alpha=0.3, beta=0.9)
    mse = nn.functional.mse_loss
    expected = 0.3 * mse(outputs[[0, 3]], targets[[0, 3]]) + 0.9 * mse(outputs[[1, 2, 4, 5]], targets[[1, 2, 4, 5]])
    torch.testing.assert_close(recipe.loss(outputs, None, targets, negative), expected)
    alone = recipe.loss(outputs, None, targets, torch.zeros(6))
    torch.testing.assert_close(alone, 0.9 * mse(outputs, targets))
    twice = torch.tensor([0, 0, 3, 3, 1, 2, 4, 5])
    torch.testing.assert_close(recipe.loss(outputs[twice], None, targets[twice], negative[twice]), expected)


def test_penultimate_features_are_what_enters_the_last_layer(problem):
    network = copy.deepcopy(problem.network)
    x, model = draw(3, 3, 32, 32), Penultimate(network, "fc")
    before = state_of(network)
    with torch.no_grad():
        torch.testing.assert_close(network.fc(model(x)), network(x))
    assert_same_state(before, network)


# --- rounds


def counter(steps: list[float]):
    "A one-weight network that walks by the given steps; accuracy falls off above 1."
    network, todo = nn.Linear(1, 1, bias=False), list(steps)
    nn.init.zeros_(network.weight)
    rates = []

    def train(recipe, name):
        rates.append((recipe.lr, recipe.seed, name))
        network.weight.data += todo.pop(0)

    return network, train, (lambda: (1.0 if network.weight <= 1 else 0.5, min(1.0, network.weight.item()))), rates


def test_a_round_that_breaks_is_undone_and_the_next_is_gentler():
    network, train, measure, rates = counter([0.5, 5.0, 5.0, 0.25])
    happened = imitate(network, train, Imitation(1, lr=1.0), measure, rounds=4)
    assert [r["undone"] for r in happened] == [False, True, True, False] and network.weight.item() == 0.75
    assert [lr for lr, *_ in rates] == pytest.approx([1.0, 1.0, 0.8, 0.64]) and len({seed for _, seed, _ in rates}) == 4
    network, train, measure, _ = counter([5.0])
    imitate(network, train, Imitation(1, lr=1.0), measure, rounds=1, tolerance=0.6)
    assert network.weight.item() == 5.0


def test_rounds_end_when_enough_has_been_repaired_for_long_enough():
    network, train, measure, rates = counter([1.0, 0, 0, 0, 0, 0])
    assert len(imitate(network, train, Imitation(1), measure, rounds=6, patience=3)) == 3
    network, train, measure, rates = counter([0.5] + 5 * [0])
    assert len(imitate(network, train, Imitation(1), measure, rounds=6, patience=3)) == 6


def test_rounds_go_on_where_they_were():
    steps = [0.5, 5.0, 0.1, 0.2]
    network, train, measure, _ = counter(steps)
    whole = imitate(network, train, Imitation(1, lr=1.0), measure, rounds=4)
    states = []
    other, train, measure, _ = counter(steps)
    imitate(other, train, Imitation(1, lr=1.0), measure, rounds=2, save=lambda **state: states.append(copy.deepcopy(state)))
    fresh, train, measure, rates = counter(steps[2:])
    again = imitate(fresh, train, Imitation(1, lr=1.0), measure, rounds=4, resume=states[-1])
    assert again == whole and torch.equal(fresh.weight, network.weight) and [lr for lr, *_ in rates] == [0.8, 0.8]


# --- multipliers


# --- the method


def rows_changed(before: nn.Module, after: nn.Module) -> dict[str, int]:
    after = after.state_dict()
    different = {k: after[k] != v for k, v in before.state_dict().items() if v.ndim and not torch.equal(v, after[k])}
    return {k: int(where.reshape(len(where), -1).any(1).sum()) for k, where in different.items()}


@pytest.mark.parametrize("n, normalize", [(20, False), (4, True)])
def test_finetuning_changes_the_channels_it_names_and_no_statistics(problem, monkeypatch, n, normalize):
    "With a search that halves every neuron it is asked about."
    halve = lambda behavior, layers, places, stream, **more: OptimizationResult(torch.full((len(places),), -0.5), 0.0, torch.zeros(1), [])
    monkeypatch.setattr(birdnn, "search_multipliers", halve)
    result = BIRDNN(style="fine-tuning", n_neurons=n, normalize=normalize).repair(problem.network, problem.scenario.data)
    neurons = result.config["neurons"]
    assert 0 < len(neurons) <= n and all(neuron["r"] == -0.5 and neuron["responsibility"] > 0 for neuron in neurons)
    changed = rows_changed(problem.network, result.candidates["repaired"])
    assert changed and not any("running" in name or "num_batches" in name for name in changed)
    in_layer = Counter(neuron["layer"] for neuron in neurons)
    assert max(changed.values()) <= max(in_layer.values())
    wiring = wire(problem.network, torch.zeros(1, 3, 32, 32))
    layers = scalable(problem.network, wiring, torch.zeros(1, 3, 32, 32))
    assert {name.rpartition(".")[0] for name in changed} <= {module for layer in in_layer for module in layers[layer]}


def test_finetuning_is_never_worse_than_nothing_on_what_it_scores(problem):
    history = BIRDNN(style="fine-tuning", iterations=3).repair(problem.network, problem.scenario.data).history["search"]
    assert len(history) == 4 and history[-1]["best"] >= history[0]["best"]


def test_finetuning_without_iterations_is_the_identity(problem):
    result = BIRDNN(style="fine-tuning", iterations=0).repair(problem.network, problem.scenario.data)
    assert not rows_changed(problem.network, result.candidates["repaired"])


def test_finetuning_where_no_neuron_differs_changes_nothing_and_says_so(problem, monkeypatch):
    monkeypatch.setattr(birdnn, "responsibility", lambda positive, negative, **k: torch.zeros(positive.shape[1]))
    result = BIRDNN(style="fine-tuning").repair(problem.network, problem.scenario.data)
    assert not rows_changed(problem.network, result.candidates["repaired"])
    assert any("no neuron behaves differently" in w for w in result.warnings)


@pytest.mark.parametrize("target", ["logits", "features"])
def test_what_is_imitated(problem, monkeypatch, target):
    "Targets of negatives are outputs of positives of their label; positives keep the original's; all views have the same target."
    data, trained_on = problem.scenario.data, []

    def spy(self, network, rows, recipe, name="train", **more):
        trained_on.append(rows)
        return true(self, network, rows, recipe, name, **more)

    true = Problem.train
    monkeypatch.setattr(Problem, "train", spy)
    result = BIRDNN(epochs=2, failure_views=2, target=target, precision="fp32").repair(problem.network, data)
    look = copy.deepcopy(problem.network) if target == "logits" else Penultimate(copy.deepcopy(problem.network), "fc")
    outputs = predict(look, data.train, data.transform)
    right = torch.where(is_correct(predict(problem.network, data.train, data.transform), data.train.labels))[0]
    assert len(trained_on) == 2
    for rows in trained_on:
        n = len(rows) - rows.failures
        assert n == len(right) and not rows.imitate[:n].any()
        torch.testing.assert_close(rows.teacher[:n], outputs[right], rtol=1e-4, atol=1e-4)
        assert rows.failures == 2 * len(data.failures)
        one, two = rows.teacher[n:].chunk(2)
        assert torch.equal(one, two)
        for target_row, label, negative in zip(one, data.failures.labels, rows.imitate[n:]):
            of_label = rows.teacher[:n][data.train.labels[right] == label]
            assert not negative or (of_label == target_row).all(1).any()
    assert trained_on[0].imitate[-trained_on[0].failures:].all()  # in the first round all failures are wrong
    assert result.history["rounds"][0]["round"] == 1 and len(result.history["rounds"]) == 2


def test_imitation_brings_outputs_nearer_to_their_targets():
    "One linear layer, whole batches, a low rate: the loss is convex, so every step lowers it."
    network, x, targets = nn.Linear(4, 3), draw(20, 4), draw(20, 3, seed=1)
    negative, recipe = (torch.arange(20) < 5).float(), Imitation(1, alpha=0.5, beta=0.5)
    with torch.no_grad():
        network.weight.copy_(draw(3, 4, seed=2))
        network.bias.zero_()
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.01), []
    for _ in range(20):
        loss = recipe.loss(network(x), None, targets, negative)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_rounds_say_what_the_network_does(problem):
    data = problem.scenario.data
    result = BIRDNN(epochs=3, lr=0.005, precision="fp32").repair(problem.network, data)
    share = lambda network, part: float(is_correct(predict(network, part, data.transform), part.labels).float().mean())
    repaired, rounds = result.candidates["repaired"], [entry for entry in result.history["rounds"] if not entry["undone"]]
    last = rounds[-1] if rounds else {"mended": 0.0, "accuracy": share(problem.network, data.val)}
    assert share(problem.network, data.failures) == 0.0
    assert share(repaired, data.failures) == pytest.approx(last["mended"], abs=0.02)
    assert share(repaired, data.val) == pytest.approx(last["accuracy"], abs=0.02)


def without(images: ImageSet, label: int) -> ImageSet:
    return images.select(torch.where(images.labels != label)[0])


def answering(name: str, data: RepairData) -> tuple[nn.Module, RepairData]:
    """A network that was never trained, whose last bias is set so that its answers vary, and labels that fit them.

    It is right on the training images and wrong on the failures.
    """
    network, x = create_model(name, 10, width=0.125, stem_stride=2, seed=1), torch.zeros(1, 3, 32, 32)
    train = data.train.select(torch.arange(64))
    logits = predict(network, train, data.transform)
    head = network.get_submodule(last_layer(network, wire(network, x), x)[0])
    with torch.no_grad():
        head.bias -= logits.mean(0)
    answers = (logits - logits.mean(0)).argmax(1)
    relabel = lambda images, labels: ImageSet(images.images, labels, images.classes, images.name)
    failures = data.train.select(torch.arange(64, 76))
    wrong = answers[(predict(network, failures, data.transform).argmax(1)[:, None] != answers).float().argmax(1)]
    return network, replace(data, failures=relabel(failures, wrong), train=relabel(train, answers))


def test_failures_of_a_label_that_is_never_right_are_left_out(problem):
    network, data = answering("resnet18", problem.scenario.data)
    often, rare, *_ = data.train.labels.bincount(minlength=10).argsort(descending=True).tolist()
    answers = predict(network, data.failures, data.transform).argmax(1)
    labels = torch.where((answers != rare) & (torch.arange(12) > 3), rare, often)  # wherever it is `rare`, that is not the network's answer
    part = replace(data, failures=replace(data.failures, labels=labels), train=without(data.train, rare))
    result = BIRDNN(epochs=1, precision="fp32").repair(network, part)
    assert (labels == rare).any() and any(w.startswith(f"{(labels == rare).sum()} failures were left out") for w in result.warnings)
    only = replace(part, failures=part.failures.select(torch.where(labels == rare)[0]))
    with pytest.raises(ArchrepairError, match="right on no training image of any failure's label"):
        BIRDNN(epochs=1, precision="fp32").repair(network, only)
    wrong = ImageSet(data.train.images, (data.train.labels + 1) % 10, data.train.classes, data.train.name)
    for style in birdnn.STYLES:
        with pytest.raises(ArchrepairError, match="right on none of the training images"):
            BIRDNN(style=style, epochs=1, precision="fp32").repair(network, replace(data, train=wrong))


LARGE = ("resnet101", "densenet121")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in NETWORKS if n != "resnet18"])
def test_both_styles_run_on_every_network(name, problem):
    network, data = answering(name, problem.scenario.data)
    tuning = {"style": "fine-tuning", "iterations": 1, "samples": 8, "particles": 4, "normalize": True}
    for settings in (tuning, {"epochs": 1, "target": "features"}):
        result = BIRDNN(precision="fp32", **settings).repair(network, data)
        repaired = result.candidates["repaired"].state_dict()
        assert {k: v.shape for k, v in repaired.items()} == {k: v.shape for k, v in network.state_dict().items()}
        assert all(v.isfinite().all() for v in repaired.values()) and not result.warnings[1:]
    assert rows_changed(network, result.candidates["repaired"]) or result.history["rounds"][-1]["undone"]


@pytest.mark.parametrize("settings, words", [
    ({"style": "finetuning"}, "unknown style of BIRDNN 'finetuning': did you mean 'fine-tuning'"),
    ({"target": "logit"}, "did you mean 'logits'"),
    ({"preset": "papre"}, "unknown preset 'papre'"), ({"n_neurons": 0}, "n_neurons is 0"), ({"particles": 0}, "particles is 0"),
    ({"alpha": -1}, "alpha is -1"), ({"lr": "fast"}, "lr is 'fast'"), ({"round_epochs": 0}, "round_epochs is 0")])
def test_settings(settings, words):
    with pytest.raises(ArchrepairError, match=words) as caught:
        BIRDNN(**settings)
    assert "\n" not in str(caught.value)
