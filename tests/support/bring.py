"""What people bring, kind by kind: a row of a table says what happens, and the test that it stands above shows that it does.

The tables are the columns of the guide page "What you can bring": `docs/pages.py` reads them.
"""
from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from archrepair import ArchrepairError, ArchRepair, ImageSet, RepairData, load_dataset
from archrepair.repair.result import RepairResult
from support import ROOT

ORDER = ("folders", "lists", "arrays", "weights", "networks", "settings")  # tests/journeys/test_bring_<name>.py, as the guide shows them


@dataclass(frozen=True)
class Row:
    "What a person brings, and what happens: does it work, or is it answered in one line?"

    brings: str
    works: bool
    happens: str


class Kind:
    "A table of what people bring: `title` and `door` (where it comes in, for the reader of the guide), and rows."

    def __init__(self, title: str, door: str):
        self.title, self.door, self.rows = title, door, list[Row]()

    def works(self, brings: str, happens: str) -> Callable[[Callable], Callable]:
        "Enter a row above the test that brings it and looks at the right result."
        return self._enter(Row(brings, True, happens))

    def one_line(self, brings: str, happens: str) -> Callable[[Callable], Callable]:
        "Enter a row above the test that brings it and reads the line."
        return self._enter(Row(brings, False, happens))

    def _enter(self, row: Row) -> Callable[[Callable], Callable]:
        self.rows.append(row)
        return lambda test: test

    def each(self, names: str, rows: dict[str, tuple], works: bool = True) -> pytest.MarkDecorator:
        "Enter rows above a test that they give values for its arguments `names`: {what a person brings: (what happens, *values)}."
        self.rows += [Row(brings, works, happens) for brings, (happens, *_) in rows.items()]
        values = [row[1:] if len(row) > 2 else row[1] for row in rows.values()]
        return pytest.mark.parametrize(names, values, ids=list(rows))


def kinds() -> list[Kind]:
    "All tables, in the order of the guide."
    found = []
    for name in ORDER:
        spec = importlib.util.spec_from_file_location(f"bring_{name}", ROOT / "tests" / "journeys" / f"test_bring_{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [value for value in vars(module).values() if isinstance(value, Kind)]
    return found


@contextmanager
def one_line(pattern: str) -> Iterator[None]:
    "Inside, an `ArchrepairError` of one line is raised that the pattern is found in."
    with pytest.raises(ArchrepairError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and re.search(pattern, message), message


# --- small data and a small network


@functools.cache
def _digits(split: str) -> ImageSet:
    return load_dataset("digits" if split == "train" else "digits:fog:3", split)


def ordinary(n: int = 200) -> ImageSet:
    "Digits to train on."
    return _digits("train").select(torch.arange(n))


def foggy(n: int = 60) -> ImageSet:
    "Digits in fog, which take the part of failures."
    return _digits("test").select(torch.arange(n))


PHOTOS = {"cat": 0, "dog": 1, "owl": 7}  # the digits that take the part of animals


def photos(root: Path, train: int = 24, test: int = 8, size: int = 32, suffix: str = "png") -> Path:
    "Write pictures to `root`/train/<class>/ and `root`/test/<class>/, so many for each of `PHOTOS`, and return `root`."
    for split, count in (("train", train), ("test", test)):
        images = load_dataset("digits", split)
        for name, digit in PHOTOS.items():
            (root / split / name).mkdir(parents=True)
            for i in (images.labels == digit).nonzero()[:count, 0].tolist():
                picture(images.images[i], size).save(root / split / name / f"{i:04}.{suffix}")
    return root


def picture(pixels: Tensor, size: int = 32) -> Image.Image:
    return Image.fromarray(pixels.numpy()).resize((size, size))


class Net(nn.Module):
    "Three blocks and a classifier, with weights of a seed; subclasses return `out` in place of the logits."

    def __init__(self, classes: int = 10, channels: int = 3, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        unit = lambda a, b, stride: (nn.Conv2d(a, b, 3, stride, 1, bias=False), norm(b), nn.ReLU())
        block = lambda a, b: nn.Sequential(*unit(a, b, 2), *unit(b, b, 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block1, self.block2, self.block3 = block(channels, 8), block(8, 16), block(16, 16)
            self.classifier, self.auxiliary = nn.Linear(16, classes), nn.Linear(16, classes)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        features = self.block3(self.block2(self.block1(x))).mean((2, 3))
        return self.out(self.classifier(features), features)

    def out(self, logits: Tensor, features: Tensor) -> Any:
        return logits


def repair(model: nn.Module, data: RepairData | None = None, **settings: Any) -> RepairResult:
    "The shortest repair that searches and fine-tunes."
    method = ArchRepair(**{"strategy": "pc-darts", "search_epochs": 1, "finetune_epochs": 1, **settings})
    return method.repair(model, data or RepairData.of(foggy(), ordinary()))


def assert_same_outcome(result: RepairResult, expected: RepairResult) -> None:
    "The same block was repaired, and the repaired candidates have the same weights, under the same names."
    one, two = (repaired.candidates["repaired"].state_dict() for repaired in (result, expected))
    tensors = [name for name, value in one.items() if isinstance(value, Tensor)]
    assert result.block == expected.block and tensors == list(two)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in tensors)
