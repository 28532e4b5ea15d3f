"""Which pages make which exhibits, what they lack, and how long it will take."""
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from archrepair.cli.app import app
from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import load_dataset
from archrepair.experiments.runs import Runs
from archrepair.paper.exhibits import EXHIBITS, requirements
from archrepair.paper.parameters import parameters_of
from archrepair.paper.plan import dataset_size, estimate, plan, seconds_per_pass, source_of, tasks
from support.exhibits import SMOKE, a_copy, recorded


def test_the_plan_covers_everything_once():
    pages = plan(tier="smoke")
    assert {name for p in pages for name in p.exhibits} == set(EXHIBITS)
    assert [p.notebook for p in pages] == sorted(p.notebook for p in pages[:7]) + ["03_rq1", "04_rq2", "05_rq3", "06_rq4"]
    for page in pages:
        assert set(page.parameters) <= set(parameters_of(source_of(page.notebook))) and page.parameters["tier"] == "smoke"
    full = plan(tier="paper")
    assert [p.settings.models for p in full if p.notebook == "05_rq3"][:2] == [("resnet18",), ("resnet50",)]
    assert len(next(p for p in full if p.notebook == "03_rq1").settings.models) == 6


def test_pages_are_given_what_differs_from_their_defaults():
    page, = plan(tier="smoke", only=["table9"], datasets=["digits:fog:3"], models=["vgg16"], seeds=2)
    assert page.parameters == {"tier": "smoke", "protocol": "clean", "seeds": 2, "model": "vgg16", "dataset": "digits:fog:3"}
    first = plan(tier="smoke", only=["table5"], methods=["retrain", "mode"], missing="skip")[0]
    assert (first.parameters["methods"], first.parameters["missing"]) == ("retrain,mode", "skip") and "dataset" not in first.parameters
    six = next(page for page in plan(tier="paper") if page.notebook == "03_rq1")
    assert six.parameters["models"].split(",") == list(six.settings.models) and six.parameters["model"] == six.settings.models[0]


def test_every_notebook_of_the_paper_takes_a_model_and_a_tier():
    for notebook in {e.notebook for e in EXHIBITS.values()}:
        assert {"model", "tier", "seed", "dataset"} <= set(parameters_of(source_of(notebook))), notebook


@pytest.mark.parametrize(("arguments", "message"), [
    (["--only", "table2"], "unknown table or figure 'table2'"), (["--tier", "huge"], "unknown tier"),
    (["--corruption", "rain"], "unknown corruption"), (["--methods", "magic"], "unknown method")])
def test_the_command_refuses_in_one_line(arguments, message):
    done = CliRunner().invoke(app, ["paper", "--dry-run", "--tier", "smoke", *arguments])
    assert isinstance(done.exception, ArchrepairError) and message in str(done.exception) and "\n" not in str(done.exception)


def test_dry_run_says_what_would_run_and_how_long():
    done = CliRunner().invoke(app, ["paper", "--dry-run", "--tier", "smoke", "--only", "table10", "--seeds", "7", "--json"])
    printed = json.loads(done.stdout)
    assert [p["notebook"] for p in printed["pages"]] == ["06_rq4", "06_rq4"] and printed["pages"][0]["runs"] == 7 * 4
    assert all(t["seconds"] > 0 for t in printed["tasks"]) and any("level=layer" in t["what"] for t in printed["tasks"])
    text = CliRunner().invoke(app, ["paper", "--dry-run", "--tier", "smoke", "--only", "table10", "--seeds", "7"]).stdout
    assert "about" in text and "06_rq4" in text


def test_sizes_are_those_of_the_datasets():
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    assert dataset_size("digits:fog:3") == (len(train) * 9 // 10, len(test), train.size)
    metrics = recorded()[2]["record"][0].metrics
    assert dataset_size("digits")[:2] == (metrics["images"]["train"], metrics["before"]["full"]["n"])
    assert dataset_size("cifar10") == (45_000, 10_000, 32) and dataset_size("npz:/my/own.npz") == dataset_size("cifar10")


def test_time_is_estimated_from_counted_cost():
    cell = SMOKE.cell("retrain")
    assert estimate(cell, 0, 0.002) == pytest.approx(2 * estimate(cell, 0, 0.001))
    assert estimate(cell, 10, 0.001) - estimate(cell, 0, 0.001) == pytest.approx(10 * 597 * 0.001)
    assert estimate(cell, 10, 0.001, repaired=True) == pytest.approx(10 * 597 * 0.001)
    assert estimate(SMOKE.cell("fewshot"), 0, 1) > estimate(SMOKE.cell("archrepair"), 0, 1) > estimate(SMOKE.cell("arachne"), 0, 1)


def test_a_pass_is_timed_from_records_or_now(tmp_path):
    folder, _, rows = recorded()
    costs = [record.repair["cost"] for record in rows["record"]]
    rates = [cost["seconds"] / (cost["forwards"] + 2 * cost["backwards"]) for cost in costs]
    assert seconds_per_pass("resnet18", "digits", "smoke", folder) == pytest.approx(sum(rates) / 2)
    assert 0 < seconds_per_pass("resnet18", "digits", "smoke", tmp_path, "cpu") < 1


def test_tasks_are_what_is_missing(tmp_path):
    runs = a_copy(tmp_path / "outputs")
    page, = plan(tier="smoke", only=["fig4"], datasets=["digits:fog:3"])
    pages = [replace(page, requirements=tuple(requirements(["fig4"], SMOKE)))]
    todo = tasks(pages, runs)
    assert {task.cell.method for task in todo} == {"retrain", "surgical", "original"}  # evaluations alone
    assert all(len(task.versions) == 16 and not task.trains_original for task in todo)
    missing = tasks(pages, Runs(outputs=tmp_path / "empty"))
    assert [task.cell.method for task in missing] == ["original", "retrain", "surgical", "original"]
    assert missing[0].trains_original and all(task.seconds > 0 for task in missing)
