"""What a repair may see and what it is judged on never overlap, in any version of the test set."""
import pytest
import torch

from archrepair.core.errors import ArchrepairError, NoFailures
from archrepair.data.datasets import load_dataset
from archrepair.data.images import ImageSet, Normalize
from archrepair.data.scenario import RepairData, build_scenario


def images(n: int, classes: int = 5, name: str = "images", seed: int = 0) -> ImageSet:
    draw = torch.Generator().manual_seed(seed)
    return ImageSet(torch.randint(0, 256, (n, 8, 8, 3), generator=draw, dtype=torch.uint8), torch.randint(0, classes, (n,), generator=draw),
                    tuple(map(str, range(classes))), name)


def answers(n: int, wrong: float = 0.2, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) >= wrong


TRAIN, TEST = images(200, name="train"), images(301, name="test", seed=1)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_repair_never_sees_a_held_out_image(protocol, seed):
    correct = answers(len(TEST), 0.3, seed)
    made = build_scenario(TRAIN, TEST, correct, protocol=protocol, n_failures=20, seed=seed)
    used, held = set(made.used.tolist()), set(made.held_out.tolist())
    seen = {*made.data.failures.index.tolist(), *made.data.val_failures.index.tolist()}
    assert seen == used and not used & held and len(used) == 20
    assert not correct[made.used].any()
    assert not set(made.data.failures.index.tolist()) & set(made.data.val_failures.index.tolist())
    assert not set(made.data.train.index.tolist()) & set(made.data.val.index.tolist())
    assert len(made.data.train) + len(made.data.val) == len(TRAIN) and made.data.train.name == made.data.val.name == "train"
    assert torch.equal(made.data.failures.images, TEST.images[made.data.failures.index])
    if protocol == "clean":
        assert len(held) == 150 and not correct[made.held_out].all()  # held-out images are not chosen by whether they are right
    else:
        assert held | used == set(range(len(TEST)))


def test_the_halves_do_not_depend_on_the_network():
    "Failures of one version of the test set are thereby excluded from all versions."
    one, two = (build_scenario(TRAIN, TEST, answers(len(TEST), w, s), seed=3) for w, s in ((0.1, 0), (0.9, 1)))
    assert torch.equal(one.held_out, two.held_out) and not torch.isin(one.used, two.held_out).any()
    assert not torch.equal(one.held_out, build_scenario(TRAIN, TEST, answers(len(TEST)), seed=4).held_out)


def test_indices_of_a_corrupted_version_are_those_of_the_clean_one(digits, digits_test):
    noisy = load_dataset("digits:gaussian_noise:3", "test")
    made = build_scenario(digits, noisy, answers(len(noisy)), clean=digits_test)
    assert made.clean is digits_test and torch.equal(made.clean.labels[made.used], made.test.labels[made.used])
    assert not torch.isin(made.data.failures.index, made.held_out).any()
    assert torch.equal(made.data.failures.images, noisy.images[made.data.failures.index])


def test_the_failure_rate_is_that_of_the_pool():
    correct = answers(len(TEST), 0.3)
    paper = build_scenario(TRAIN, TEST, correct, protocol="paper", n_failures=10)
    assert paper.data.failure_rate == int((~correct).sum()) / 301
    clean = build_scenario(TRAIN, TEST, correct, n_failures=10)
    pool = torch.ones(len(TEST), dtype=torch.bool)
    pool[clean.held_out] = False
    assert clean.data.failure_rate == int((~correct)[pool].sum()) / 151


def test_same_seed_same_scenario_and_no_more_failures_than_there_are():
    correct = answers(len(TEST))
    a, b = (build_scenario(TRAIN, TEST, correct, seed=5, n_train=77) for _ in range(2))
    assert torch.equal(a.used, b.used) and torch.equal(a.data.train.index, b.data.train.index) and len(a.data.train) == 77
    assert len(a.used) == int((~correct).sum()) - int((~correct[a.held_out]).sum())


def test_fewer_failures_are_drawn_at_random_and_not_from_the_front():
    drawn = build_scenario(TRAIN, TEST, torch.zeros(len(TEST), dtype=torch.bool), protocol="paper", n_failures=40).used
    assert drawn.float().mean() == pytest.approx(150, abs=45) and drawn.tolist() == sorted(drawn.tolist())


@pytest.mark.parametrize("n", [1, 50, 179, 180, 999, None])
def test_subset_takes_exactly_as_many_training_images_and_only_those(n):
    data = RepairData.of(TEST.select(torch.arange(30)), TRAIN)
    part = data.subset(n)
    assert len(part.train) == min(n or 999, len(data.train)) and part.val is data.val and part.failures is data.failures
    assert set(part.train.index.tolist()) <= set(data.train.index.tolist()) and part.failure_rate == data.failure_rate


def test_validation_that_is_given_is_kept():
    val = images(10, seed=9)
    data = RepairData.of(TEST.select(torch.arange(30)), TRAIN, val=val, transform=abs)
    assert data.val is val and data.train is TRAIN and data.transform is abs and len(data.val_failures) == 3


def test_the_default_transform_is_that_of_the_training_images():
    data = RepairData.of(TEST.select(torch.arange(30)), TRAIN)
    assert data.transform == Normalize.of(TRAIN)  # of all of them: what is set aside for validation does not change it
    assert data.subset(10).transform == data.transform


def test_no_failures():
    for protocol in ("clean", "paper"):
        with pytest.raises(NoFailures, match="no failures to repair"):
            build_scenario(TRAIN, TEST, torch.ones(len(TEST), dtype=torch.bool), protocol=protocol)


@pytest.mark.parametrize("correct", [
    torch.ones(300, dtype=torch.bool), torch.ones(302, dtype=torch.bool), torch.zeros(301, dtype=torch.int64),
    torch.zeros(301, 1, dtype=torch.bool),
], ids=["short", "long", "numbers", "2-d"])
def test_answers_that_do_not_fit_the_test_set(correct):
    with pytest.raises(ArchrepairError, match="expected one bool per image"):
        build_scenario(TRAIN, TEST, correct)


def test_versions_of_other_lengths_unknown_protocols_and_bad_rates():
    with pytest.raises(ArchrepairError, match="as many of both"):
        build_scenario(TRAIN, TEST, answers(301), clean=TRAIN)
    with pytest.raises(ArchrepairError, match="unknown protocol 'cleen': did you mean 'clean'"):
        build_scenario(TRAIN, TEST, answers(301), protocol="cleen")
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArchrepairError, match="failure_rate"):
            RepairData.of(TEST, TRAIN, failure_rate=rate)


def test_sets_that_do_not_fit_together():
    other = images(20, classes=4)
    assert RepairData.of(other, TRAIN).failures.classes == TRAIN.classes  # its names are among ours
    with pytest.raises(ArchrepairError, match="test has images of 4, not among the classes"):
        RepairData.of(TEST, other, val=images(20, 5, "train"))
    with pytest.raises(ArchrepairError, match="images has images of 8×6 px but train of 8 px; expected one size"):
        RepairData.of(ImageSet(other.images[:, :, :6], other.labels, other.classes), TRAIN)


def test_nothing_to_train_or_validate_on():
    with pytest.raises(ArchrepairError, match="no images to validate on"):
        RepairData.of(TEST, TRAIN.select(torch.arange(5)))
    with pytest.raises(ArchrepairError, match="no images to train on"):
        RepairData.of(TEST, TRAIN.select(torch.arange(0)), val=TRAIN, transform=abs)
