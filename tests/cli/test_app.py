"""The command line: every command, its words and its files, at the smoke tier."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.main import get_command

import archrepair.experiments.cells as experiments
import archrepair.experiments.originals as originals
from archrepair.cli.app import app, find_notebook
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import METHODS
from archrepair.data.datasets import load_dataset
from archrepair.experiments.originals import original
from archrepair.networks.models import create_model
from archrepair.networks.weights import load_weights, save_weights
from archrepair.training.evaluation import predict
from support import ROOT
from support.finished import DATASET, FILES, ORIGINAL, REPAIR, command, fails, finished, furnish, tree
from support.pictures import save_tree

SMOKE = ("--tier", "smoke")
COMMANDS = ("train", "doctor", "diagnose", "localize", "repair", "evaluate", "compare", "report", "corrupt", "list", "run")


@pytest.fixture
def done(monkeypatch):
    "The home of the finished repair; a test that changes anything in it fails."
    before = tree(finished())
    monkeypatch.setenv("ARCHREPAIR_HOME", str(finished()))
    yield finished()
    assert tree(finished()) == before


@pytest.fixture
def idle(monkeypatch):
    "Nothing is trained, and nothing repaired."
    for module, name in ((originals, "train_original"), (experiments, "run_full")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("was run"))


def said(capsys, *arguments) -> tuple[str, str]:
    "What a command that succeeds writes to standard output and to standard error."
    capsys.readouterr()
    assert command(*arguments) == 0, capsys.readouterr().err
    return capsys.readouterr()


def parsed(capsys, *arguments) -> dict:
    "The JSON of a command that prints nothing else."
    def no_such_number(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(said(capsys, *arguments, "--json")[0], parse_constant=no_such_number)


# --- help

@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(capsys, name):
    out, err = said(capsys, name, "--help")
    assert out.startswith(f"Usage: archrepair {name} ") and not err
    options = [line.split()[0] for line in out.splitlines() if line.strip().startswith("--") or line.strip().startswith("-")]
    assert "--help" in options and "[" not in "".join(options)


def test_help_names_every_command_and_usage_errors_are_2(capsys):
    out, _ = said(capsys, "--help")
    assert all(f"\n  {name} " in out for name in COMMANDS)
    for wrong in (["repare"], ["repair", "--sed", "1"], ["repair", "--seed", "x"], ["list"], []):
        assert command(*wrong) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_every_command_speaks_json():
    commands = get_command(app).commands
    assert set(COMMANDS) <= commands.keys()
    assert not [name for name, one in commands.items() if not any("--json" in parameter.opts for parameter in one.params)]


def test_help_needs_no_torch():
    program = """
import sys
from archrepair.cli.app import main
try:
    main(["repair", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)


def test_the_package_is_the_command(done):
    "In a process of its own: JSON alone on standard output, status 0; a mistake is one line and status 1."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARCHREPAIR_PROGRESS": "1"}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "archrepair", *arguments], capture_output=True, text=True, env=environment, cwd=done,
                              timeout=200)

    good = call("localize", *SMOKE, "--dataset", DATASET, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["block"].startswith("layer")
    bad = call("list", "modles")
    assert (bad.returncode, bad.stdout) == (1, "") and bad.stderr.startswith("archrepair: unknown list 'modles': did you mean 'models'?")
    assert bad.stderr.count("\n") == 1


# --- weights

WEIGHTS = {  # what a file holds for a state dict, and what is said
    "w.pth": (lambda state: {f"module.{name}": value for name, value in state.items()}, "prefix module. removed"),
    "w.ckpt": (lambda state: {"model": state, "state_dict_ema": {k: 0 * v for k, v in state.items()}, "epoch": 7},
               "entry model taken, not state_dict_ema"),
    "w.pth.tar": (lambda state: {"state_dict": state, "best_acc1": np.float64(98.8)}, "entry state_dict taken"),
    "w.pt#ema": (lambda state: {"model": {k: 0 * v for k, v in state.items()}, "ema": state}, "entry ema taken, not model"),
    "old.pth": (lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, "the file has no num_batches_tracked"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_as_people_keep_them_have_the_accuracy_of_the_original(done, capsys, tmp_path, name):
    keep, said_of_it = WEIGHTS[name]
    torch.save(keep(load_file(done / ORIGINAL)), tmp_path / name.partition("#")[0])
    expected = parsed(capsys, "evaluate", *SMOKE, "--weights", done / ORIGINAL)
    out, err = said(capsys, "evaluate", *SMOKE, "--weights", tmp_path / name, "--json")
    assert json.loads(out) == expected
    assert err.startswith(f"note: {tmp_path / name.partition('#')[0]}: {said_of_it}") and err.count("\n") == 1


# --- train

def test_train_uses_what_there_is(done, idle, capsys):
    out, err = said(capsys, "train", *SMOKE)
    assert "resnet18 on digits, tier smoke" in out and "597" in out and err == f"weights: {done / ORIGINAL}\n"
    got = parsed(capsys, "train", *SMOKE)
    assert got == {"model": "resnet18", "dataset": "digits", "tier": "smoke", "seed": 0, "weights": str(done / ORIGINAL),
                   "accuracy": got["accuracy"], "n": 597} and got["accuracy"] > 90
    assert f"{got['accuracy']:.2f}" in out


def test_train_writes_weights_and_nothing_else(home, capsys, monkeypatch):
    from archrepair.training import fit as training

    train = training.train_original
    monkeypatch.setattr(originals, "train_original", lambda *a, **k: train(*a, **k, epochs=1))
    path = home / "new" / "w.safetensors"
    got = parsed(capsys, "train", *SMOKE, "--seed", 3, "--out", path)
    assert got["weights"] == str(path) and got["seed"] == 3 and sorted(tree(home)) == ["new", "new/w.safetensors"]
    load_weights(create_model("resnet18", 10, width=0.125, stem_stride=2), str(path))
    content = path.read_bytes()
    parsed(capsys, "train", *SMOKE, "--seed", 4, "--out", path)
    assert path.read_bytes() == content  # what there is is used
    parsed(capsys, "train", *SMOKE, "--seed", 4, "--out", path, "--force")
    assert path.read_bytes() != content


# --- localize

def test_localize(done, idle, capsys):
    got = parsed(capsys, "localize", *SMOKE, "--dataset", DATASET)
    out, _ = said(capsys, "localize", *SMOKE, "--dataset", DATASET)
    assert f"(top 50); most suspicious: {got['block']}" in out and all(name in out for name in ("layer1", "layer2", "layer3", "layer4"))
    weighed = parsed(capsys, "localize", *SMOKE, "--dataset", DATASET, "--grad", "activation")
    assert (got["settings"]["grad"], weighed["settings"]["grad"]) == ("weight", "activation")
    few = parsed(capsys, "localize", *SMOKE, "--dataset", DATASET, "--blocks", "layer1,layer2", "-k", "5", "--measure", "ochiai")
    assert few["block"] in ("layer1", "layer2") and few != got
    record = json.loads((done / "outputs" / "repair" / "record.json").read_text())
    assert record["repair"]["localization"]["block"] == got["block"]


def test_localize_by_drift(done, idle, capsys):
    assert command("localize", *SMOKE, "--dataset", DATASET, "--measure", "drift") == 1
    assert "no emulator imitates these failures" in capsys.readouterr().err
    arguments = ("localize", *SMOKE, "--dataset", "digits:gaussian_noise:3", "--measure", "drift", "--blocks", "layer1,layer3")
    got = parsed(capsys, *arguments)
    out, err = said(capsys, *arguments)
    assert list(got["blocks"]) == ["layer1", "layer3"] and got["block"] in got["blocks"]
    assert got["verdict"].split(",")[0] in " ".join(out.split()) and all(warning in err for warning in got["warnings"])


# --- repair

def test_repair_wrote_everything(done):
    assert {p.name for p in (done / "outputs" / "repair").iterdir()} == FILES
    assert sorted(p for p in tree(done) if tree(done)[p] != "folder") == sorted([str(ORIGINAL), *(f"outputs/repair/{f}" for f in FILES)])
    page = (done / "outputs" / "repair" / "report.html").read_text()
    record = json.loads((done / "outputs" / "repair" / "record.json").read_text())
    assert page.lstrip().lower().startswith("<!doctype html>") and DATASET in page and record["repair"]["block"] in page


def test_a_second_call_shows_the_first_result(done, idle, capsys):
    record = json.loads((done / "outputs" / "repair" / "record.json").read_text())
    out, err = said(capsys, *REPAIR)
    assert "is complete already" in err and record["repair"]["verdict"][:12] in out
    assert f"archrepair on resnet18, {DATASET}, block {record['repair']['block']}" in out
    for name, words in (("held_out", "held out"), ("full", "full test")):
        line = next(line for line in out.splitlines() if words in line)
        assert all(f"{record['metrics'][when][name]['accuracy']:.2f}" in line for when in ("before", "after"))
        assert str(record["metrics"]["change"][name]["fixed"]) in line
    got = parsed(capsys, *REPAIR)
    assert got["cell"] == record["cell"] and got["out"] == str(done / "outputs" / "repair")
    assert got["metrics"]["after"] == record["metrics"]["after"] and got["repair"]["verdict"] == record["repair"]["verdict"]
    assert got["metrics"]["change"]["seen"]["negative_flips"] is None  # of failures none was right: no rate


OTHER = [("--seed", 1), ("--block", "layer1"), ("--strategy", "darts"), ("--max-touched", 0.1), ("--preset", "paper"),
         ("--protocol", "paper"), ("--finetune-epochs", 2), ("--dataset", "digits"), ("--weights", "other"),
         ("--n-failures", 30)]


@pytest.mark.parametrize("change", OTHER, ids=lambda change: change[0])
def test_other_settings_do_not_pass_for_the_same(done, idle, capsys, tmp_path, change):
    if change[0] == "--weights":
        change = ("--weights", tmp_path / "other.safetensors")
        save_weights(create_model("resnet18", 10, width=0.125, stem_stride=2), str(change[1]))
    assert "holds another repair" in fails(capsys, *REPAIR, *change)


def test_a_record_older_than_the_limit_on_failures_is_the_same(done, idle, capsys):
    path = done / "outputs" / "repair" / "record.json"
    whole = path.read_text(encoding="utf-8")
    content = json.loads(whole)
    assert content["cell"].pop("n_failures") is None
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "is complete already" in said(capsys, *REPAIR)[1]
    path.write_text(whole, encoding="utf-8")


def test_force_replaces_a_repair(home, capsys):
    furnish(home)
    folder = home / "outputs" / "repair"
    (folder / "genotype.json").write_text("{}")  # of a search, which may not stay
    before = tree(home)
    said(capsys, *REPAIR, "--force", "--search-epochs", 0)
    after = tree(home)
    assert {p.name for p in folder.iterdir()} == FILES
    assert {name for name in after if after[name] != before[name]} >= {f"outputs/repair/{f}" for f in FILES}
    assert parsed(capsys, "evaluate", *SMOKE, "--repaired", folder)["digits"]["n"] == 597


# --- evaluate

def test_evaluate(done, idle, capsys):
    metrics = json.loads((done / "outputs" / "repair" / "record.json").read_text())["metrics"]
    folder = done / "outputs" / "repair"
    for arguments, when in (([], "before"), (["--repaired", folder], "after")):
        got = parsed(capsys, "evaluate", *SMOKE, "--dataset", f"{DATASET},digits", *arguments)
        assert got == {DATASET: metrics[when]["full"], "digits": metrics[when]["clean_full"]}
        out, err = said(capsys, "evaluate", *SMOKE, "--dataset", f"{DATASET},digits", *arguments)
        assert all(f"{score['accuracy']:.2f}" in out for score in got.values()) and DATASET in out and not err
    assert list(parsed(capsys, "evaluate", *SMOKE)) == ["digits"]
    assert parsed(capsys, "evaluate", *SMOKE, "--weights", done / ORIGINAL) == {"digits": metrics["before"]["clean_full"]}
    assert "of another architecture" in fails(capsys, "evaluate", *SMOKE, "--weights", done / ORIGINAL, "--model", "vgg16")


def test_evaluate_says_how_a_folder_is_read(home, tmp_path, capsys):
    "Each gray level is a class; without the first class among the test images the others keep their accuracy."
    root = tmp_path / "photos, 2024"
    for split, levels in (("train", (0, 120, 250)), ("test", (120, 250))):
        for level in levels:
            save_tree(root / split, {f"level {level:03}": 0})
            for i in range(20):
                shade = np.full((32, 32, 3), level, np.uint8) + np.uint8(i % 5)
                Image.fromarray(shade).save(root / split / f"level {level:03}" / f"{i}.png")
    (root / "train" / "level 000" / "._0.png").write_bytes(b"junk")
    scores = parsed(capsys, "evaluate", *SMOKE, "--dataset", f"folder:{root},folder:{root}:contrast:1")
    assert list(scores) == [f"folder:{root}", f"folder:{root}:contrast:1"] and scores[f"folder:{root}"]["n"] == 40

    fresh = tmp_path / "again" / "photos"  # remarks are made once
    shutil.copytree(root, fresh)
    _, err = said(capsys, "evaluate", *SMOKE, "--dataset", f"folder:{fresh}")
    assert err.splitlines() == [f"note: folder:{fresh}: no test images of level 000; files left out: 1 hidden",
                                f"note: folder:{fresh}: 60 training images, 32 px, 3 classes"]
    network = original(dataset=f"folder:{root}", tier="smoke")
    images = load_dataset(f"folder:{root}", "test")
    expected = (predict(network.network, images, network.transform).argmax(1) == images.labels).float().mean()
    assert scores[f"folder:{root}"]["accuracy"] == pytest.approx(100 * float(expected)) and set(images.labels.tolist()) == {1, 2}


# --- report

def test_report_of_one(done, idle, capsys):
    folder = done / "outputs" / "repair"
    assert said(capsys, "report", folder) == (f"{folder / 'report.html'}\n", "")
    got, record = parsed(capsys, "report", folder), json.loads((folder / "record.json").read_text())
    assert got["report"] == str(folder / "report.html") and not got["rebuilt"]
    assert got["after"] == record["metrics"]["after"]["held_out"]["accuracy"]
    assert "holds no repair" in fails(capsys, "report", done)


def test_report_of_several(home, idle, capsys, monkeypatch):
    monkeypatch.chdir(home)
    furnish(home)
    folder = home / "outputs" / "repair"
    shutil.copytree(folder, home / "other")
    out, err = said(capsys, "report", folder, home / "other")
    assert "other" in out and "%" in out and err == "report: compare.html\n" and "other" in (home / "compare.html").read_text()
    got = parsed(capsys, "report", folder, home / "other", "--out", home / "new" / "page.html")
    assert [row["name"] for row in got["repairs"]] == ["repair", "other"] and (home / "new" / "page.html").exists()
    (home / "other" / "report.html").unlink()
    assert parsed(capsys, "report", home / "other")["rebuilt"] and (home / "other" / "report.html").exists()


# --- corrupt

CORRUPT = ("corrupt", "--dataset", "digits", "--corruption", "fog", "--severity", 2, "--limit", 20)


@pytest.mark.parametrize("name", ["c.npz", "no-suffix", "c.other"])
def test_corrupt_writes_arrays_in_test_order(tmp_path, capsys, name, digits_test):
    out, err = said(capsys, *CORRUPT, "--out", tmp_path / name)
    assert not out and "20 images 32×32" in err and [p.name for p in tmp_path.iterdir()] == [name]
    with np.load(tmp_path / name) as arrays:
        assert np.array_equal(arrays["labels"], digits_test.labels[:20]) and list(arrays["classes"]) == list(digits_test.classes)
        assert np.array_equal(arrays["images"], load_dataset("digits:fog:2", "test").images[:20]) and arrays["images"].dtype == np.uint8


def test_corrupt_speaks_json(tmp_path, capsys):
    got = parsed(capsys, *CORRUPT, "--out", tmp_path / "c.npz")
    assert got == {"dataset": "digits", "corruption": "fog", "severity": 2, "n": 20, "size": 32, "out": str(tmp_path / "c.npz")}


def test_what_corrupt_writes_can_be_read_as_a_dataset(tmp_path, capsys, done):
    said(capsys, "corrupt", "--dataset", "digits", "--corruption", "brightness", "--severity", 5, "--out", tmp_path / "test.npz")
    train = load_dataset("digits", "train")
    np.savez(tmp_path / "train.npz", images=train.images.numpy(), labels=train.labels.numpy())
    got = parsed(capsys, "evaluate", *SMOKE, "--weights", done / ORIGINAL, "--dataset", f"npz:{tmp_path}")
    assert got == {f"npz:{tmp_path}": parsed(capsys, "evaluate", *SMOKE, "--dataset", DATASET)[DATASET]}


# --- list

@pytest.mark.parametrize(("what", "some"), [
    ("models", "resnet18 resnet50 resnet101 vgg16 densenet121 efficientnet_b0"), ("datasets", "cifar10 digits npz:PATH"),
    ("corruptions", "gaussian_noise fog jpeg_compression"), ("methods", "archrepair"), ("strategies", "pc-darts"),
    ("tiers", "smoke lite paper"),
    ("blocks", "layer1 layer4"),
])
def test_list(capsys, what, some):
    rows = parsed(capsys, "list", what)
    out, err = said(capsys, "list", what)
    assert not err and [line.split()[0] for line in out.splitlines()] == list(rows) and set(some.split()) <= rows.keys()
    assert all(text in out for text in rows.values()) and not any("None" in text for text in rows.values())


def test_a_list_is_narrowed_by_a_pattern(capsys):
    assert list(parsed(capsys, "list", "models", "resnet*")) == ["resnet18", "resnet50", "resnet101"]
    assert "no tiers match 'x'; `archrepair list tiers` shows them all" in fails(capsys, "list", "tiers", "x")


def test_blocks_of_another_network(capsys):
    assert len(parsed(capsys, "list", "blocks", "--model", "vgg16")) == 5


# --- run

def notebook(path: Path, *cells: str) -> Path:
    "A notebook whose first cell has the parameters."
    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    new.cells[0].metadata["tags"] = ["parameters"]
    new.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new, path)
    return path


def test_run_the_papers_notebook(home, capsys):
    "Table 9 of one block, by weights alone, from the notebook as it is."
    furnish(home, repaired=False)
    for file in ("nbs/05_rq3.ipynb", "data/published.csv"):
        (home / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, home / file)
    source = (home / "nbs" / "05_rq3.ipynb").read_bytes()
    out, err = said(capsys, "run", "rq3", "-p", "model=resnet18", "-p", "tier=smoke", "-p", "search=false", "-p", "blocks=layer4",
                    "-p", f"dataset={DATASET}")
    target = home / "outputs" / "05_rq3" / "blocks=layer4,dataset=digits~brightness~5,model=resnet18,search=False,tier=smoke.ipynb"
    assert target.exists() and f"archrepair: writing to {target}" in err and not out
    text = "".join(str(cell.get("outputs")) for cell in nbformat.read(target, 4).cells)
    assert re.search(r"Table 9 · .*resnet18.*digits:brightness:5.*n = 1", text)
    records = list((home / "outputs" / "smoke" / "records").rglob("*.json"))
    options = [["search_epochs", 0], ["strategy", "pc-darts"]]
    assert len(records) == 1 and json.loads(records[0].read_text())["cell"]["options"] == options
    assert (home / "nbs" / "05_rq3.ipynb").read_bytes() == source
    assert not [p for p in tree(home) if "part" in p or "checkpoint" in p]


def test_run_passes_typed_values_and_failures_are_kept_apart(home, capsys):
    notebook(home / "nbs" / "07_own.ipynb", "count = 1\nname = ''\nwide = True", "print(repr(count), repr(name), wide)",
             "assert count < 5, 'count is too large\\nfor this'")
    said(capsys, "run", "own", "-p", "count=3", "-p", "name=a=b", "-p", "wide=false", "-o", home / "deep" / "out.ipynb")
    assert "3 'a=b' False" in str(nbformat.read(home / "deep" / "out.ipynb", 4).cells[2:])
    got = parsed(capsys, "run", "own", "-p", "count=3", "-p", "wide=false", "-o", home / "deep" / "out.ipynb")
    assert got == {"notebook": str(home / "nbs" / "07_own.ipynb"), "out": str(home / "deep" / "out.ipynb"),
                   "parameters": {"count": 3, "wide": False}}
    before = tree(home)
    capsys.readouterr()
    assert command("run", "07_own", "-p", "count=7", "-o", home / "deep" / "out.ipynb") == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    failed = home / "deep" / "out.failed.ipynb"
    assert not out and lines[-1] == f"archrepair: 07_own.ipynb failed in cell 4: AssertionError: count is too large; see {failed}"
    assert "Traceback" not in err and "count is too large" in str(nbformat.read(failed, 4).cells)
    after = tree(home)
    assert after.pop("deep/out.failed.ipynb") and after == before  # the good output stays


@pytest.mark.parametrize(("arguments", "message"), [
    (["rq9"], "unknown notebook 'rq9'.*own"), (["none.ipynb"], "no notebook at none.ipynb"),
    (["own", "-p", "cuont=3"], "did you mean 'count'"),
    (["own", "-p", "count"], "expected NAME=VALUE"), (["own", "-p", "=3"], "expected NAME=VALUE"), (["own", "-p", "count=[1"], "YAML"),
    (["own", "-o", "nbs/07_own.ipynb/out.ipynb"], "cannot write"), (["own", "-o", "/proc/x/out.ipynb"], "cannot write"),
    (["broken.ipynb"], "cannot read broken.ipynb"), (["empty.ipynb"], "cannot read empty.ipynb"),
])
def test_run_mistakes(home, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(home)
    notebook(home / "nbs" / "07_own.ipynb", "count = 1")
    Path("broken.ipynb").write_text("{")
    Path("empty.ipynb").write_text("{}")
    before = tree(home)
    assert re.search(message, fails(capsys, "run", *arguments)) and tree(home) == before


def test_notebooks_are_found_by_name_number_or_path(tmp_path, monkeypatch):
    path = notebook(tmp_path / "nbs" / "05_rq3.ipynb", "a = 1")
    assert find_notebook("rq3", tmp_path) == find_notebook("05_rq3", tmp_path) == find_notebook(str(path), tmp_path / "x") == path
    with pytest.raises(ArchrepairError, match="checkout"):
        find_notebook("rq3", tmp_path / "elsewhere")


# --- manners

def test_interrupted_and_a_reader_that_left(capsys, monkeypatch):
    def raising(error):
        def act(*arguments, **more):
            raise error
        return act

    monkeypatch.setattr("archrepair.cli.app.choices", raising(KeyboardInterrupt()))
    assert command("list", "models") == 130
    assert capsys.readouterr().err.strip() == "archrepair: interrupted; run the same command again to resume"
    monkeypatch.setattr("archrepair.cli.app.choices", raising(ZeroDivisionError("our own mistake")))
    with pytest.raises(ZeroDivisionError):  # keeps its traceback
        command("list", "models")
    line = f"{sys.executable} -m archrepair list corruptions | true"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""


# --- networks from elsewhere


@pytest.mark.parametrize("words", [["evaluate"], ["localize"], ["repair", "--out", "r"], ["compare", "--out", "c"]])
def test_every_command_that_judges_a_network_takes_its_normalization(capsys, done, idle, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    own = (*SMOKE, "--dataset", DATASET, "--weights", done / ORIGINAL)
    assert "normalize is 'imagnet'; expected cifar10, " in fails(capsys, *words, *own, "--normalize", "imagnet")


@pytest.mark.parametrize("words", [["evaluate"], ["localize"], ["repair", "--out", "r"], ["compare", "--out", "c"], ["train"],
                                   ["list", "blocks"]])
def test_code_of_a_repository_runs_only_where_it_is_trusted(capsys, home, idle, monkeypatch, words):
    monkeypatch.chdir(home)
    (home / "hubconf.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef broken(num_classes):\n    raise ValueError('ran')")
    own = ("--model", "hub:.:broken") if words[0] == "list" else (*SMOKE, "--model", "hub:.:broken")
    assert "on this machine; if you trust it, say so: --trust" in fails(capsys, *words, *own) and not Path("ran").exists()
    assert "hub:.:broken did not build a network (ValueError: ran)" in fails(capsys, *words, *own, "--trust") and Path("ran").exists()


def test_a_network_is_judged_under_the_normalization_it_was_repaired_under(capsys, home, monkeypatch):
    "`evaluate --repaired` needs no reminder, whether the user or the network's configuration had chosen it."
    asked = []
    monkeypatch.setattr(originals, "original", lambda *a, normalize=None, **k: asked.append(normalize) or pytest.fail("enough"))
    furnish(home)
    record = json.loads((home / "outputs" / "repair" / "record.json").read_text())
    for names, expected in (({"normalize": "none"}, "none"), ({"configured": "imagenet"}, "imagenet"), ({}, "dataset")):
        content = {**record, "versions": {**record["versions"], **names}}
        (home / "outputs" / "repair" / "record.json").write_text(json.dumps(content))
        with pytest.raises(pytest.fail.Exception):
            app(["evaluate", *SMOKE, "--dataset", DATASET, "--repaired", str(home / "outputs" / "repair")], standalone_mode=False)
        assert asked.pop() == expected


@pytest.mark.parametrize("arguments", ["list corruptions", "list methods --json", "--help", "repair --help"])
def test_a_reader_that_has_gone_ends_the_command_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "archrepair", *arguments.split()], stdout=pipe, stderr=subprocess.PIPE, timeout=100)
    assert done.stderr == b""


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"},
                                      {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "LANG": "C"}])
def test_every_terminal_shows_what_it_can(settings):
    done = subprocess.run([sys.executable, "-m", "archrepair", "list", "methods"], capture_output=True, env={**os.environ, **settings},
                          timeout=100)
    assert done.returncode == 0 and not done.stderr and done.stdout.count(b"\n") == len(METHODS)
    assert b"(?3)" in done.stdout or "(§3)".encode("cp1252") in done.stdout


SEARCHED = ("--strategy", "pc-darts")


@pytest.mark.parametrize(("arguments", "message"), [
    (["repair", *SEARCHED, "-S", "max_skips=2"], "unknown option of the search 'max_skips': did you mean 'max_skip'"),
    (["repair", *SEARCHED, "-S", "inherited_lr=fast"], "inherited_lr is 'fast'; expected a number from 0"),
    (["repair", *SEARCHED, "-S", "order=5"], "order is 5; expected 1, 2 or 'fd'"),
    (["repair", *SEARCHED, "-S", "edge_norm=maybe"], "edge_norm is 'maybe'; expected True or False"),
    (["repair", "--views", "0"], "views is 0"), (["repair", "-S", "order=2"], "'order' is no option of strategy measured; order is one of"),
    (["repair", "--method", "archrepair:strategy=pc-darts", "-S", "order=5"], "order is 5; expected 1, 2 or 'fd'"),
    (["repair", "--search-epochs", "-1"], "search_epochs is -1; expected a whole number from 0"),
    (["repair", "--seed", "-1"], "seed is -1; expected a whole number from 0 to"),
    (["repair", "--strategy", "drats"], "unknown strategy 'drats': did you mean 'darts'"), (["repair", "--preset", "papr"], "'paper'"),
    (["repair", "--method", "retrain:epoch=3"], "did you mean 'epochs'"), (["repair", "--tier", "smok"], "unknown tier 'smok'"),
    (["repair", "--protocol", "cleen"], "unknown protocol 'cleen'"),
    (["repair", "--dataset", "digits:fog:9"], "severity of digits:fog:9 is 9; expected a whole number from 1 to 5"),
    (["localize", "-k", "0"], "k is 0; expected a whole number from 1"), (["localize", "--measure", "ochai"], "did you mean 'ochiai'"),
    (["train", "--device", "cdua"], "unknown device 'cdua': did you mean 'cuda'"), (["evaluate", "--seed", "-3"], "seed is -3"),
    (["compare", "--epochs", "0"], "epochs is 0"), (["compare", "--seeds=-1"], "seed is -1"), (["paper", "--seeds", "-1"], "seeds is -1"),
    (["paper", "--jobs", "-2"], "jobs is -2"), (["corrupt", "--severity", "6"], "severity is 6"),
    (["corrupt", "--limit", "0"], "limit is 0"),
    (["corrupt", "--corruption", "fogg"], "unknown corruption 'fogg': did you mean 'fog'"),
])
def test_options_are_checked_before_any_data_are_read(home, capsys, monkeypatch, arguments, message):
    def read(*arguments, **options):
        raise AssertionError("data are read")

    for module in ("data.datasets", "experiments.originals", "experiments.cells", "experiments.runs"):
        monkeypatch.setattr(f"archrepair.{module}.load_dataset", read)
    before = tree(home)
    assert re.search(message, fails(capsys, *arguments)) and tree(home) == before
