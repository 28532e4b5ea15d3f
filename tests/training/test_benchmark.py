"""The benchmark is what it was when it was frozen, on any copy of the data; and scores follow from predictions."""
import hashlib
import shutil
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import ROOT, freeze

from archrepair.core.errors import ArchrepairError
from archrepair.data.images import ImageSet
from archrepair.training.benchmark import METRICS, RULES, digest_of, in_order, read_benchmark, score, version_in_order

FILES = ("bench-v1.toml", "bench-v1.npz", "bench-v1-digits.safetensors")
FROZEN = "75fb0d0be304"  # the first digits of the SHA-256 of data/bench-v1.toml, which has the digests of everything else


@pytest.fixture(scope="module")
def benchmark():
    return read_benchmark(ROOT / "data")


@pytest.fixture
def digits(benchmark):
    return benchmark.tracks["digits"]


def test_the_file_is_the_one_that_was_frozen(benchmark):
    content = (ROOT / "data" / "bench-v1.toml").read_bytes()
    assert benchmark.digest == hashlib.sha256(content).hexdigest() and benchmark.digest.startswith(FROZEN)
    assert benchmark.name == "archrepair-bench v1" and set(benchmark.tracks) == {"digits", "cifar10"}


def check_frozen_again(name, tmp_path):
    "Freeze a track anew from the data and the network, and compare every part."
    for file in FILES[2:]:
        shutil.copy(ROOT / "data" / file, tmp_path)
    freeze.freeze(tmp_path, {name: freeze.TRACKS[name]})
    now = tomllib.loads((tmp_path / "bench-v1.toml").read_text(encoding="utf-8"))
    then = tomllib.loads((ROOT / "data" / "bench-v1.toml").read_text(encoding="utf-8"))
    assert now["protocol"] == then["protocol"] and now["track"][name] == then["track"][name]


@pytest.mark.filterwarnings("ignore::archrepair.core.errors.Notice")
def test_the_small_track_comes_out_the_same_from_its_sources(tmp_path):
    check_frozen_again("digits", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::archrepair.core.errors.Notice")
def test_the_large_track_comes_out_the_same_from_its_sources(tmp_path):
    check_frozen_again("cifar10", tmp_path)


def test_what_a_method_sees_and_what_judges_it_have_no_image_in_common(benchmark):
    for track in benchmark.tracks.values():
        for version, seed in track.runs:
            held_out = set(track.positions(f"held out {seed}").tolist())
            failures = set(track.positions(f"failures {version} {seed}").tolist())
            kept = set(track.positions(f"validation failures {version} {seed}").tolist())
            assert failures and kept and not failures & kept and not held_out & (failures | kept)
            train, val = (set(track.positions(f"{part} images {seed}").tolist()) for part in ("training", "validation"))
            assert train and val and not train & val
            assert 0 < track.failure_rate[f"{version} {seed}"] < 1 and version in track.judged


def test_the_order_is_that_of_the_pixels_and_noise_belongs_to_the_image(digits):
    images = digits.images("test")
    mixed = images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(0)))
    again = in_order(ImageSet(mixed.images, mixed.labels, mixed.classes, images.name))
    assert digest_of(again) == digest_of(images) != digest_of(mixed)
    few = torch.tensor([5, 200, 411])
    whole, part = version_in_order(again, "frost:3"), version_in_order(images.select(few), "frost:3")
    assert torch.equal(whole.select(few).images, part.images) and not torch.equal(part.images, images.select(few).images)


def test_a_problem_has_the_frozen_images(digits):
    train, test = digits.images("train"), digits.images("test")
    data = digits.data("fog:3", 1, train, test, lambda batch: batch)
    assert data.failures.index.tolist() == digits.positions("failures fog:3 1").tolist() and len(data.failures) == 89
    assert torch.equal(data.val.images, train.select(digits.positions("validation images 1")).images)


@pytest.mark.parametrize(("file", "change", "message"), [
    ("bench-v1.toml", lambda path: path.write_text(path.read_text().replace('"labels" = "', '"labels" = "0')), "labels of track digits"),
    ("bench-v1.toml", lambda path: path.write_text(path.read_text().replace("tier =", "tear =")), "cannot read the benchmark"),
    ("bench-v1.toml", lambda path: path.unlink(), "run in one"), ("bench-v1.npz", lambda path: path.write_bytes(b"PK"), "cannot read"),
])
def test_a_benchmark_that_was_changed_is_one_line(tmp_path, file, change, message):
    for name in FILES:
        shutil.copy(ROOT / "data" / name, tmp_path)
    change(tmp_path / file)
    with pytest.raises(ArchrepairError, match=message):
        read_benchmark(tmp_path)


def test_other_images_are_refused(digits, monkeypatch):
    import archrepair.training.benchmark as module

    load = module.load_dataset
    monkeypatch.setattr(module, "load_dataset", lambda *where: load(*where).select(torch.arange(500)))
    with pytest.raises(ArchrepairError, match="test images of track digits are not those"):
        digits.images("test")


@pytest.fixture
def answers(digits):
    "The original is wrong on every second image, the returned network nowhere, the method's own nowhere but on clean images."
    labels = digits.lists["labels"][digits.positions("held out 0").numpy()]
    wrong = np.where(np.arange(len(labels)) % 2, labels, (labels + 1) % 10).astype(np.uint8)
    say = lambda network, version: wrong if network == "original" or (network, version) == ("own", "clean") else labels
    return {f"{network}/{version}": say(network, version) for network in ("original", "returned", "own") for version in digits.judged}


def test_scores_follow_from_predictions(digits, answers):
    scores = score(digits, "fog:3", 0, answers)
    assert set(scores) == {"validation", "paper"} < set(RULES) and set(scores["paper"]) < set(METRICS)
    assert scores["validation"] == {"accuracy": 100.0, "change": 50.0, "clean accuracy": 100.0, "clean change": 50.0,
                                    "elsewhere change": 50.0, "failures fixed": 100.0, "negative flips": 0.0}
    assert scores["paper"] == scores["validation"] | {"clean accuracy": 50.0, "clean change": 0.0}
    answers["returned/fog:3"] = np.where(np.arange(298) < 1, answers["original/fog:3"], answers["returned/fog:3"])
    assert score(digits, "fog:3", 0, answers)["validation"]["failures fixed"] == pytest.approx(100 * 148 / 149, abs=1e-3)


@pytest.mark.parametrize("change", [lambda a: a.pop("own/clean"), lambda a: a.update({"own/clean": a["own/clean"][:7]})])
def test_predictions_that_are_not_whole_are_one_line(digits, answers, change):
    change(answers)
    with pytest.raises(ArchrepairError, match="no own/clean of 298 images"):
        score(digits, "fog:3", 0, answers)


def test_a_part_of_another_digest_is_refused(digits):
    with pytest.raises(ArchrepairError, match="weights of track digits are not those of the benchmark"):
        replace(digits, sha256={**digits.sha256, "weights": "0" * 64}).check("weights", digits.sha256["weights"])
