"""Images made when they are asked for: reading D_repair, moving images, AugMix's operations and plans, consistency, budgets."""
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy.stats import kstest
from torch import nn

from archrepair.baselines.parts.augmented import AUGMENTATION_RECIPES, Images, to_float, to_uint8
from archrepair.baselines.parts.augmix import OPERATIONS, Consistency, Mixer, Mixing, augmix, jensen_shannon
from archrepair.baselines.parts.common import Problem
from archrepair.core.errors import ArchrepairError
from archrepair.core.settings import checked
from archrepair.corruptions.randomness import image_keys
from archrepair.data.scenario import RepairData
from archrepair.training.fit import Recipe
from support.textures import smooth_pictures

SIZES = (8, 32, 64, 224)


def small_data(data: RepairData, n: int = 48) -> RepairData:
    few = lambda part, k: part.select(torch.arange(min(k, len(part))))
    parts = few(data.failures, 16), few(data.train, n), few(data.val, 32), data.transform, few(data.val_failures, 4), data.failure_rate
    return RepairData(*parts)


@checked
@dataclass
class JustAugMix(Mixing):
    "AugMix, and nothing else."
    name: str = "augmix"

    def run_method(self, problem):
        return self.tune(problem, Mixer(self.width, self.depth, self.severity))


@pytest.fixture
def little(problem):
    return Problem(problem.network, small_data(problem.scenario.data))


# --- moving


# --- operations


@pytest.mark.parametrize("size", SIZES)
def test_gray_level_operations_are_pillows(size):
    images = smooth_pictures(4, size)
    images[1] = 77  # flat
    images[2, ..., 1] = 200  # one channel flat
    images[3] = images[3] // 4 + 100
    x, level = to_float(images), torch.tensor([0.3, 2.6, 5.0, 9.9])
    plain = lambda image, value: {"autocontrast": ImageOps.autocontrast(image), "equalize": ImageOps.equalize(image),
                                  "posterize": ImageOps.posterize(image, 4 - int(value * 4 / 10)),
                                  "solarize": ImageOps.solarize(image, 256 - int(value * 256 / 10))}
    expected = [plain(Image.fromarray(image.numpy()), value) for image, value in zip(images, level.tolist())]
    for name in expected[0]:
        found = to_uint8(OPERATIONS[name](x, level, torch.ones(4)))
        for i in range(4):
            assert np.array_equal(found[i], np.asarray(expected[i][name])), (name, i)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_moving_operations_are_torchvisions(size, sign):
    from torchvision.transforms.functional import InterpolationMode, affine

    x, level = to_float(smooth_pictures(1, size)), 2.7
    shift, plain = int(level * size / 30), {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    slant = math.degrees(math.atan(0.03 * level))
    theirs = {"rotate": {"angle": -sign * int(3 * level)}, "translate_x": {"translate": [-sign * shift, 0]},
              "translate_y": {"translate": [0, -sign * shift]}, "shear_x": {"shear": [sign * slant, 0.0]},
              "shear_y": {"shear": [0.0, sign * slant]}}
    for name, change in theirs.items():
        found = OPERATIONS[name](x, torch.tensor([level]), torch.tensor([sign]))
        expected = affine(x, **{**plain, **change}, interpolation=InterpolationMode.BILINEAR)
        if name == "shear_y":  # theirs also shortens the columns; a slant is so many pixels per column
            expected = OPERATIONS["shear_x"](x.mT, torch.tensor([level]), torch.tensor([sign])).mT
        assert float((found - expected).abs().max()) <= 0.51, name
        assert torch.equal(found, found.round())


@given(st.integers(0, 2**20), st.sampled_from(sorted(OPERATIONS)), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_operations_keep_gray_levels_and_images_apart(seed, name, level):
    images = torch.randint(0, 256, (3, 9, 9, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[2] = images[2, :1, :1]
    x, levels, sign = to_float(images), torch.tensor([level, 3.0, level]), torch.tensor([1.0, -1.0, -1.0])
    found = OPERATIONS[name](x, levels, sign)
    assert torch.equal(found, found.round()) and 0 <= float(found.min()) and float(found.max()) <= 255
    for i in range(3):
        assert torch.equal(found[i:i + 1], OPERATIONS[name](x[i:i + 1], levels[i:i + 1], sign[i:i + 1]))


# --- plans


def test_plans_are_drawn_as_published():
    mixer, keys = Mixer(severity=4.0), image_keys("plans", torch.arange(4000))
    plan = mixer.draw(keys)
    assert torch.allclose(plan.weights.sum(1), torch.ones(4000)) and (plan.weights >= 0).all()
    assert kstest(plan.skip, "uniform").pvalue > 1e-3
    for chain in range(3):  # Dirichlet(1, 1, 1): each weight is Beta(1, 2)
        assert kstest(plan.weights[:, chain], "beta", args=(1, 2)).pvalue > 1e-3
    assert kstest((plan.level.flatten()[:5000] - 0.1) / 3.9, "uniform").pvalue > 1e-3
    length = (plan.steps >= 0).sum(-1)
    assert (plan.steps >= 0).int().diff(dim=-1).le(0).all(), "a gap in a chain"
    shares = torch.bincount(length.flatten(), minlength=4) / length.numel()
    assert shares[0] == 0 and (shares[1:] - 1 / 3).abs().max() < 0.02
    used = torch.bincount(plan.steps[plan.steps >= 0], minlength=9) / int((plan.steps >= 0).sum())
    assert len(used) == 9 and (used - 1 / 9).abs().max() < 0.01
    assert (plan.sign.unique() == torch.tensor([-1.0, 1.0])).all() and abs(float(plan.sign.mean())) < 0.03


def test_an_image_has_the_same_plan_in_every_batch(quiet_stream):
    mixer = Mixer()
    one, many = mixer.draw(image_keys("plans", torch.tensor([17])), 1), mixer.draw(image_keys("plans", torch.arange(30)), 1)
    assert all(torch.equal(getattr(one, part)[0], getattr(many, part)[17]) for part in ("steps", "level", "sign", "weights", "skip"))
    other = mixer.draw(image_keys("plans", torch.tensor([17])), 0)
    assert not torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("size", SIZES)
def test_batched_chains_are_the_chains_one_by_one(size):
    n = 2 if size == 224 else 6
    mixer, x = Mixer(width=2, depth=4), to_float(smooth_pictures(n, size))
    plan = mixer.draw(image_keys("chains", torch.arange(n)))
    found = mixer.chains(x, plan)
    for i in range(n):
        for chain in range(2):
            end = x[i:i + 1]
            for d, step in enumerate(plan.steps[i, chain].tolist()):
                if step >= 0:
                    end = OPERATIONS[mixer.operations[step]](end, plan.level[i, chain, d][None], plan.sign[i, chain, d][None])
            assert torch.equal(found[i, chain], end[0])
    mixed = mixer.mix(x, found, plan.weights, plan.skip)
    expected = [(1 - m) * x[i] + m * sum(w * c for w, c in zip(plan.weights[i], found[i])) for i, m in enumerate(plan.skip)]
    assert torch.allclose(mixed, torch.stack(expected), atol=1e-3)
    assert 0 <= float(mixed.min()) and float(mixed.max()) <= 255.001  # convex


def test_a_replacement_comes_first_and_only_where_it_is_drawn():
    mixer, x = Mixer(operations=(*OPERATIONS, "style")), to_float(smooth_pictures(40, 8))
    plan, other, asked = mixer.draw(image_keys("style", torch.arange(40))), 255 - x, []

    def replacement(positions):
        asked.extend(positions.tolist())
        return other[positions]

    found = mixer.chains(x, plan, {"style": replacement})
    drawn = (plan.steps == 9).any(2)
    assert asked == drawn.any(1).nonzero().squeeze(1).tolist() and 0 < len(asked) < 40
    without = replace(plan, steps=plan.steps.masked_fill(plan.steps == 9, -1))
    assert torch.equal(found[~drawn], mixer.chains(x, without)[~drawn]) and torch.equal(found[drawn], mixer.chains(other, without)[drawn])


# --- consistency


def test_divergence(quiet_stream):
    generator = torch.Generator().manual_seed(0)
    one, two, three = 3 * torch.randn(3, 50, 7, generator=generator)
    assert float(jensen_shannon((one, one, one))) == pytest.approx(0, abs=1e-6)
    value = float(jensen_shannon((one, two, three)))
    p = [x.double().softmax(1) for x in (one, two, three)]
    entropy = lambda q: float(-(q * q.log()).sum(1).mean())
    assert value == pytest.approx(entropy(sum(p) / 3) - sum(map(entropy, p)) / 3, abs=1e-5)
    assert value == pytest.approx(float(jensen_shannon((three, one, two))), abs=1e-6) and 0 < value < math.log(3)
    certain = 1000 * torch.eye(7)[:3, None]
    assert float(jensen_shannon(tuple(certain))) == pytest.approx(math.log(3), abs=1e-5)


def test_consistency_is_cross_entropy_of_the_clean_third_and_the_divergence():
    logits, labels = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4, 2, 2])
    recipe = Consistency(epochs=1, jsd=12.0)
    expected = nn.functional.cross_entropy(logits[:4], labels) + 12 * jensen_shannon(logits.split(4))
    assert torch.allclose(recipe.loss(logits, labels), expected)
    assert torch.equal(replace(recipe, jsd=0.0).loss(logits, labels), nn.functional.cross_entropy(logits[:4], labels))


def test_mixes_that_do_not_mix_are_plain_training(little):
    "Three copies of a batch have the statistics of one, agree, and cost three times as much."
    method = JustAugMix(epochs=1, precision="fp32")
    tripled = method.tune(little, Mixer(), lambda x, positions, epoch: [x, x])
    network, images = little.network(), Images(little)
    method.train(little, network, images, lambda p, epoch: little.data.transform(images.batch(p, epoch)), method.recipe(little, 3))
    for (name, a), b in zip(tripled.state_dict().items(), network.state_dict().values()):
        if "running_var" not in name:  # its unbiased estimate knows the number of images
            assert torch.allclose(a, b, atol=1e-4), name


def test_cost_of_consistency(little):
    before = little.meter.forwards
    JustAugMix(epochs=2).tune(little, Mixer())
    validated = 3 * (len(little.data.val) + len(little.data.val_failures))
    rows = little.meter.backwards
    assert little.meter.forwards - before == rows + validated and rows % 3 == 0 and rows > 0


def test_the_same_mixes_whatever_the_batch():
    x, keys = to_float(smooth_pictures(9)), image_keys("augmix 0 1", torch.arange(9))
    both = augmix(Mixer(), x, keys)
    assert not torch.equal(*both)
    for i in range(9):
        for one, many in zip(augmix(Mixer(), x[i:i + 1], keys[i:i + 1]), both):
            assert torch.allclose(one[0], many[i], atol=1e-3)


# --- settings


def test_budgets(little):
    plain, same_cost = JustAugMix(epochs=9), JustAugMix(epochs=9, budget="cost")
    assert [plain.recipe(little, c).epochs for c in (3, 9, 17)] == [9, 9, 9]
    assert [same_cost.recipe(little, c).epochs for c in (3, 9, 13, 17, 100)] == [9, 3, 2, 1, 1]
    assert JustAugMix(epochs=0, budget="cost").recipe(little, 9).epochs == 0
    paper = JustAugMix(preset="paper", seed=4).recipe(little, 9)
    assert (paper.lr, paper.batch_size, paper.weight_decay, paper.patience) == (0.1, 128, 5e-4, 10)
    assert (paper.failure_ratio, paper.seed) == (None, 4)
    assert AUGMENTATION_RECIPES["default"].imitation == 0
    own = Recipe(epochs=77, lr=0.3)
    assert JustAugMix(preset=own, epochs=2).recipe(little, 9) == replace(own, epochs=2)


def test_no_epochs_leave_the_network(little):
    tuned = JustAugMix(epochs=0).tune(little, Mixer())
    assert all(torch.equal(v, little.original.state_dict()[k]) for k, v in tuned.state_dict().items())


@pytest.mark.parametrize(("settings", "message"), [
    ({"preset": "papr"}, "unknown preset 'papr': did you mean 'paper'"), ({"keep": "first"}, "unknown keep 'first'"),
    ({"budget": "time"}, "unknown budget 'time'"), ({"epochs": -1}, "epochs is -1"), ({"failure_views": 0}, "failure_views is 0"),
    ({"width": 0}, "width is 0"), ({"depth": 0}, "depth is 0"), ({"severity": 11.0}, "severity is 11.0"),
    ({"severity": 0.0}, "severity is 0.0"),
    ({"jsd": -1.0}, "jsd is -1.0"), ({"views": 0}, "views is 0"), ({"width": 2.5}, "width is 2.5; expected a whole number")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        JustAugMix(**settings)


def test_last_keeps_the_last_and_best_what_validates_best(little, worsening):
    best, last = (JustAugMix(epochs=1, keep=keep).tune(little, Mixer()) for keep in ("best", "last"))
    same = lambda network: all(torch.equal(v, little.original.state_dict()[k]) for k, v in network.state_dict().items())
    assert same(best) and not same(last)
