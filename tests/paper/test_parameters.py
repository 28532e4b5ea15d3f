"Parameters of notebooks: read from the cell that declares them, checked before a kernel starts, and spelled as papermill understands them."
import json

import pytest

from archrepair.core.errors import ArchrepairError
from archrepair.core.settings import in_words
from archrepair.data.scenario import PROTOCOLS
from archrepair.paper.launcher import OPT_OUT, spell_parameters
from archrepair.paper.parameters import PARAMETERS, check_parameters, parameters_of
from support import ROOT

CELL = '''
model: str = "resnet18"  # a network
tier: str = "auto"
seed: int = 0
rate: float = 0.1
epochs: int | None = None
names: list[str] = []
flag: bool = True
text = "plain"
count = 3
folder = Path("x")
'''


@pytest.fixture
def notebook(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair\n", encoding="utf-8")
    cells = [{"cell_type": "code", "source": CELL, "metadata": {"tags": ["parameters"]}}, {"cell_type": "code", "source": "x = 1"}]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return tmp_path / "n.ipynb"


def test_kinds_come_from_annotations_and_defaults(notebook):
    assert {name: in_words(setting.kind) for name, setting in parameters_of(notebook).items()} == {
        "model": "text", "tier": "one of auto, smoke, lite, paper", "seed": "a whole number from 0 to 4294967295", "rate": "a number",
        "epochs": "a whole number from 1, or None", "names": "a list", "flag": "True or False", "text": "text", "count": "a number",
        "folder": "anything"}
    assert parameters_of(notebook)["rate"].default == 0.1


def test_every_notebook_of_the_paper_declares_kinds_that_its_defaults_fit():
    for path in sorted((ROOT / "nbs").glob("0[0-6]_*.ipynb")):
        settings = parameters_of(path)
        assert {"model", "tier"} <= set(settings)
        assert check_parameters(path, {name: setting.default for name, setting in settings.items() if setting.default is not None})


def test_the_protocols_are_those_of_the_scenario():
    assert in_words(PARAMETERS["protocol"]) == f"one of {', '.join(PROTOCOLS)}"


@pytest.mark.parametrize(("values", "message"), [
    ({"modle": "x"}, "unknown parameter of n.ipynb 'modle': did you mean 'model'. known: model, tier"), ({"seed": "two"}, "seed is 'two'"),
    ({"seed": 2.5}, "seed is 2.5; expected a whole number"), ({"seed": True}, "seed is True"), ({"flag": "maybe"}, "flag is 'maybe'"),
    ({"tier": "lit"}, "unknown tier 'lit': did you mean 'lite'"), ({"count": "x"}, "count is 'x'; expected a number"),
    ({"model": 3}, "model is 3; expected text"), ({"epochs": 0}, "epochs is 0"), ({"names": "a"}, "names is 'a'; expected a list"),
])
def test_what_does_not_fit_is_one_line(notebook, values, message):
    with pytest.raises(ArchrepairError, match=message) as error:
        check_parameters(notebook, values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cells": 3}', '{"cells": [3]}'])
def test_a_file_that_is_not_a_notebook_is_one_line(tmp_path, content):
    (tmp_path / "n.ipynb").write_text(content, encoding="utf-8")
    with pytest.raises(ArchrepairError, match="cannot read .*; expected a notebook"):
        parameters_of(tmp_path / "n.ipynb")


@pytest.mark.parametrize(("given", "spelled"), [
    ("-p flag no", "-p flag False"), ("-p flag yes", "-p flag True"), ("--parameters flag off", "--parameters flag False"),
    ("-pflag no", "-pflag False"), ("--parameters=flag no", "--parameters=flag False"), ("-p text no", "-p text no"),
    ("-p text 007", "-r text 007"), ("-p text True", "-r text True"), ("--parameters=text 1e3", "--parameters_raw=text 1e3"),
    ("-p text c=d", "-p text c=d"), ("-p rate 1e-3", "-p rate 0.001"), ("-p epochs null", "-p epochs None"), ("-p seed 3", "-p seed 3"),
    ("-r text 5 -p seed 1", "-r text 5 -p seed 1"),
])
def test_papermill_is_told_what_the_notebook_expects(notebook, given, spelled):
    argv = ["papermill", "n.ipynb", *given.split(), "-k", "python3"]
    assert spell_parameters(argv, cwd=notebook.parent, environ={}) == ["papermill", "n.ipynb", *spelled.split(), "-k", "python3"]


@pytest.mark.parametrize("given", ["-p flog no", "-p flag maybe", "-p seed two", "-r seed 3"])
def test_papermill_is_stopped_before_it_starts(notebook, given):
    argv = ["papermill", "n.ipynb", *given.split()]
    with pytest.raises(ArchrepairError):
        spell_parameters(argv, cwd=notebook.parent, environ={})
    assert spell_parameters(argv, cwd=notebook.parent, environ={OPT_OUT: "1"}) == argv


def test_other_peoples_notebooks_are_left_alone(notebook, tmp_path):
    (tmp_path / "settings.ini").unlink()
    argv = ["papermill", "n.ipynb", "-p", "flog", "no"]
    assert spell_parameters(argv, cwd=tmp_path, environ={}) == argv
