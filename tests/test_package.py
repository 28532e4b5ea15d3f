"""The package as a whole: light to import, complete, documented, and said once."""
import ast
import configparser
import json
import re
import runpy
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import archrepair
from support import ROOT

PACKAGE = ROOT / "archrepair"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_"))
NOTEBOOKS = sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/*/*.ipynb")])
LIGHT = ["errors", "tiers", "launcher", "cli", "paper", "progress", "baselines"]


def file_of(module: str) -> Path:
    return (PACKAGE / module.replace(".", "/")).with_suffix(".py")


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout


# --- importing


def test_importing_is_fast_and_does_not_import_torch():
    program = "import sys, time; t = time.perf_counter(); import archrepair; print(time.perf_counter() - t, 'torch' in sys.modules)"
    runs = [python(program).split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.3 and {torch for _, torch in runs} == {"False"}


def test_light_modules_do_not_import_torch():
    names = [f"archrepair.{m}" for m in LIGHT if m in MODULES or (PACKAGE / m).is_dir()]
    assert python(f"import sys, {', '.join(names)}; print('torch' in sys.modules)").strip() == "False"


def test_every_public_name_resolves_whatever_was_imported_before():
    "A module may bear the name of a function (search.search): importing it must not hide the function."
    program = f"""
import importlib, types
for module in {MODULES!r}:
    importlib.import_module("archrepair." + module)
import archrepair
wrong = [n for n in archrepair.__all__ if isinstance(getattr(archrepair, n), types.ModuleType)]
print(sorted(n for n in archrepair.__all__ if getattr(archrepair, n) is None), wrong)
assert set(archrepair.__all__) <= set(dir(archrepair))
"""
    assert python(program).strip() == "[] []"


@pytest.mark.parametrize("name", archrepair.__all__)
def test_public_name(name):
    if archrepair._WHERE[name] not in MODULES:
        pytest.skip(f"archrepair.{archrepair._WHERE[name]} is not exported yet")
    assert getattr(archrepair, name) is not None


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'repiar'"):
        archrepair.repiar  # noqa: B018


@cache
def trees() -> dict[str, ast.Module]:
    return {m: ast.parse(file_of(m).read_text()) for m in MODULES}


def test_modules_import_from_floors_below_only():
    "Imports at the top of modules form no circle."
    needs = {}
    for name, tree in trees().items():
        full = f"archrepair.{name}".split(".")
        froms = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
        found = {".".join([*full[:len(full) - n.level], n.module or ""]) if n.level else n.module or "" for n in froms}
        needs[name] = {module.removeprefix("archrepair.") for module in found if module.startswith("archrepair.")}
    assert needs["repair"] >= {"search", "errors"} and needs["baselines.retrain"] >= {"baselines.common", "finetuning"}
    assert not [n for n in needs if not n.startswith("baselines.") and any(x.startswith("baselines") for x in needs[n])]
    order = []
    while len(order) < len(needs):
        free = [n for n in needs if n not in order and (needs[n] & set(needs)) <= set(order)]
        assert free, f"a circle among {sorted(set(needs) - set(order))}"
        order += free


# --- documentation


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_and_annotations(module):
    tree = trees()[module]
    if module != "__main__":
        assert ast.get_docstring(tree), f"archrepair/{module}.py has no docstring: its notebook lacks a `> summary`"
    wrong = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            wrong.append(f"{node.name}: no docstring")
        if isinstance(node, ast.FunctionDef):
            a = node.args
            bare = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.annotation is None]
            if bare or node.returns is None:
                wrong.append(f"{node.name}: no annotation for {', '.join(bare) or 'what it returns'}")
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_enough_to_read(module):
    lines = file_of(module).read_text().splitlines()
    assert sum(bool(line.strip()) and not line.startswith("#") for line in lines) < 350


# --- notebooks


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    tags = [t for c in cells(path) for t in c["metadata"].get("tags", [])]
    assert tags.count("parameters") <= 1 and "injected-parameters" not in tags
    first = "".join(cells(path)[0]["source"])
    assert cells(path)[0]["cell_type"] == "markdown" and first.startswith("# "), "the first cell is its title"
    errors = [o for c in cells(path) for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors, "a stored output is an error"


def test_numbered_notebooks_have_their_order():
    numbers = [int(p.stem.split("_")[0]) for p in NOTEBOOKS if re.match(r"0\d_", p.stem)]
    assert numbers == sorted(set(numbers))


def test_every_module_has_a_notebook_and_every_notebook_its_module():
    exported = {m.group(1) for p in NOTEBOOKS for c in cells(p) if (m := re.match(r"#\|\s*default_exp (\S+)", "".join(c["source"])))}
    assert exported == {m for m in MODULES if "AUTOGENERATED" in file_of(m).read_text()[:300]}


# --- metadata


def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_settings_and_pyproject_agree_and_nothing_is_said_twice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = settings()
    assert project["name"] == said["lib_name"] == "archrepair" and said["version"] == archrepair.__version__
    assert set(project["dynamic"]) == {"version", "requires-python", "dependencies", "optional-dependencies", "entry-points", "scripts"}
    assert not set(project["dynamic"]) & set(project) and project["license"] == "Apache-2.0" and said["license"] == "apache2"


def test_setup_reads_settings(monkeypatch):
    import setuptools

    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    said = settings()
    lines = lambda key: [x.strip() for x in said[key].splitlines() if x.strip()]
    assert given["version"] == said["version"] and given["python_requires"] == f">={said['min_python']}"
    assert given["install_requires"] == lines("requirements") and len(given["install_requires"]) > 5
    assert {"dev", "docs", "sweep", "export", "timm"} <= set(given["extras_require"]) and given["extras_require"]["dev"] == lines("dev_requirements")
    assert "archrepair=archrepair.cli.app:main" in given["entry_points"]["console_scripts"] and "archrepair" in given["packages"]
    tools = {"nbdev", "fastcore", "execnb", "jupyterlab", "sphinx", "pytest"}
    assert not tools & {re.split(r"[<>=\[]", line)[0] for line in given["install_requires"]}, "a development tool is no run-time dependency"


def test_nothing_names_the_machine_it_was_made_on():
    try:
        files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no checkout")
    here = re.compile(rb"(?<![\w.:/-])/(" + rb"wor" + rb"k|roo" + rb"t|home/\w+|Users/\w+)/\w")
    found = [name.decode() for name in files.split(b"\0") if name and (ROOT / name.decode()).is_file() and here.search((ROOT / name.decode()).read_bytes())]
    assert not found
