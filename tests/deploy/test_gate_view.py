"""Four lines and a section that say what a repair behind a gate gained, can touch, did not choose, and how to undo it."""
import copy

import matplotlib.pyplot as plt
import pytest

from archrepair.deploy.card import model_card
from archrepair.deploy.gate_view import closing_lines, draw_branches, gate_section

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


@pytest.mark.parametrize("stages", [["layer1", "layer2"], ["layer2"]])
def test_a_drawing_names_every_stage_and_branch(stages):
    _, ax = plt.subplots()
    draw_branches([BRANCH | {"stages": stages}, BRANCH | {"name": "blur", "block": "layer2", "stages": stages}], ax)
    texts = {text.get_text() for text in ax.texts}
    assert {"input", "logits", "layer1", "layer2", "noise: copy of layer1", "blur: copy of layer2"} <= texts
    plt.close()
