"""Methods and versions by name; a run is read where there is one; bits of one run are not taken for another's."""
import json
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import archrepair.experiments.runs as runs_module
from archrepair.core.errors import ArchrepairError
from archrepair.experiments.cells import Record
from archrepair.experiments.comparison import compare_methods
from archrepair.experiments.runs import Runs, method_cell, versions_of
from archrepair.networks.weights import save_weights
from support.comparisons import CELL, METHODS
from support.finished import DATASET


def test_methods_are_read_with_their_settings():
    assert method_cell("retrain", CELL) == replace(CELL, method="retrain")
    cell = method_cell(" surgical:variant=auto-rgn;epochs=3;preset=paper ", CELL)
    assert (cell.method, cell.options, cell.block) == ("surgical", (("epochs", 3), ("preset", "paper"), ("variant", "auto-rgn")), None)
    assert method_cell("surgical:block=layer2", CELL).block == "layer2"
    assert method_cell("archrepair", replace(CELL, block="layer1")).block == "layer1"


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 10])
def test_the_budget_is_the_same_for_all(epochs):
    options = dict(method_cell("archrepair", CELL, epochs).options)
    assert options["search_epochs"] + options["finetune_epochs"] == epochs and options["finetune_epochs"] >= 1
    assert dict(method_cell("retrain", CELL, epochs).options) == {"epochs": epochs}
    assert epochs != 5 or options == {"search_epochs": 2, "finetune_epochs": 3}  # as the smoke tier divides it
    assert method_cell("archrepair", CELL).options == ()


@pytest.mark.parametrize(("text", "message"), [
    ("retrian", "unknown method 'retrian': did you mean 'retrain'"), ("", "unknown method"),
    ("retrain:epcohs=3", "unknown option of retrain 'epcohs'"), ("retrain:epochs", "is not a method; expected NAME or NAME:FIELD=VALUE"),
    ("retrain:epochs=-1", "epochs is -1"), ("retrain:block=layer1", "does not take a block")])
def test_methods_that_make_no_sense(text, message):
    with pytest.raises(ArchrepairError, match=message) as error:
        method_cell(text, CELL)
    assert "\n" not in str(error.value)
    with pytest.raises(ArchrepairError, match="epochs is 0"):
        method_cell("retrain", CELL, 0)


def test_versions_are_read():
    assert versions_of("digits:fog:4", ["own", "snow", "contrast:5", "clean", "fog"]) == [
        "digits:fog:4", "digits:snow:4", "digits:contrast:5", "digits"]
    assert versions_of("digits", ["snow"]) == ["digits:snow:3"] and len(versions_of("digits", ["all"])) >= 15
    for names, message in ((["own"], "has no corruption of its own"), (["smow"], "unknown corruption 'smow': did you mean 'snow'")):
        with pytest.raises(ArchrepairError, match=message):
            versions_of("digits", names)


def test_a_new_corruption_needs_no_new_repair(project, monkeypatch, tmp_path):
    outputs, _, _ = project
    shutil.copytree(outputs, tmp_path / "o")
    log = []
    with monkeypatch.context() as patch:
        patch.setattr(runs_module, "run_full", lambda *a, **k: pytest.fail("was run"))
        table = compare_methods(METHODS[1:], CELL, corruptions=["own", "fog"], epochs=1, runs=Runs(tmp_path / "o", log=log.append))
    assert table.versions == [DATASET, "digits:fog:5"]
    assert sorted(log) == ["original on digits:fog:5, seed 0", "retrain on digits:fog:5, seed 0"]
    cell = method_cell(METHODS[1], CELL, 1)
    runs = Runs(tmp_path / "o")
    path = runs.file(cell, "robust")
    content = json.loads(path.read_text())
    content["of"]["seconds"] += 1  # bits of another run of the same cell
    content["right"][DATASET]["right"] = ""
    path.write_text(json.dumps(content))
    assert runs.right(cell, [DATASET])[DATASET].any()
    shutil.rmtree(runs.file(cell, "networks", ""))
    ran, real = [], runs_module.run_full
    monkeypatch.setattr(runs_module, "run_full", lambda *a, **k: ran.append(1) or real(*a, **k))
    runs.right(cell, ["digits:snow:1"])  # its network is gone: it is repaired again, once
    assert ran == [1] and (runs.file(cell, "networks", "") / "repair.json").exists()
    path.write_text("{")
    with pytest.raises(ArchrepairError, match="cannot read .*; remove it"):
        runs.right(cell, [DATASET])


def test_bits_survive_packing():
    for n in (1, 7, 8, 9, 298):
        bits = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
        assert torch.equal(runs_module._unpack(json.loads(json.dumps(runs_module._pack(bits)))), bits)


def test_a_network_of_ones_own(project, tmp_path):
    outputs, _, _ = project
    other = tmp_path / "other.safetensors"
    network = deepcopy(Runs(outputs).problem(CELL)[0].network)
    network.fc.bias.data += 0.5
    save_weights(network, str(other))
    with pytest.raises(ArchrepairError, match="need a folder of their own"):
        Runs(weights=other)
    with pytest.raises(ArchrepairError, match="is the record of other weights"):
        compare_methods(METHODS[1:], CELL, epochs=1, runs=Runs(outputs, weights=other))
    table = compare_methods(["retrain"], CELL, epochs=1, runs=Runs(tmp_path / "own", weights=other))
    assert Record.read(method_cell("retrain", CELL, 1).path(tmp_path / "own")).versions["weights"] == runs_module.digest(other)
    assert table.runs[0]["method"] == "retrain" and not list((tmp_path / "own").rglob("originals"))
    with pytest.raises(ArchrepairError, match="is the record of other weights, or under another normalization"):
        compare_methods(["retrain"], CELL, epochs=1, runs=Runs(tmp_path / "own", weights=other, normalize="none"))
