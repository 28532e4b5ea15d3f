"""What a network weighs and how long it takes."""
import itertools

import pytest
import torch

from archrepair.deploy.footprint import footprints, latencies, size_of


def test_a_footprint_counts_and_leaves_the_networks_alone(untouched):
    small, large = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, n), torch.nn.Linear(n, 2)) for n in (2, 200))
    with untouched(small), untouched(large):
        sides = footprints(small, large, torch.zeros(5, 3, 2, 2))
    assert sides["before"]["parameters"] == 12 * 2 + 2 + 2 * 2 + 2 and sides["after"]["bytes"] == 4 * sides["after"]["parameters"]
    assert sides["before"]["flops"] == 2 * (12 * 2 + 2 * 2) and sides["after"]["milliseconds"] > 0


def test_a_size_counts_buffers_as_bytes_but_not_as_parameters():
    norm = torch.nn.BatchNorm2d(3)
    assert size_of(norm) == {"parameters": 6, "bytes": 4 * (6 + 6) + 8}


def test_latencies_are_one_per_network_in_milliseconds(monkeypatch):
    "On a clock that ticks two milliseconds at every look."
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: 0.002 * next(ticks))
    assert latencies([torch.nn.Identity()] * 3, torch.zeros(1), runs=5) == pytest.approx([2.0] * 3)
