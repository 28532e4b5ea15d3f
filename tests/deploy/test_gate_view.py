"""Four lines and a section that say what a repair behind a gate gained, can touch, did not choose, and how to undo it."""
import copy

import matplotlib.pyplot as plt
import pytest
import torch

from archrepair.deploy.card import model_card
from archrepair.deploy.footprint import firing_rows
from archrepair.deploy.gate_view import closing_lines, draw_branches, gate_section
from archrepair.deploy.provenance import changes_section
from archrepair.nas.gate import Gate
from archrepair.networks.conditional import Conditional
from archrepair.networks.models import create_model

TOUCH = {"thresholds": [3.1], "fired": 13, "n": 2500, "limit": 0.01, "budget": 0.01}
BRANCH = {"name": "noise", "block": "layer1", "form": "copy", "parameters": 14_302, "stages": ["layer1:input", "layer1", "layer2"]}
REPAIR = {
    "method": "archrepair", "chosen": "repaired", "verdict": "accepted: behind a gate: no worse", "block": "layer1", "changed": {},
    "localization": {"block": "layer3", "verdict": "layer3 holds most"},
    "validation": {"repaired": 0.36, "original": 1.89, "control": 0.71},
    "conditional": {"label": "noise", "pattern": "noise <i>", "emulator": "spectral", "auroc": 0.998, "branches": [BRANCH], "touch": TOUCH,
                    "trials": [{"block": "layer1", "loss": 0.61, "before": 2.2}, {"block": "layer3", "loss": 0.93, "before": 2.2}]}}
METRICS = {"before": {"held_out": {"accuracy": 34.3, "n": 50}, "clean_held_out": {"accuracy": 91.62, "n": 50}},
           "after": {"held_out": {"accuracy": 82.36, "n": 50}, "clean_held_out": {"accuracy": 91.54, "n": 50}},
           "fires": {"held_out": 1.0, "clean_held_out": 0.0061}}


def changed(**changes):
    repair = copy.deepcopy(REPAIR)
    repair["conditional"] |= {name: value for name, value in changes.items() if name in repair["conditional"]}
    return repair | {name: value for name, value in changes.items() if name not in repair["conditional"]}


def test_the_four_lines():
    gained, touches, not_chosen, undo = closing_lines(REPAIR, METRICS, "out")
    assert gained == "gained: +48.06 points held out (34.30 → 82.36 %), −0.08 points clean, held out (91.62 → 91.54 %)"
    assert touches.startswith("touches: on images like the training images at most 1.00 % of the answers can change (95 % confidence")
    assert "an expert in layer3 0.93 (loss in its longest trial; layer1 0.61)" in not_chosen
    assert "the localizer's block layer3" in not_chosen and "plain fine-tuning of layer1 (validation loss 0.710" in not_chosen
    assert undo == "undo: archrepair.load('out', network).without('noise'), where network is the original"


@pytest.mark.parametrize("repair, expected", [
    (changed(chosen="original", touch=None, auroc=0.61, trials=[]), "no gate tells these failures from other images (AUROC 0.61)"),
    (changed(chosen="control"), "the expert (validation loss 0.360, control 0.710)"),
])
def test_where_nothing_was_gained_the_lines_say_why(repair, expected):
    lines = closing_lines(repair, METRICS)
    assert lines[0] == "gained: nothing behind a gate" and lines[3] == "undo: nothing to undo" and expected in lines[2]


def test_other_repairs_have_neither():
    assert closing_lines({"chosen": "repaired"}, {}) == [] and not gate_section({"chosen": "repaired"}, {})


def test_the_section_escapes_and_shows_every_number():
    page = str(gate_section(REPAIR, METRICS))
    assert "noise &lt;i&gt;" in page and "<i>" not in page
    for text in ("0.998", "At most 1.00 %".lower(), "0.61 %", "100.00 %", "14,302", "0.9300", "layer1"):
        assert text in page or text in page.lower(), text


def test_the_card_tells_the_limit():
    assert "at most 1.00 % of the answers can differ" in model_card(REPAIR)
    assert "can differ" not in model_card(changed(chosen="original"))


def drawn(branches, fires=None):
    "The texts of a drawing."
    axes = draw_branches(branches, fires=fires)
    texts = [text.get_text() for text in axes.texts]
    plt.close(axes.figure)
    return texts


@pytest.mark.parametrize("block, before, after", [
    ("layer1", "stem", "layer2 …\nhead"), ("layer2", "stem\n… layer1", "head"), ("layer1..layer2", "stem", "head"),
    ("layer1.0.conv1", "what comes\nbefore", "what follows")])
def test_a_drawing_shows_what_is_around_the_block(block, before, after):
    texts = drawn([BRANCH | {"block": block}])
    assert {"input", before, block, after, "logits", "shared"} <= set(texts)


@pytest.mark.parametrize("branch", [{"block": "layer2.."}, {"block": "layer2", "form": "rest"}])
def test_an_expert_up_to_the_logits_shares_nothing_that_follows(branch):
    texts = drawn([BRANCH | branch | {"stages": ["layer1", "layer2", "layer3"]}])
    assert {"stem\n… layer1", "layer2", "layer3 …\nhead", "logits"} <= set(texts) and "shared" not in texts


def test_a_drawing_has_a_row_per_repair_with_gate_expert_and_size():
    blur = BRANCH | {"name": "blur", "block": "layer2", "form": "low_rank", "parameters": 96, "threshold": -1.256}
    texts = drawn([BRANCH, blur], {"held_out": 1.0, "clean_held_out": 0.0061})
    assert {"noise", "gate", "expert: copy\n+14,302 numbers", "blur", "gate\nscore > −1.26", "expert: low rank\n+96 numbers"} <= set(texts)
    assert "A gate fires on 100.00 % (held out) and 0.61 % (clean, held out) of the images." in texts
    assert not any("fires on" in text for text in drawn([BRANCH, blur]))


def test_a_network_can_be_drawn_from_its_description():
    network, x = create_model("resnet18", 10, image_size=32, width=0.125, stem_stride=2, seed=0).eval(), torch.rand(2, 3, 32, 32)
    repaired = Conditional(network)
    repaired.tap(["layer2"])
    gate = Gate.for_example(x, {"layer2": repaired.read(x)[1]["layer2"]})
    gate.threshold.fill_(2.5)
    repaired.add("noise", "layer2", copy.deepcopy(network.layer2), gate)
    assert {"noise", "layer2", "gate\nscore > 2.50"} <= set(drawn(repaired.describe()))


ROWS = firing_rows({"": (1.0035, 1.113), "noise": (1.991, 2.244)}, METRICS["fires"])
FOOTPRINT = {when: {"parameters": 269_722, "bytes": 1_084_544, "flops": 81_102_080, "milliseconds": 2.35, "device": "cpu, 1 thread"}
             for when in ("before", "after")}
FOOTPRINT["after"] |= {"added": [{"repair": "noise", "expert": 14_016, "gate": 286, "share": 0.05303}], "firing": ROWS}


def test_what_a_gate_costs_is_in_the_section_and_on_the_card():
    repair = changed(footprint=FOOTPRINT)
    page, card = str(gate_section(repair, METRICS)), model_card(repair | {"metrics": {"fires": METRICS["fires"]}})
    for text in ("No gate fires", "All fire", "0.61 %", "1.00", "1.11", "1.99", "2.24", "5.30 %", "14,302", "286"):
        assert text in page and text in card, text
    assert "median ratio of paired runs" in page
    changes = str(changes_section(repair | {"changed": {"branches.noise.gate.weight": "added"}}, {}))
    assert "269,722" in changes and "an image on which no gate fires" in changes


def test_what_earlier_records_lack_is_a_dash():
    footprint = {"before": FOOTPRINT["before"], "after": FOOTPRINT["before"]}
    page, card = str(gate_section(REPAIR, METRICS)), model_card(changed(footprint=footprint))
    assert "<td>100.00 %</td><td>–</td><td>–</td>" in page and "<td>14,302</td><td>–</td><td>–</td>" in page
    assert "paired runs" not in page and "Parameters added" not in card and "269,722" in card
