"""All checks, in the order in which they fail fastest: `make test` runs this and nothing else.

Exported code and cleaned notebooks up to date, README in step with its notebook, every notebook executed at the smoke tier, those of the
paper through papermill into all tables and figures, and pytest. Every stage has a time limit and a crashed test ends the run, so it never
hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.browser import get_browser

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
README_NOTEBOOK = ROOT / "nbs" / "index.ipynb"
ENVIRONMENT = {**os.environ, "IN_TEST": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "ARCHREPAIR_PROGRESS": "0",
               "PYTHONWARNINGS": "ignore::DeprecationWarning", "ARCHREPAIR_HOME": str(ROOT)}


def call(*command: object, cwd: Path = ROOT, env: dict[str, str] = ENVIRONMENT, minutes: float = 10) -> None:
    "Run a tool of this environment; stop the whole run if it fails or has not ended after so many minutes."
    name, *arguments = map(str, command)
    line, started = " ".join([name, *arguments]), time.time()
    print(f"\n$ {line}", flush=True)
    process = subprocess.Popen([str(BIN / name), *arguments], cwd=cwd, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        status = process.wait(minutes * 60)
    except subprocess.TimeoutExpired:
        sys.exit(f"stopped: no end after {minutes:g} minutes: {line}")
    finally:  # whatever it started and left behind ends with it, as it does on Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    print(f"  {time.time() - started:.0f} s", flush=True)
    if status:
        sys.exit(f"failed ({status}): {line}")


def check_exported() -> None:
    "Exporting and cleaning a copy of the tree must change nothing in it."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        copy.mkdir()
        for part in ("nbs", "archrepair"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for part in ("settings.ini", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / part, copy)
        plain = {k: v for k, v in ENVIRONMENT.items() if k != "IN_TEST"}  # under IN_TEST nbdev's tools do nothing
        call("nbdev-export", cwd=copy, env=plain)
        call("nbdev-clean", cwd=copy, env=plain)
        changed = [p.relative_to(copy) for part in ("nbs", "archrepair") for p in sorted((copy / part).rglob("*"))
                   if p.suffix in (".py", ".ipynb") and p.name != "_modidx.py" and _content(p) != _content(ROOT / p.relative_to(copy))]
    if changed:
        sys.exit(f"not exported or not cleaned: {', '.join(map(str, changed))}; run nbdev-export && nbdev-clean and commit")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def execute_readme() -> None:
    "Run nbs/index.ipynb afresh, so that its numbers are those of the records."
    call("jupyter", "nbconvert", "--execute", "--to", "notebook", "--inplace", README_NOTEBOOK, "--log-level=ERROR")
    call("nbdev-clean", "--fname", README_NOTEBOOK, env={k: v for k, v in ENVIRONMENT.items() if k != "IN_TEST"})


def readme() -> str:
    "README.md from nbs/index.ipynb, without cells tagged `remove-cell` and the code of cells tagged `remove-input`."
    with tempfile.TemporaryDirectory() as folder:
        call("jupyter", "nbconvert", "--to", "markdown", README_NOTEBOOK, "--output-dir", folder, "--output", "README",
             "--TagRemovePreprocessor.enabled=True", "--TagRemovePreprocessor.remove_cell_tags=remove-cell",
             "--TagRemovePreprocessor.remove_input_tags=remove-input", "--log-level=ERROR")
        text = (Path(folder) / "README.md").read_text()
    text = _python_fences(text)
    text = re.sub(r"<style[^>]*>.*?</style>\n?", "", text, flags=re.S)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _python_fences(text: str) -> str:
    "Name the language of fences that name none: those are the notebook's code cells."
    lines, inside = text.split("\n"), False
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if not inside and line == "```":
                lines[i] = "```python"
            inside = not inside
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-readme", action="store_true", help="execute nbs/index.ipynb, write README.md from it, and end")
    if parser.parse_args().write_readme:
        execute_readme()
        (ROOT / "README.md").write_text(readme())
        return
    call("ruff", "check", "archrepair", "tests", "benchmarks", "docs", "setup.py")
    check_exported()
    if readme() != (ROOT / "README.md").read_text():
        sys.exit("README.md is not what nbs/index.ipynb gives; run `make readme` and commit")
    call("nbdev-test", "--n-workers", "2", "--timing", "--skip-file-re",
         r"^([_.]|0\d_(localization|search|finetuning|rq\d))", minutes=60)  # those of the paper come next
    call("archrepair", "paper", "--tier", "smoke", "--jobs", "2", minutes=60)  # all tables and figures, through papermill
    call("archrepair", "paper", "--tier", "smoke", "--recorded", "--only", "table9", "--datasets", "digits:fog:3")  # from records alone
    get_browser()
    # A file's tests share what they make (a built site, say), so one worker takes them all.
    # One that crashes is not replaced: the run ends with the name of the test.
    call("python", "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "--max-worker-restart=0", "-rs",
         "-m", "not gpu and not slow and not cluster", "--durations=8", minutes=90)


if __name__ == "__main__":
    main()
