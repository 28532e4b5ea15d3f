"Tutorials: complete, literate, the same wherever they are opened. They are executed by nbdev-test; here is what that does not see."
import ast
import json
import re

import pytest

from support import ROOT

FOLDER = ROOT / "nbs" / "tutorials"
NAMES = ["add_your_method", "bring_your_data", "compare_methods", "quickstart", "read_a_report", "repair_your_model", "scale_out"]


def cells(name: str) -> list[dict]:
    return [{**cell, "source": "".join(cell["source"])} for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]]


def code(name: str) -> list[dict]:
    return [cell for cell in cells(name) if cell["cell_type"] == "code"]


def python(source: str) -> ast.Module:
    return ast.parse(source)


def test_all_tutorials_are_there_and_no_others():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_what_it_is_and_installs_nothing_where_archrepair_is(name):
    first = cells(name)[0]["source"].splitlines()
    assert first[0].startswith("# ") and first[2].startswith("> ") and first[2].endswith(".")
    assert "Colab" in cells(name)[1]["source"]
    test = python(code(name)[0]["source"]).body[-1]
    assert isinstance(test, ast.If) and ast.unparse(test.test) == "find_spec('archrepair') is None", "installing is conditional"
    assert re.search(r"install -q '?archrepair", ast.unparse(test.body[0]))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_typed_and_commented_and_small(name):
    tagged = [cell for cell in cells(name) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = tagged[0]["source"].splitlines()
    body = python(tagged[0]["source"]).body
    assert len(body) == len(lines) and all(isinstance(node, ast.AnnAssign) and node.value is not None for node in body)
    assert all("  # " in line for line in lines)
    values = {node.target.id: ast.literal_eval(node.value) for node in body}
    assert values.get("tier", values.get("track")) in ("smoke", "digits"), "a tutorial is quick unless it is told otherwise"


@pytest.mark.parametrize("name", NAMES)
def test_its_outputs_are_stored_and_it_ends_in_something_to_look_at(name):
    last = code(name)[-1]
    kinds = {kind for output in last["outputs"] for kind in output.get("data", {})}
    assert kinds & {"image/png", "text/html", "text/markdown"}
    pictures = [o for cell in code(name) for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert pictures, "a page without a picture"
    streams = ["".join(o["text"]) for cell in code(name) for o in cell["outputs"] if o["output_type"] == "stream"]
    assert not streams, "a warning or a print was left on the page"


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_ends_in_a_value(name):
    for cell in code(name):
        tree = python(cell["source"])
        last = tree.body[-1]
        assert not isinstance(last, ast.Assert), cell["source"]
        assert not (isinstance(last, ast.Expr) and ast.unparse(last).startswith("print(")), cell["source"]


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_place_that_only_its_author_has(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert not re.search(r"https?://(?!arxiv\.org)[\w.]*(pypi|index|registry)", text)
    assert not re.search(r"(?<![\w.:/-])/(tmp|opt|srv|mnt)/\w", text)


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name):
    text = "\n".join(cell["source"] for cell in cells(name) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (FOLDER / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_commands_it_names_exist(name):
    from typer.main import get_command

    from archrepair.cli.app import app

    text = "\n".join(cell["source"] for cell in cells(name))
    commands = set(get_command(app).commands)
    named = set(re.findall(r"(?:`|^|\()archrepair ([a-z]+)", text, flags=re.M)) | set(re.findall(r'terminal\(f?"archrepair ([a-z]+)', text))
    assert named <= commands, named - commands
