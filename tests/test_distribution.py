"""What surrounds the code: metadata said once, types, wheel and sdist, citation, guide, templates, and the workflow that checks it all."""
import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile

import pytest
import yaml
from oldest import constraints

import archrepair
from support import ROOT


def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- metadata


def test_settings_and_pyproject_agree_and_nothing_is_said_twice():
    project = pyproject()["project"]
    said = settings()
    assert project["name"] == said["lib_name"] == "archrepair" and said["version"] == archrepair.__version__
    assert set(project["dynamic"]) == {"version", "requires-python", "dependencies", "optional-dependencies", "entry-points", "scripts"}
    assert not set(project["dynamic"]) & set(project) and project["license"] == "Apache-2.0" and said["license"] == "apache2"


def test_setup_reads_settings(monkeypatch):
    import setuptools

    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    said = settings()
    lines = lambda key: [x.strip() for x in said[key].splitlines() if x.strip()]
    assert arguments["version"] == said["version"] and arguments["python_requires"] == f">={said['min_python']}"
    assert arguments["install_requires"] == lines("requirements") and len(arguments["install_requires"]) > 5
    extras = arguments["extras_require"]
    assert {"dev", "docs", "sweep", "export", "timm"} <= set(extras) and extras["dev"] == lines("dev_requirements")
    assert "archrepair=archrepair.cli.app:main" in arguments["entry_points"]["console_scripts"] and "archrepair" in arguments["packages"]
    tools = {"nbdev", "fastcore", "execnb", "jupyterlab", "sphinx", "pytest", "import-linter"}
    required = {re.split(r"[<>=\[]", line)[0] for line in arguments["install_requires"]}
    assert not tools & required, "a development tool is not a run-time dependency"


def test_the_oldest_releases_are_those_of_the_settings():
    assert len(constraints()) == len(settings()["requirements"].split())
    assert {"torch==2.11.*", "torchvision==0.26.*", "pillow==10.*"} <= set(constraints()) and not [c for c in constraints() if ">" in c]


def test_versions_and_citation_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == settings()["version"] == archrepair.__version__ and cited["license"] == "Apache-2.0"
    assert cited["preferred-citation"]["title"].startswith("ArchRepair: Block-Level") and cited["cff-version"] == "1.2.0"


# --- types


def test_types_are_checked():
    "mypy over the whole package but the modules that pyproject.toml names; no public name is defined in one of those."
    tool = pyproject()["tool"]["mypy"]
    unchecked = [module for override in tool["overrides"] if override.get("ignore_errors") for module in override["module"]]
    excluded = {module.removeprefix("archrepair.") for module in unchecked}
    assert tool["packages"] == ["archrepair"] and all((ROOT / "archrepair" / f"{m.replace('.', '/')}.py").exists() for m in excluded)
    assert not set(archrepair._WHERE.values()) & excluded - {"nas.reading"}  # of which the error `CannotRelax` is public
    done = subprocess.run([sys.executable, "-m", "mypy", "--no-error-summary"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]


# --- wheel and sdist


def run(*words: object, **variables: str) -> str:
    "What a command prints, run where none of the package's own files lie."
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=200, cwd=empty, env=environment)
        return done.stdout


def test_wheel_and_sdist_build_and_install(tmp_path):
    "Into an environment of their own, without dependencies: the package is imported, and the command is there."
    source = tmp_path / "source"
    source.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "archrepair", source / "archrepair", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "archrepair" / "_modidx.py").write_text("d = {}\n")  # as nbdev leaves it
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source)  # the wheel is built from the sdist
    wheel, = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "archrepair").rglob("*.py") if p.name != "_modidx.py"}
    assert {name for name in inside if name.startswith("archrepair/")} == modules | {"archrepair/py.typed"}
    assert not [name for name in inside if name.startswith(("tests", "nbs", "build"))]
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    executable = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", "--quiet", wheel)
    where = run(executable, "-c", "import archrepair; print(archrepair.__file__, archrepair.__version__)").split()
    assert where[0].startswith(str(tmp_path / "env")) and where[1] == archrepair.__version__
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    out = run(tmp_path / "env" / "bin" / "archrepair", "list", "tiers", "--json", PYTHONPATH=libraries)
    assert set(json.loads(out)) == {"smoke", "lite", "paper"}


# --- pages beside the code


def test_templates_point_into_the_guide():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert [p.stem for p in templates] == ["bug", "new_dataset", "new_method", "new_model"]
    for path in templates:
        head = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
        assert {"name", "about"} <= head.keys()
        for title in re.findall(r'CONTRIBUTING.md, "(.*?)"', path.read_text(encoding="utf-8")):
            assert f"## {title}\n" in guide


PATHS = r"`((?:archrepair|benchmarks|docs|nbs|tests|workflow)/[\w./]*\w)/?`"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/index.md", "docs/benchmarks.md", "docs/reliability.md"])
def test_paths_in_pages_exist(page):
    paths = re.findall(PATHS, (ROOT / page).read_text(encoding="utf-8"))
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


def test_every_promise_names_tests_that_exist():
    "The last cell of a row of the table in docs/reliability.md: files below tests/."
    lines = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| **")]
    assert len(rows) > 10
    for promise, _, files in rows:
        paths = re.findall(r"`(.*?)`", files)
        assert paths and not [path for path in paths if not (path.endswith(".py") and (ROOT / "tests" / path).is_file())], promise


def test_the_workflow_calls_what_the_makefile_has():
    "On the oldest Python and the newest: the same commands as on a developer's machine."
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    targets = set(" ".join(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)).split())
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = {target for command in commands for target in re.findall(r"^make ([\w-]+)", command, re.M)}
    assert {"repair", "test", "test-oldest"} <= called <= targets
    assert {settings()["min_python"]} < set(re.findall(r'"(3\.\d+)"', text))
    badge, = set(re.findall(r"actions/workflows/(\w+\.yml)/badge\.svg", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert (ROOT / ".github" / "workflows" / badge).is_file()
