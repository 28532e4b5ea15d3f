"""A cell becomes a record once; what the record says is true; and what is interrupted goes on where it was."""
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import archrepair.experiments.cells as module
from archrepair.core.errors import ArchrepairError, NoFailures, TrainingDiverged
from archrepair.core.tiers import TIERS
from archrepair.data.datasets import fingerprint, load_dataset
from archrepair.data.images import holdout
from archrepair.experiments.cells import Cell, Record, run, run_full, scenario_of
from archrepair.experiments.originals import Original
from archrepair.networks.models import create_model
from archrepair.networks.weights import save_weights
from archrepair.repair.archrepair import ArchRepair
from archrepair.repair.result import load
from support.finished import DATASET, FILES, ORIGINAL, REPAIR, command, finished, furnish, tree
from support.pictures import save_tree

SHORT = (("finetune_epochs", 1), ("search_epochs", 1))
CELL = Cell(dataset=DATASET, tier="smoke", block="layer4", options=SHORT)


@pytest.fixture(scope="module")
def unrepaired(_problem, digits, tmp_path_factory) -> Original:
    "The shared network as an original."
    path = tmp_path_factory.mktemp("original") / "network.safetensors"
    save_weights(_problem.network, str(path))
    return Original(_problem.network, "digits", digits, _problem.transform, TIERS["smoke"], path)


@pytest.fixture
def record():
    return json.loads((finished() / "outputs" / "repair" / "record.json").read_text())


# --- the path of a record

def test_paths_are_stable():
    assert Cell(dataset="cifar10:fog:3", tier="lite").path(Path("o")).as_posix() == (
        "o/lite/records/cifar10~fog~3/resnet18/archrepair-localized-clean-s0.json")
    assert CELL.path(Path("o")).as_posix() == "o/smoke/records/digits~brightness~5/resnet18/archrepair-layer4-clean-s0-a7ddbd2c.json"
    assert Cell(tier="smoke").path(Path("o")) == Cell(tier="smoke", dataset="digits").path(Path("o"))
    assert dataclasses.replace(CELL, options=tuple(reversed(SHORT))).path() == CELL.path()
    assert CELL.resolved() == CELL.resolved().resolved()


def test_whatever_defines_a_run_is_in_its_path(home, monkeypatch):
    changes = [{"method": "apricot"}, {"model": "vgg16"}, {"dataset": "digits"}, {"seed": 1}, {"tier": "lite"}, {"protocol": "paper"},
               {"block": None}, {"block": "layer3"}, {"options": ()}, {"options": SHORT[:1]},
               {"options": (("finetune_epochs", 2), SHORT[1])}, {"options": (*SHORT, ("strategy", "darts"))},
               {"n_failures": 30}, {"n_failures": 31}]
    paths = {dataclasses.replace(CELL, **change).path() for change in [{}, *changes]}
    assert len(paths) == len(changes) + 1
    assert set(Cell.__dataclass_fields__) == {key for change in changes for key in change}  # nothing that defines a run is forgotten
    assert all(path.is_relative_to(home / "outputs") for path in paths)


def test_paths_of_ones_own_data_do_not_collide(home):
    names = ["npz:/a/b.npz", "npz:/c/b.npz", "folder:/a/b.npz", "npz:/a/b.npz:fog:3", "npz:/a/b.npz:fog:4", "npz:b.npz"]
    paths = {dataclasses.replace(CELL, dataset=name).path() for name in names}
    assert len(paths) == len(names)
    assert all(path.is_relative_to(home / "outputs" / "smoke" / "records") and len(path.relative_to(home).parts) == 6 for path in paths)


# --- once

def test_run_once_force_and_resume(unrepaired, tmp_path, monkeypatch):
    path = CELL.path(tmp_path)
    first = run(CELL, outputs=tmp_path, unrepaired=unrepaired)
    assert first.path == str(path) and [p.name for p in path.parent.iterdir()] == [path.name]
    content, calls = path.read_bytes(), []
    monkeypatch.setattr(module, "run_full", lambda *a, **k: calls.append(a) or (first, None, None))
    assert run(CELL, outputs=tmp_path) == Record.read(path) and not calls and path.read_bytes() == content
    assert Record.read(path).asked == CELL.resolved()
    run(CELL, outputs=tmp_path, force=True)
    run(dataclasses.replace(CELL, seed=1), outputs=tmp_path)
    assert [cell.seed for cell, *_ in calls] == [0, 1]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"cell": {}}', '{"cell": {}, "metrics": {}, "repair": {}, "versions": {}}',
                                  '{"cell": {"a": 1}, "metrics": {"a": 1}, "repair": 3, "versions": {"a": 1}}'])
def test_a_broken_record_is_named_and_nothing_is_run(tmp_path, monkeypatch, text):
    monkeypatch.setattr(module, "run_full", lambda *a, **k: pytest.fail("was run"))
    path = CELL.path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ArchrepairError, match="is not a record.*with force") as error:
        run(CELL, outputs=tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and path.read_text() == text


@pytest.mark.parametrize(("change", "message"), [
    ({"method": "x"}, "unknown method"), ({"options": (("epochs", 3),)}, "unknown option of archrepair"),
    ({"options": (("search_epochs", -1),)}, "search_epochs"), ({"tier": "x"}, "unknown tier"), ({"protocol": "x"}, "unknown protocol"),
    ({"block": "x"}, "unknown block")])
def test_a_cell_that_makes_no_sense_leaves_nothing(unrepaired, tmp_path, change, message):
    with pytest.raises(ArchrepairError, match=message):
        run(dataclasses.replace(CELL, **change), outputs=tmp_path, unrepaired=unrepaired)
    assert not [p for p in tmp_path.rglob("*.json") if p.name != "run.json"]


def test_a_diverged_run_leaves_nothing(unrepaired, tmp_path, monkeypatch):
    def diverge(self, model, data, *, checkpoints):
        (checkpoints / "search.pt").write_text("half")
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr(ArchRepair, "repair", diverge)
    with pytest.raises(TrainingDiverged):
        run(CELL, outputs=tmp_path, unrepaired=unrepaired)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() or "checkpoints" in p.name]


# --- what it holds

def test_the_schema_of_a_record(record):
    assert record.keys() == {"cell", "metrics", "repair", "versions"}
    options = [["finetune_epochs", 1], ["search_epochs", 2]]
    assert record["cell"] == {"method": "archrepair", "model": "resnet18", "dataset": DATASET, "seed": 0, "tier": "smoke",
                              "protocol": "clean", "block": None, "options": options, "n_failures": None}
    sets, metrics = {"full", "held_out", "clean_full", "clean_held_out"}, record["metrics"]
    assert metrics.keys() - {"fires", "ungated"} == {"before", "after", "change", "candidates", "images"}
    assert set(metrics["candidates"]) == {"repaired", "control"} and ("fires" in metrics) == (record["repair"]["chosen"] == "repaired")
    for part in (metrics, *metrics["candidates"].values()):
        assert part["after"].keys() == metrics["before"].keys() == sets and part["change"].keys() == sets | {"seen", "unseen"}
        for name in sets:
            for score in (metrics["before"][name], part["after"][name]):
                assert score.keys() == {"accuracy", "n", "low", "high"} and 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 100
            change, before, after = part["change"][name], metrics["before"][name], part["after"][name]
            assert change.keys() == {"fixed", "broken", "repair_rate", "negative_flips", "p"}
            difference = (after["accuracy"] - before["accuracy"]) * before["n"] / 100
            assert change["fixed"] - change["broken"] == pytest.approx(difference, abs=0.02)
    assert metrics["before"]["full"]["n"] == 597 and metrics["before"]["held_out"]["n"] == metrics["images"]["held_out"] == 298
    chosen = record["repair"]["chosen"]
    assert metrics["after"] == (metrics["before"] if chosen == "original" else metrics["candidates"][chosen]["after"])
    costs = {"forwards", "backwards", "seconds", "cpu_seconds", "peak_bytes"}
    assert set(record["repair"]["cost"]) == set(record["repair"]["control_cost"]) == costs
    assert all(record["repair"]["cost"].values()) and record["repair"]["localization"] and record["repair"]["config"]["localized"]
    assert record["versions"].keys() == {"archrepair", "commit", "python", "torch", "machine", "threads", "time", "weights"}
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["weights"] == module.digest(finished() / ORIGINAL)


def test_the_digest_is_that_of_the_outcome():
    "Not of times, memory, machine or threads, however deep they lie; of everything else."
    metrics, repair = {"after": {"full": {"accuracy": 50.0}}}, {"cost": {"forwards": 1.0, "seconds": 2.0}}
    record = Record({"seed": 0}, metrics, repair, {"threads": "1"})
    digest = record.digest
    record.repair["cost"]["seconds"], record.repair["history"], record.versions["threads"] = 3.0, [{"epoch": 1, "seconds": 1.0}], "2"
    history = record.digest
    record.repair["history"][0]["seconds"] = 9.0
    assert digest != history == record.digest
    record.repair.pop("history")
    assert record.digest == digest
    record.metrics["after"]["full"]["accuracy"] = 50.01
    assert record.digest != digest


def test_the_accuracies_are_true(record):
    "Everything counted again, from the files alone and by other means."
    network = create_model("resnet18", 10, width=0.125, stem_stride=2)
    network.load_state_dict(load_file(finished() / ORIGINAL))
    repaired = load(finished() / "outputs" / "repair", network)
    train, labels = load_dataset("digits", "train"), load_dataset("digits", "test").labels
    pixels = train.images.double() / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    _, held_out = holdout(labels, 0.5, 0)
    metrics, right = record["metrics"], {}
    for prefix, name in (("", DATASET), ("clean_", "digits")):
        x = ((load_dataset(name, "test").images.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()
        for when, model in (("before", network.eval()), ("after", repaired)):
            with torch.no_grad():
                answers = right[prefix, when] = model(x).argmax(1) == labels
            assert metrics[when][f"{prefix}full"]["accuracy"] == pytest.approx(100 * float(answers.float().mean()), abs=0.17)  # one image
            assert metrics[when][f"{prefix}held_out"]["accuracy"] == pytest.approx(100 * float(answers[held_out].float().mean()), abs=0.34)
    wrong, after = ~right["", "before"], right["", "after"]
    pool = torch.ones(len(labels), dtype=torch.bool)
    pool[held_out] = False
    failures, unseen = wrong & pool, wrong & ~pool
    assert metrics["images"]["failures"] + metrics["images"]["val_failures"] == min(100, int(failures.sum())) > 20
    assert metrics["change"]["unseen"]["repair_rate"] == pytest.approx(100 * float(after[unseen].float().mean()), abs=3)
    assert metrics["change"]["seen"]["repair_rate"] == pytest.approx(100 * float(after[failures].float().mean()), abs=3)
    assert metrics["images"]["failure_rate"] == pytest.approx(float(failures.sum() / pool.sum()), abs=0.01)


def test_a_repair_is_given_no_more_failures_than_asked_for(unrepaired):
    many, few = (scenario_of(dataclasses.replace(CELL, n_failures=n), unrepaired)[1] for n in (None, 20))
    assert len(few.used) == 20 < len(many.used) and len(few.data.failures) + len(few.data.val_failures) == 20
    assert few.held_out.equal(many.held_out)  # judged on the same images


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_images_used_are_held_out_of_every_version(unrepaired, protocol):
    cell = dataclasses.replace(CELL, protocol=protocol)
    _, scenario = scenario_of(cell, unrepaired)
    used, held_out = set(scenario.used.tolist()), set(scenario.held_out.tolist())
    given = scenario.data.failures.index.tolist() + scenario.data.val_failures.index.tolist()
    assert sorted(given) == sorted(used) and not used & held_out
    assert scenario.test.name.startswith(DATASET) and scenario.clean.name.startswith("digits/")
    assert len(scenario.test) == len(scenario.clean) == 597
    assert torch.equal(scenario.test.labels, scenario.clean.labels) and not torch.equal(scenario.test.images, scenario.clean.images)
    evaluated = module.evaluate(unrepaired.network, scenario)
    assert {name: score.n for name, score in evaluated.scores.items()} == {"full": 597, "held_out": len(held_out), "clean_full": 597,
                                                                          "clean_held_out": len(held_out)}
    assert len(held_out) == (298 if protocol == "clean" else 597 - len(used))
    train = {bytes(image.numpy()) for image in unrepaired.train.images}
    assert all(bytes(image.numpy()) in train for image in (*scenario.data.train.images[:50], *scenario.data.val.images[:50]))
    again = scenario_of(cell, unrepaired)[1]
    assert torch.equal(again.used, scenario.used) and torch.equal(again.held_out, scenario.held_out)


def test_a_network_without_mistakes(unrepaired, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_correct", lambda logits, labels: torch.ones(len(labels), dtype=torch.bool))
    with pytest.raises(NoFailures, match="makes no mistake"):
        run(CELL, outputs=tmp_path, unrepaired=unrepaired)
    assert not list(tmp_path.rglob("*"))


def test_summaries(record):
    records = [Record(**record) for _ in range(3)]
    records[1].metrics = json.loads(json.dumps(record["metrics"]))
    records[1].metrics["after"]["held_out"]["accuracy"] += 3
    table = module.summarize(records)
    row, before = table.loc["held_out"], record["metrics"]["before"]["held_out"]["accuracy"]
    after = record["metrics"]["after"]["held_out"]["accuracy"]
    assert list(table.index) == ["held_out", "clean_held_out"] and row["n"] == 3
    assert (row["before"], row["after"], row["change"]) == pytest.approx((before, after + 1, after + 1 - before))
    assert row["sd"] == pytest.approx(math.sqrt(3))
    assert (records[0].accuracy("held_out", "before"), records[0].accuracy()) == (before, after)


# --- data of one's own

def test_a_record_of_other_images_is_not_taken(home, tmp_path):
    "The folder has the same name, and other photographs in it."
    save_tree(tmp_path / "photos", {"cat": 4, "dog": 4}, (32, 32))
    cell = Cell(dataset=f"folder:{tmp_path}/photos", tier="smoke").resolved()
    path = cell.path()
    content = {"weights": "x", "data": fingerprint(cell.dataset)[:16]}
    record = Record(json.loads(json.dumps(dataclasses.asdict(cell))), {}, {}, content)
    assert module._same(record, cell, None)
    (tmp_path / "photos" / "cat" / "000.png").unlink()
    assert not module._same(record, cell, None) and cell.path() != path


# --- interrupted

def test_checkpoints_of_another_run_are_not_taken(tmp_path):
    folder = module._claim(tmp_path / "a.checkpoints", {"cell": 1, "weights": "x"})
    torch.save({"epoch": 1}, folder / "search.pt")
    assert module._claim(folder, {"cell": 1, "weights": "x"}) == folder and (folder / "search.pt").exists()
    module._claim(folder, {"cell": 1, "weights": "y"})
    assert [p.name for p in folder.iterdir()] == ["run.json"]
    (folder / "run.json").unlink()
    (folder / "search.pt").write_text("of nobody")
    module._claim(folder, {"cell": 1, "weights": "y"})
    assert [p.name for p in folder.iterdir()] == ["run.json"]


def test_a_repair_is_claimed_by_its_cell_and_its_weights(unrepaired, tmp_path, monkeypatch):
    claimed = []

    def claim(folder, identity):
        claimed.append((folder, identity))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_claim", claim)
    for cell in (CELL, dataclasses.replace(CELL, dataset="digits")):
        with pytest.raises(KeyboardInterrupt):
            run_full(cell, tmp_path / "record.json", unrepaired=unrepaired)
    (one, first), (two, second) = claimed
    assert one == two and first != second and first["weights"] == module.digest(unrepaired.path)


KILLER = """
import os, signal, sys
import matplotlib.pyplot, scipy.stats, sklearn.datasets  # once, before the forks
from archrepair.cli.app import main
from archrepair.deploy import report
from archrepair.experiments import cells
from archrepair.training import fit as training

save = training._save
for file, after in (("expert.pt", 1), ("control.pt", 1)):
    child = os.fork()
    if not child:
        count = 0

        def dying(run, path):
            global count
            save(run, path)
            count += path.name.endswith(file)
            if count == after:
                os.kill(os.getpid(), signal.SIGKILL)

        training._save = dying
        try:
            main(sys.argv[1:])
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    print(file, os.WIFSIGNALED(status) and os.WTERMSIG(status), flush=True)
main(sys.argv[1:])
"""


def test_killed_twice_and_still_the_same(tmp_path, record):
    "kill -9 while the expert learns and while the control is fine-tuned; the result is that of an undisturbed run."
    furnish(tmp_path, repaired=False)
    done = subprocess.run([sys.executable, "-c", KILLER, *REPAIR, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=290,
                          env={**os.environ, "ARCHREPAIR_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kills, _, _ = done.stdout.partition("{")
    assert kills.split("\n") == [f"{f} {int(signal.SIGKILL)}" for f in ("expert.pt", "control.pt")] + [""]
    assert sorted(tree(tmp_path)) == sorted(tree(finished()))  # no checkpoint and no half file is left
    folder, undisturbed = tmp_path / "outputs" / "repair", finished() / "outputs" / "repair"
    assert (folder / "repaired.safetensors").read_bytes() == (undisturbed / "repaired.safetensors").read_bytes()

    measured = ("seconds", "cpu_seconds", "peak_bytes", "time", "milliseconds", "latency")

    def timeless(content):
        if isinstance(content, dict):
            return {k: timeless(v) for k, v in content.items() if k not in measured}
        return [timeless(v) for v in content] if isinstance(content, list) else repr(content)

    assert timeless(json.loads((folder / "record.json").read_text())) == timeless(record)  # its cost in image passes included


def test_an_interrupted_ending_is_no_finished_repair(home, monkeypatch, capsys):
    "Whatever is written before the record: without the record nothing counts as finished, and the next call ends the work."
    furnish(home)
    folder = home / "outputs" / "repair"
    undisturbed = tree(folder)
    monkeypatch.setattr(module.RepairResult, "report", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(*REPAIR, "--force") == 130
    err = capsys.readouterr().err
    assert err == "archrepair: interrupted; run the same command again to resume\n" and not (folder / "record.json").exists()
    monkeypatch.undo()
    monkeypatch.setenv("ARCHREPAIR_HOME", str(home))
    monkeypatch.setattr("torch.optim.SGD.step", lambda *a, **k: pytest.fail("was trained again"))
    assert command(*REPAIR) == 0
    assert {p.name for p in folder.iterdir()} == FILES and tree(folder)["repaired.safetensors"] == undisturbed["repaired.safetensors"]


def test_entries_of_one_file_are_different_weights(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(b"weights")
    digests = {module.digest(f"{path}{entry}") for entry in ("", "#model", "#ema")}
    assert len(digests) == 3 and module.digest(path) == hashlib.sha256(b"weights").hexdigest()[:16]
