"""Which runs a table needs, what a table prints, and what the whole paper does when it is interrupted."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
from typer.testing import CliRunner

from archrepair.cli.app import app
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import METHODS
from archrepair.experiments.runs import Runs
from archrepair.paper import reproduce
from archrepair.paper.exhibits import EXHIBITS, FEW_CORRUPTIONS, PAPER_METHODS, STAND_INS, Requirement, Settings, everywhere, requirements
from archrepair.paper.figures import save_figure
from archrepair.paper.index import cards, index
from archrepair.paper.published import PRINTED, display_name, published
from archrepair.paper.reproduce import Page, estimate, parameter_names, plan, source_of, spoken, stamp, tasks
from archrepair.paper.tables import ResultTable, collect_rows, runs_as_values
from support import ROOT

SMOKE = Settings.of(tier="smoke", methods="retrain,surgical")


# ---- settings and needs -------------------------------------------------------------------------------------------------------

def test_every_table_and_figure_of_the_paper_is_there():
    assert list(EXHIBITS) == ["table1", "fig1", "fig2", "fig3", "table4", "table5", "table6", "fig4", "fig5", "table7", "fig6", "fig7", "table8", "table9", "table10"]
    assert {f"table{t}" for t in published()["table"].unique()} == {name for name in EXHIBITS if name.startswith("table")}
    for exhibit in EXHIBITS.values():
        assert source_of(exhibit.notebook).is_file()


def test_printed_names_are_those_of_the_published_tables():
    table5, table7 = published(5), published(7)
    assert [display_name("method", m) for m in ("original", *PAPER_METHODS)] == list(dict.fromkeys(table5["row"]))
    assert list(PRINTED["corruption"].values()) == list(dict.fromkeys(table7["column"]))
    assert list(PRINTED["model"].values()) == list(dict.fromkeys(table5["column"]))
    assert set(PRINTED["dataset"].values()) == set(table5["part"])
    assert set(PRINTED["level"].values()) == set(published(1)["row"])
    assert set(PRINTED["method"]) - {"original"} <= set(METHODS)
    assert display_name("method", "arachne:search=de") == "Arachne (search=de)" and display_name("model", "timm:x") == "timm:x".replace(":", " (") + ")"
    with pytest.raises(ArchrepairError, match="unknown kind of name"):
        display_name("color", "red")


def test_the_paper_tier_has_the_papers_sizes():
    full = Settings.of(tier="paper", models=",".join(PRINTED["model"]))
    assert len(full.seeds) == 5 and len(full.corruptions) == 15 and full.dataset == "cifar10"
    assert len(requirements(["table5"], full)) == 6 * 7 * 5  # networks, methods, runs
    assert len(requirements(["table7"], replace(full, models=("resnet18",)))) == 5 * 16 * 5  # methods, clean and corruptions, runs
    assert len(requirements(["table1"], replace(full, models=full.models[1:4]))) == 3 * 4 * 5
    assert len(requirements(["table9"], replace(full, models=("resnet50",)))) == 4 * 5
    assert all(len(n.versions) == 16 for n in requirements(["table8"], full))


def test_a_cell_is_needed_once_with_all_its_versions():
    both = requirements(["table5", "fig4"], SMOKE)
    assert len(both) == len({n.cell for n in both}) == 2 and all(n.versions == everywhere(SMOKE) for n in both)
    assert all(n.versions == () for n in requirements(["table5"], SMOKE))
    with pytest.raises(ArchrepairError, match="unknown table or figure 'table2': did you mean"):
        requirements(["table2"], SMOKE)


@pytest.mark.parametrize(("changes", "message"), [({"corruption": "fgo"}, "unknown corruption 'fgo': did you mean 'fog'"), ({"protocol": "dirty"}, "unknown protocol"),
                                                  ({"tier": "big"}, "unknown tier"), ({"seeds": -1}, "seeds is -1"), ({"severity": 6}, "severity 6"),
                                                  ({"models": ","}, "at least one")])
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ArchrepairError, match=message) as caught:
        Settings.of(**{"tier": "smoke", **changes})
    assert "\n" not in str(caught.value)


def test_settings_from_text():
    made = Settings.of(tier="smoke", models=" resnet18, vgg16,resnet18", corruption="all", seed=3, seeds=2)
    assert made.models == ("resnet18", "vgg16") and made.seeds == (3, 4) and len(made.corruptions) == 15
    assert Settings.of(tier="smoke").corruptions == FEW_CORRUPTIONS["smoke"] and Settings.of(tier="smoke").dataset == STAND_INS[0]
    assert made.stem == "resnet18+vgg16-digits~fog~3-clean" and made.version("snow") == "digits:snow:3" and made.version("clean") == "digits:fog:3"
    assert not made.uses_second_dataset and Settings.of(tier="lite", dataset="tiny-imagenet").uses_second_dataset


# ---- sheets -------------------------------------------------------------------------------------------------------------------

def values(**rows) -> pd.DataFrame:
    return pd.DataFrame([{"row": row, "column": "ResNet-18", "score": "full", "value": v} for row, several in rows.items() for v in several])


PAPER = pd.DataFrame({"ResNet-18": {"Original": 85.0, "MODE": 85.48}})


def test_a_table_says_mean_spread_n_paper_and_difference():
    table = ResultTable.of("table5", "Accuracy", SMOKE, values(Original=[80.0, 82.0], MODE=[84.0, 86.0], Apricot=[84.0]), PAPER, commits=["b", "a", "b", ""])
    assert list(table.long["mean"]) == [81.0, 85.0, 84.0] and list(table.long["n"]) == [2, 2, 1]
    assert table.long["sd"].iloc[0] == pytest.approx(math.sqrt(2)) and math.isnan(table.long["sd"].iloc[2]) and math.isnan(table.long["paper"].iloc[2])
    assert list(table.long["difference"].round(2))[:2] == [-4.0, -0.48]
    frame = table.frame(("<b>", "</b>"))
    assert frame.loc["MODE", ("ResNet-18", "full test")] == "<b>85.00 ± 1.41</b>" and frame.loc["Apricot", ("ResNet-18", "full test")] == "84.00 (n 1)"
    assert frame.loc["Original", ("ResNet-18", "difference")] == "-4.00" and frame.loc["Apricot", ("ResNet-18", "paper")] == "–"
    assert table.commits == ("a", "b") and "n = 1 to 2" in table.caption and "tier smoke" in table.caption and "commit a, b" in table.caption
    assert "**85.00 ± 1.41**" in table.markdown() and table.markdown().count("\n|") == 5


def test_the_original_is_never_the_best_and_ties_share():
    table = ResultTable.of("table5", "", SMOKE, values(Original=[99.0], MODE=[84.001], Apricot=[84.004]))
    assert [text.startswith("<b>") for text in table.frame(("<b>", "</b>")).iloc[:, 0]] == [False, True, True]
    least = ResultTable.of("table4", "", SMOKE, values(MODE=[3.0], Apricot=[2.0]), better="min")
    assert [text.startswith("*") for text in least.frame(("*", "*")).iloc[:, 0]] == [False, True]
    assert not any("*" in text for text in replace(least, better="").frame(("*", "*")).iloc[:, 0])


def test_a_missing_cell_is_a_dash():
    ragged = pd.concat([values(MODE=[1.0], Apricot=[2.0]), values(MODE=[3.0]).assign(column="VGG-16")])
    assert ResultTable.of("table5", "", SMOKE, ragged).frame().loc["Apricot", ("VGG-16", "full test")] == "–"


def test_what_is_saved_can_be_read_back_and_bound(tmp_path):
    import matplotlib.pyplot as plt

    table = ResultTable.of("table5", "Accuracy <of> all", SMOKE, values(Original=[80.0], MODE=[84.0]), PAPER, commits=["abc"])
    csv, markdown, card = table.save(tmp_path)
    read = pd.read_csv(csv)
    assert list(read.columns) == ["row", "column", "score", "mean", "sd", "n", "paper", "difference", "unit", "tier", "protocol", "commit"] and len(read) == 2
    assert card.name == "table5-resnet18-digits~fog~3-clean.json" and "ours" not in json.loads(card.read_text())["html"]
    fig, ax = plt.subplots(figsize=(1, 1))
    first = save_figure(fig, "fig4", SMOKE, "A <b> of bars.", tmp_path)
    before = [path.read_bytes() for path in first]
    assert [path.read_bytes() for path in save_figure(fig, "fig4", SMOKE, "A <b> of bars.", tmp_path)] == before  # no date, no machine
    plt.close(fig)
    old = card.with_name("old.json")
    old.write_text(json.dumps({**json.loads(card.read_text()), "name": "line"}))  # of a version that knew other exhibits
    assert [c["name"] for c in cards(tmp_path)] == ["table5", "fig4"]
    text = index(tmp_path).read_text()
    assert "Accuracy &lt;of&gt; all" in text and 'alt="A &lt;b&gt; of bars."' in text and text.count("<section") == 2 and "http" not in text


# ---- from records -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    runs = Runs(outputs=folder)
    return folder, runs, collect_rows(requirements(["fig4"], SMOKE), runs)


def test_gathered_rows_are_the_records(recorded):
    folder, runs, found = recorded
    assert list(found["method"]) == ["retrain", "surgical"] and (found["corruption"] == "fog").all() and (found["full before"] > 0).all()
    for row in found.itertuples():
        after = row.record.metrics["candidates"]["repaired"]["after"]
        assert row.full == after["full"]["accuracy"] and row.held_out == after["held_out"]["accuracy"] and row.cpu_seconds > 0
        assert runs.has_network(row.cell)  # they will be asked for by the figure
    table = runs_as_values(found, "method", "model")
    assert list(dict.fromkeys(table["row"])) == ["Original", "Retraining", "Surgical"] and len(table) == 2 * 3
    assert collect_rows([Requirement(SMOKE.cell("mode"))], runs, missing="skip").empty


def test_tasks_are_what_is_missing(recorded):
    folder, runs, found = recorded
    pages = [replace(p, requirements=tuple(requirements(["fig4"], SMOKE))) for p in plan(tier="smoke", only=["fig4"], datasets=["digits:fog:3"])]
    todo = tasks(pages, runs)
    assert {t.cell.method for t in todo} == {"retrain", "surgical", "original"} and all(len(t.versions) == 16 for t in todo)  # evaluations alone
    for task in todo:
        reproduce._do(task, folder, "cpu")
    assert tasks(pages, runs) == []
    before = stamp(pages[0], runs)
    path = runs.file(found["cell"][0], "robust")
    path.write_text(path.read_text() + "\n")
    assert stamp(pages[0], runs) != before
    fresh = tasks(pages, Runs(outputs=folder / "elsewhere"))
    assert [t.cell.method for t in fresh][0] == "original" and fresh[0].versions == () and fresh[0].seconds > 0 and len(fresh) == 4


def test_a_cell_that_fails_is_named(recorded):
    folder, _, _ = recorded
    task = reproduce.Task(replace(SMOKE.cell("retrain"), options=(("epochs", -1),)))
    with pytest.raises(ArchrepairError, match=r"retrain \(epochs=-1\), resnet18 on digits:fog:3, seed 0: epochs is -1"):
        reproduce._do(task, folder, "cpu")


# ---- the whole paper ----------------------------------------------------------------------------------------------------------

def test_the_plan_covers_everything_once():
    pages = plan(tier="smoke")
    assert {name for p in pages for name in p.exhibits} == set(EXHIBITS)
    assert [p.notebook for p in pages] == sorted(p.notebook for p in pages[:7]) + ["03_rq1", "04_rq2", "05_rq3", "06_rq4"]
    for page in pages:
        assert set(page.parameters) <= set(parameter_names(source_of(page.notebook))) and page.parameters["tier"] == "smoke"
    full = plan(tier="paper")
    assert [p.settings.models for p in full if p.notebook == "05_rq3"][:2] == [("resnet18",), ("resnet50",)]
    assert len(next(p for p in full if p.notebook == "03_rq1").settings.models) == 6


def test_every_notebook_of_the_paper_takes_a_model_and_a_tier():
    for notebook in {e.notebook for e in EXHIBITS.values()}:
        assert {"model", "tier", "seed", "dataset"} <= set(parameter_names(source_of(notebook))), notebook


@pytest.mark.parametrize(("arguments", "message"), [(["--only", "table2"], "unknown table or figure 'table2'"), (["--tier", "huge"], "unknown tier"),
                                                    (["--corruption", "rain"], "unknown corruption"), (["--methods", "magic"], "unknown method")])
def test_the_command_refuses_in_one_line(arguments, message):
    done = CliRunner().invoke(app, ["paper", "--dry-run", "--tier", "smoke", *arguments])
    assert isinstance(done.exception, ArchrepairError) and message in str(done.exception) and "\n" not in str(done.exception)


def test_dry_run_says_what_would_run_and_how_long():
    done = CliRunner().invoke(app, ["paper", "--dry-run", "--tier", "smoke", "--only", "table10", "--seeds", "7", "--json"])
    said = json.loads(done.stdout)
    assert [p["notebook"] for p in said["pages"]] == ["06_rq4", "06_rq4"] and said["pages"][0]["runs"] == 7 * 4
    assert all(t["seconds"] > 0 for t in said["tasks"]) and any("level=layer" in t["what"] for t in said["tasks"])
    text = CliRunner().invoke(app, ["paper", "--dry-run", "--tier", "smoke", "--only", "table10", "--seeds", "7"]).stdout
    assert "about" in text and "06_rq4" in text


def test_time_is_estimated_from_counted_cost():
    cell = SMOKE.cell("retrain")
    assert estimate(cell, 0, 0.002) == pytest.approx(2 * estimate(cell, 0, 0.001))
    assert estimate(cell, 10, 0.001) - estimate(cell, 0, 0.001) == pytest.approx(10 * 597 * 0.001)
    assert estimate(SMOKE.cell("fewshot"), 0, 1) > estimate(SMOKE.cell("archrepair"), 0, 1) > estimate(SMOKE.cell("arachne"), 0, 1)
    assert [spoken(x) for x in (-1, 3, 600, 7200)] == ["0 s", "3 s", "10 min", "2.0 h"]


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A checkout with one notebook that counts how often it has been executed."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair\n")
    (tmp_path / "data" / "published.csv").write_text("table,part,row,column,value,unit,note\n")
    code = ["from pathlib import Path\n", "log = Path('../count')\n", "log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n", "if Path('../fail').exists(): raise ValueError('no luck')"]
    cells = [{"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": ["tier: str = 'smoke'  # tier"], "outputs": [], "execution_count": None},
             {"cell_type": "code", "id": "b", "metadata": {}, "source": code, "outputs": [], "execution_count": None}]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (tmp_path / "nbs" / "03_rq1.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_page_is_printed_once_until_something_changes(house):
    page = Page("03_rq1", ("table5",), SMOKE, {"tier": "smoke"}, ())
    said = []
    where = reproduce.reproduce([page], jobs=1, device="cpu", log=said.append)
    count = lambda: len((house / "count").read_text())
    assert where == house / "outputs" / "index.html" and where.exists() and count() == 1 and any("table5" in line for line in said)
    reproduce.reproduce([page], jobs=1, device="cpu", log=said.append)
    assert count() == 1  # nothing had changed
    (house / "data" / "published.csv").write_text("table,part,row,column,value,unit,note\n5,a,b,c,1,%,\n")
    reproduce.reproduce([page], jobs=1, device="cpu", log=said.append)
    assert count() == 2
    reproduce.reproduce([page], jobs=1, device="cpu", force=True, log=said.append)
    assert count() == 3
    (house / "fail").touch()
    target = reproduce.page_path(page)[0]
    kept = target.read_bytes()
    with pytest.raises(ArchrepairError, match="03_rq1.ipynb failed in cell 3: ValueError: no luck"):
        reproduce.reproduce([page], jobs=1, device="cpu", force=True, log=said.append)
    assert target.read_bytes() == kept and not list(target.parent.glob(".*.part*"))  # what was printed before is still there
    (house / "fail").unlink()
    reproduce.reproduce([page], jobs=1, device="cpu", log=said.append)
    assert count() == 4  # the stamp still vouches for the page from before the failure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_anywhere_and_called_again_the_tables_are_the_same(tmp_path):
    "kill -9 of the whole process group once some runs are recorded; a second call ends with the tables of an undisturbed run."
    tables = []
    for name, kill in (("undisturbed", False), ("killed", True)):
        house = tmp_path / name
        for part in ("nbs/06_rq4.ipynb", "data/published.csv", "settings.ini"):
            (house / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, house / part)
        environment = {**os.environ, "ARCHREPAIR_HOME": str(house), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "archrepair", "paper", "--tier", "smoke", "--only", "table10", "--datasets", "digits:fog:3", "--jobs", "2"]
        if kill:
            process = subprocess.Popen(command, cwd=house, env=environment, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            until = time.time() + 200
            while len(list(house.glob("outputs/smoke/records/*/*/*.json"))) < 2 and time.time() < until:
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not (house / "outputs" / "index.html").exists()
        done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_csv(house / "outputs/smoke/tables/table10-resnet18-digits~fog~3-clean.csv").drop(columns="commit"))
        assert not list(house.rglob("*.part*")) and not list(house.rglob("*.checkpoints"))
    pd.testing.assert_frame_equal(*tables)
