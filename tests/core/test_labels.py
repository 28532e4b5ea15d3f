"""What people read: names of the test sets, numbers and counts."""
import math

import pytest

from archrepair.core.labels import TEST_SETS, count_images, number


@pytest.mark.parametrize(("value", "form", "unit", "text"), [
    (-1.5, "+.1f", "", "−1.5"), (1234.5, ",.2f", " %", "1,234.50 %"), (1e-5, ".2g", "", "1e−05"), (0, ",.0f", "", "0"),
    (None, ",.2f", " %", "–"), (math.nan, ",.2f", " %", "–"), (-math.inf, ",.2f", "", "–"),
])
def test_a_number_has_a_true_minus_and_what_is_missing_is_a_dash(value, form, unit, text):
    assert number(value, form, unit) == text


def test_no_two_test_sets_are_called_the_same():
    assert list(TEST_SETS) == ["held_out", "full", "clean_held_out", "clean_full"]
    assert len({one.label for one in TEST_SETS.values()}) == 4 and TEST_SETS["clean_full"].title == "Clean, full test"


def test_only_images_that_are_there_are_counted():
    images = {"failures": 1200, "val_failures": 0, "test": 3, "held_out": 5}
    assert count_images(images) == "1,200 failures to learn from, 5 test images held out"
