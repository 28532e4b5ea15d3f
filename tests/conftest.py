"""Shared by all tests: one thread, no progress bars, and one small network trained once.

No test may need the luck of its training: `ARCHREPAIR_TEST_SEED=1 python -m pytest` trains another one.
"""
import os
from dataclasses import replace
from types import SimpleNamespace

os.environ["ARCHREPAIR_PROGRESS"] = "0"

import pytest
import torch

from archrepair.core.tiers import TIERS
from archrepair.data.datasets import load_dataset
from archrepair.data.images import Normalize, holdout
from archrepair.data.scenario import build_scenario
from archrepair.networks.models import create_model
from archrepair.training.evaluation import is_correct, predict
from archrepair.training.fit import train_original
from support.states import assert_same_state, state_of

torch.set_num_threads(1)
SEED = int(os.environ.get("ARCHREPAIR_TEST_SEED", "0"))


@pytest.fixture
def untouched():
    "`with untouched(model):` fails when anything about the model differs afterwards."
    from contextlib import contextmanager

    @contextmanager
    def check(model):
        before = state_of(model)
        yield model
        assert_same_state(before, model)

    return check


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty project root: nothing is read from, or written to, the real one."
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def quiet_stream():
    "Seeds are passed in: a test that asks for this fails when torch's global random stream was drawn from or seeded."
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global random stream moved"


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits", "train")


@pytest.fixture(scope="session")
def digits_test():
    return load_dataset("digits", "test")


@pytest.fixture(scope="session")
def _problem(digits, digits_test):
    "A small network that makes mistakes, the scenario of its repair, and the same data with failures that share a pattern: they are dark."
    network = create_model("resnet18", 10, width=0.125, stem_stride=2, seed=SEED)
    transform = Normalize.of(digits)
    train_original(network, digits.select(holdout(digits.labels, 0.1, 0)[0]), TIERS["smoke"], epochs=2, transform=transform, seed=SEED)
    correct = is_correct(predict(network, digits_test, transform), digits_test.labels)
    scenario = build_scenario(digits, digits_test, correct, n_failures=60)
    darker = lambda part: replace(part, images=part.images // 3)
    dark = replace(scenario.data, failures=darker(scenario.data.failures), val_failures=darker(scenario.data.val_failures))
    return SimpleNamespace(network=network, transform=transform, correct=correct, scenario=scenario, dark=dark)


@pytest.fixture
def problem(_problem):
    "The shared network and scenario; a test that changes the network fails."
    before = state_of(_problem.network)
    yield _problem
    assert_same_state(before, _problem.network)


@pytest.fixture(scope="session")
def chromium():
    "One browser for all tests that look at pages."
    from support.browser import browser

    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def parts():
    "Networks and the scenario of a made-up result."
    from support.reports import scenario_and_networks

    return scenario_and_networks()
