"""Parameters of notebooks: through `archrepair run`, through papermill's own command line, and as the notebooks read them."""

import functools
import json
import os
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import archrepair.paper.launcher as launcher
import archrepair.paper.reproduce as reproduce
from archrepair.core.registry import METHODS, MODELS
from archrepair.paper.exhibits import Settings, requirements
from support import ROOT
from support.fuzz import attempt, command, filename, fuzz, ground, junk, text

KIND = "parameters"
NAMES = ["model", "dataset", "tier", "seed", "seeds", "protocol", "severity", "corruption", "methods", "models", "missing"]
NOTEBOOKS = ["00_localization", "05_rq3"]


@functools.cache
def notebook(name: str) -> str:
    "The cell of parameters of one of the paper's notebooks, as a notebook."
    whole = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    whole["cells"] = [cell for cell in whole["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    return json.dumps(whole)


def furnish(folder) -> None:
    "A checkout with two notebooks."
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", folder)
    for name in NOTEBOOKS:
        (folder / "nbs" / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def stub():
    "Parameters are put into the notebook as papermill does it, and nothing is executed."

    def execute(source, target, parameters):
        assert parameterize_notebook(load_notebook_node(str(source)), parameters)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "execute", execute)
        yield


VALUES = [
    "resnet18",
    "[1, 2]",
    "{a: 1}",
    "2020-01-01",
    "1e3",
    "0777",
    "yes",
    "[x",
    "*a",
    "&a [*a]",
    "!!python/object/apply:os.system ['touch xss']",
    "!!binary eA==",
    "12:30:45",
    "&a [&b [*a, *b]]",
    "? x",
    ": ",
    "- - -",
    "{[1]: 2}",
    "|\n x",
    "\t",
    "!!set {a}",
    "!!float x",
    "!!int x",
    "!!timestamp x",
    "<<: 3",
    "=",
    "[" * 2000,
    "{a: " * 500,
    "&a ['x', 'x'], b: &b [*a, *a]",
]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
values = st.one_of(st.sampled_from(VALUES), text)
words = st.one_of(st.tuples(st.one_of(st.sampled_from(NAMES), text), values).map("=".join), text)
settings = st.fixed_dictionaries(
    {},
    optional={
        "model": st.one_of(st.sampled_from([*MODELS, "resnet_18", "timm:x", "os:system", "os.path:join"]), text),
        "models": st.one_of(st.sampled_from(["auto", "resnet18,vgg16", ",", ""]), text),
        "dataset": st.one_of(st.sampled_from(["digits", "digits:fog:3", "npz:x", "folder:/", "auto", "digits:fog:9"]), text),
        "tier": st.one_of(st.sampled_from(["smoke", "auto", "x"]), text),
        "seed": junk,
        "seeds": st.one_of(st.integers(0, 5), junk),
        "severity": st.one_of(st.integers(0, 6), junk),
        "protocol": st.one_of(st.sampled_from(["clean", "paper"]), text),
        "corruption": st.one_of(st.sampled_from(["auto", "all", "fog", "fog,snow", "own"]), text),
        "methods": st.one_of(st.sampled_from(["auto", *METHODS, "arachne:search=de"]), text),
    },
)


@given(
    st.one_of(st.sampled_from(["rq3", "05_rq3", "localization", "nbs/05_rq3.ipynb", "x.ipynb", "../inside/nbs/05_rq3.ipynb"]), text),
    st.lists(words, max_size=3),
)
@example("rq3", [f"model={LAUGHS}"])
@example("rq3", [f"dataset={'[' * 2000}"])
@example("rq3", ["model=!!python/object/apply:os.system ['touch xss']"])
@example("rq3", ["dataset=../../../up", "seed=&a [*a]"])
@example("rq3", ["seed=2020-13-45"])
@fuzz(KIND)
def test_run(name, parameters):
    "`archrepair run`: what is written lies in outputs of the project."
    with ground() as folder:
        furnish(folder)
        arguments = ["run", "--json", *(word for parameter in parameters for word in ("-p", parameter)), "--", name]
        outcome = command(KIND, arguments, folder)
        if outcome.line is None:
            assert os.path.realpath(json.loads(outcome.value)["out"]).startswith(f"{folder}/outputs/")
            assert {path.name for path in folder.iterdir()} == {"nbs", "outputs", "settings.ini"}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["-p", "-r", "--parameters"]), st.sampled_from(NAMES), values),
            st.tuples(st.sampled_from(["-y", "-b", "-f", "--parameters_yaml"]), values),
            st.tuples(text),
        ),
        max_size=3,
    ).map(lambda parts: [word for part in parts for word in part]),
    filename,
)
@example(["-y", LAUGHS], "05_rq3")
@example(["-f", "/dev/zero"], "05_rq3")
@fuzz(KIND)
def test_launcher(words, stem):
    "papermill's own command line: a place in outputs of the project is added, or nothing is."
    with ground() as folder:
        furnish(folder)
        (folder / "nbs" / f"{stem}.ipynb").write_text(notebook("05_rq3"), encoding="utf-8")
        argv = ["papermill", f"{folder}/nbs/{stem}.ipynb", *words]
        outcome = attempt(KIND, lambda: launcher.missing_output(argv, isatty=True, cwd=os.getcwd(), environ={}), folder)
        if outcome.value:
            path = os.path.realpath(outcome.value[1])
            assert path.startswith(f"{folder}/outputs/") and len(os.fsencode(os.path.basename(path))) <= 255


@given(settings)
@example({"tier": "smoke", "seed": "x"})
@example({"tier": "smoke", "seeds": 10**9})
@example({"tier": "smoke", "seed": 2**64, "seeds": True})
@fuzz(KIND)
def test_settings(parameters):
    "As a notebook reads its parameters, and what it would then ask for."

    def use():
        read = Settings.of(**{"tier": "smoke", **parameters})
        assert "/" not in read.stem and str(read)
        return requirements(["table1", "table5", "table7"], read)

    with ground() as folder:
        attempt(KIND, use, folder)
