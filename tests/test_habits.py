"""What people expect of a package they know nothing of: wildcards, pictures of results, completion, cards."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import archrepair
from archrepair import list_models
from archrepair.cli import listing
from archrepair.core.errors import ArchrepairError
from archrepair.deploy.card import CARD, MARK, model_card, write_card
from archrepair.deploy.export import export_network
from archrepair.deploy.footprint import footprints
from support.finished import command, finished
from support.reports import Checked, make

# --- names

def test_models_are_listed_by_pattern():
    assert archrepair.list_models("resnet*") == ["resnet18", "resnet50", "resnet101"] and len(list_models()) == 6
    found = list_models("torchvision:mobilenet_v3*")
    assert found == ["torchvision:mobilenet_v3_large", "torchvision:mobilenet_v3_small"] and not list_models("nothing*")
    with pytest.raises(ArchrepairError, match="library"):
        list_models("torchvison:*")


@pytest.mark.parametrize("what", ["models", "datasets", "corruptions", "methods", "strategies", "tiers"])
def test_names_for_the_shell_are_those_of_the_registry(what):
    from archrepair.core.tiers import TIERS
    from archrepair.corruptions.catalogue import CORRUPTIONS
    from archrepair.data.datasets import DATASETS
    from archrepair.experiments.methods import METHODS
    from archrepair.nas.strategies import STRATEGIES
    from archrepair.networks.models import MODELS

    registry = {"models": MODELS, "corruptions": CORRUPTIONS, "methods": METHODS, "strategies": STRATEGIES, "tiers": TIERS,
                "datasets": [name.removesuffix("PATH") for name in DATASETS]}[what]
    assert sorted(listing.names(what)) == sorted(registry)


def pressed(*words: str) -> list[str]:
    "What the shell is offered when the tabulator is pressed after these words."
    environment = {**os.environ, "COMP_WORDS": " ".join(["archrepair", *words]), "COMP_CWORD": str(len(words)), "_ARCHREPAIR_COMPLETE": "complete_bash"}
    code = ("import sys\nfrom archrepair.cli.app import main\ntry:\n    main([])\nfinally:\n    assert 'torch' not in sys.modules, 'slow'")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "slow" not in done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("words", "offered"), [
    (("repair", "--method", "ar"), {"archrepair", "arachne"}), (("train", "--model", "resnet1"), {"resnet18", "resnet101"}),
    (("repair", "--strategy", "d"), {"darts"}), (("list", "me"), {"methods"}), (("compare", "--methods", "archrepair,sur"), {"archrepair,surgical"}),
    (("train", "--tier", ""), {"smoke", "lite", "paper", "auto"}), (("repo",), {"report"}),
])
def test_the_shell_completes_names_without_torch(words, offered):
    assert set(pressed(*words)) == offered


def test_the_shell_is_told_how_to_complete():
    done = subprocess.run([sys.executable, "-c", "from archrepair.cli.app import main; main([])"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "_ARCHREPAIR_COMPLETE": "source_bash"})
    assert "complete -o" in done.stdout and "_ARCHREPAIR_COMPLETE=complete_bash" in done.stdout


# --- pictures

def test_results_show_themselves_in_a_notebook(parts, monkeypatch):
    result = make(parts, block="<b>x</b>", verdict="accepted: <img src=x onerror=alert(1)> & so on")
    result.localization.warnings.append("<script>y</script>")
    shown = [result.localization._repr_html_(), result.genotype._repr_html_(), result.genotype.graph._repr_html_(), result._repr_html_()]
    for text in shown:
        page = Checked(text)
        assert not page.all("script") and not page.all("i") and "://" not in text and "onerror=" not in "".join(map(str, page.seen))
        assert "prefers-color-scheme: dark" in text and 'class="archrepair"' in text
        assert all(a.get("aria-label") for a in page.all("svg"))
    assert "layer<1>" in Checked(shown[0]).words and "<script>y</script>" in Checked(shown[0]).words
    assert "0 to 1 original" in shown[1] and "sep conv" in shown[1] and len(Checked(shown[1]).all("svg")) == 1
    said = Checked(shown[3]).words
    assert "Accept: <img src=x onerror=alert(1)> & so on." in said and "Held out" in said and "repaired ← returned" in said
    bare = make(parts, genotype=None, localization=None, candidates={}, metrics={}, history={}, warnings=[])
    assert "Accept" in Checked(bare._repr_html_()).words


def test_a_long_list_of_blocks_is_held_to_those_that_lead(parts):
    import pandas as pd

    found = make(parts).localization
    names = [f"layer{i}" for i in range(40)]
    counts = [i % 7 for i in range(40)]
    summary = pd.DataFrame({"size": 3, "count": counts, "per_neuron": 0.1, "expected": 1.0, "enrichment": 1.0, "p": 0.5, "gradient": 0.1, "s_hat": 0.1},
                           index=names)
    many = type(found)(**{**found.__dict__, "block": "layer7", "blocks": names, "summary": summary})
    leading = many.leading(12)
    assert len(leading) == 12 and "layer7" in leading and leading == sorted(leading, key=names.index)
    assert min(summary.loc[[n for n in leading if n != "layer7"], "count"]) >= max(summary.loc[[n for n in names if n not in leading], "count"])
    assert len(many.plot(most=12).patches) == 12 and "16 more blocks are not shown" in many._repr_html_()


def test_a_result_comes_back_from_its_dictionary(parts):
    result = make(parts)
    result.footprint = {"before": {"parameters": 3}, "after": {"parameters": 4}}
    plain = json.loads(json.dumps(result.to_dict()))
    plain["localization"]["summary"] = {b: {"size": 1, "count": 1, "expected": 1.0, "p": None} for b in plain["localization"]["blocks"]}
    again = archrepair.RepairResult.from_dict(plain)
    assert again.genotype == result.genotype and again.cost == result.cost and again.footprint == result.footprint and not again.candidates
    assert again.localization.verdict.startswith("layer<1> holds 1 of the 2") and again.to_dict()["changed"] == result.changed
    for broken in ({}, {**plain, "cost": {"miles": 3}}, {**plain, "genotype": {"graph": 1}}):
        with pytest.raises(ArchrepairError, match="genotype|saved repair") as error:
            archrepair.RepairResult.from_dict(broken)
        assert "\n" not in str(error.value)


def test_a_footprint_counts_and_leaves_the_networks_alone(untouched):
    small, large = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, n), torch.nn.Linear(n, 2)) for n in (2, 200))
    with untouched(small), untouched(large):
        found = footprints(small, large, torch.zeros(5, 3, 2, 2))
    assert found["before"]["parameters"] == 12 * 2 + 2 + 2 * 2 + 2 and found["after"]["bytes"] == 4 * found["after"]["parameters"]
    assert found["before"]["flops"] == 2 * (12 * 2 + 2 * 2) and found["after"]["milliseconds"] > 0


# --- model cards

def test_a_card_lies_beside_every_saved_network():
    folder = finished() / "outputs" / "repair"
    text, record = (folder / CARD).read_text(), json.loads((folder / "record.json").read_text())
    after = record["metrics"]["after"]["held_out"]
    assert f"| {after['n']} | " in text and f"{after['accuracy']:.2f} % ({after['low']:.2f}–{after['high']:.2f})" in text
    for said in ("# resnet18, repaired on digits:brightness:5", "seed 0", record["repair"]["block"], "## Limits", "archrepair.load('repair', network)",
                 "training images", "ms an image", f"{record['repair']['footprint']['after']['parameters']:,}"):
        assert said in text, said


def test_a_card_lies_beside_every_exported_network_and_its_code_works(tmp_path, parts):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    export_network(network, tmp_path / "a.pt2", torch.zeros(1, 3, 2, 2))
    text = (tmp_path / CARD).read_text()
    assert "# Sequential\n" in text and "Nothing is known here" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    here, space = Path.cwd(), {}
    os.chdir(tmp_path)
    try:
        exec(code, space)
    finally:
        os.chdir(here)
    assert torch.equal(space["repaired"](torch.ones(4, 3, 2, 2)), network(torch.ones(4, 3, 2, 2)))
    result = make(parts)
    write_card(tmp_path, result.to_dict(), {"model": "a|b", "dataset": "x"})
    text = (tmp_path / CARD).read_text()
    assert "# a\\|b, repaired on x" in text and "beware of &lt;i&gt;this&lt;/i&gt;" in text and "'a.pt2'" in text
    (tmp_path / CARD).write_text("mine")
    write_card(tmp_path, {})
    assert (tmp_path / CARD).read_text() == "mine"


def test_a_card_of_a_repair_without_test_images():
    text = model_card({"method": "m", "block": None, "verdict": "accepted", "changed": {}, "metrics": {}})
    assert text.startswith(MARK) and "accuracy elsewhere is unknown" in text and "nan" not in text


def test_the_command_says_what_there_is(capsys):
    assert command("list", "models", "resnet*", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["resnet18", "resnet50", "resnet101"]
