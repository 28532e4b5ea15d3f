"""Situations that no training run has to bring about by luck: every epoch validates better, or worse, than the one before."""
import itertools

import pytest

from archrepair.baselines.parts.common import Problem


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
