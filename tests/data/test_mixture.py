"""Mixed failures: how many patterns there are, whose failures are whose, and which have nothing in common."""
import numpy as np
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.catalogue import corrupt
from archrepair.corruptions.statistics import image_statistics
from archrepair.data.mixture import DIRECTIONS, depth, divide, fewer, gate_scores, relative_to, sight, valley, widest
from archrepair.data.pattern import Pattern

from .test_emulators import generator
from .test_pattern import photographs

N_FEATURES = 20
ORDINARY = torch.randn(600, N_FEATURES, generator=generator(1))


def cloud(n, shift, seed, spread=1.0):
    "Features of n failures, away from the ordinary ones by `shift` along one feature each."
    rows = spread * torch.randn(n, N_FEATURES, generator=generator(seed))
    for feature, size in shift.items():
        rows[:, feature] += size
    return rows


NOISY, BLURRED, DIFFICULT = cloud(300, {0: 7, 1: 4}, 2), cloud(200, {2: -7, 3: 5}, 3), cloud(250, {}, 4)


def shuffled(*parts, seed=0):
    "The parts in a random order, and the number of the part of each row."
    kinds = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = torch.randperm(len(kinds), generator=generator(seed))
    return torch.cat(parts)[order], kinds[order.numpy()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_pattern_is_one(seed):
    division = divide(NOISY, ORDINARY, seed=seed)
    assert [len(part) for part in division.patterns] == [300] and division.sights[0] > 0.99 and not len(division.rest)


def test_a_bent_cloud_is_one_pattern():
    "Its likelihood under two normal distributions is far higher than under one; it has no valley."
    along = 3 * torch.randn(600, generator=generator(7))
    bent = cloud(600, {0: 8}, 8, spread=0.6)
    bent[:, 4] += along
    bent[:, 5] += along.square() / 3
    assert len(divide(bent, ORDINARY).patterns) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_patterns_and_what_has_none(seed):
    mixed, kinds = shuffled(NOISY, BLURRED, DIFFICULT, seed=seed)
    division = divide(mixed, ORDINARY, seed=seed)
    counts = [np.bincount(kinds[part.numpy()], minlength=3) for part in (*division.patterns, division.rest)]
    assert len(division.patterns) == 2 and [int(c.argmax()) for c in counts] == [0, 1, 2], "the largest pattern comes first"
    assert all(c.max() / c.sum() > 0.95 for c in counts)
    together = torch.cat([*division.patterns, division.rest]).sort().values
    assert torch.equal(together, torch.arange(len(mixed))), "each failure has one place"


def test_failures_like_ordinary_images_have_nothing_in_common():
    division = divide(DIFFICULT, ORDINARY)
    assert not division.patterns and torch.equal(division.rest, torch.arange(250))


def test_few_failures_are_one_pattern_or_none():
    mixed = torch.cat([NOISY[:50], BLURRED[:50]])
    assert [len(part) for part in divide(mixed, ORDINARY).patterns] == [100], "too few to be cut"
    assert [len(part) for part in divide(mixed, ORDINARY, least=40).patterns] == [50, 50]
    small = divide(torch.cat([NOISY, BLURRED[:40]]), ORDINARY)
    assert [len(part) for part in small.patterns] == [300] and small.rest.tolist() == list(range(300, 340))
    assert not divide(NOISY[:9], ORDINARY).patterns and not divide(NOISY[:0], ORDINARY).patterns


def test_the_same_seed_gives_the_same_division():
    mixed, _ = shuffled(NOISY, BLURRED)
    first, second = divide(mixed, ORDINARY, seed=3), divide(mixed, ORDINARY, seed=3)
    assert first.sights == second.sights and all(torch.equal(*pair) for pair in zip(first.patterns, second.patterns))


def test_coordinates_are_relative_to_ordinary_images():
    rows = torch.randn(4000, 3, generator=generator(5))
    rows[:, 1] = 0.6 * rows[:, 0] + 0.8 * rows[:, 1]  # correlation 0.6
    own = relative_to(rows, 5 * rows + 3)
    other = relative_to(5 * rows + 3, 5 * rows + 3)
    assert other.mean(0).abs().max() < 1e-6 and (other.T.cov() - torch.eye(3)).abs().max() < 0.1
    assert own.mean(0).abs().min() > 1, "what lies elsewhere stays there"
    assert widest(torch.randn(50, 4)).shape == (50, 4) and widest(torch.randn(50, 30)).shape == (50, DIRECTIONS)


def test_constant_features_and_outliers_do_no_harm():
    constant = torch.cat([NOISY, torch.ones(300, 1)], 1)
    assert len(divide(constant, torch.cat([ORDINARY, torch.ones(600, 1)], 1)).patterns) == 1
    wild = NOISY.clone()
    wild[:3] *= 1e6
    assert [len(part) for part in divide(wild, ORDINARY).patterns] == [300]


def test_valleys():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0, 1, 400), np.r_[rng.normal(-3, 1, 200), rng.normal(3, 1, 200)]
    assert valley(one, (one > 0).astype(int)) > 0.9 and valley(two, (two > 0).astype(int)) < 0.2
    assert valley(one, np.zeros(400, int)) == 1 and valley(np.zeros(40), np.arange(40) % 2) == 1
    assert depth(rng.normal(0, 1, (400, 5))) > 0.9


def test_scores_come_from_gates_that_saw_neither():
    "More features than images: a gate tells what it was fitted to, and nothing else."
    noise = [torch.randn(40, 60, generator=generator(seed)) for seed in (11, 12)]
    assert abs(sight(*noise) - 0.5) < 0.15
    pairs = gate_scores(NOISY, ORDINARY)
    assert sum(len(high) for high, _ in pairs) == 300 and sum(len(low) for _, low in pairs) == 600
    assert sight(NOISY[:9], ORDINARY) == 0.5


def test_photographs_are_divided_by_their_statistics():
    train = photographs(400, 0)
    noisy, blurred = corrupt(photographs(150, 30), "gaussian_noise", 3), corrupt(photographs(150, 40), "gaussian_blur", 4)
    found = Pattern.split(torch.cat([noisy, blurred]), train)
    assert len(found) == 2
    words = {int((at >= 150).double().mean().round()): pattern.describe() for pattern, at in found}
    assert words[0].startswith("noise") and "detail lost" in words[1]
    assert all(min((at < 150).double().mean(), (at >= 150).double().mean()) < 0.1 for _, at in found)
    assert Pattern.split(photographs(200, 60), train) == []
    own = Pattern.split(noisy, train, (image_statistics(noisy), image_statistics(train)))
    assert [len(at) for _, at in own] == [150]


def test_mistakes():
    with pytest.raises(ArchrepairError, match="expected failures × features"):
        divide(NOISY[:, :5], ORDINARY)
    with pytest.raises(ArchrepairError, match="ten or more ordinary images"):
        divide(NOISY, ORDINARY[:9])
    with pytest.raises(ArchrepairError, match="not finite"):
        divide(NOISY / 0, ORDINARY)
    with pytest.raises(ArchrepairError, match="one row per failure"):
        Pattern.split(photographs(40, 0), photographs(40, 1), (NOISY, ORDINARY))


def test_thousands_of_features_are_summed_and_divided_alike():
    "Two clouds that lie apart in a few of 3,000 features; few enough features stay as they are."
    g = torch.Generator().manual_seed(0)
    ordinary, failures = torch.randn(400, 3000, generator=g), torch.randn(200, 3000, generator=g)
    failures[:, :1500] += 1
    failures[:100, 1500:] += 1
    first, second = fewer(ordinary, failures)
    assert first.shape == (400, 512) and second.shape == (200, 512)
    division = divide(failures, ordinary)
    assert sorted(map(len, division.patterns)) == [100, 100] and len({int(p[0]) // 100 for p in division.patterns}) == 2
    few = ordinary[:, :300], failures[:, :300]
    assert all(before is after for before, after in zip(few, fewer(*few)))
