"""The one training loop: what learns, at which rate, what comes out, and that a killed run goes on as if nothing had happened."""
import copy
import math
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError, TrainingDiverged, note_once
from archrepair.core.tiers import TIERS
from archrepair.data.images import Normalize
from archrepair.networks.blocks import freeze, replace_block, split
from archrepair.networks.models import create_model
from archrepair.training.cost import CostMeter
from archrepair.training.fit import History, Recipe, _Run, default_precision, fit, precision_of, train_original
from archrepair.training.rows import Features, Rows, cache_features, image_features
from archrepair.training.stopping import STOP
from support.tables import C, small, table


def loss_of(model: nn.Module, rows: Rows) -> float:
    with torch.inference_mode():
        x, order = rows.inputs(torch.arange(len(rows)))
        return float(nn.functional.cross_entropy(model.eval()(x), rows.labels[order]))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


FEW = Recipe(epochs=4, lr=0.1, batch_size=16)


# --- objective


def test_schedules():
    cosine, cycle, constant = (Recipe(1, schedule=s).lr_at for s in ("cosine", "onecycle", "constant"))
    assert [round(cosine(p), 6) for p in (0, 0.5, 1)] == [1, 0.5, 0]
    assert [round(cycle(p), 6) for p in (0, 0.1, 0.2, 0.6, 1)] == [0, 0.5, 1, 0.5, 0]
    assert constant(0.7) == 1
    for change in ({"schedule": "cosin"}, {"precision": "fp16"}):
        with pytest.raises(ArchrepairError, match="unknown"):
            Recipe(1, **change)


def test_imitation_is_zero_for_the_teacher_itself_and_the_formula_otherwise():
    draw = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(8, C, generator=draw) for _ in range(2))
    labels, marked = torch.arange(8) % C, (torch.arange(8) < 5).float()
    plain = nn.functional.cross_entropy(logits, labels)
    recipe = Recipe(1, imitation=0.7, temperature=2.0)
    assert torch.allclose(recipe.loss(logits, labels, logits, torch.ones(8)), plain, atol=1e-6)
    assert torch.equal(recipe.loss(logits, labels), plain) and torch.equal(Recipe(1).loss(logits, labels, teacher, marked), plain)
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    kl = (p * (p / q).log()).sum(1)
    assert torch.allclose(recipe.loss(logits, labels, teacher, marked), plain + 0.7 * 4 * kl[:5].sum() / 8, atol=1e-5)
    assert torch.allclose(recipe.loss(logits, labels, teacher, torch.zeros(8)), plain, atol=1e-6)


def test_bfloat16_only_where_it_helps(monkeypatch):
    monkeypatch.delenv("ARCHREPAIR_PRECISION", raising=False)
    monkeypatch.setattr("archrepair.training.fit.multiplies_bf16", lambda: True)
    with torch.device("meta"):
        dense, depthwise = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    assert default_precision(dense) == "bf16" and default_precision(depthwise) == "fp32" and default_precision(depthwise, "cuda") == "bf16"
    monkeypatch.setattr("archrepair.training.fit.multiplies_bf16", lambda: False)
    assert default_precision(dense) == "fp32"


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
def test_the_environment_says_what_auto_means(monkeypatch, wanted):
    monkeypatch.setenv("ARCHREPAIR_PRECISION", wanted)
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    assert default_precision(depthwise) == default_precision(depthwise, "cuda") == precision_of(depthwise, "auto") == wanted
    for explicit, name in (("fp32", "fp32"), ("bf16", "bf16"), (torch.bfloat16, "bf16")):
        assert precision_of(depthwise, explicit) == name


def test_another_word_for_auto_is_refused(monkeypatch):
    monkeypatch.setenv("ARCHREPAIR_PRECISION", "fp16")
    with pytest.raises(ArchrepairError, match="ARCHREPAIR_PRECISION is 'fp16'; expected fp32 or bf16") as caught:
        default_precision(nn.Conv2d(4, 4, 3))
    assert "\n" not in str(caught.value)
    for nothing in ("", "auto"):
        monkeypatch.setenv("ARCHREPAIR_PRECISION", nothing)
        assert default_precision(nn.Conv2d(4, 4, 3)) in ("fp32", "bf16")


# --- the loop


def test_a_training_counts_its_passes():
    meter = CostMeter()
    rows = Rows([table()])
    fit(small(), rows, FEW, meter=meter, share=0.5)
    passes = sum(len(b) for e in range(1, 5) for b in rows.order(e, 16, None, 0))
    assert meter.forwards == meter.backwards == passes / 2


def test_training_learns_is_deterministic_and_leaves_the_global_stream_alone(quiet_stream):
    rows, results = Rows([table()]), []
    for _ in range(2):
        model = small(0.3)
        before = loss_of(model, rows)
        fit(model, rows, Recipe(epochs=8, lr=0.1, batch_size=16))
        results.append(copy.deepcopy(model.state_dict()))
        assert loss_of(model, rows) < before - 0.1 and not model.training
    assert same(*results)
    other = small(0.3)
    fit(other, rows, Recipe(epochs=8, lr=0.1, batch_size=16, seed=1))
    assert not same(other.state_dict(), results[0])


def test_one_step_is_the_optimizers_own():
    "Nesterov momentum, clipping and decay of matrices alone: one epoch of one batch equals torch's SGD written out."
    ours, theirs, rows = small(), small(), Rows([table(n=16)])
    fit(ours, rows, Recipe(epochs=1, lr=0.1, batch_size=16, weight_decay=0.01, clip=0.1))
    theirs.train()
    loss = nn.functional.cross_entropy(theirs(rows.inputs(rows.order(1, 16, None, 0)[0])[0]), rows.labels[rows.order(1, 16, None, 0)[0]])
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
    for p in theirs.parameters():
        g = p.grad * min(1, 0.1 / float(norm)) + (0.01 * p.data if p.ndim > 1 else 0)
        p.data -= 0.1 * (g + 0.9 * g)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert float(norm) > 0.2, "the clip did something"


def test_the_rest_is_frozen_bit_for_bit():
    model = small()
    freeze(model)
    model[4].requires_grad_(True)
    before, modes = copy.deepcopy(model.state_dict()), []
    fit(model, Rows([table()]), FEW, trainable=[model[4]], before_step=lambda *_: modes.append((model[1].training, model[4].training)))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"4.weight", "4.bias"} and set(modes) == {(False, True)}


def test_nothing_to_train():
    with pytest.raises(ArchrepairError, match="nothing to train"):
        fit(freeze(small()), Rows([table()]), FEW)


def test_groups_have_their_own_rates_and_follow_the_schedule():
    model, seen = small(), []
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[4].weight], "lr": 0.0}]
    before = copy.deepcopy(model.state_dict())
    fit(model, Rows([table()]), FEW, groups=groups, before_step=lambda e, s: seen.append((e, s)))
    assert not torch.equal(model[0].weight, before["0.weight"]) and torch.equal(model[4].weight, before["4.weight"])
    assert seen == [(e, s) for e in range(1, 5) for s in range(6)]


def test_views_take_turns():
    seen = []
    part = table(views=3)
    spy = Features(part.labels, lambda p, v: (seen.append(v), part.read(p, v))[1], 3)
    fit(small(), Rows([spy]), Recipe(epochs=5, batch_size=100))
    assert seen == [0, 1, 2, 0, 1]


def test_training_never_worsens_validation():
    "The weights that came in are a candidate: an absurd learning rate keeps them, bit for bit."
    rows, val = Rows([table()]), Rows([table(5)])
    model = small()
    before, loss = copy.deepcopy(model.state_dict()), loss_of(model, val)
    history = fit(model, rows, Recipe(epochs=3, lr=50.0, clip=None, batch_size=16), validate=lambda: loss_of(model, val))
    assert history.selected_epoch == 0 and history.val == pytest.approx(loss) and len(history.epochs) == 4
    assert same(model.state_dict(), before)


def test_the_best_epoch_comes_out_and_ties_go_to_the_earlier():
    values, states = iter([1.0, 0.5, 0.7, 0.5, 0.9]), []
    model = small()
    history = fit(model, Rows([table()]), FEW, validate=lambda: (states.append(copy.deepcopy(model.state_dict())), next(values))[1])
    assert history.selected_epoch == 1 and history.val == 0.5 and same(model.state_dict(), states[1])
    values, states = iter([1.0, 0.5, 0.7, 0.6, 0.9]), []
    history = fit(small(), Rows([table()]), FEW, validate=lambda: next(values), select="last")
    assert history.selected_epoch == 4 and history.val == 0.9


def test_patience():
    values = iter([1.0, 0.9, 0.95, 0.95, 0.95, 0.5])
    history = fit(small(), Rows([table()]), Recipe(epochs=50, patience=3, batch_size=50), validate=lambda: next(values))
    assert [e["epoch"] for e in history.epochs] == [0, 1, 2, 3, 4] and history.selected_epoch == 1


def test_a_validation_that_is_not_finite_is_never_the_best():
    values = iter([1.0, math.nan, 0.9, math.nan, math.nan])
    assert fit(small(), Rows([table()]), FEW, validate=lambda: next(values)).selected_epoch == 2


def test_after_epoch_can_stop():
    history = fit(small(), Rows([table()]), FEW, after_epoch=lambda epoch: epoch == 2)
    assert [e["epoch"] for e in history.epochs] == [1, 2] and history.selected_epoch == 2


def test_a_history_without_validation_has_no_validation_loss():
    history = fit(small(), Rows([table()]), FEW)
    assert history.selected_epoch == 4 and math.isnan(history.val) and math.isnan(History().val)


def test_divergence_leaves_the_last_good_weights_and_checkpoint(tmp_path):
    model, path, saved = small(), tmp_path / "c.pt", {}

    def spoil(epoch, step):
        if epoch == 2 and step == 0:
            saved.update(bytes=path.read_bytes(), state=copy.deepcopy(model.state_dict()))
        if epoch == 2 and step == 3:
            model[0].weight.data.fill_(math.nan)

    with pytest.raises(TrainingDiverged, match="the loss is nan in epoch 2; lower the learning rate") as caught:
        fit(model, Rows([table()]), FEW, before_step=spoil, checkpoint=path)
    assert path.read_bytes() == saved["bytes"] and same(model.state_dict(), saved["state"]) and not model.training
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


# --- cached features


def test_training_on_cached_features_equals_training_the_frozen_network_bit_for_bit(problem):
    images, block = problem.scenario.data.train.select(torch.arange(160)), "layer3"
    cut = split(problem.network, block)
    recipe = Recipe(epochs=2, lr=0.05, batch_size=32)
    cached = copy.deepcopy(cut.block).requires_grad_(True)
    fit(cut.tail(cached), Rows([cache_features(cut, images, problem.transform)]), recipe, trainable=[cached])
    whole = replace_block(cut.model, block, copy.deepcopy(cut.block).requires_grad_(True))
    frozen = {k: v.clone() for k, v in whole.state_dict().items() if not k.startswith(block)}
    fit(whole, Rows([image_features(images, problem.transform)]), recipe, trainable=[whole.layer3])
    assert same(cached.state_dict(), whole.layer3.state_dict()) and not same(cached.state_dict(), cut.block.state_dict())
    assert same(frozen, {k: v for k, v in whole.state_dict().items() if k in frozen})


# --- checkpoints

RUN = Recipe(epochs=5, lr=0.1, batch_size=16, seed=3, patience=5)


def run(checkpoint=None, **options):
    "A run with everything that could be forgotten: dropout, momentum, BatchNorm statistics, validation."
    model, val = small(0.3), Rows([table(7)])
    history = fit(model, Rows([table()]), RUN, validate=lambda: loss_of(model, val), checkpoint=checkpoint, **options)
    return model.state_dict(), [{k: v for k, v in e.items() if k != "seconds"} for e in history.epochs], history.selected_epoch


class Stop(Exception):
    pass


def stop_at(when):
    def raiser(*now):
        if now == when:
            raise Stop
    return raiser


@pytest.mark.parametrize("where", [("after_epoch", (3,)), ("before_step", (3, 2)), ("before_step", (1, 0)), ("before_step", (5, 5))])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, where):
    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        run(path, **{where[0]: stop_at(where[1])})
    state, epochs, selected = run(path)
    straight = run()
    assert same(state, straight[0]) and (epochs, selected) == straight[1:]


def ask_at(when):
    def asker(*now):
        if now == when:
            assert STOP.ask(SystemExit(75))
    return asker


@pytest.mark.parametrize("when", [(1, 0), (3, 2), (5, 5)], ids=["first step", "in the middle", "last step"])
def test_a_run_that_is_asked_to_stop_goes_on_at_the_next_step(tmp_path, when):
    "Dropout draws on from where it was, and an epoch's loss is the mean over all of its steps."
    path, steps = tmp_path / "run.pt", []
    with pytest.raises(SystemExit):
        run(path, before_step=ask_at(when))
    assert torch.load(path, weights_only=True)["place"]["steps"] == when[1] + 1
    state, epochs, selected = run(path, before_step=lambda *now: steps.append(now))
    straight = run()
    assert steps == [(epoch, step) for epoch in range(1, 6) for step in range(6) if (epoch, step) > when]
    assert same(state, straight[0]) and (epochs, selected) == straight[1:]
    assert "place" not in torch.load(path, weights_only=True)


def test_a_run_that_is_stopped_in_a_validation_repeats_no_step(tmp_path):
    path, val, steps, validations = tmp_path / "run.pt", Rows([table(7)]), [], []

    def train(stop: bool):
        model = small(0.3)

        def validate() -> float:
            validations.append(1)
            if stop and len(validations) == 3:  # after the second epoch
                raise SystemExit(75)
            return loss_of(model, val)

        fit(model, Rows([table()]), RUN, validate=validate, checkpoint=path, before_step=lambda *now: steps.append(now))
        return model.state_dict()

    with pytest.raises(SystemExit):
        train(stop=True)
    steps.clear()
    assert same(train(stop=False), run()[0]) and steps[0] == (3, 0)


def test_a_run_that_is_stopped_in_a_step_keeps_its_last_epoch(tmp_path):
    "Of half a step nothing can be saved."
    path = tmp_path / "run.pt"

    def interrupted(*now) -> None:
        if now == (3, 2):
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        run(path, before_step=interrupted)
    content = torch.load(path, weights_only=True)
    assert "place" not in content and content["epochs"][-1]["epoch"] == 2


def test_a_run_that_is_stopped_in_a_slow_step_repeats_that_step(tmp_path, monkeypatch):
    "Where every step is a slow one, the state before it is at hand."
    monkeypatch.setattr("archrepair.training.fit.SLOW", 0.0)
    path, steps = tmp_path / "run.pt", []

    def interrupted(*now) -> None:
        if now == (3, 2):
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        run(path, before_step=interrupted)
    assert torch.load(path, weights_only=True)["place"]["steps"] == 2
    state, epochs, selected = run(path, before_step=lambda *now: steps.append(now))
    straight = run()
    assert steps[0] == (3, 2) and same(state, straight[0]) and (epochs, selected) == straight[1:]


def test_without_a_checkpoint_nobody_is_asked_to_wait():
    asked = []
    run(before_step=lambda *now: asked.append(STOP.ask(SystemExit(75))))
    assert not any(asked)


def test_the_checkpoint_format_is_that_of_earlier_runs(tmp_path):
    run(tmp_path / "run.pt")
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    assert content.keys() == {"recipe", "epochs", "kept", "best", "cost", "state"} and content["state"].keys() == {"model", "optimizer"}
    assert content["cost"].keys() == {"forwards", "backwards", "seconds", "cpu_seconds"}


def test_a_finished_run_is_not_run_again(tmp_path):
    path, steps = tmp_path / "run.pt", []
    first = run(path)
    again = run(path, before_step=lambda *_: steps.append(1))
    assert same(first[0], again[0]) and first[1:] == again[1:] and not steps


def test_a_run_that_was_stopped_stays_stopped(tmp_path):
    path, stop = tmp_path / "run.pt", {"after_epoch": lambda epoch: epoch == 2}
    first, again = run(path, **stop), run(path, **stop)
    assert len(first[1]) == 3 and first[1:] == again[1:] and same(first[0], again[0])


def test_kill_9_and_resume(tmp_path):
    program = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
        import torch
        torch.set_num_threads(1)
        from test_fit import run
        run({str(tmp_path / "run.pt")!r}, before_step=lambda epoch, step: (epoch, step) == (4, 1) and os.kill(os.getpid(), signal.SIGKILL))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps = []
    state, epochs, selected = run(tmp_path / "run.pt", before_step=lambda *now: steps.append(now))
    straight = run()
    assert steps[0] == (4, 0) and same(state, straight[0]) and (epochs, selected) == straight[1:]


class Counter:
    def __init__(self):
        self.n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_extra_state_travels_with_the_checkpoint(tmp_path):
    counter = Counter()
    add = lambda: setattr(counter, "n", counter.n + 1)
    with pytest.raises(Stop):
        run(tmp_path / "c.pt", extra={"counter": counter}, after_step=add, before_step=stop_at((3, 2)))
    assert counter.n == 14
    run(tmp_path / "c.pt", extra={"counter": counter}, before_step=stop_at((9, 9)), after_step=add)
    assert counter.n == 12 + 3 * 6


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path, rows = tmp_path / "c.pt", Rows([table()])
    fit(small(), rows, FEW, checkpoint=path)
    with pytest.raises(ArchrepairError, match="other settings; remove it"):
        fit(small(), rows, Recipe(epochs=4, lr=0.2, batch_size=16), checkpoint=path)
    with pytest.raises(ArchrepairError, match="cannot resume"):
        fit(small()[:1], rows, FEW, checkpoint=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArchrepairError, match="cannot resume"):
        fit(small(), rows, FEW, checkpoint=path)


def test_an_unwritable_checkpoint_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchrepairError, match="cannot write"):
        fit(small(), Rows([table()]), FEW, checkpoint=tmp_path / "file" / "c.pt")


# --- the original


def test_the_original_learns_digits_and_resumes(digits, digits_test, tmp_path, quiet_stream):
    few = digits.select(torch.arange(256))
    fresh, straight, resumed = (create_model("resnet18", 10, width=0.0625, stem_stride=2) for _ in range(3))
    history = train_original(straight, few, TIERS["smoke"], epochs=2)
    assert len(history.epochs) == 2 and all(math.isfinite(e["loss"]) for e in history.epochs) and not straight.training
    before, after = (dict(network.named_parameters()) for network in (fresh, straight))
    assert not any(torch.equal(before[name], after[name]) for name in before)
    meter = CostMeter()
    train_original(resumed, few, TIERS["smoke"], epochs=2, checkpoint=tmp_path / "c.pt", meter=meter)
    assert same(straight.state_dict(), resumed.state_dict()) and meter.backwards == 512
    other = create_model("resnet18", 10, width=0.0625, stem_stride=2)
    train_original(other, few, TIERS["smoke"], epochs=2, seed=1, transform=Normalize.of(few))
    assert not same(straight.state_dict(), other.state_dict())


# --- a loss that is not finite in bfloat16


def spoil_bf16(monkeypatch, epochs: set[int]) -> None:
    "In these epochs the second loss under autocast is NaN."
    step, loss, where = _Run.step, Recipe.loss, {}

    def noted(run, epoch, number, *batch):
        where.update(spoiled=run.precision == "bf16" and epoch in epochs and number == 1)
        return step(run, epoch, number, *batch)

    monkeypatch.setattr(_Run, "step", noted)
    monkeypatch.setattr(Recipe, "loss", lambda recipe, *more: loss(recipe, *more) * (math.nan if where["spoiled"] else 1))


def test_an_epoch_that_is_not_finite_in_bf16_is_repeated_in_fp32(monkeypatch, recwarn):
    note_once.cache_clear()
    spoil_bf16(monkeypatch, {2})
    model, half = small(), replace(FEW, precision="bf16")
    history = fit(model, Rows([table()]), half)
    assert [entry.get("precision") for entry in history.epochs] == [None, "fp32", None, None]
    assert all(math.isfinite(entry["loss"]) for entry in history.epochs)
    assert all(bool(p.isfinite().all()) for p in model.state_dict().values())
    said = [str(w.message) for w in recwarn if "bf16" in str(w.message)]
    assert len(said) == 1 and said[0].startswith("a loss in bf16 is not finite; the epoch is repeated in fp32")


def test_the_repeated_epoch_begins_where_the_other_had_begun(monkeypatch):
    "Spoiled in every epoch, a training in bf16 is one in fp32, momentum included."
    plain, spoiled = small(), small()
    expected = fit(plain, Rows([table()]), FEW)
    spoil_bf16(monkeypatch, {1, 2, 3, 4})
    history = fit(spoiled, Rows([table()]), replace(FEW, precision="bf16"))
    assert [e["loss"] for e in history.epochs] == [e["loss"] for e in expected.epochs]
    assert same(plain.state_dict(), spoiled.state_dict())


@pytest.mark.parametrize("when", [(2, 0), (2, 3)], ids=["before", "after"])
def test_an_epoch_that_was_stopped_is_repeated_from_its_beginning_all_the_same(monkeypatch, tmp_path, when):
    "It was stopped in its first pass, before the loss that is not finite or after it."
    spoil_bf16(monkeypatch, {2})
    half, straight, resumed = replace(FEW, precision="bf16"), small(), small()
    expected = fit(straight, Rows([table()]), half)
    with pytest.raises(SystemExit):
        fit(small(), Rows([table()]), half, checkpoint=tmp_path / "c.pt", before_step=ask_at(when))
    history = fit(resumed, Rows([table()]), half, checkpoint=tmp_path / "c.pt")
    assert [e["loss"] for e in history.epochs] == [e["loss"] for e in expected.epochs] and history.epochs[1]["precision"] == "fp32"
    assert same(straight.state_dict(), resumed.state_dict())


def test_what_is_not_finite_in_fp32_either_has_diverged(monkeypatch):
    monkeypatch.setattr(Recipe, "loss", lambda recipe, logits, *more: logits.sum() * math.nan)
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        fit(small(), Rows([table()]), replace(FEW, precision="bf16"))
