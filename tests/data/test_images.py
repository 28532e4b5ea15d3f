"""Sets of images: what is accepted, what is refused, how they are joined and divided, and how pixels become inputs."""
import itertools

import numpy as np
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.data.images import STATISTICS, ImageSet, Normalize, concatenate, holdout
from support.pictures import pixels, tiny

# --- ImageSet


def test_a_subset_of_a_subset_still_knows_its_images():
    whole = tiny(10)
    part = whole.select(torch.tensor([7, 2, 9, 4])).select(torch.tensor([3, 0]))
    assert part.index.tolist() == [4, 7] and part.labels.tolist() == [0, 1] and len(part) == 2
    assert torch.equal(part.images, whole.images[[4, 7]]) and torch.equal(part.batch(torch.tensor([1])), whole.images[7:8])
    assert part.classes == whole.classes and part.size == 8


def test_select_may_repeat_and_may_be_empty():
    assert tiny().select(torch.tensor([1, 1])).index.tolist() == [1, 1]
    assert len(tiny().select(torch.arange(0))) == 0


WRONG = {
    "float": {"images": pixels(6).astype(np.float32)}, "gray": {"images": pixels(6)[..., :1]}, "one image": {"images": pixels(6)[0]},
    "channels first": {"images": pixels(6).transpose(0, 3, 1, 2)}, "few images": {"images": pixels(5)},
    "few labels": {"labels": np.zeros(5, int)}, "2-d labels": {"labels": np.zeros((6, 1), int)}, "float labels": {"labels": np.zeros(6)},
    "too large": {"labels": [0, 1, 2, 0, 1, 0]}, "negative": {"labels": [0, -1, 0, 0, 0, 0]}, "no classes": {"classes": ()},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_not_a_set_is_refused_in_one_line(change):
    with pytest.raises(ArchrepairError, match="^tiny: .*expected") as caught:
        tiny(**change)
    assert "\n" not in str(caught.value)


def test_labels_of_any_integer_type_become_int64():
    for kind in (np.uint8, np.uint16, np.int32, np.uint64):
        assert tiny(labels=np.array([0, 1, 0, 1, 0, 1], kind)).labels.dtype == torch.int64


def test_concatenate_keeps_the_order_and_refuses_other_sizes():
    a, b = tiny(3), tiny(2, images=pixels(2, seed=5), labels=[1, 1])
    both = concatenate(a, b)
    assert torch.equal(both.images, torch.cat([a.images, b.images])) and both.labels.tolist() == [0, 1, 0, 1, 1]
    for other, message in ((tiny(2, images=pixels(2, 4)), "cannot be joined"), (tiny(2, classes=("cat", "cow")), "has images of cow")):
        with pytest.raises(ArchrepairError, match=message):
            concatenate(a, other)


# --- classes by name


@pytest.mark.parametrize(("classes", "labels", "expected"), [
    (("cat", "dog"), [0, 1], [0, 1]), (("dog", "cat"), [0, 1], [1, 0]), (("dog",), [0, 0], [1, 1]), (("owl", "dog", "cat"), [2, 1], [0, 1]),
    (("0", "1"), [1, 0], [1, 0]), ((), [], []),
], ids=["same", "other order", "fewer", "one more without images", "numbers", "nothing"])
def test_classes_are_matched_by_name(classes, labels, expected):
    images = ImageSet(pixels(len(labels)), torch.tensor(labels, dtype=torch.int64), classes).aligned(["cat", "dog"])
    assert images.classes == ("cat", "dog") and images.labels.tolist() == expected


@pytest.mark.parametrize(("classes", "labels", "target", "message"), [
    (("cat", "owl"), [0, 1], ("cat", "dog"), r"has images of owl, not among the classes it is matched with \(cat, dog\)"),
    (("0", "1", "2"), [0, 2], ("cat", "dog"), "has images of 0, 2, not among"),
    (("0", "1"), [0, 1], ("1", "2"), "has images of 0, not among"),  # names that are numbers, and not the same
    (("cat", "dog"), [0, 1], ("cat", "dog", "dog"), "two classes are called 'dog'"),
])
def test_classes_that_do_not_match_are_named(classes, labels, target, message):
    with pytest.raises(ArchrepairError, match=message) as caught:
        ImageSet(pixels(len(labels)), labels, classes).aligned(target)
    assert "\n" not in str(caught.value)


def test_joined_sets_are_matched_by_name():
    both = concatenate(tiny(2, labels=[0, 1]), tiny(2, labels=[0, 1], classes=("dog", "cat")))
    assert both.labels.tolist() == [0, 1, 1, 0] and both.classes == ("cat", "dog")
    with pytest.raises(ArchrepairError, match=r"tiny \(8 px\) and tiny \(8×6 px\) cannot be joined"):
        concatenate(tiny(2), tiny(2, images=pixels(2)[:, :, :6]))


# --- holdout


@pytest.mark.parametrize(("fraction", "seed"), [*itertools.product([0.1, 1 / 3, 0.5, 0.55, 0.07, 0.2, 0.999], [0, 7])])
def test_holdout_is_exact_fair_and_deterministic(fraction, seed):
    sizes = [1, 3, 50, 97, 10, 333]
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    rest, part = holdout(labels, fraction, seed)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist()) and part.tolist() == sorted(part.tolist())
    assert len(part) == int(np.floor(len(labels) * fraction + 1e-9))
    taken = labels[part].bincount(minlength=len(sizes))
    assert all(abs(int(t) - n * fraction) <= 1 for t, n in zip(taken, sizes))
    assert torch.equal(part, holdout(labels, fraction, seed)[1])
    assert fraction > 0.99 or not torch.equal(part, holdout(labels, fraction, seed + 1)[1])


@pytest.mark.parametrize(("n", "k"), [(9999, 777), (40000, 777), (45000, 20000), (1080, 333), (50000, 49999), (50000, 1)])
def test_holdout_meets_a_number_of_images_exactly(n, k):
    assert len(holdout(torch.arange(n) % 10, k / n, 0)[1]) == k


def test_holdout_at_the_ends():
    labels = torch.arange(10) % 3
    assert len(holdout(labels, 0.0, 0)[1]) == 0 and len(holdout(labels, 1.0, 0)[1]) == 10
    assert [len(h) for h in holdout(labels[:0], 0.5, 0)] == [0, 0]


def test_holdout_draws_every_image_equally_often():
    labels = torch.arange(20) % 2
    counts = sum(holdout(labels, 0.3, seed)[1].bincount(minlength=20) for seed in range(1000))
    assert counts.min() > 230 and counts.max() < 370  # 300 expected, standard deviation 14


# --- Normalize


@pytest.mark.parametrize("name", [*STATISTICS, None])
def test_normalize_equals_torchvision_on_real_pixels(digits_test, name):
    from torchvision import transforms

    ours = Normalize(*STATISTICS[name]) if name else Normalize.of(digits_test)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(ours.mean, ours.std)])
    batch = digits_test.images[:16].clone()
    x = ours(batch)
    assert torch.equal(x, torch.stack([theirs(image.numpy()) for image in batch])) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last) and torch.equal(batch, digits_test.images[:16])


def test_normalize_takes_floats_in_0_to_1_and_leaves_them_alone(digits_test):
    ours, batch = Normalize.of(digits_test), digits_test.images[:4]
    floats = batch.permute(0, 3, 1, 2).float() / 255
    copy = floats.clone()
    assert torch.equal(ours(floats), ours(batch)) and torch.equal(floats, copy)


def test_normalize_of_an_unknown_set_gives_mean_0_and_deviation_1():
    images = tiny(50, images=pixels(50), labels=np.zeros(50, int))
    x = Normalize.of(images)(images.images)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert Normalize.of(tiny(name="cifar10:fog:3/test")) == Normalize(*STATISTICS["cifar10"])


def test_normalize_of_a_large_sorted_set_sees_all_of_it():
    dark_then_light = np.repeat(np.array([0, 200], np.uint8), 2500)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    mean = Normalize.of(ImageSet(dark_then_light, np.zeros(5000, int), ("a",))).mean
    assert abs(mean[0] - 100 / 255) < 0.01


def test_normalize_of_constant_images_stays_finite():
    black = tiny(images=np.zeros((6, 8, 8, 3), np.uint8))
    assert torch.isfinite(Normalize.of(black)(black.images)).all()
