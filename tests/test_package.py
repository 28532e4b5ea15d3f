"""The package as a whole: light to import, in layers, documented, short enough to read, and the same in README, notebooks and modules."""
import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import archrepair
from support import ROOT

PACKAGE = ROOT / "archrepair"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAYERS = next(c["layers"] for c in CONFIGURATION["tool"]["importlinter"]["contracts"] if c["type"] == "layers")[::-1]  # from the ground up
# What every command imports before it knows what to do: none of it may import torch.
LIGHT = [*LAYERS, "core.errors", "core.html", "core.names", "core.paths", "core.progress", "core.tiers", "experiments.methods",
         "paper.launcher", "paper.published", "cli.app", "cli.console", "cli.listing"]
LONG_FUNCTIONS: set[str] = set()  # "package.module.function" of more than 60 lines, with a reason each
LONG_CELLS = {  # notebooks with a cell of more than 60 lines, each a public class that is read as one; these numbers only fall
    "data/01_images": 1, "data/12_pattern": 1, "networks/11_conditional": 1, "repair/02_blockdata": 1, "repair/04_result": 1,
    "repair/09_archrepair": 1}


def file_of(module: str) -> Path:
    return (PACKAGE / module.replace(".", "/")).with_suffix(".py")


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def lines_of_code(source: str) -> int:
    "The lines of a cell without empty ones, comments and docstrings."
    tree, skipped = ast.parse(re.sub(r"(?m)^[%!].*$", "", source)), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and number not in skipped
               for number, line in enumerate(source.splitlines(), 1))


SILENT = {"cleanup", "filterwarnings", "set_num_threads", "set_option"}  # calls that return nothing


def shows_something(source: str) -> bool:
    "Does a cell end in a value or a picture? Exported definitions do not, nor do calls that are made for their effect."
    if source.startswith("#| export"):
        return False
    tree = ast.parse(re.sub(r"(?m)^[%!].*$", "", source))
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        return False
    called = last.value.func if isinstance(last.value, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", "")) not in SILENT


def is_cut(data: dict) -> bool:
    "Has pandas cut a text or left out rows or columns? Frames are looked at as HTML, series as text."
    pattern = r"\.\.\.</t[dh]>" if "text/html" in data else r"\.\.\.[ ]*$"
    text = "".join(data.get("text/html") or data.get("text/plain", ""))
    return re.search(pattern, text, re.M) is not None


# --- importing


def test_importing_is_fast_and_does_not_import_torch():
    program = "import sys, time; t = time.perf_counter(); import archrepair; print(time.perf_counter() - t, 'torch' in sys.modules)"
    runs = [python(program).split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.3 and {torch for _, torch in runs} == {"False"}


def test_light_modules_do_not_import_torch():
    names = [f"archrepair.{module}" for module in LIGHT]
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(print(name))
"""
    assert python(program).strip() == "", "this module imports torch"


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


def test_public_names_are_grouped_from_the_ground_up():
    packages = [module.split(".")[0] for module in archrepair._PUBLIC]
    assert packages == sorted(packages, key=LAYERS.index)


def test_nothing_needs_what_windows_lacks():
    "Modules and functions of POSIX are blocked once the libraries are loaded; a repair's cost is then counted without its memory."
    program = f"""
import os, sys
import matplotlib.pyplot, nbclient, pandas, papermill, rich.console, rich.progress, scipy.stats
import seaborn, sklearn.datasets, torch, torchvision, typer
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "curses", "readline", "syslog"):
    sys.modules[name] = None
for name in ("fork", "getuid", "geteuid", "sysconf", "uname", "killpg", "sched_getaffinity", "mkfifo"):
    delattr(os, name)
import importlib
for module in {MODULES!r}:
    importlib.import_module("archrepair." + module)
from archrepair.training.cost import CostMeter
meter = CostMeter()
with meter.running():
    meter.add(1)
print(meter.forwards, meter.peak_bytes)
"""
    assert python(program).split() == ["1.0", "0"]


@pytest.mark.parametrize("module", MODULES)
def test_files_of_text_are_read_and_written_in_a_named_encoding(module):
    "Elsewhere the default is that of the machine."
    for node in ast.walk(tree_of(file_of(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            assert "encoding" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'repiar'"):
        archrepair.repiar  # noqa: B018


# --- layers


def lint_imports(folder: Path) -> tuple[int, str]:
    "Status and words of import-linter, with the contracts of `folder/pyproject.toml`, on the package in `folder`."
    done = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_packages_import_only_from_those_below_and_nothing_imports_in_circles():
    status, said = lint_imports(ROOT)
    assert status == 0, said[said.find("Broken contracts"):]


@pytest.mark.parametrize(("file", "code", "message"), [
    ("core/errors.py", "def lazy():\n    from archrepair.cli.app import main", "archrepair.core.errors -> archrepair.cli.app"),
    ("nas/graph.py", "if TYPE_CHECKING:\n    from archrepair.data.datasets import ImageSet",
     "archrepair.nas.graph -> archrepair.data.datasets"),
    ("core/errors.py", "def lazy():\n    from archrepair.core import html", "No cycles are allowed in archrepair.core"),
    ("attic/__init__.py", "", "archrepair.attic"),
])
def test_the_contracts_see_lazy_imports_circles_and_new_packages(tmp_path, file, code, message):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "archrepair", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "archrepair" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + "\n" + code + "\n", encoding="utf-8")
    if "core import html" in code:
        page = tmp_path / "archrepair" / "core" / "html.py"
        page.write_text(page.read_text(encoding="utf-8") + "\nfrom archrepair.core import errors\n", encoding="utf-8")
    status, said = lint_imports(tmp_path)
    assert status and message in re.sub(r"\s+", " ", said)


def test_contributing_shows_the_packages_in_the_order_of_the_contract():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\(nbs/(\w+)\) \| (.+) \|$", guide, re.M)
    summaries = [ast.get_docstring(tree_of(PACKAGE / package / "__init__.py")) for package in LAYERS]
    assert [row for row in rows if row[0] in LAYERS and row[0] == row[1] and row[2] in summaries] == list(zip(LAYERS, LAYERS, summaries))
    assert all((ROOT / "nbs" / package).is_dir() for package in LAYERS)


def test_contributing_states_the_layers():
    assert " → ".join(f"`{package}`" for package in LAYERS) in " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())


def test_the_page_of_the_paper_leads_to_the_code_of_every_equation():
    "Every row of the table links to a notebook that exports the code it names and speaks of the equation."
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (§.+?) \| (\[.+?) \| (`.+?) \|$", page, re.M)
    equations = [re.findall(r"\d+", place.partition(" · ")[0].partition("eq")[2]) for place, _, _ in rows]
    assert set(map(int, sum(equations, []))) == {1, 2, 5, 6, 7, 8, 9, 10}
    for (place, links, names), numbers in zip(rows, equations):
        notebooks = [ROOT / "docs" / target for target in re.findall(r"\]\((.+?)\)", links)]
        exported = {m[1] for path in notebooks for c in cells(path) if (m := re.match(r"#\|\s*default_exp (\S+)", "".join(c["source"])))}
        for name in re.findall(r"`archrepair\.([\w.]+)`", names):
            module, _, attribute = name.rpartition(".")
            if module:
                assert module in exported, f"{place}: none of {links} exports {module}"
                assert hasattr(import_module(f"archrepair.{module}"), attribute), name
            else:
                assert attribute in LAYERS
        text = "".join("".join(c["source"]) for path in notebooks for c in cells(path))
        mentioned = " ".join(re.findall(r"(?i)\beqs?\. ([\d ,–-]*(?:and \d+)?)", text))
        spans = [range(int(first), int(last) + 1) for first, last in re.findall(r"(\d+)–(\d+)", mentioned)]
        for number in map(int, numbers):
            assert str(number) in re.findall(r"\d+", mentioned) or any(number in span for span in spans), f"{links}: no eq. {number}"


# --- documentation


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_and_annotations(module):
    tree = tree_of(file_of(module))
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


# Packages in which longer signatures still describe their parameters in the docstring alone.
NOT_YET = ("nas.", "data.", "repair.")


def described(module: str, function: ast.FunctionDef) -> tuple[set[str], set[str]]:
    "The parameters of a function, and those with a comment behind them on a line of their own, or with the help of a command's option."
    lines = file_of(module).read_text(encoding="utf-8").splitlines()
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    alone = Counter(argument.lineno for argument in arguments)
    told = {a.arg for a in arguments if alone[a.lineno] == 1 and re.search(r",?  # \S", lines[a.end_lineno - 1][a.end_col_offset:])}
    if module.startswith("cli."):
        hints = get_type_hints(getattr(import_module(f"archrepair.{module}"), function.name), include_extras=True)
        told |= {name for name, hint in hints.items() if any(getattr(part, "help", None) for part in getattr(hint, "__metadata__", ()))}
    return {argument.arg for argument in arguments}, told


def example_of(function: ast.FunctionDef) -> ast.Call | None:
    "The call of the function in the example of its docstring."
    examples = re.findall(r"^Example: `(.+)`$", ast.get_docstring(function) or "", re.M)
    calls = [node for text in examples for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return next((call for call in calls if getattr(call.func, "id", "") == function.name), None)


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith(NOT_YET)])
def test_functions_of_many_parameters_say_what_each_is_and_give_an_example(module):
    for function in tree_of(file_of(module)).body:
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
            continue
        parameters, told = described(module, function)
        if len(parameters) < 5:
            continue
        assert parameters == told, f"{function.name}: nothing is said of {', '.join(sorted(parameters - told))}"
        if not module.startswith("cli."):  # a command's examples are in its lesson
            call = example_of(function)
            assert call is not None, f"{function.name}: no example"
            needed = len(function.args.args) - len(function.args.defaults)
            assert {keyword.arg for keyword in call.keywords} <= parameters and len(call.args) + len(call.keywords) >= needed


# --- short enough to read


def functions_of(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(file_of(module))) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_enough_to_read(module):
    "Lines of code; a signature with a line per parameter counts as one."
    lines = file_of(module).read_text(encoding="utf-8").splitlines()
    several = [node for node in functions_of(module) if node.body[0].lineno > node.lineno + 1 and "  # " in lines[node.lineno]]
    signatures = sum(node.body[0].lineno - node.lineno - 1 for node in several)
    assert sum(bool(line.strip()) and not line.startswith("#") for line in lines) - signatures <= 350


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short_enough_to_read(module):
    "Lines of the body, without the docstring, and one for the signature."
    for node in functions_of(module):
        described = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
        length = node.end_lineno - node.body[0].lineno + 2 - described
        assert length <= 60 or f"{module}.{node.name}" in LONG_FUNCTIONS, f"{node.name} has {length} lines"


def test_packages_hold_few_enough_modules_to_see_at_a_glance():
    sizes = {package: sum(m.startswith(f"{package}.") for m in MODULES) for package in LAYERS if package != "baselines"}
    assert all(1 <= size <= 12 for size in sizes.values()), sizes
    assert [m for m in MODULES if "." not in m] == [], "every module lies in a package"


# --- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook(path):
    tags = [t for c in cells(path) for t in c["metadata"].get("tags", [])]
    assert tags.count("parameters") <= 1 and "injected-parameters" not in tags
    first = "".join(cells(path)[0]["source"])
    assert cells(path)[0]["cell_type"] == "markdown" and first.startswith("# "), "the first cell is its title"
    errors = [o for c in cells(path) for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert not errors, "a stored output is an error"
    text = "".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    base = ROOT if path.stem == "index" else path.parent  # the front page is README.md
    assert not [target for target in re.findall(r"\]\(([^)#:\s]+\.(?:ipynb|md))\)", text) if not (base / target).exists()], "a dead link"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_outputs_are_stored_and_whole(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    last_lines = {cell["id"]: "".join(cell["source"]).splitlines()[-1:] for cell in code}
    assert not [last_lines[c["id"]] for c in code if shows_something("".join(c["source"])) and not c["outputs"]], "no output is stored"
    assert not [last_lines[c["id"]] for c in code for o in c["outputs"] if is_cut(o.get("data", {}))], "pandas has cut a stored output"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_cells_are_short_enough_to_hold_one_idea(path):
    lengths = [lines_of_code("".join(cell["source"])) for cell in cells(path) if cell["cell_type"] == "code"]
    long = sum(length > 60 for length in lengths)
    allowed = LONG_CELLS.get(path.relative_to(ROOT / "nbs").with_suffix("").as_posix(), 0)
    assert long == allowed, f"{long} cells of more than 60 lines; {allowed} are allowed"


def test_lines_of_code_are_counted_without_what_explains_them():
    assert lines_of_code('#| export\n# why\ndef f():\n    """What.\n\n    More.\n    """\n\n    return 1  # one') == 2
    assert lines_of_code("%matplotlib inline\nx = (1,\n     2)\nx") == 4
    assert lines_of_code("") == 0


@pytest.mark.parametrize(("source", "shows"), [
    ("x = 1\nx", True), ("x = 1", False), ("import torch\ntorch.set_num_threads(1)", False), ("plt.plot(x);", True),
    ("#| export\napp.command()(f)", False), ("def f():\n    f()", False), ("", False)])
def test_a_cell_that_shows_something_is_told_from_one_that_does_not(source, shows):
    assert shows_something(source) == shows


@pytest.mark.parametrize(("data", "cut"), [
    ({"text/html": ["<td>-0.11 on im...</td>"], "text/plain": ["-0.11 on im..."]}, True), ({"text/html": ["<th>...</th>"]}, True),
    ({"text/plain": ["0    a long sentence that e...\n", "1    short"]}, True), ({"text/plain": ["network = f(...)"]}, False),
    ({"text/html": ["<code>network = ...  # yours</code>"], "text/plain": ["x ..."]}, False), ({"image/png": "..."}, False), ({}, False)])
def test_an_output_that_was_cut_is_told_from_a_whole_one(data, cut):
    assert is_cut(data) == cut


@pytest.mark.parametrize("folder", ["", *(package for package in LAYERS if package != "baselines")])
def test_notebooks_are_numbered_in_reading_order(folder):
    "From 01 without a gap; the seven of the paper from 00."
    names = sorted(p.stem for p in (ROOT / "nbs" / folder).glob("*.ipynb") if p.stem != "index")
    first = 1 if folder else 0
    assert names and [name[:3] for name in names] == [f"{i:02d}_" for i in range(first, first + len(names))], names


def test_every_notebook_of_a_package_exports_the_module_of_its_name():
    exported = {}
    for path in NOTEBOOKS:
        for cell in cells(path):
            if match := re.match(r"#\|\s*default_exp (\S+)", "".join(cell["source"])):
                exported[path.relative_to(ROOT / "nbs").with_suffix("").as_posix()] = match[1]
    paper = {"00_localization": "repair.localization", "01_search": "repair.search", "02_finetuning": "repair.finetuning"}
    assert exported.items() >= paper.items()
    lessons = {name for name in (p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in NOTEBOOKS) if name.split("/")[0] in LAYERS}
    assert exported == paper | {name: re.sub(r"/(\d\d_)?", ".", name) for name in lessons}
    assert sorted(exported.values()) == MODULES


def test_nothing_names_the_machine_it_was_made_on():
    try:
        files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no checkout")
    here = re.compile(rb"(?<![\w.:/-])/(" + rb"wor" + rb"k|roo" + rb"t|home/\w+|Users/\w+)/\w")
    paths = [ROOT / name.decode() for name in files.split(b"\0") if name]
    assert not [str(path) for path in paths if path.is_file() and here.search(path.read_bytes())]
