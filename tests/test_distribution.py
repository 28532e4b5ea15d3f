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
import lock
import metadata
import signatures
import yaml
from oldest import constraints

import archrepair
from archrepair.core.tiers import TIERS
from archrepair.networks.models import create_model
from archrepair.networks.weights import save_weights
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


def test_what_catalogues_read_agrees_with_the_settings():
    "Made by `python tests/metadata.py`; CITATION.cff, codemeta.json and .zenodo.json say the same."
    said, made = settings(), metadata.files()
    assert {name: (ROOT / name).read_text(encoding="utf-8") for name in made} == made
    cited = yaml.safe_load(made["CITATION.cff"])
    code, archive = json.loads(made["codemeta.json"]), json.loads(made[".zenodo.json"])
    for title, version, authors, words in (
            (cited["title"], cited["version"], [a["name"] for a in cited["authors"]], cited["keywords"]),
            (code["name"], code["version"], [a["name"] for a in code["author"]], code["keywords"]),
            (archive["title"], archive["version"], [a["name"] for a in archive["creators"]], archive["keywords"])):
        assert (title, version, authors) == (said["lib_name"], said["version"], [said["author"]])
        assert ", ".join(words) == said["keywords"]
    assert cited["license"] == archive["license"] == code["license"].rpartition("/")[2] == pyproject()["project"]["license"]
    assert cited["abstract"] == code["description"] == archive["description"] == pyproject()["project"]["description"]
    address = said.get("repository", None)
    assert cited.get("repository-code") == code.get("codeRepository") == address


def test_a_repository_in_the_settings_stands_in_all_three():
    known = {**metadata.facts(), "repository": "https://example.org/archrepair"}
    texts = [json.dumps(metadata.codemeta(known)), json.dumps(metadata.zenodo(known)), metadata.citation(known)]
    assert all(known["repository"] in text for text in texts)


# --- lock and image


def test_the_lock_has_every_requirement_with_hashes_and_names_no_place():
    "Made by `python tests/lock.py`."
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in lock.FILES]
    names = [[re.match(r"[\w.-]+", entry)[0].lower() for entry in lock.entries(text)] for text in texts]
    wanted = {re.split("[<>=]", line)[0].lower() for line in settings()["requirements"].split()}
    assert wanted <= {*names[0], *names[1]} and {"torch", "torchvision"} <= set(names[1]) and not set(names[0]) & set(names[1])
    for text in texts:
        assert all("--hash=sha256:" in entry and "==" in entry.partition(";")[0] for entry in lock.entries(text))
        assert not re.search(r"https?:|file:|--index|--find-links|(?m:^/)", text)


def test_the_lock_allows_what_the_settings_require():
    from packaging.requirements import Requirement

    pinned = {}
    for name in lock.FILES:
        for entry in lock.entries((ROOT / name).read_text(encoding="utf-8")):
            package, version = re.match(r"([\w.-]+)==([\w.+!-]+)", entry).groups()
            pinned.setdefault(package.lower(), []).append(version)
    for line in settings()["requirements"].split():
        requirement = Requirement(line)
        assert all(requirement.specifier.contains(version) for version in pinned[requirement.name.lower()]), line


def test_what_the_lock_is_made_of_is_divided():
    one, two = "numpy==2.0.0 \\\n    --hash=sha256:ab\n", "torch==2.14.1 ; sys_platform == 'linux' \\\n    --hash=sha256:cd\n"
    first, second = lock.locked(f"# a comment\n{one}    # via x\n{two}").values()
    assert first.endswith(f"\n{one}") and second.endswith(f"\n{two}") and "via" not in first + second


def test_the_image_copies_what_exists_and_runs_what_the_makefile_runs():
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    copied = [source for word, rest in steps if word == "COPY" and "--from=" not in rest
              for source in [part for part in rest.split() if not part.startswith("--")][:-1]]
    assert copied and not [source for source in copied if not (ROOT / source).exists()]
    tracked = {line[1:].partition("*")[0] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert not [source for source in copied if not any(source.startswith(allowed) for allowed in tracked)], "left out by .dockerignore"
    words = [word for word, _ in steps]
    assert ["USER", "archrepair"] in steps and words.index("USER") < words.index("ENTRYPOINT")
    entry, command = (json.loads(rest) for word, rest in steps if word in ("ENTRYPOINT", "CMD"))
    assert f"$(BIN)/{' '.join([*entry, *command])}" in (ROOT / "Makefile").read_text(encoding="utf-8")
    python = re.search(r"FROM python:(3\.\d+)-slim", text)[1]
    assert tuple(map(int, python.split("."))) >= tuple(map(int, settings()["min_python"].split(".")))


# --- what is promised to stay


def test_public_signatures_are_those_that_were_promised():
    "After a change that is meant: `python tests/signatures.py`, and a line in CHANGELOG.md."
    promised, now = signatures.FILE.read_text(encoding="utf-8").splitlines(), signatures.snapshot()
    assert not [line for line in promised if line not in now], "changed or removed"
    names = {re.match(r"archrepair\.(\w+)", line)[1] for line in promised if line.startswith("archrepair.")}
    assert not set(archrepair.__all__) - names, "new, and not yet promised"
    assert len(promised) == len(set(promised)) > 200


def test_a_changed_signature_is_noticed(monkeypatch):
    def localize(model, data, blocks=None, *, measure="ochiai") -> str:
        return ""

    before = signatures.snapshot()
    monkeypatch.setitem(vars(archrepair), "localize", localize)
    after = signatures.snapshot()
    changed = [line for line in before if line not in after]
    assert len(changed) == 1 and changed[0].startswith("archrepair.localize(model: nn.Module")
    assert "archrepair.localize(model, data, blocks = None, *, measure = 'ochiai') -> str" in after


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


@pytest.mark.timeout(600)
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
    assert wheel.stat().st_size < 1_000_000
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    executable = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", "--quiet", wheel)
    where = run(executable, "-c", "import archrepair; print(archrepair.__file__, archrepair.__version__)").split()
    assert where[0].startswith(str(tmp_path / "env")) and where[1] == archrepair.__version__
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    out = run(tmp_path / "env" / "bin" / "archrepair", "list", "tiers", "--json", PYTHONPATH=libraries)
    assert set(json.loads(out)) == {"smoke", "lite", "paper"}
    weights = tmp_path / "untrained.safetensors"  # to train them is what takes time
    save_weights(create_model("resnet18", 10, width=TIERS["smoke"].width, stem_stride=TIERS["smoke"].stem_stride), str(weights))
    command = [tmp_path / "env" / "bin" / "archrepair", "repair", "--tier", "smoke", "--method", "surgical:epochs=1", "--json",
               "--weights", weights]
    where = {"ARCHREPAIR_HOME": str(tmp_path / "home"), "ARCHREPAIR_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    done = json.loads(run(*command, "--out", tmp_path / "repair", PYTHONPATH=libraries, **where))
    assert done["cell"]["dataset"] == "digits" and (tmp_path / "repair" / "report.html").stat().st_size > 10_000


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
