"""Tuning: the same number of settings for every method, halved by validation, resumed, and written down."""
import json
import math
from dataclasses import dataclass

import pytest
from support.finished import command, fails

from archrepair.baselines.tuning import ROUNDS, SPACES, Attempt, Space, Tuning, attempts_of, settings_to_try, shortened, space_of, tune
from archrepair.core.errors import ArchrepairError
from archrepair.core.registry import METHODS
from archrepair.core.settings import check_settings
from archrepair.experiments.methods import method_class

SPACE = Space({"rate": (1, 2, 3, 4), "odd": (False, True)}, ("epochs",))


@dataclass
class Made:
    "A method whose loss is known: the lower the rate the better, but those that are odd only look good as long as they are short."

    rate: int = 3
    odd: bool = False
    epochs: int = 8

    def repair(self, network, data):
        if self.rate == 4:
            raise ArchrepairError("cannot work at such a rate")
        network.append((self.rate, self.odd, self.epochs))
        loss = self.rate - (1.5 if self.odd and self.epochs < 8 else 0)
        return type("Result", (), {"validation": {"original": 9.0, "repaired": loss}})


def test_every_method_has_a_space_of_at_least_eight_settings_that_it_takes():
    assert set(SPACES) == set(METHODS)
    for name in METHODS:
        kind, space = method_class(name), space_of(name)
        own = kind()
        tried = settings_to_try(space, own)
        assert len(tried) == 8 and tried[0] == {} and len({str(each) for each in tried}) == 8
        for settings in tried:
            made = kind(**check_settings(kind, settings))
            assert all(getattr(made, field) == value for field, value in settings.items())
        assert all(any(getattr(own, field) != value for field, value in each.items()) for each in tried[1:])
        assert all(isinstance(getattr(own, field), int) for field in space.length)
    with pytest.raises(ArchrepairError, match="unknown space of method 'retrian': did you mean 'retrain'"):
        space_of("retrian")


def test_the_same_seed_tries_the_same():
    assert settings_to_try(SPACE, Made(), seed=1) == settings_to_try(SPACE, Made(), seed=1) != settings_to_try(SPACE, Made(), seed=2)
    assert len(settings_to_try(SPACE, Made(), 100)) == 8, "there are no more"
    assert settings_to_try(SPACE, Made(), 1) == [{}]


def test_the_better_half_goes_on_and_what_shines_early_can_still_lose():
    calls = []
    tuning = tune(Made, SPACE, calls, None, name="made")
    assert [attempt.share for attempt in tuning.attempts] == [0.25] * 8 + [0.5] * 4 + [1.0] * 2
    assert [epochs for *_, epochs in calls] == [2] * 6 + [4] * 4 + [8] * 2, "two of eight cannot run, and do not go on"
    last = tuning.attempts[-2:]
    assert {attempt.loss for attempt in last} == {1.0, 2.0} and tuning.best == {"rate": 1, "odd": True}
    assert str(tuning) == "made:rate=1;odd=True"
    failed = [attempt for attempt in tuning.attempts if attempt.failed]
    assert len(failed) == 2 and all(attempt.failed == "cannot work at such a rate" and attempt.loss == math.inf for attempt in failed)


def test_an_interrupted_tuning_goes_on():
    whole, calls, kept = tune(Made, SPACE, [], None, name="made"), [], []

    def stop(tuning):
        kept.append(json.loads(json.dumps(tuning.to_dict())))
        if len(kept) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(Made, SPACE, calls, None, name="made", after=stop)
    before = len(calls)
    again = tune(Made, SPACE, calls, None, name="made", known=attempts_of(kept[-1]))
    assert [(a.settings, a.share, a.loss) for a in again.attempts] == [(a.settings, a.share, a.loss) for a in whole.attempts]
    assert len(calls) - before == 5, "three of the second round and two of the third"
    assert attempts_of(again.to_dict()) == again.attempts and again.to_dict()["use"] == str(again)


def test_a_method_that_finds_nothing_to_repair_is_judged_as_the_original():
    class Idle(Made):
        def repair(self, network, data):
            return type("Result", (), {"validation": {"original": 0.7}})

    assert {attempt.loss for attempt in tune(Idle, SPACE, None, None, count=2).attempts} == {0.7}


def test_few_settings_and_short_runs():
    shares = [attempt.share for attempt in tune(Made, SPACE, [], None, count=3).attempts]
    assert [shares.count(part / whole) for part, whole in ROUNDS] == [3, 1, 1]
    assert shortened(Made, {}, ("epochs",), (1, 4)).epochs == 2
    assert shortened(lambda **s: Made(**{"epochs": 2} | s), {}, ("epochs",), (1, 4)).epochs == 1
    nothing = Tuning("made", [Attempt({}, 0.25, math.inf, 0.0)])
    assert nothing.best == {} and str(nothing) == "made" and nothing.to_dict()["attempts"][0]["loss"] is None


def test_the_command(home, capsys):
    arguments = ["tune", "--method", "retrain:epochs=2", "--dataset", "digits:fog:3", "--tier", "smoke", "--count", "2", "--json"]
    outcomes = []
    for _ in range(2):
        assert command(*arguments) == 0
        outcomes.append(json.loads(capsys.readouterr().out))
    assert outcomes[0] == outcomes[1] and len(outcomes[0]["attempts"]) == 4
    path, = home.glob("outputs/smoke/tuning/*/*/retrain-*.json")
    assert json.loads(path.read_text())["use"] == outcomes[0]["use"]
    assert command(*arguments[:-1]) == 0
    shown = capsys.readouterr()
    assert f'tuned: archrepair compare --methods "{outcomes[0]["use"]}"' in shown.out + shown.err
    path.write_text("{")
    assert "is damaged; remove it to tune retrain:epochs=2 afresh" in fails(capsys, *arguments)
    assert "unknown" in fails(capsys, "tune", "--method", "retrian")
