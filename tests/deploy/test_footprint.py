"""What a network weighs and how long it takes."""
import itertools

import pytest
import torch

from archrepair.deploy.footprint import firing_rows, footprints, hold_gates, run_times, size_of
from archrepair.nas.gate import Gate
from archrepair.networks.blocks import suffix_of
from archrepair.networks.conditional import Conditional, make_expert
from archrepair.networks.models import create_model
from archrepair.training.cost import work


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
    assert run_times([torch.nn.Identity()] * 3, torch.zeros(1), runs=5).amin(1).tolist() == pytest.approx([2.0] * 3)


@pytest.fixture(scope="module")
def gated():
    "A network, and one with experts beside two of its stages; their gates are fresh."
    network, x = create_model("resnet18", 10, image_size=32, width=0.125, stem_stride=2, seed=0).eval(), torch.rand(1, 3, 32, 32)
    result, stages = Conditional(network), ["layer1", "layer2"]
    result.tap(stages)
    for name, block, form in (("noise", "layer3", "affine"), ("blur", "layer2", "copy")):
        result.tap([block])
        with torch.no_grad():
            readings = result.read(x)[1]
        expert = make_expert(form, result.original.get_submodule(block), readings[f"{block}:input"])
        result.add(name, block, expert, Gate.for_example(x, {stage: readings[stage] for stage in stages}), form)
    return network, result, x


def test_behind_a_gate_the_expert_and_what_follows_count_twice_and_nothing_else(gated, untouched):
    network, result, x = gated
    with untouched(result):
        sides = footprints(network, result, x, {"clean_held_out": 0.01, "held_out": 0.9})
    with torch.no_grad():
        readings = result.read(x)[1]
        twice = {branch.block: work(branch.expert, readings[f"{branch.block}:input"])
                 + work(suffix_of(network, branch.block), readings[branch.block]) for branch in result.repairs()}
    rows = {(row["images"], row["repair"]): row for row in sides["after"]["firing"]}
    whole = work(network, x)
    quiet = rows["none", ""]["operations"]
    gates = sides["after"]["flops"] - whole
    assert quiet == pytest.approx(sides["after"]["flops"] / whole, abs=1e-4) and 0 < gates < 0.1 * whole
    for repair, block in (("noise", "layer3"), ("blur", "layer2")):
        assert rows["all", repair]["operations"] == pytest.approx(quiet + twice[block] / whole, abs=2e-4)
    assert rows["held_out", "blur"]["operations"] == pytest.approx(quiet + 0.9 * twice["layer2"] / whole, abs=2e-4)
    assert rows["clean_held_out", "blur"]["operations"] == pytest.approx(quiet + 0.01 * twice["layer2"] / whole, abs=2e-4)
    assert all(row["latency"] > 0 for row in rows.values())


def test_what_each_repair_adds(gated):
    network, result, x = gated
    added = {entry["repair"]: entry for entry in footprints(network, result, x)["after"]["added"]}
    sizes = {name: size_of(network.get_submodule(block))["parameters"] for name, block in (("noise", "layer3"), ("blur", "layer2"))}
    assert 0 < added["noise"]["expert"] < sizes["noise"] and added["blur"]["expert"] == sizes["blur"]
    for name, branch in result.branches.items():
        assert added[name]["gate"] == len(branch.gate.weight) + 1
        total = added[name]["expert"] + added[name]["gate"]
        assert added[name]["share"] == pytest.approx(total / size_of(network)["parameters"], abs=1e-5)


def test_held_gates_fire_on_everything_or_nothing(gated):
    result, x = gated[1], torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        for position, repair in enumerate(["noise", "blur"]):
            held = hold_gates(result, repair)
            held(x)
            assert held.fired.tolist() == [position] * 5
            assert held.decide(x, held.read(x)[1])[1].tolist() == [1.0] * 5  # the expert's answer alone
        held = hold_gates(result)
        assert torch.equal(held(x), gated[0](x)) and held.fired.tolist() == [-1] * 5


def test_rates_lie_on_the_line_between_the_ends():
    rows = firing_rows({"": (1.0, 1.1), "a": (1.2, 1.9), "b": (1.6, 1.7)}, {"held_out": 0.5})
    assert [(row["images"], row["repair"], row["rate"]) for row in rows] == [
        ("none", "", 0.0), ("all", "a", 1.0), ("all", "b", 1.0), ("held_out", "b", 0.5)]
    assert rows[3]["operations"] == pytest.approx(1.3) and rows[3]["latency"] == pytest.approx(1.4)


def test_other_networks_have_no_rates(gated):
    network, x = gated[0], gated[2]
    for after in (network, Conditional(network)):
        assert footprints(network, after, x)["after"].keys() == {"parameters", "bytes", "flops", "milliseconds", "device"}
