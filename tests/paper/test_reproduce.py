"""Runs that are missing are run, pages that have changed are executed, and nothing twice, even after kill -9."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.paper import reproduce
from archrepair.paper.exhibits import requirements
from archrepair.paper.plan import Page, Task, plan, tasks
from archrepair.paper.reproduce import stamp
from support import ROOT
from support.exhibits import SMOKE, a_copy, recorded


def test_what_is_run_is_not_missing_afterwards(tmp_path):
    folder = tmp_path / "outputs"
    runs, rows = a_copy(folder), recorded()[2]
    page, = plan(tier="smoke", only=["fig4"], datasets=["digits:fog:3"])
    page = replace(page, requirements=tuple(requirements(["fig4"], SMOKE)))
    todo = tasks([page], runs)
    assert todo
    for task in todo:
        reproduce.run_task(task, folder, "cpu")
    assert tasks([page], runs) == []
    before, path = stamp(page, runs), runs.file(rows["cell"][0], "robust")
    path.write_text(path.read_text() + "\n")
    assert stamp(page, runs) != before  # the page was made from other numbers


def test_a_cell_that_fails_is_named():
    task = Task(replace(SMOKE.cell("retrain"), options=(("epochs", -1),)))
    with pytest.raises(ArchrepairError, match=r"retrain \(epochs=-1\), resnet18 on digits:fog:3, seed 0: epochs is -1"):
        reproduce.run_task(task, recorded()[0], "cpu")


def test_originals_come_first_and_the_rest_is_announced(monkeypatch):
    ran, log = [], []
    monkeypatch.setattr(reproduce, "run_task", lambda task, outputs, device: ran.append(task) or 1.0)
    cell = SMOKE.cell("retrain")
    repair, training = Task(cell, (), 60.0), Task(cell.unrepaired(), (), 30.0)
    reproduce.run_tasks([repair, training], 1, "cpu", log.append)
    assert ran == [training, repair]
    assert log == ["2 runs, about 2 min in 1 process", f"{training}: 1 s; about 60 s left", f"{repair}: 1 s; about 0 s left"]


def test_work_is_shared_and_the_first_error_ends_it():
    results = {}
    for jobs in (1, 2):
        reproduce.share_out([(divmod, n, 3) for n in range(4)], jobs, results.__setitem__)
        assert results == {n: divmod(n, 3) for n in range(4)}
        with pytest.raises(ZeroDivisionError):
            reproduce.share_out([(divmod, 1, 0)], jobs, results.__setitem__)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A checkout with one notebook that counts how often it has been executed."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair\n")
    (tmp_path / "data" / "published.csv").write_text("table,part,row,column,value,unit,note\n")
    code = ["from pathlib import Path\n", "log = Path('../count')\n", "log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n",
            "if Path('../fail').exists(): raise ValueError('no luck')"]
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**empty, "id": "a", "metadata": {"tags": ["parameters"]}, "source": ["tier: str = 'smoke'  # tier"]},
             {**empty, "id": "b", "source": code}]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (tmp_path / "nbs" / "03_rq1.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_page_is_executed_once_until_something_changes(checkout):
    page = Page("03_rq1", ("table5",), SMOKE, {"tier": "smoke"}, ())
    log = []
    where = reproduce.reproduce([page], jobs=1, device="cpu", log=log.append)
    count = lambda: len((checkout / "count").read_text())
    assert where == checkout / "outputs" / "index.html" and where.exists() and count() == 1 and any("table5" in line for line in log)
    reproduce.reproduce([page], jobs=1, device="cpu", log=log.append)
    assert count() == 1  # nothing had changed
    (checkout / "data" / "published.csv").write_text("table,part,row,column,value,unit,note\n5,a,b,c,1,%,\n")
    reproduce.reproduce([page], jobs=1, device="cpu", log=log.append)
    assert count() == 2
    reproduce.reproduce([page], jobs=1, device="cpu", force=True, log=log.append)
    assert count() == 3
    (checkout / "fail").touch()
    target = reproduce.page_path(page)[0]
    kept = target.read_bytes()
    with pytest.raises(ArchrepairError, match="03_rq1.ipynb failed in cell 3: ValueError: no luck"):
        reproduce.reproduce([page], jobs=1, device="cpu", force=True, log=log.append)
    assert target.read_bytes() == kept and not list(target.parent.glob(".*.part*"))  # the page from before is still there
    (checkout / "fail").unlink()
    reproduce.reproduce([page], jobs=1, device="cpu", log=log.append)
    assert count() == 4  # the stamp still vouches for the page from before the failure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_anywhere_and_called_again_the_tables_are_the_same(tmp_path):
    "kill -9 of the whole process group once some runs are recorded; a second call ends with the tables of an undisturbed run."
    tables = []
    for name, kill in (("undisturbed", False), ("killed", True)):
        checkout = tmp_path / name
        for part in ("nbs/06_rq4.ipynb", "data/published.csv", "settings.ini"):
            (checkout / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, checkout / part)
        environment = {**os.environ, "ARCHREPAIR_HOME": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "archrepair", "paper", "--tier", "smoke", "--only", "table10", "--datasets", "digits:fog:3",
                   "--jobs", "2"]
        if kill:
            process = subprocess.Popen(command, cwd=checkout, env=environment, start_new_session=True, stderr=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL)
            until = time.time() + 200
            while len(list(checkout.glob("outputs/smoke/records/*/*/*.json"))) < 2 and time.time() < until:
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not (checkout / "outputs" / "index.html").exists()
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_csv(checkout / "outputs/smoke/tables/table10-resnet18-digits~fog~3-clean.csv").drop(columns="commit"))
        assert not list(checkout.rglob("*.part*")) and not list(checkout.rglob("*.checkpoints"))
    pd.testing.assert_frame_equal(*tables)
