"""The diagnosis of failures: what they have in common, in how many patterns, how well a gate sees them, and what follows."""
import ast
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from archrepair.core.errors import ArchrepairError
from archrepair.corruptions.catalogue import corrupt
from archrepair.data.datasets import load_dataset
from archrepair.data.images import concatenate
from archrepair.data.scenario import build_scenario
from archrepair.experiments.diagnosis import Reader, Subject, diagnose, looks_like
from archrepair.networks.weights import tensors_of
from archrepair.training.evaluation import is_correct, predict
from support import ROOT
from support.published import published_resnet



@pytest.fixture(scope="module")
def train():
    return load_dataset("digits", "train")


@pytest.fixture(scope="module")
def noisy():
    return load_dataset("digits:gaussian_noise:4", "test").select(torch.arange(120))


@pytest.fixture(scope="module")
def clean():
    return load_dataset("digits", "test").select(torch.arange(120, 300))


def test_one_pattern(problem, noisy, train):
    before = {name: tensor.clone() for name, tensor in tensors_of(problem.network).items()}
    found = diagnose(problem.network, (noisy, train), transform=problem.transform)
    assert [len(part.positions) for part in found.parts] == [120] and not len(found.rest) and found.network
    assert found.whole is found.parts[0] and found.whole.sight.low > 0.95
    assert found.verdict.startswith("one pattern in 120 of 120 failures: noise, standard deviation 0.0")
    assert found.advice("archrepair repair") == ["repair: archrepair repair"]
    assert [row[1] for row in found.emulators()] == ["spectral, used", "blur"]
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(problem.network).items())


def test_a_repair_set_is_read_as_a_repair_reads_it(problem, train):
    clean, test = load_dataset("digits", "test"), load_dataset("digits:contrast:3", "test")
    correct = is_correct(predict(problem.network, test, problem.transform), test.labels)
    data = build_scenario(train, test, correct, clean=clean, n_failures=100, transform=problem.transform).data
    found = diagnose(problem.network, data)
    assert found.failures == len(data.failures) and "contrast" in found.verdict


def test_no_pattern(problem, clean, train):
    found = diagnose(problem.network, (clean, train), transform=problem.transform)
    assert not found.parts and len(found.rest) == found.failures == 180
    assert found.verdict.startswith("no common pattern: a gate tells") and found.advice()[0].startswith("label more images like these")


def test_mixed_failures(problem, noisy, clean, train):
    found = diagnose(problem.network, (concatenate(noisy, clean), train), transform=problem.transform)
    assert len(found.parts) == 1 and found.verdict.endswith("failures have nothing in common")
    assert (found.parts[0].positions < 120).double().mean() > 0.9 and (found.rest >= 120).double().mean() > 0.9
    assert len(found.advice()) == 2 and "nothing in common" in found.advice()[1]
    record = json.loads(json.dumps(found.to_dict()))
    assert record["patterns"][0]["failures"] == len(found.parts[0].positions) and record["rest"] == found.rest.tolist()
    assert record["patterns"][0]["gate"]["value"] > 0.9 and record["patterns"][0]["emulators"]["spectral"]["clean"]["value"] > 0.9


def test_images_alone_and_few_of_them(noisy, train):
    found = diagnose(None, (noisy.batch(torch.arange(60)), train))
    assert not found.network and len(found.parts) == 1 and found.whole.describe().startswith("noise")
    few = diagnose(None, (noisy.select(torch.arange(9)), train))
    assert few.verdict.startswith("too few failures") and not few.parts and few.advice()[0].startswith("collect at least 10")
    assert few.to_dict()["gate"] is None


def test_the_reader_reads_what_a_gate_reads(problem, clean):
    with_network, alone = Reader(problem.network, problem.transform)(clean), Reader()(clean)
    assert alone.shape == (180, 29) and len(with_network) == 180 and with_network.shape[1] > 29 and with_network.isfinite().all()


def test_folders_and_mistakes(noisy, train, tmp_path):
    for name, images in (("failing", noisy), ("ordinary", train)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i, pixels in enumerate(images.batch(torch.arange(60)).numpy()):
            Image.fromarray(pixels).save(tmp_path / name / "deeper" / f"{i}.png")
    subject = Subject.of(failures=tmp_path / "failing", ordinary=tmp_path / "ordinary")
    assert len(subject.failures) == len(subject.ordinary) == 60 and subject.network is None
    assert diagnose(None, subject.data).whole.describe().startswith("noise")
    assert Subject.of(failures=tmp_path / "failing", dataset="digits", tier="smoke").ordinary.name.startswith("digits")
    with pytest.raises(ArchrepairError, match="there are no images in"):
        Subject.of(failures=tmp_path / "none", ordinary=tmp_path / "ordinary")
    with pytest.raises(ArchrepairError, match="given without failures"):
        Subject.of(ordinary=tmp_path / "ordinary")
    with pytest.raises(ArchrepairError, match="expected one size"):
        diagnose(None, (torch.zeros(20, 16, 16, 3, dtype=torch.uint8), train))
    with pytest.raises(ArchrepairError, match="data has 3 parts"):
        diagnose(None, (noisy, train, train))


def test_a_corruption_is_recognized_by_eye(train, noisy):
    first = looks_like(noisy, train, images=32)[0]
    assert (first.corruption, first.severity) == ("gaussian_noise", 4)
    assert looks_like(load_dataset("digits", "test"), train, images=32)[0].corruption == "none"


@pytest.mark.parametrize("package", ["nas", "data", "networks", "training", "repair"])
def test_no_repair_looks_at_the_catalogue(package):
    "Neither `looks_like` nor the list of corruptions may be known to what repairs: in a benchmark it would be the answer."
    judge = ROOT / "archrepair" / "training" / "benchmark.py"  # makes the images that judge, and no repair may know it either
    for path in {*(ROOT / "archrepair" / package).glob("*.py")} - {judge}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").endswith("benchmark")), path
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            used = {getattr(node, "id", ""), getattr(node, "attr", "")} | names
            assert "looks_like" not in used, path
            assert package == "data" or not {"CORRUPTIONS", "corrupt"} & names, path
    for name in ("pattern", "mixture", "emulators"):
        text = (ROOT / "archrepair" / "data" / f"{name}.py").read_text(encoding="utf-8")
        assert "catalogue" not in text and "CORRUPTIONS" not in text


@pytest.fixture(scope="module")
def public():
    "The published ResNet-20, CIFAR-10's training images and 2,000 of its test images."
    return published_resnet(2000)


@pytest.mark.parametrize(("kind", "words"), [("gaussian_noise", "noise, standard deviation 0.0"), ("contrast", "contrast 4"),
                                             ("motion_blur", "blur along a line, another one in each image, fine detail lost"),
                                             ("defocus_blur", "blur, fine detail lost"),
                                             ("", "no common pattern")])
def test_failures_of_a_public_network_are_named(public, kind, words):
    network, transform, train, test = public
    pixels = test.batch(torch.arange(len(test)))
    damaged = replace(test, images=corrupt(pixels, kind, 3, dataset="cifar10/test") if kind else pixels)
    wrong = ~is_correct(predict(network, damaged, transform), damaged.labels)
    found = diagnose(network, (damaged.select(wrong.nonzero()[:, 0]), train), transform=transform)
    if not kind:
        assert not found.parts and found.verdict.startswith(words)
        return
    assert len(found.parts) == 1 and not len(found.rest) and words in found.whole.describe(), found.verdict
    if kind == "gaussian_noise":
        sigma = float(found.whole.describe().split("deviation ")[1].split(",")[0])
        assert abs(sigma - 0.08) < 0.008
