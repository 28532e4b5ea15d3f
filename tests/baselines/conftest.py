"""A small problem, and situations that need no luck: every epoch validates better, or worse, than the one before."""
import itertools

import pytest
import torch

from archrepair.baselines.parts.common import Problem
from archrepair.data.scenario import RepairData


@pytest.fixture
def improving(monkeypatch):
    "Whatever is trained validates better with every look, so what the last epoch made is kept."
    losses = itertools.count(0, -1)
    monkeypatch.setattr(Problem, "validate", lambda self, network: float(next(losses)))


@pytest.fixture
def worsening(monkeypatch):
    "Whatever is trained validates worse with every look, so what came in is kept."
    losses = itertools.count()
    monkeypatch.setattr(Problem, "validate", lambda self, network: float(next(losses)))


@pytest.fixture
def little(problem):
    "A few images of the shared problem, for methods that look at every one."
    data = problem.scenario.data
    few = lambda part, k: part.select(torch.arange(min(k, len(part))))
    parts = few(data.failures, 24), few(data.train, 60), few(data.val, 24), data.transform, few(data.val_failures, 4)
    return Problem(problem.network, RepairData(*parts))
