"""Few-shot guided mixing (a reconstruction): AugMix where nothing guides, convex weights, nearer to the failures the more candidates."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archrepair.baselines.deeprepair import DeepRepair
from archrepair.baselines.fewshot import FewShot, Guide, penultimate, with_failure
from archrepair.baselines.parts.augmented import to_float, to_uint8
from archrepair.baselines.parts.augmix import Mixer, augmix
from archrepair.baselines.parts.common import Problem
from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.randomness import image_keys
from archrepair.data.images import ImageSet
from archrepair.data.scenario import RepairData
from archrepair.networks.models import create_model, list_models
from support.states import same_state


def batch(problem, n=40):
    train = problem.data.train
    return to_float(train.images[:n]), train.labels[:n], image_keys("augmix 0 1", torch.arange(n))


@pytest.mark.parametrize("model", list_models())
def test_penultimate_is_what_enters_the_last_layer(model):
    network = create_model(model, 10, image_size=32, width=0.125, stem_stride=2).eval()
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    x, seen = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(x)
        handle.remove()
        found = penultimate(network)(x)
    assert torch.equal(found, seen[0]) and found.shape == (3, linear.in_features)


def test_a_network_without_a_linear_layer_is_seen_by_its_logits():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(penultimate(network)(x), network(x).flatten(1))


def test_one_candidate_and_no_failure_is_augmix_bit_for_bit(little):
    method, mixer, (x, labels, keys) = FewShot(candidates=1, lam_max=0.0), Mixer(), batch(little)
    guide = Guide(little)
    for view, expected in enumerate(augmix(mixer, x, keys)):
        assert torch.equal(method.guided(guide, mixer, x, labels, keys, view), expected)


def test_one_candidate_and_no_failure_ends_with_the_same_network(little):
    settings = {"epochs": 2, "failure_views": 2, "seed": 3, "keep": "last"}
    one, two = (method.repair(little.original, little.data).candidates["repaired"]
                for method in (FewShot(candidates=1, lam_max=0.0, **settings), DeepRepair(stylizer="none", **settings)))
    assert same_state(one, two) and not same_state(one, little.original)
    guided = FewShot(candidates=2, **settings).repair(little.original, little.data).candidates["repaired"]
    assert not same_state(one, guided)


@given(st.integers(0, 2**20), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_weights_are_convex(seed, lam_max):
    keys = image_keys(f"weights {seed}", torch.arange(20))
    plan = Mixer().draw(keys)
    share = lam_max * torch.rand(20, generator=torch.Generator().manual_seed(seed))
    failures, chains = torch.rand(20, 3, 4, 4) * 255, torch.rand(20, 3, 3, 4, 4) * 255
    longer, weights = with_failure(chains, plan, failures, share)
    assert torch.allclose(weights.sum(1), torch.ones(20)) and (weights >= 0).all() and torch.equal(weights[:, 3], share)
    assert torch.equal(longer[:, :3], chains) and torch.equal(longer[:, 3], failures)
    mixed = Mixer().mix(failures, longer, weights, plan.skip)
    assert 0 <= float(mixed.min()) and float(mixed.max()) <= 255.001
    assert float((plan.skip * weights[:, 3]).max()) <= lam_max + 1e-6


def test_failures_are_of_the_images_class(little):
    "And a class without failures gets none."
    failures = little.data.failures
    only = (failures.labels == failures.labels.mode().values).nonzero().squeeze(1)
    data = RepairData(failures.select(only), little.data.train, little.data.val, little.data.transform, little.data.val_failures)
    problem, mixer, (x, labels, keys) = Problem(little.original, data), Mixer(), batch(little)
    guide = Guide(problem)
    found = FewShot(candidates=1, lam_max=1.0).candidate(guide, mixer, x, labels, keys, 0)
    plain = augmix(mixer, x, keys)[0]
    moved = (found - plain).abs().amax((1, 2, 3)) > 0
    assert torch.equal(moved, labels == failures.labels[only[0]]) and moved.any()


def test_members_are_drawn_evenly(little):
    guide = Guide(little)
    counts = torch.bincount(guide.labels, minlength=10)
    label = int(counts.argmax())
    drawn = guide.member(torch.full((2000,), label), torch.linspace(0, 1 - 1e-7, 2000))
    assert guide.labels[drawn].eq(label).all()
    shares = torch.bincount(drawn, minlength=len(guide.labels))[guide.labels == label] / 2000
    assert torch.allclose(shares, torch.full_like(shares, 1 / int(counts[label])), atol=2e-3)
    assert guide.member(torch.arange(10), torch.full((10,), 0.999)).le(len(guide.labels) - 1).all()


def test_distances_by_hand(little):
    guide = Guide(little)
    x, labels, _ = batch(little)
    features = guide.look(to_uint8(x))
    found = guide.distance(features, labels)
    for i in range(len(x)):
        of_class = guide.labels == labels[i]
        rivals = of_class if of_class.any() else torch.ones_like(of_class)
        assert float(found[i]) == pytest.approx(float((guide.features[rivals] - features[i]).norm(dim=1).min()), abs=2e-2)


def test_more_candidates_come_nearer(little):
    guide, mixer, (x, labels, keys) = Guide(little), Mixer(), batch(little, 60)
    means, each = [], []
    for candidates in (1, 2, 4, 8):
        mixes = FewShot(candidates=candidates, lam_max=0.3).guided(guide, mixer, x, labels, keys, 0)
        each.append(guide.distance(guide.look(to_uint8(mixes)), labels))
        means.append(float(each[-1].mean()))
    assert means == sorted(means, reverse=True) and means[3] < means[0]
    assert all((later <= earlier + 2e-2).all() for earlier, later in zip(each, each[1:]))  # the candidates of fewer are among those of more


def test_the_guide_is_the_original_and_does_not_move(little):
    guide = Guide(little)
    assert little.meter.forwards == len(little.data.failures)
    assert torch.equal(guide.look(guide.images), guide.features) or torch.allclose(guide.look(guide.images), guide.features, atol=1e-4)
    assert not guide.features.requires_grad and not any(m.training for m in little.original.modules())


def test_cost(little):
    result = FewShot(epochs=1).repair(little.original, little.data)
    rows = result.cost.backwards / 3
    validated = 4 * (len(little.data.val) + len(little.data.val_failures))
    assert result.cost.forwards == 3 * rows + 8 * rows + len(little.data.failures) + validated
    assert FewShot(epochs=6, candidates=2, budget="cost").repair(little.original, little.data).config["passes"] == 1  # 6 · 3 of 13


def test_one_failure_is_enough(little):
    data = little.data
    nothing = data.val_failures.select(torch.tensor([], dtype=torch.long))
    one = RepairData(data.failures.select(torch.tensor([0])), data.train, data.val, data.transform, nothing)
    assert isinstance(one.failures, ImageSet)
    method = FewShot(epochs=1, candidates=2, keep="last")  # whatever validates best, the last epoch has learned
    result = method.repair(little.original, one)
    assert any("only 0 failures" in w for w in result.warnings) and not same_state(result.candidates["repaired"], little.original)


@pytest.mark.parametrize(("settings", "message"), [({"candidates": 0}, "candidates is 0"), ({"lam_max": 1.5}, "lam_max is 1.5"),
                                                   ({"lam_max": -0.1}, "lam_max is -0.1"), ({"jsd": "a"}, "jsd is 'a'")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        FewShot(**settings)
