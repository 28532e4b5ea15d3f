"Settings: every kind of value is taken or refused by its annotation, words are read by YAML 1.2, and calls are checked before they run."
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from archrepair.core.errors import ArchrepairError
from archrepair.core.settings import (
    Count,
    NotNegative,
    OneOf,
    Positive,
    Seed,
    Setting,
    Severity,
    Share,
    UnknownSetting,
    WholeNumber,
    Within,
    check_settings,
    checked,
    fits,
    in_words,
    read_value,
    settings_of,
)

COLORS = Annotated[str, OneOf(("red", "green"), "color")]

# --- kinds

FITTING = [
    (WholeNumber, 0), (Count, 1), (Count | None, None), (float, 3), (NotNegative, 0.0), (Positive, 1e-9), (Share, 1), (Seed, 2**32 - 1),
    (Severity, 5), (bool, False), (str, ""), (COLORS, "red"), (COLORS | None, None), (Literal[1, 2, "fd"], "fd"), (Sequence[str], ["a"]),
    (Sequence[str], ()), (tuple[float, float], [1.0, 2]), (tuple[int, ...], (1, 2, 3)), (Mapping[str, object], {"a": 1}), (Any, [None]),
    (Annotated[float, Within(0, infinite=True)], math.inf), (Annotated[int | None, "a remark", Within(0)], None),
]
REFUSED = [
    (WholeNumber, -1, "a whole number from 0"), (WholeNumber, 2.5, "a whole number from 0"), (WholeNumber, 2.0, "a whole number from 0"),
    (WholeNumber, True, "a whole number from 0"), (WholeNumber, "3", "a whole number from 0"), (WholeNumber, [3], "a whole number from 0"),
    (Count | None, 0, "a whole number from 1, or None"), (Share, 7, "a number from 0 to 1"), (Share, True, "a number from 0 to 1"),
    (Positive, "fast", "a number above 0"), (Positive, math.nan, "a number above 0"), (Positive, math.inf, "a number above 0"),
    (Positive, 0, "a number above 0"), (NotNegative, None, "a number from 0"), (Severity, 6, "a whole number from 1 to 5"),
    (Annotated[float, Within(0, 1, below=True)], 1.0, "a number from 0 to below 1"),
    (bool, 1, "True or False"), (bool, "no", "True or False"),
    (Annotated[float, Within(0, 1, above=True)], 0, "a number above 0, up to 1"), (str, 3, "text"), (str | None, b"x", "text, or None"),
    (Annotated[float, Within(0, 1, above=True, below=True)], 1, "a number above 0 and below 1"), (Literal[1, 2, "fd"], 3, "1, 2 or 'fd'"),
    (Literal[1, 2, "fd"], True, "1, 2 or 'fd'"), (Sequence[str], "relu", "a list of values, each text"), (COLORS, 3, "one of red, green"),
    (tuple[float, float], (1.0,), "a list of 2 values, each a number"),
    (Annotated[int | None, Within(0)], -1, "a whole number from 0, or None"),
    (int, np.array([1, 2]), "a whole number"), (Seed, 2**32, "a whole number from 0 to 4294967295"),
]


@pytest.mark.parametrize(("kind", "value"), FITTING)
def test_values_that_fit_are_taken_as_they_are(kind, value):
    assert fits(value, kind) and Setting("x", kind).check(value) is value


@pytest.mark.parametrize(("kind", "value", "expected"), REFUSED)
def test_other_values_are_one_line_that_says_what_was_expected(kind, value, expected):
    with pytest.raises(ArchrepairError) as error:
        Setting("x", kind).check(value)
    assert str(error.value).startswith("x is ") and str(error.value).endswith(f"; expected {expected}") and "\n" not in str(error.value)
    assert not fits(value, kind) and in_words(kind) == expected


def test_an_unknown_name_has_a_nearest():
    with pytest.raises(ArchrepairError, match="unknown color 'gren': did you mean 'green'. known: red, green"):
        Setting("paint", COLORS | None).check("gren")


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_scalars_of_numpy_and_torch_become_pythons_own(value):
    number = Setting("x", Count).check(value)
    assert number == 3 and type(number) is int


def test_objects_of_a_class_are_left_to_who_uses_them():
    assert Setting("model", torch.nn.Module).check("resnet18") == "resnet18"


# --- words

YAML_12 = {  # the core schema of YAML 1.2, where 1.1 differs first of all
    "1e-3": 1e-3, "1E3": 1000.0, "no": "no", "yes": "yes", "off": "off", "on": "on", "y": "y", "NO": "NO", "true": True, "False": False,
    "TRUE": True, "0o17": 15, "017": 17, "0x1F": 31, "1_000": "1_000", "12:30:45": "12:30:45", "2026-01-02": "2026-01-02", ".inf": math.inf,
    "-.INF": -math.inf, "inf": "inf", "null": None, "~": None, "Null": None, "": "", "'3'": "3", '"no"': "no", ".5": 0.5, "5.": 5.0,
    "-3": -3, "+3": 3, "[1, no, 1e-3]": [1, "no", 1e-3], "{a: 1}": {"a": 1}, "c=d": "c=d", "C:\\photos": "C:\\photos", "=": "=", "<<": "<<",
}


@pytest.mark.parametrize("text", YAML_12)
def test_words_are_read_by_the_rules_of_yaml_12(text):
    value = read_value(text)
    assert value == YAML_12[text] and type(value) is type(YAML_12[text])


def test_not_a_number_is_a_float():
    assert math.isnan(read_value(".nan"))


@pytest.mark.parametrize("text", ["[1", "*x", "{[1]: 2}", "!!int abc", "!!int {}", "!!python/name:os.system x", "a\x00b", "9" * 5000,
                                  "[" * 5000, "- a\n b: ]"])
def test_what_is_not_yaml_is_one_line(text):
    with pytest.raises(ArchrepairError, match="quote it") as error:
        read_value(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(("kind", "text", "value"), [
    (bool, "no", False), (bool, "Off", False), (bool, "yes", True), (bool, "1", True), (bool | None, "null", None), (str, "no", "no"),
    (str, "007", "007"), (str, "1e-3", "1e-3"), (str, "null", "null"), (str | None, "null", None), (str, "'7'", "7"), (str, "c=d", "c=d"),
    (str, "a #b", "a #b"), (str, "a: b", "a: b"), (str, "[1", "[1"), (str, "true", "true"), (Positive, "1e-3", 1e-3),
    (Positive, "fast", "fast"),
    (Annotated[float, Within(0, infinite=True)], "inf", math.inf), (Count | None, "None", None), (Count, "3", 3), (Count, "2.5", 2.5),
    (Literal[1, 2, "fd"], "2", 2), (Literal[1, 2, "fd"], "fd", "fd"), (str | Sequence[str] | None, "[fc, conv1]", ["fc", "conv1"]),
    (Any, "no", "no"),
])
def test_a_word_is_read_as_what_the_setting_expects(kind, text, value):
    read = Setting("x", kind).read(text)
    assert read == value and type(read) is type(value)


# --- calls


@checked
@dataclass(frozen=True)
class Plain:
    epochs: Count = 10
    lr: Positive | None = None
    color: COLORS = "red"


class Parent:
    name = "parent"

    @checked
    def __init__(self, *, size: Count = 1):
        self.size = size


@checked
class Child(Parent):
    name = "child"

    def __init__(self, *, flag: bool = True, **options):
        super().__init__(**options)
        self.flag = flag


@checked
def act(model, /, steps: Count = 3, *rest, share: Share = 0.5, **changes):
    return model, steps, rest, share, changes


def test_a_checked_class_is_the_same_class():
    assert Plain(3, lr=np.float64(0.5)) == Plain(epochs=3, lr=0.5, color="red") and replace(Plain(), epochs=2).epochs == 2
    assert list(settings_of(Plain)) == ["epochs", "lr", "color"] and settings_of(Plain)["epochs"].default == 10
    assert (Child(size=2, flag=False).size, Child(flag=False).flag) == (2, False) and set(settings_of(Child)) == {"flag", "size"}


def test_positions_rest_and_what_is_passed_on_reach_a_checked_function():
    assert act("net", 4, "a", share=1, other=7) == ("net", 4, ("a",), 1, {"other": 7}) and act.__name__ == "act"


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Plain(0), "epochs is 0; expected a whole number from 1"),
    (lambda: Plain(lr="fast"), "lr is 'fast'; expected a number above 0"),
    (lambda: replace(Plain(), epochs=True), "epochs is True"), (lambda: Child(size=0), "size is 0"), (lambda: Child(flag=1), "flag is 1"),
    (lambda: act("net", 0), "steps is 0"), (lambda: act("net", share=2), "share is 2; expected a number from 0 to 1"),
    (lambda: check_settings(act, {"steps": 2.5}), "steps is 2.5"),
])
def test_wrong_values_stop_the_call(call, message):
    with pytest.raises(ArchrepairError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Plain(epoch=3), "unknown option of Plain 'epoch': did you mean 'epochs'. known: epochs, lr, color"),
    (lambda: Child(sise=3), "unknown option of child 'sise': did you mean 'size'. known: flag, size"),
    (lambda: check_settings(Plain, {"colour": "red"}), "unknown option of Plain 'colour': did you mean 'color'"),
])
def test_unknown_options_name_the_nearest(call, message):
    with pytest.raises(UnknownSetting, match=message) as error:
        call()
    assert isinstance(error.value, TypeError) and isinstance(error.value, ArchrepairError)  # as Python says it, and as we do


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="missing 1 required"):
        act()
