"""The default output path of `papermill NOTEBOOK`: when it is given, what it is called, and that nothing else changes."""
import base64
import json
import os
import pty
import random
import select
import subprocess
import sys
from pathlib import Path

import pytest

from archrepair.core.paths import find_root
from archrepair.paper.launcher import OPT_OUT, VALUES, default_output, parameters, parse, rewrite

PAPERMILL = Path(sys.executable).with_name("papermill")


def cell(source: str, *tags: str) -> dict:
    return {"cell_type": "code", "id": f"c{len(source)}", "metadata": {"tags": list(tags)}, "source": source,
            "execution_count": None, "outputs": []}


@pytest.fixture
def tree(tmp_path):
    "A project tree with one notebook, as papermill sees it."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair\n")
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = {"cells": [cell('model = "resnet18"', "parameters"), cell("print('model is', model)")],
                "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "05_rq3.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def given(text: str, cwd: Path, *, isatty: bool = True, environ: dict | None = None, piped_in: bool = False) -> str:
    return " ".join(rewrite(text.split(), isatty=isatty, cwd=cwd, environ=environ or {}, piped_in=piped_in))


# --- names

@pytest.mark.parametrize(("values", "name"), [
    ({}, "default"),
    ({"model": "resnet50"}, "model=resnet50"),
    ({"tier": "smoke", "model": "resnet50"}, "model=resnet50,tier=smoke"),
    ({"seed": 0}, "seed=0"),
    ({"dataset": "cifar10:gaussian_noise:3"}, "dataset=cifar10~gaussian_noise~3"),
    ({"models": ["resnet18", "vgg16"]}, "models=resnet18+vgg16"),
])
def test_names(values, name):
    assert default_output("nbs/05_rq3.ipynb", values) == Path("outputs/05_rq3") / f"{name}.ipynb"


def test_names_are_safe_and_do_not_collide():
    values = ["a/b", "a-b", "a b", "a\\b", "a~b", "a:b", "a+b", ["a", "b"], "../../etc/x", "{model}", "x" * 400, "x" * 401,
              "", "a,b=c", "é", "è", ["a"], "a", []]
    awkward = [*({"w": value} for value in values), {"w": "a", "b": "c"}, {"a b": "1"}, {"a-b": "1"}]
    paths = [default_output("05_rq3.ipynb", values) for values in awkward]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.parent == Path("outputs/05_rq3") and len(path.name) < 200
        assert not set(path.name) & set('/\\{}:*?"<>| ') and path.name.isascii()


def test_same_parameters_same_name():
    assert default_output("a.ipynb", {"x": "1/2", "y": 3}) == default_output("a.ipynb", {"y": "3", "x": "1/2"})


# --- the command line

def test_option_table_is_papermills():
    import click
    from papermill.cli import papermill

    declared = {name: 0 if option.is_flag or option.count else option.nargs
                for option in papermill.params if isinstance(option, click.Option) for name in (*option.opts, *option.secondary_opts)}
    assert {name: count for name, count in declared.items() if count} == VALUES


def test_reads_a_command_line_as_papermill_does():
    from papermill.cli import papermill

    pieces = [["-p", "model", "resnet50"], ["--parameters", "a", "x.ipynb"], ["--parameters=b", "-k"], ["-pseed", "1"],
              ["-r", "model", "01"], ["-k", "python3"], ["-kpython3"], ["--kernel=python3"],
              ["--log-output"], ["--no-progress-bar"], ["--start_timeout", "9"],
              ["--cwd", "out.ipynb"], ["--prepare-only"], ["-y", "{c: 1}"], ["--inject-paths"], ["-p", "n", "-1"], ["--engine", "-"]]
    generator = random.Random(0)
    for _ in range(300):
        positionals = [["in.ipynb"], ["out.ipynb"]][:generator.choice((1, 2))]
        chosen = generator.sample(pieces, generator.randint(0, 5))
        places = sorted(generator.choices(range(len(chosen) + 1), k=len(positionals)))
        for place, positional in reversed([*zip(places, positionals)]):
            chosen.insert(place, positional)
        argv = [token for piece in chosen for token in piece]
        if generator.random() < 0.2 and chosen[-1] in positionals:
            argv.insert(-1, "--")
        truth = papermill.make_context("papermill", list(argv)).params
        line = parse(["papermill", *argv])
        assert [text for _, text in line.positionals] == [p for p in (truth["notebook_path"], truth["output_path"]) if p], argv
        assert all(["papermill", *argv][place] == text for place, text in line.positionals)
        expected = dict(truth["parameters"]) | dict(truth["parameters_raw"])
        assert parameters(line) == ({"c": 1} if truth["parameters_yaml"] else {}) | expected, argv


def test_parameters_from_files_and_texts(tmp_path):
    (tmp_path / "p.yaml").write_text("model: from-file\ntier: lite\n")
    encoded = base64.b64encode(b"{model: encoded, seed: 3}").decode()
    line = parse(["papermill", "nb.ipynb", "-y", "tier: smoke", "-f", "p.yaml", "-b", encoded])
    assert parameters(line, tmp_path) == {"model": "from-file", "tier": "smoke", "seed": 3}
    for bad in (["-f", "absent.yaml"], ["-y", "{"], ["-y", "[1]"], ["-b", "abc"]):
        assert list(parameters(parse(["papermill", "nb.ipynb", *bad]), tmp_path).values()) == [bad[1]]
    assert parameters(parse(["papermill", "nb.ipynb", "-p", "model"])) == {}


# --- when to act

def test_literal_command(tree):
    expected = "papermill nbs/05_rq3.ipynb outputs/05_rq3/model=resnet50.ipynb -p model resnet50"
    assert given("papermill nbs/05_rq3.ipynb -p model resnet50", tree) == expected
    assert given("/usr/bin/papermill nbs/05_rq3.ipynb", tree).endswith("nbs/05_rq3.ipynb outputs/05_rq3/default.ipynb")
    assert given("papermill -p a b -- nbs/05_rq3.ipynb", tree) == "papermill -p a b -- nbs/05_rq3.ipynb outputs/05_rq3/a=b.ipynb"
    assert given("papermill 05_rq3.ipynb", tree / "nbs") == "papermill 05_rq3.ipynb ../outputs/05_rq3/default.ipynb"
    assert not (tree / "outputs").exists()  # rewriting alone writes nothing


@pytest.mark.parametrize("text", [
    "papermill nbs/05_rq3.ipynb out.ipynb -p model resnet50", "papermill -p model resnet50 nbs/05_rq3.ipynb -",
    "papermill nbs/05_rq3.ipynb --help-notebook", "papermill nbs/05_rq3.ipynb -h", "papermill --version nbs/05_rq3.ipynb",
    "papermill", "papermill -", "papermill nbs/absent.ipynb", "papermill settings.ini",
    "papermill -p nbs/05_rq3.ipynb x", "papermill s3://bucket/nbs/05_rq3.ipynb", "python nbs/05_rq3.ipynb",
    "my-papermill nbs/05_rq3.ipynb",
])
def test_leaves_alone(tree, text):
    assert given(text, tree) == text


def test_leaves_alone_by_situation(tree):
    text = "papermill nbs/05_rq3.ipynb"
    assert given(text, tree, isatty=False) == text
    assert given(text, tree, piped_in=True) == text
    assert given(text, tree, environ={OPT_OUT: "1"}) == text
    assert given(text, tree, environ={OPT_OUT: "0"}) != text
    (tree / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair_fork\n")
    assert given(text, tree) == text
    (tree / "settings.ini").write_bytes(b"\xff\xfe")
    assert given(text, tree) == text


def test_finds_the_root(tree):
    assert find_root(tree / "nbs" / "05_rq3.ipynb") == tree.resolve()
    assert find_root("/") is None


# --- the real papermill

def run_papermill(tree: Path, *args: str, **environ: str) -> tuple[int, str, str]:
    "Run papermill with stdin and stdout on a pseudo-terminal: exit status, terminal text, stderr."
    master, slave = pty.openpty()
    with open(tree / "stderr.txt", "w+") as errors:
        env = {k: v for k, v in os.environ.items() if k != OPT_OUT} | environ
        process = subprocess.Popen([PAPERMILL, *args], stdin=slave, stdout=slave, stderr=errors, cwd=tree, env=env)
        os.close(slave)
        seen = b""
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    chunk = os.read(master, 65536)
                except OSError:  # Linux reports a closed terminal this way
                    break
                if not chunk:
                    break
                seen += chunk
        status = process.wait(timeout=60)
        os.close(master)
        errors.seek(0)
        return status, seen.decode(), errors.read()


def test_terminal_without_output_path(tree):
    status, _, errors = run_papermill(tree, "nbs/05_rq3.ipynb", "-p", "model", "resnet50", "--no-progress-bar")
    assert status == 0, errors
    output = tree / "outputs" / "05_rq3" / "model=resnet50.ipynb"
    assert [line for line in errors.splitlines() if line.startswith("archrepair:")] == [
        f"archrepair: writing to outputs/05_rq3/model=resnet50.ipynb (no output path was given; {OPT_OUT}=1 turns this off)"]
    assert json.loads(output.read_text())["cells"][-1]["outputs"][0]["text"] == ["model is resnet50\n"]
    assert "injected-parameters" not in (tree / "nbs" / "05_rq3.ipynb").read_text()


def test_terminal_opted_out(tree):
    status, _, errors = run_papermill(tree, "nbs/05_rq3.ipynb", **{OPT_OUT: "1"})
    assert status == 2 and "OUTPUT_PATH" in errors and "archrepair:" not in errors
    assert not (tree / "outputs").exists()


def test_terminal_with_output_path(tree):
    status, _, errors = run_papermill(tree, "nbs/05_rq3.ipynb", "out.ipynb", "-p", "model", "resnet50", "--prepare-only")
    assert status == 0 and "archrepair:" not in errors
    assert (tree / "out.ipynb").exists() and not (tree / "outputs").exists()


def test_terminal_of_another_project(tree):
    (tree / "settings.ini").unlink()
    status, _, errors = run_papermill(tree, "nbs/05_rq3.ipynb")
    assert status == 2 and "archrepair:" not in errors


def test_terminal_where_outputs_cannot_be_made(tree):
    (tree / "outputs").write_text("a file, not a folder")
    status, _, errors = run_papermill(tree, "nbs/05_rq3.ipynb")
    assert status == 2 and sum(line.startswith("archrepair:") for line in errors.splitlines()) == 1 and "Traceback" not in errors


def test_piped(tree):
    done = subprocess.run([PAPERMILL, "nbs/05_rq3.ipynb", "-p", "model", "resnet50", "--prepare-only"], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["cells"]) == 3 and not (tree / "outputs").exists()


# --- the engine

def test_engine_is_papermills_own():
    code = ("import archrepair.paper.launcher as l, sys; assert 'papermill' not in sys.modules; engine = l.ArchrepairEngine\n"
            "from papermill.engines import NBClientEngine, papermill_engines as known\n"
            "assert issubclass(engine, NBClientEngine) and known.get_engine('archrepair') is engine is l.ArchrepairEngine")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_import_is_light_and_has_no_effect():
    code = ("import sys; sys.argv = ['papermill', 'x.ipynb']; import archrepair.paper.launcher\n"
            "assert sys.argv == ['papermill', 'x.ipynb']; sys.exit(bool({'torch', 'papermill', 'pandas', 'yaml'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_papermill_does_not_load_torch():
    code = "import sys, papermill.engines; assert 'archrepair.paper.launcher' in sys.modules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
