"""What a job is told, and how it ends."""
import pytest

from archrepair.cli.worker import seeds_of, status_of
from archrepair.core.errors import ArchrepairError
from archrepair.experiments.cells import Cell
from archrepair.experiments.runs import Outcome


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("0, 2,5-7", [0, 2, 5, 6, 7]), ("3,1-3", [3, 1, 2])])
def test_seeds(text, seeds):
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "4-2", "1.5", "0,,1", "0--2", "9" * 5000, "0-99999"])
def test_seeds_that_are_none(text):
    with pytest.raises(ArchrepairError, match="expected whole numbers from 0"):
        seeds_of(text)


def test_the_status_says_whether_to_try_again():
    there, passing, lasting = (Outcome(Cell(), *rest) for rest in (("there", ""), ("failed", "full", True), ("failed", "unknown", False)))
    assert [status_of(outcomes) for outcomes in ([there], [there, lasting], [lasting, passing], [])] == [0, 1, 75, 0]
