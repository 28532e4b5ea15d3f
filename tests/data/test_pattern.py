"""Patterns: the two-sample test and its interval, the choice of an emulator, words, records and figures."""
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.catalogue import corrupt
from archrepair.corruptions.statistics import ImageStatistics
from archrepair.data import pattern as module
from archrepair.data.emulators import Profile, Spectral
from archrepair.data.images import ImageSet
from archrepair.data.pattern import Fidelity, Interval, Pattern, describe_profiles, fidelity, placements

from .test_emulators import generator, noisy, pictures


def photographs(count, seed):
    "Pictures with the falling spectrum and the fine detail of photographs."
    return noisy(pictures(count, seed=seed), 0.01, seed=seed + 100)


TRAIN, OTHERS = photographs(400, 0), photographs(300, 50)


def test_placements_average_to_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    high, low = np.round(rng.normal(1, 1, 60), 1), np.round(rng.normal(0, 1, 90), 1)
    area = roc_auc_score(np.r_[np.ones(60), np.zeros(90)], np.r_[high, low])
    of_high, of_low = placements(high, low)
    assert np.isclose(of_high.mean(), area) and np.isclose(of_low.mean(), area)


def test_intervals_hold_the_true_area_about_as_often_as_they_say():
    rng, true, inside = np.random.default_rng(0), 0.7602, 0  # area for two unit normals one apart: Φ(1/√2)
    for _ in range(400):
        folds = [placements(rng.normal(1, 1, 60), rng.normal(0, 1, 60)) for _ in range(2)]
        interval = module.Interval.of(folds)
        inside += interval.low <= true <= interval.high
    assert 0.92 <= inside / 400 <= 0.985


def test_noise_is_imitated_and_named():
    found = Pattern.of(noisy(OTHERS, 0.08), TRAIN)
    measured = found.fidelity
    assert found.emulator.name == "spectral" and measured.clean.value > 0.98 and measured.emulated.value < 0.75 and measured.helps
    assert found.describe().startswith("noise, standard deviation 0.0") and "same at all frequencies" in found.describe()
    sigma = float(found.describe().split("deviation ")[1].split(",")[0])
    assert abs(sigma - 0.08) < 0.008


def test_motion_is_a_blur_along_a_line():
    found = Pattern.of(corrupt(OTHERS, "motion_blur", 5), TRAIN)
    assert found.emulator.name == "blur" and found.fidelity.emulated.value < found.tried["spectral"].emulated.value
    assert found.describe().startswith("blur along a line, another one in each image, fine detail lost above 0.")


@pytest.mark.parametrize(("line", "area", "chosen"), [(True, 0.61, "blur"), (True, 0.63, "spectral"),
                                                      (False, 0.51, "spectral"), (False, 0.49, "blur")])
def test_a_line_that_no_classifier_sees_counts_for_blur(monkeypatch, line, area, chosen):
    areas = {"spectral": 0.6, "blur": area}
    measured = lambda value: Fidelity(Interval(0.9, 0.88, 0.92), Interval(value, value, value), Interval(0.3, 0.2, 0.4), 300)
    monkeypatch.setattr(module, "fidelity", lambda kind, *rest: measured(areas[kind.name]))
    monkeypatch.setattr(module, "blurs_along_a_line", lambda failures, train: line)
    assert Pattern.of(OTHERS, TRAIN).emulator.name == chosen


def test_a_line_is_found_where_there_is_one():
    assert module.blurs_along_a_line(corrupt(OTHERS, "motion_blur", 5), TRAIN) and not module.blurs_along_a_line(OTHERS, TRAIN)


def test_the_same_images_have_no_pattern():
    found = Pattern.of(OTHERS, TRAIN)
    assert found.emulator.name == "none" and found.describe() == "no common pattern" and found.fidelity is None
    assert torch.equal(found(TRAIN[:5], generator()), TRAIN[:5])


def test_what_no_emulator_can_imitate_is_said():
    "A white corner in every image: a place, which a spectrum does not have."
    failing = OTHERS.clone()
    failing[:, :12, :12] = 255
    found = Pattern.of(failing, TRAIN)
    assert found.tried["spectral"].clean.value > 0.95
    assert found.emulator.name == "spectral" or "no emulator imitates" in found.describe()
    assert found.tried["spectral"].emulated.value > 0.9


@pytest.mark.parametrize(("damage", "words"), [
    (lambda x: corrupt(x, "contrast", 3), "contrast 4"), (lambda x: corrupt(x, "gaussian_blur", 5), "blur, fine detail lost above 0."),
    (lambda x: (x.int() + 30).clamp(max=255).byte(), "brighter by 0.1"), (lambda x: (x.int() - 30).clamp(min=0).byte(), "darker by 0.1"),
    (lambda x: (x.int() + torch.tensor([20, 0, 0])).clamp(max=255).byte(), "color shifted by +0.08, +0.00, +0.00"),
])
def test_words(damage, words):
    assert words in "; ".join(describe_profiles(Profile.of(TRAIN), Profile.of(damage(TRAIN))))


def test_the_halves_are_kept_apart():
    "Fewer images than statistics: what was fitted to them must not look like knowledge."
    areas = [fidelity(Spectral, photographs(24, 200 + s), photographs(24, 300 + s), generator(s)).clean.value for s in range(12)]
    assert abs(np.mean(areas) - 0.5) < 0.1


def test_few_images():
    found = Pattern.of(noisy(OTHERS[:8], 0.1), TRAIN)
    assert found.emulator.name == "none" and not found.tried and "too few images" in found.describe()
    forced = Pattern.of(noisy(OTHERS[:8], 0.1), TRAIN, emulator="spectral")
    assert forced.emulator.name == "spectral" and forced.fidelity is None
    with pytest.raises(ArchrepairError, match="at least 20 of each"):
        fidelity(Spectral, OTHERS[:8], TRAIN, generator())


def test_sets_seeds_and_new_draws():
    labels = torch.zeros(len(TRAIN), dtype=torch.int64)
    whole = ImageSet(TRAIN, labels, ("a", "b"))
    failing = noisy(OTHERS, 0.08)
    first, second = Pattern.of(failing, whole), Pattern.of(failing, TRAIN)
    assert first.to_dict() == second.to_dict() and first.to_dict() != Pattern.of(failing, TRAIN, seed=1).to_dict()
    draws = generator()
    assert not torch.equal(first(TRAIN[:4], draws), first(TRAIN[:4], draws))


def test_record_and_figure():
    found = Pattern.of(noisy(OTHERS, 0.08), TRAIN)
    again = Pattern.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict() and again.describe() == found.describe()
    assert torch.equal(again(TRAIN[:3], generator()), found(TRAIN[:3], generator()))
    assert [label.get_text() for label in found.figure().axes[2].get_yticklabels()] == ["training", "emulated", "failures"]
    assert not again.figure().axes[2].images
    gray = Pattern.of(noisy(pictures(30, channels=1), 0.1), pictures(30, 40, 32, channels=1))
    assert gray.figure().axes[2].images
    plt.close("all")


def test_features_of_others_tell_failures_apart():
    "Features that see nothing but the mean color find nothing in noise."
    failing = noisy(OTHERS, 0.08)
    blind = Pattern.of(failing, TRAIN, features=lambda x: x.mean((2, 3)))
    assert blind.describe() == "no common pattern" and Pattern.of(failing, TRAIN).fidelity.helps


def test_an_emulator_of_ones_own():
    failing = (OTHERS.int() - 40).clamp(min=0).byte()
    found = Pattern.of(failing, TRAIN, emulator=lambda x, generator: (x - 40 / 255).clamp(min=0))
    assert found.emulator.name == "custom" and found.fidelity.helps and found.faithful
    assert Pattern.of(failing, TRAIN, emulator=Spectral).emulator.name == "spectral"
    with pytest.raises(ArchrepairError, match="emulator is a int; expected a name"):
        Pattern.of(failing, TRAIN, emulator=3)


def test_the_thorough_emulator_is_asked_where_nothing_quick_is_faithful(monkeypatch):
    asked = []

    class Thorough(Spectral):
        name = "learned"

        @classmethod
        def fit(cls, failures, train, generator, features=None):
            asked.append(len(failures))
            return super().fit(failures, train, generator)

    kind = type(module.EMULATORS["learned"])
    load = kind.load
    monkeypatch.setattr(kind, "load", lambda entry: Thorough if entry.target.endswith(":Learned") else load(entry))
    marked = OTHERS.clone()
    marked[:, :12, :12] = 255
    features = ImageStatistics(32, 32)
    assert "learned" in Pattern.of(marked, TRAIN, features=features).tried and len(asked) >= 2
    asked.clear()
    Pattern.of(marked, TRAIN, emulator="quick", features=features)
    Pattern.of(marked, TRAIN)
    for failing in (marked[:150], noisy(OTHERS, 0.08), OTHERS):
        Pattern.of(failing, TRAIN, features=features)
    assert not asked, "quick, no features, few failures, another is faithful, nothing to imitate"


def test_mistakes():
    with pytest.raises(ArchrepairError, match="unknown emulator 'spectrl': did you mean 'spectral'"):
        Pattern.of(OTHERS, TRAIN, emulator="spectrl")
    with pytest.raises(ArchrepairError, match="expected uint8 N×H×W×C"):
        Pattern.of(OTHERS.float(), TRAIN)
    with pytest.raises(ArchrepairError, match="expected at least two"):
        Pattern.of(OTHERS[:1], TRAIN)


def test_an_emulator_that_was_trained_on_what_measures_it_is_never_faithful():
    fine = Fidelity(*[Interval(value, value - 0.01, value + 0.01) for value in (0.99, 0.5, 0.4)], 100)
    images = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spectral = Pattern.of(images, images, emulator="spectral")
    assert replace(spectral, tried={"spectral": fine}).faithful
    learned = type("Any", (), {"name": "learned"})()
    assert not replace(spectral, emulator=learned, tried={"learned": fine}).faithful
