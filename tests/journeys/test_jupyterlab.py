"""A notebook in JupyterLab itself: opened in a browser, run from top to bottom, and its figure seen."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from support import ROOT
from support.browser import MISSING, find_browser

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(not find_browser(), reason=MISSING)]
TOKEN = "a-token-for-this-test-only"


def notebook() -> Path:
    "The first lesson of a new user; a small one with a figure while there is none."
    first = ROOT / "nbs" / "tutorials" / "quickstart.ipynb"
    return first if first.exists() else ROOT / "nbs" / "corruptions" / "03_displacement.ipynb"


@pytest.fixture
def lab(tmp_path):
    "Address of a JupyterLab on a copy of the notebook, without its outputs; ended with all its kernels."
    book = json.loads(notebook().read_text(encoding="utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (tmp_path / "work").mkdir()
    # Every cell is on the page, not only those in sight; nothing asks the network for news.
    for plugin, setting in (("notebook-extension/tracker", '{"windowingMode": "none"}'),
                            ("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}')):
        chosen = tmp_path / "jupyterlab_settings_dir" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        chosen.parent.mkdir(parents=True, exist_ok=True)
        chosen.write_text(setting)
    (tmp_path / "work" / "lesson.ipynb").write_text(json.dumps(book), encoding="utf-8")
    for needed in ("data", "nbs"):
        (tmp_path / needed).symlink_to(ROOT / needed) if (ROOT / needed).exists() else None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                                                                 "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    env = {**os.environ, **settings, "IN_TEST": "1", "OMP_NUM_THREADS": "1", "ARCHREPAIR_PROGRESS": "0", "ARCHREPAIR_HOME": str(tmp_path)}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
               f"--ServerApp.root_dir={tmp_path / 'work'}", "--allow-root", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, env=env, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.1)
        else:
            pytest.fail((tmp_path / "log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(tmp_path / "work", ignore_errors=True)


STATE = r"""() => {
  const cells = [...document.querySelectorAll(".jp-Notebook .jp-CodeCell")];
  const size = e => { const box = e.getBoundingClientRect(); return Math.min(box.width, box.height); };
  return {
    cells: cells.length,
    ran: cells.filter(c => /\[\d+\]/.test(c.querySelector(".jp-InputPrompt")?.textContent || "")).length,
    errors: [...document.querySelectorAll(".jp-RenderedText")].map(e => e.textContent).filter(t => /Traceback \(most recent/.test(t)),
    figures: [...document.querySelectorAll(".jp-OutputArea-output img, .jp-OutputArea-output svg")]
      .filter(e => size(e) > 50 && (e.naturalWidth ?? 1) > 0).length,
  };
}"""
READY = r"""() => /Python 3/.test(document.querySelector(".jp-Toolbar-kernelName")?.textContent || "")
  && document.querySelector(".jp-Notebook-ExecutionIndicator")?.dataset.status === "idle" """
SEEN = f"() => {{ const now = ({STATE})(); return now.errors.length || now.ran === now.cells; }}"


def run_all(chromium, address: str, name: str) -> tuple[dict, dict]:
    "What is to be seen of a notebook before and after all its cells were run from the menu."
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(180_000)
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_function(READY)
    before = page.evaluate(STATE)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(SEEN)
    page.wait_for_function(READY)
    after = page.evaluate(STATE)
    page.close()
    return before, after


def test_a_lesson_runs_and_shows_its_figure(lab, chromium):
    before, after = run_all(chromium, lab, "lesson.ipynb")
    assert before["cells"] > 0 and before["ran"] == before["figures"] == 0
    assert not after["errors"] and after["ran"] == before["cells"] and after["figures"] > 0


def test_a_failing_cell_is_seen_to_fail(lab, chromium, tmp_path):
    book = {"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": "1 / 0"}],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
            "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "work" / "wrong.ipynb").write_text(json.dumps(book))
    _, after = run_all(chromium, lab, "wrong.ipynb")
    assert "ZeroDivisionError" in after["errors"][0]
