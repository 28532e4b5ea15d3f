"The frame of every method: what a problem offers, checkpoints, the verdict, and what a result says."
import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from archrepair.baselines.parts.common import Baseline, Problem
from archrepair.core.errors import ArchrepairError
from archrepair.repair.result import changes
from archrepair.repair.verdict import judge
from archrepair.training.cost import CostMeter
from archrepair.training.fit import Recipe
from support.states import same_state


@dataclasses.dataclass
class Step(Baseline):
    "Adds to the classifier's bias, in steps that are kept; for tests of the frame."

    steps: int = 4
    size: float = 0.0
    die_at: int = -1
    name: str = "step"

    def run_method(self, problem: Problem) -> nn.Module:
        network = problem.network()
        state = problem.resume("steps") or {"done": 0, "bias": network.fc.bias.detach().clone()}
        for i in range(state["done"], self.steps):
            if i == self.die_at:
                raise KeyboardInterrupt
            problem.meter.add(10, 3, share=0.5)
            noise = torch.rand(len(state["bias"]), generator=problem.generator(f"step {i}"))
            state = {"done": i + 1, "bias": state["bias"] + self.size * noise}
            problem.save_checkpoint("steps", **state)
        network.fc.bias.data = state["bias"]
        problem.findings["steps"], problem.history["steps"] = state["done"], [{"step": state["done"]}]
        problem.warnings.append("a note")
        return network


def test_a_network_that_did_not_change_is_accepted_and_costs_what_was_counted(_problem):
    result = Step().repair(_problem.network, _problem.scenario.data)
    data = _problem.scenario.data
    assert result.accepted and result.changed == {} and result.validation["original"] == result.validation["repaired"]
    assert result.cost.forwards == 4 * 5 + 2 * (len(data.val) + len(data.val_failures)) and result.cost.backwards == 4 * 1.5
    assert result.config["steps"] == 4 and result.config["size"] == 0.0
    assert result.warnings[0] == "a note" and result.history == {"steps": [{"step": 4}]}
    assert (result.cost.as_dict()["seconds"] > 0) and result.control_cost.forwards == 0 and result.genotype is None


def test_a_worse_network_is_a_candidate_but_not_returned(_problem):
    result = Step(size=50.0).repair(_problem.network, _problem.scenario.data)
    own = result.candidates["repaired"]
    assert not result.accepted and result.chosen == "original" and same_state(result.model, _problem.network) and result.changed == {}
    assert changes(_problem.network.state_dict(), own.state_dict()) == {"fc.bias": "10/10"} and result.model is not _problem.network
    nothing = Step(size=math.nan).repair(_problem.network, _problem.scenario.data)
    assert nothing.chosen == "original" and "the repaired network is not finite" in str(nothing.verdict)


def test_a_checkpoint_goes_on_and_counts_once(_problem, tmp_path):
    data, one_go = _problem.scenario.data, Step(size=0.01).repair(_problem.network, _problem.scenario.data)
    with pytest.raises(KeyboardInterrupt):
        Step(size=0.01, die_at=3).repair(_problem.network, data, checkpoints=tmp_path)
    with pytest.raises(ArchrepairError, match="run with other settings; remove it"):
        Step(size=0.02).repair(_problem.network, data, checkpoints=tmp_path)
    path = tmp_path / "steps.pt"
    content = torch.load(path, weights_only=True)
    content["settings"] = json.dumps(dataclasses.asdict(Step(size=0.01)), sort_keys=True)
    content["cost"][2] += 1000
    torch.save(content, path)
    again = Step(size=0.01).repair(_problem.network, data, checkpoints=tmp_path)
    assert same_state(again.candidates["repaired"], one_go.candidates["repaired"])
    assert (again.cost.forwards, again.cost.backwards) == (one_go.cost.forwards, one_go.cost.backwards) and 1000 < again.cost.seconds < 1100
    path.write_text("half")
    with pytest.raises(ArchrepairError, match="cannot resume from .*steps.pt .*remove it to start afresh"):
        Step(size=0.01).repair(_problem.network, data, checkpoints=tmp_path)


def test_a_network_with_other_parameters_is_refused(_problem):
    class Wider(Step):
        def run_method(self, problem):
            network = problem.network()
            network.extra = nn.Linear(2, 2)
            return network

    with pytest.raises(TypeError, match="fold what was added"):
        Wider().repair(_problem.network, _problem.scenario.data)


def test_few_validation_failures_are_a_warning(_problem):
    data = dataclasses.replace(_problem.scenario.data, val_failures=_problem.scenario.data.val_failures.select(torch.arange(2)))
    assert "only 2 failures are kept for validation" in Step().repair(_problem.network, data).warnings[-1]


@pytest.mark.parametrize(("before", "after", "chosen"), [
    (1.0, 0.5, "repaired"), (0.5, 0.5, "repaired"), (0.5, 0.6, "original"), (0.5, math.nan, "original"),
    (math.nan, 0.5, "repaired"), (math.inf, 9.0, "repaired"), (math.nan, math.nan, "original")])
def test_who_is_returned(before, after, chosen):
    verdict = judge({"original": before, "repaired": after}, method="x")
    assert verdict.chosen == chosen and str(verdict).startswith("accepted: x" if chosen == "repaired" else "rejected: x")


def test_a_problem_answers_once_and_in_order(_problem):
    problem = Problem(copy.deepcopy(_problem.network), _problem.scenario.data)
    data = problem.data
    assert torch.equal(problem.logits("val"), problem.logits("val")) and problem.meter.forwards == len(data.val)
    assert not problem.correct("failures").any()  # that is what failures are
    rows = problem.rows(failure_views=3, teacher=True)
    assert len(rows) == len(data.train) + 3 * len(data.failures) and rows.failures == 3 * len(data.failures)
    assert torch.equal(rows.labels, torch.cat([data.train.labels, data.failures.labels.repeat(3)]))
    assert torch.equal(rows.teacher[-len(data.failures):], problem.logits("failures"))
    assert rows.imitate.sum() == problem.correct("train").sum()
    assert problem.rows().teacher is None
    assert torch.equal(problem.rows().inputs(torch.tensor([0]))[0], data.transform(data.train.images[:1]))
    draw = lambda purpose, seed=0: torch.rand(4, generator=dataclasses.replace(problem, seed=seed).generator(purpose))
    assert torch.equal(draw("a"), draw("a")) and not torch.equal(draw("a"), draw("b")) and not torch.equal(draw("a"), draw("a", 1))
    assert all(p.requires_grad for p in problem.network().parameters()) and problem.network() is not problem.original
    assert problem.at("x") is None and problem.resume("x") is None and problem.save_checkpoint("x", a=1) is None


def test_a_problem_trains_with_the_one_loop(_problem, tmp_path):
    from archrepair.training.fit import fit

    problem = Problem(copy.deepcopy(_problem.network), _problem.scenario.data, checkpoints=tmp_path)
    network, other, recipe = problem.network(), problem.network(), Recipe(epochs=1, lr=0.01)
    history = problem.train(network, problem.rows(), recipe, "tuning")
    fit(other, problem.rows(), recipe, validate=lambda: problem.validate(other))
    assert same_state(network, other) and problem.history["tuning"] == history.epochs and (tmp_path / "tuning.pt").exists()
    assert history.epochs[0]["val"] == pytest.approx(problem.validate(problem.original))


def test_time_is_counted_once():
    meter = CostMeter()
    with meter.running():
        with meter.running(), meter.running():
            sum(range(100_000))
        inside = meter.seconds
    assert inside == 0 and meter.seconds > 0
    spent = meter.seconds
    with pytest.raises(ZeroDivisionError), meter.running():
        1 / 0  # noqa: B018
    with meter.running():
        pass
    assert meter.seconds > spent and "runs" not in str(meter.as_dict())
