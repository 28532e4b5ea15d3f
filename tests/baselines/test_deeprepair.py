"""DeepRepair: stylizers, references from clusters of failures, and AugMix with a style in its list."""
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archrepair.baselines import deeprepair
from archrepair.baselines.deeprepair import DeepRepair, references
from archrepair.baselines.parts.augmented import to_float, to_uint8
from archrepair.baselines.parts.augmix import OPERATIONS, Mixer, Mixing
from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.wavelets import haar_wct
from archrepair.data.images import ImageSet
from archrepair.data.scenario import RepairData
from archrepair.training.fit import Recipe
from support.states import same_state
from support.textures import textured_pictures

SIZES = (8, 32, 64, 224)


def negative(content, style):
    "A stylizer of the user's own."
    return 255 - content


# --- references


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.integers(1, 5), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_one_reference_of_every_cluster(sizes, clusters, seed):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    images = torch.randint(0, 256, (len(labels), 8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if not len(labels):
        return
    chosen = references(ImageSet(images, labels, ("a", "b", "c")), clusters, seed=seed)
    assert torch.bincount(labels[chosen], minlength=3).tolist() == [min(clusters, size) for size in sizes]
    assert len(chosen.unique()) == len(chosen)
    assert torch.equal(chosen, references(ImageSet(images, labels, ("a", "b", "c")), clusters, seed=seed))


def test_references_come_from_different_groups():
    "Three kinds of failures, far apart, in each class: one of each kind."
    generator = torch.Generator().manual_seed(0)
    kind = torch.randperm(60, generator=generator) % 3
    pixels = (kind * 100)[:, None, None, None] + torch.randint(0, 20, (60, 8, 8, 3), generator=generator)
    failures = ImageSet(pixels.to(torch.uint8), torch.arange(60) % 2, ("a", "b"))
    chosen = references(failures, 3, seed=1)
    assert sorted(zip(failures.labels[chosen].tolist(), kind[chosen].tolist())) == [(c, k) for c in (0, 1) for k in (0, 1, 2)]


def test_equal_failures_are_one_cluster_and_few_are_drawn_of_a_class(recwarn):
    images = torch.full((30, 8, 8, 3), 9, dtype=torch.uint8)
    images[20:] = torch.randint(0, 256, (10, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    failures = ImageSet(images, torch.tensor([0] * 20 + [1] * 10), ("a", "b"))
    chosen = references(failures, 5)
    assert torch.bincount(failures.labels[chosen]).tolist() == [1, 5] and not recwarn.list
    assert len(references(failures, 5, per_class=2)) == 1 + 2


# --- the repair


def test_the_list_of_operations_holds_the_style(little, monkeypatch):
    assert DeepRepair().mixer().operations == (*OPERATIONS, "style") and DeepRepair(stylizer="none").mixer() == Mixer()
    painted = []
    monkeypatch.setattr(deeprepair, "restyle", lambda content, style, *rest: painted.append((content, style, *rest)) or content)
    result = DeepRepair(epochs=1, alpha=0.25).repair(little.original, little.data)
    styles = {tuple(image.flatten().tolist()) for image in to_float(little.data.failures.images[references(little.data.failures)])}
    assert painted and all(tuple(s.flatten().tolist()) in styles for _, style, *_ in painted for s in style)
    assert painted[0][2:] == (haar_wct, 0.25) and sum(result.config["styles"]) == len(styles)
    share = sum(len(c) for c, *_ in painted) / (result.cost.backwards / 3 * 2)
    assert 0.35 < share < 0.6  # three chains of one to three operations out of ten: 0.47


def test_without_styles_it_is_augmix(little):
    class JustAugMix(Mixing):
        def run_method(self, problem):
            return self.tune(problem, Mixer())

    settings = {"epochs": 1, "keep": "last", "seed": 2}
    plain, none, styled = (m.repair(little.original, little.data).candidates["repaired"]
                           for m in (JustAugMix(**settings), DeepRepair(stylizer="none", **settings), DeepRepair(**settings)))
    assert same_state(plain, none) and not same_state(plain, styled)


@pytest.mark.parametrize("stylizer", ["fourier", "moments", f"{__name__}:negative", negative])
def test_other_stylizers(little, stylizer):
    method = DeepRepair(epochs=1, stylizer=stylizer, keep="last")
    result = method.repair(little.original, little.data)
    assert not same_state(result.candidates["repaired"], little.original)
    assert json.loads(json.dumps(result.to_dict()))["config"]["stylizer"] == (f"{__name__}:negative" if callable(stylizer) else stylizer)
    again = dataclasses.replace(method).repair(little.original, little.data)
    assert same_state(again.candidates["repaired"], result.candidates["repaired"])


def test_painting_is_free_of_charge_and_leaves_failures_as_they_are(little):
    before = little.data.failures.images.clone()
    result = DeepRepair(epochs=1).repair(little.original, little.data)
    rows = result.cost.backwards
    assert result.cost.forwards == rows + 4 * (len(little.data.val) + len(little.data.val_failures))
    assert torch.equal(before, little.data.failures.images)


def test_one_failure_is_a_style(little):
    data = little.data
    one = RepairData(data.failures.select(torch.tensor([3])), data.train, data.val, data.transform, data.val_failures)
    assert sum(DeepRepair(epochs=1).repair(little.original, one).config["styles"]) == 1


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size):
    "A network of one layer, images of any size."
    generator = torch.Generator().manual_seed(0)
    images = lambda n: ImageSet(to_uint8(textured_pictures(n, size, n)), torch.arange(n) % 2, ("a", "b"))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    data = RepairData.of(images(4), images(8), val=images(4))
    result = DeepRepair(epochs=1, keep="last", preset=Recipe(epochs=1, batch_size=6)).repair(network, data)
    assert not same_state(result.candidates["repaired"], network)


@pytest.mark.parametrize(("settings", "message"), [
    ({"clusters": 0}, "clusters is 0"), ({"per_class": 0}, "per_class is 0"), ({"alpha": 2.0}, "alpha is 2.0"),
    ({"alpha": -1.0}, "alpha is -1.0"),
    ({"stylizer": "wct2"}, "unknown stylizer 'wct2'"), ({"stylizer": "no.such:thing"}, "cannot be called")])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ArchrepairError, match=message):
        DeepRepair(**settings)
