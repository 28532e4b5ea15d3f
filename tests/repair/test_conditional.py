"""A repair behind a gate: it repairs the pattern, leaves the rest alone, promises what it keeps, and says when there is nothing to see."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import archrepair.repair.conditional as module
from archrepair.core.errors import ArchrepairError
from archrepair.data.datasets import load_dataset
from archrepair.data.images import concatenate
from archrepair.data.pattern import Pattern
from archrepair.data.scenario import RepairData, build_scenario
from archrepair.deploy.gate_view import closing_lines, gate_section
from archrepair.experiments.methods import TrueCorruption
from archrepair.nas.gate import touch_limit
from archrepair.networks.conditional import FORMS
from archrepair.networks.models import create_model
from archrepair.networks.weights import save_weights
from archrepair.repair.conditional import ConditionalRepair
from archrepair.repair.gatedata import Emulated, Ordinary, emulated, firing_rate
from archrepair.repair.result import load
from archrepair.repair.verdict import EMULATED, REAL, Verdict
from archrepair.training.evaluation import evaluate, is_correct, predict
from support.published import published_resnet
from support.states import assert_same_state, state_of

SETTINGS = dict(block="layer2", finetune_epochs=2, failure_views=4)


def scenario_under(problem, corruption: str, network=None):
    "The shared network's failures under a corruption of its test images."
    train, clean, test = load_dataset("digits", "train"), load_dataset("digits", "test"), load_dataset(f"digits:{corruption}", "test")
    correct = is_correct(predict(network or problem.network, test, problem.transform), test.labels)
    return build_scenario(train, test, correct, clean=clean, n_failures=100, transform=problem.transform)


@pytest.fixture(scope="module")
def flat(_problem):
    return scenario_under(_problem, "contrast:3")


@pytest.fixture(scope="module")
def result(_problem, flat):
    return ConditionalRepair(**SETTINGS, label="contrast").repair(_problem.network, flat.data)


@pytest.fixture(scope="module")
def foggy(_problem, result):
    return scenario_under(_problem, "fog:3", result.model)


@pytest.fixture(scope="module")
def twice(result, foggy):
    "The repaired network, repaired once more for another pattern."
    return ConditionalRepair(**SETTINGS, label="fog", control=False, max_touched=0.05).repair(result.model, foggy.data)


def accuracies(network, scenario):
    return {name: score.accuracy for name, score in evaluate(network, scenario).scores.items()}


def test_the_pattern_is_repaired_and_clean_images_keep_their_answers(problem, flat, result):
    before, after = accuracies(problem.network, flat), accuracies(result.model, flat)
    assert result.accepted and after["held_out"] > before["held_out"] + 10
    inputs = flat.data.transform(flat.clean.batch(flat.held_out))
    with torch.no_grad():
        answers, expected = result.model(inputs), problem.network(inputs)
    quiet = result.model.fired < 0
    assert quiet.float().mean() > 0.9 and torch.equal(answers[quiet], expected[quiet])
    clean, failing = (firing_rate(result.model, images.select(flat.held_out), flat.data.transform) for images in (flat.clean, flat.test))
    assert clean == pytest.approx(1 - float(quiet.float().mean())) and failing > 0.9


def test_the_verdict_carries_the_limit(result):
    touch = result.verdict.touch
    assert touch.n == result.conditional["touch"]["n"] == 60  # half of the validation images, and nothing else
    assert touch.limit == pytest.approx(max(0.01, touch_limit(touch.fired, 60)))
    assert f"at most {100 * touch.limit:.2f} % of the answers can change (95 % confidence" in str(result.verdict)


@pytest.mark.parametrize("faithful", [True, False])
def test_candidates_are_judged_on_emulated_images_where_these_are_faithful_and_may_be_refused(problem, flat, monkeypatch, faithful):
    losses = []
    monkeypatch.setattr(module.Pattern, "faithful", property(lambda pattern: faithful))
    monkeypatch.setattr(module, "objection", lambda original, seen: losses.append(seen.failing) or "is refused by the test")
    result = ConditionalRepair(**SETTINGS | {"finetune_epochs": 1}).repair(problem.network, flat.data)
    refused = [line for line in result.warnings if "could not be returned: it is refused by the test" in line]
    assert (result.to_dict()["rule"], len(refused), len(losses)) == ((EMULATED, 1, 2) if faithful else (REAL, 0, 0))
    if faithful:
        assert result.chosen == "original" and all(len(each) == len(flat.data.val_failures) for each in losses)
    rate, ordinary = flat.data.failure_rate, Ordinary.of(flat.data).val
    mean = lambda images: float(cross_entropy(predict(problem.network, images, problem.transform), images.labels))
    on_true_failures = (1 - rate) * mean(ordinary) + rate * mean(flat.data.val_failures)
    assert (result.validation["original"] == pytest.approx(on_true_failures, rel=1e-4)) != faithful


def test_four_lines_end_it(result, flat, _problem):
    metrics = {"before": {}, "after": {}}
    lines = closing_lines(result.to_dict(), metrics, "somewhere")
    assert [line.partition(":")[0] for line in lines] == ["gained", "touches", "not chosen", "undo"]
    assert "plain fine-tuning of layer2" in lines[2] and "archrepair.load('somewhere', network).without('contrast')" in lines[3]
    assert closing_lines({"chosen": "repaired"}, metrics) == []


def test_what_was_added_is_all_that_changed(problem, result):
    assert set(result.changed.values()) == {"added"} and all(name.startswith("branches.contrast.") for name in result.changed)
    assert result.block == "layer2" and result.genotype is None
    json.dumps(result.to_dict())


def test_it_can_be_taken_out(problem, flat, result):
    x = flat.data.transform(flat.test.batch(torch.arange(8)))
    with torch.no_grad():
        assert torch.equal(result.without("contrast")(x), problem.network(x))
    with pytest.raises(ArchrepairError, match="'rain'"):
        result.without("rain")
    with pytest.raises(ArchrepairError, match="no repair that could be taken out"):
        replace(result, verdict=replace(result.verdict, chosen="original"), model=problem.network).without("contrast")


def test_a_second_repair_keeps_the_first_and_both_share_one_file_and_one_limit(problem, flat, foggy, result, twice, tmp_path):
    assert list(twice.model.branches) == ["contrast", "fog"]
    assert twice.verdict.touch.limit == pytest.approx(max(0.05, touch_limit(twice.verdict.touch.fired, 60)))
    assert accuracies(twice.model, foggy)["held_out"] > accuracies(result.model, foggy)["held_out"]
    assert accuracies(twice.model, flat)["held_out"] > accuracies(problem.network, flat)["held_out"] + 5
    twice.save(tmp_path)
    save_weights(problem.network, str(tmp_path / "original.safetensors"))
    x = torch.cat([s.data.transform(s.test.batch(torch.arange(40))) for s in (flat, foggy)])
    with torch.no_grad():
        expected = twice.model(x)
    assert {0, 1} <= set(twice.model.fired.tolist())
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys, torch, archrepair
from archrepair.networks.conditional import FORMS
from archrepair.networks.models import create_model
from archrepair.networks.weights import load_weights
torch.set_num_threads(1)
network = create_model("resnet18", 10, width=0.125, stem_stride=2, seed=3)
load_weights(network, sys.argv[1] + "/original.safetensors")
repaired = archrepair.load(sys.argv[1], network)
with torch.no_grad():
    torch.save([repaired(torch.load(sys.argv[1] + "/x.pt")), list(repaired.branches)], sys.argv[1] + "/y.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    answers, names = torch.load(tmp_path / "y.pt")
    assert names == ["contrast", "fog"] and torch.allclose(answers, expected, atol=1e-5)
    assert torch.equal(load(tmp_path, create_model("resnet18", 10, width=0.125, stem_stride=2, seed=4)).without("fog")(x),
                       twice.without("fog")(x))


def test_a_second_repair_that_is_rejected_leaves_the_first_where_it_was(_problem, foggy, result, tmp_path, monkeypatch):
    "What is saved then is the network that was repaired once, and it comes back on the original as on itself."
    monkeypatch.setattr(module, "judge", lambda losses, **options: Verdict("original", losses, "rejected by the test"))
    twice = ConditionalRepair(**SETTINGS, label="fog").repair(result.model, foggy.data)
    assert twice.chosen == "original" and "control" not in twice.candidates
    assert [branch["name"] for branch in twice.to_dict()["conditional"]["branches"]] == ["contrast"]
    twice.save(tmp_path)
    x = foggy.data.transform(foggy.test.batch(torch.arange(8)))
    with torch.no_grad():
        for network in (_problem.network, result.model):
            assert torch.equal(load(tmp_path, network)(x), result.model(x))


@pytest.mark.parametrize("step", [6, 40], ids=["many", "too few to set some aside"])
def test_failures_without_a_pattern_leave_the_network_alone(problem, step):
    "Ordinary images with wrong labels: nothing tells them from others."
    data = problem.scenario.data
    some = data.train.select(torch.arange(0, len(data.train), step))
    wrong = replace(some, labels=(some.labels + 1) % 10)
    data = RepairData.of(wrong, data.train, data.val, transform=data.transform)
    result = ConditionalRepair(**SETTINGS).repair(problem.network, data)
    assert result.chosen == "original" and "no common pattern" in str(result.verdict) and not result.changed
    assert result.conditional["auroc"] < 0.9 and result.conditional["touch"] is None
    assert "no gate tells these failures from other images" in closing_lines(result.to_dict(), {})[2]


def test_clean_failures_of_a_public_network_have_no_pattern_and_stay():
    network, transform, train, test = published_resnet(3000)
    correct = is_correct(predict(network, test, transform), test.labels)
    scenario = build_scenario(train.select(torch.arange(1500)), test, correct, transform=transform)
    result = ConditionalRepair(blocks=("layer1", "layer3")).repair(network, scenario.data)
    assert result.chosen == "original" and "no common pattern that a gate could see" in str(result.verdict)
    assert len(scenario.data.val_failures) >= 10 and result.conditional["auroc"] < 0.85
    assert_same_state(state_of(network), result.model)


def test_trials_choose_the_place(problem, flat):
    "All blocks are tried for an epoch, the better ones for longer; the earliest is taken of those that come within reach of the best."
    settings = SETTINGS | {"block": None, "search_epochs": 3, "trial_images": 200, "finetune_epochs": 1, "control": False}
    result = ConditionalRepair(**settings).repair(problem.network, flat.data)
    trials = result.conditional["trials"]
    epochs = [trial["epochs"] for trial in trials]
    assert epochs[:4] == 4 * [1] and epochs == sorted(epochs) and set(epochs[4:]) <= {2, 3}
    last = {trial["block"]: trial["loss"] for trial in trials if trial["epochs"] == trials[-1]["epochs"]}
    assert result.block in last and last[result.block] < 1.5 * min(last.values())
    assert all(trial["loss"] < trial["before"] for trial in trials) and result.localization.block in {trial["block"] for trial in trials}


def test_without_trials_the_localizers_block_is_taken(problem, flat):
    result = ConditionalRepair(**SETTINGS | {"block": None, "search_epochs": 0, "finetune_epochs": 1, "control": False}).repair(
        problem.network, flat.data)
    assert result.block == result.localization.block and result.conditional["trials"] == []


def test_trials_choose_the_form_as_well(problem, flat):
    settings = SETTINGS | {"form": "auto", "search_epochs": 1, "trial_images": 200, "finetune_epochs": 1, "control": False}
    result = ConditionalRepair(**settings).repair(problem.network, flat.data)
    trials = result.conditional["trials"]
    losses = {(trial["block"], trial["form"]): trial["loss"] for trial in trials}
    assert losses.keys() == {*(("layer2", form) for form in FORMS), ("layer2..layer3", "copy"), ("layer2..", "copy")}
    chosen = result.candidates["repaired"].branches["pattern1"]
    assert losses[chosen.block, chosen.form] <= 1.5 * min(losses.values())


def test_several_blocks_are_repaired_as_one(problem, flat, tmp_path):
    result = ConditionalRepair(**SETTINGS | {"block": "layer2..layer3", "finetune_epochs": 1}).repair(problem.network, flat.data)
    parts = lambda names: {name.partition(".")[0] for name in names}
    control = dict(result.candidates["control"].named_parameters())
    assert parts(name for name, p in problem.network.named_parameters() if not torch.equal(p, control[name])) == {"layer2", "layer3"}
    assert accuracies(result.model, flat)["held_out"] > accuracies(problem.network, flat)["held_out"] + 5
    assert result.block == result.to_dict()["conditional"]["branches"][0]["block"] == "layer2..layer3"
    x = flat.data.transform(flat.test.batch(torch.arange(8)))
    result.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, problem.network)(x), result.model(x))
    assert "layer2..layer3" in result.report(tmp_path / "report.html").read_text()


def test_the_localizer_votes_for_single_blocks_and_the_rest_of_each_is_tried(problem, flat):
    settings = {"block": None, "blocks": ("layer3", "layer4", "layer3..layer4"), "form": "rest", "search_epochs": 1, "trial_images": 100,
                "finetune_epochs": 1, "control": False}
    result = ConditionalRepair(**SETTINGS | settings).repair(problem.network, flat.data)
    assert {(trial["block"], trial["form"]) for trial in result.conditional["trials"]} == {("layer3..", "copy"), ("layer4..", "copy")}
    assert set(result.localization.blocks) == {"layer3", "layer4"}
    branch = result.candidates["repaired"].branches["pattern1"]
    assert branch.block == result.block and branch.block.endswith("..") and result.config["form"] == "rest"


@pytest.fixture(scope="module")
def two(_problem):
    "Half of the failures are of low contrast, half are negatives."
    train, clean = load_dataset("digits", "train"), load_dataset("digits", "test")
    negative = replace(clean, images=255 - clean.batch(torch.arange(len(clean))))
    parts = []
    for test in (load_dataset("digits:contrast:3", "test"), negative):
        correct = is_correct(predict(_problem.network, test, _problem.transform), test.labels)
        parts.append(build_scenario(train, test, correct, clean=clean, n_failures=200, transform=_problem.transform).data)
    joined = {part: concatenate(*(getattr(data, part) for data in parts)) for part in ("failures", "val_failures")}
    return replace(parts[0], **joined), [len(data.failures) for data in parts]


def test_mixed_failures_get_a_gate_and_an_expert_each(problem, two, tmp_path):
    data, sizes = two
    result = ConditionalRepair(**SETTINGS | {"control": False, "max_touched": 0.05}).repair(problem.network, data)
    assert result.accepted and list(result.model.branches) == ["pattern1", "pattern2"]
    findings = result.conditional
    first, second = findings, findings["further"][0]
    assert sorted([first["failures"], second["failures"]]) == pytest.approx(sorted(sizes), abs=0.1 * sum(sizes))
    assert any("share 2 patterns" in note for note in result.warnings)
    assert result.verdict.touch.limit == pytest.approx(max(0.05, touch_limit(result.verdict.touch.fired, 60)))
    with torch.no_grad():
        inputs = data.transform(data.failures.batch(torch.arange(len(data.failures))))
        result.model(inputs)
    flat = torch.arange(len(data.failures)) < sizes[0]
    answered = result.model.fired
    assert min(float((answered[part] == answered[part].mode().values).float().mean()) for part in (flat, ~flat)) > 0.85
    assert answered[flat].mode().values != answered[~flat].mode().values
    lines = closing_lines(result.to_dict(), {"before": {}, "after": {}})
    assert "without('pattern1')" in lines[3] and "pattern2" in lines[3]
    result.save(tmp_path)
    assert torch.equal(load(tmp_path, problem.network)(inputs[:20]), result.model(inputs[:20]))


def test_mixed_failures_resume_each_pattern_where_it_was(problem, two, tmp_path, monkeypatch):
    data, _ = two
    settings = {"block": None, "blocks": ("layer1", "layer2"), "search_epochs": 1, "trial_images": 100, "control": False,
                "finetune_epochs": 1}
    method = ConditionalRepair(**SETTINGS | settings)
    expected = method.repair(problem.network, data)
    with monkeypatch.context() as patch:
        patch.setattr(module, "choose_thresholds", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            method.repair(problem.network, data, checkpoints=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"expert.pt", "expert2.pt", "trials.json", "trials2.json"}
    monkeypatch.setattr(module, "Trials", lambda *args: pytest.fail("trials are not made again"))
    again = method.repair(problem.network, data, checkpoints=tmp_path)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in expected.model.state_dict().items())


def test_one_gate_for_all_where_a_mixture_is_ruled_out(problem, two):
    result = ConditionalRepair(**SETTINGS | {"control": False, "mixed": False, "finetune_epochs": 1}).repair(problem.network, two[0])
    assert result.conditional["further"] == [] and len(result.candidates["repaired"].branches) == 1
    assert result.conditional["failures"] == len(two[0].failures)


def test_the_network_that_comes_in_and_the_global_stream_stay_as_they_are(problem, flat, untouched, quiet_stream):
    with untouched(problem.network):
        one, two = (ConditionalRepair(**SETTINGS | {"finetune_epochs": 1, "control": False}).repair(problem.network, flat.data)
                    for _ in range(2))
    assert all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())


def test_a_repair_resumes(problem, flat, tmp_path, monkeypatch):
    settings = {"block": None, "blocks": ("layer1", "layer2"), "search_epochs": 1, "trial_images": 200, "control": False}
    method = ConditionalRepair(**SETTINGS | settings)
    expected = method.repair(problem.network, flat.data)
    with monkeypatch.context() as patch:
        patch.setattr(module, "choose_thresholds", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            method.repair(problem.network, flat.data, checkpoints=tmp_path)
    assert (tmp_path / "expert.pt").exists()
    monkeypatch.setattr(module, "Trials", lambda *args: pytest.fail("trials are not made again"))
    again = method.repair(problem.network, flat.data, checkpoints=tmp_path)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in expected.model.state_dict().items())
    assert again.conditional["trials"] == expected.conditional["trials"] and again.block == expected.block


@pytest.mark.parametrize("form", ["norm", "affine", "low_rank", "sep_conv"])
def test_small_experts_are_trained_and_nothing_else(problem, flat, form):
    result = ConditionalRepair(**SETTINGS | {"form": form, "control": False, "finetune_epochs": 1}).repair(problem.network, flat.data)
    repaired = result.candidates["repaired"]
    original = problem.network.state_dict()
    assert all(torch.equal(value, original[name.removeprefix("original.")]) for name, value in repaired.state_dict().items()
               if name.startswith("original."))
    expert = repaired.branches["pattern1"].expert
    shared = {id(p) for p in repaired.original.parameters()}
    own = [p for p in expert.parameters() if id(p) not in shared]
    whole = sum(p.numel() for p in problem.network.layer2.parameters())
    assert own and sum(p.numel() for p in own) < whole
    x = flat.data.transform(flat.test.batch(torch.arange(50)))
    with torch.no_grad():
        assert (repaired(x) != problem.network(x)).any()


def test_an_emulator_of_ones_own_is_used_and_named(problem, flat):
    settings = SETTINGS | {"finetune_epochs": 1, "control": False}
    for emulator, name in ((lambda images, generator: images / 2, "custom"), (TrueCorruption("contrast", 3), TrueCorruption.name)):
        result = ConditionalRepair(**settings, emulator=emulator).repair(problem.network, flat.data)
        record = json.loads(json.dumps(result.to_dict()))
        assert record["conditional"]["emulator"] == record["config"]["emulator"] == name
        assert f"learned from emulated images ({name})" in str(gate_section(record, {}))


def test_emulated_images_are_new_each_time_they_are_read(flat):
    data = flat.data
    pattern = Pattern.of(load_dataset("digits:gaussian_noise:3", "test"), data.train, emulator="spectral")
    one = emulated(data.train, pattern)
    positions = torch.arange(5)
    assert one.sides == data.train.sides and torch.equal(one.labels, data.train.labels)
    assert not torch.equal(one.batch(positions), one.batch(positions))
    assert isinstance(one.select(positions).images, Emulated) and len(one.select(positions)) == 5
    assert emulated(data.train, Pattern.of(data.failures, data.train, emulator="none")) is data.train


def test_each_purpose_has_images_of_its_own(flat):
    ordinary = Ordinary.of(flat.data)
    sets = {name: set(part.index.tolist()) for name, part in vars(ordinary).items()}
    for one, two in (("fit", "held"), ("calibration", "val")):
        assert sets[one] and sets[two] and not sets[one] & sets[two]
    assert sets["calibration"] | sets["val"] == set(flat.data.val.index.tolist())


@pytest.mark.parametrize("settings, message", [
    ({"form": "copi"}, "copy"), ({"preset": "defalt"}, "default"), ({"max_touched": 0}, "max_touched"),
    ({"max_touched": "1 %"}, "max_touched"),
    ({"block": "layer1", "blocks": ("layer2",)}, "one of the two"), ({"finetune_epochs": 0}, "finetune_epochs"), ({"views": 0}, "views"),
    ({"search_epochs": -1}, "search_epochs"), ({"trial_images": 0}, "trial_images"),
    ({"trial_images": 0.5}, "trial_images"), ({"failure_views": 0}, "failure_views")])
def test_settings_out_of_range_are_one_line(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        ConditionalRepair(**settings)


@pytest.mark.parametrize("settings, message", [({"block": "layer9"}, "layer9"), ({"emulator": "spectrl"}, "spectral"),
                                               ({"block": "layer2", "label": "a.b"}, "cannot be the name"),
                                               ({"block": "layer2..layer1"}, "cannot be cut out"),
                                               ({"block": "layer2..layer3", "form": "affine"}, "expected copy or norm")])
def test_what_does_not_fit_the_network_is_one_line(problem, flat, settings, message):
    with pytest.raises(ArchrepairError, match=message):
        ConditionalRepair(**{"finetune_epochs": 1, "control": False} | settings).repair(problem.network, flat.data)


@pytest.mark.parametrize("count", [1, 9])
def test_a_few_failures_are_no_pattern_and_leave_the_network_alone(problem, flat, count, tmp_path):
    data = replace(flat.data, failures=flat.data.failures.select(torch.arange(count)))
    result = ConditionalRepair(**SETTINGS).repair(problem.network, data)
    assert result.chosen == "original" and f"{count} failures are too few" in str(result.verdict) and result.conditional["auroc"] is None
    assert len(closing_lines(result.to_dict(), {})) == 4 and "branches" not in result.conditional
    result.save(tmp_path)
    assert result.report(tmp_path / "report.html").exists()
