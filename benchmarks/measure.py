"""How ratios are measured: two forms in turns, in one process, on one thread, by the processor's time."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Ratio:
    """One line of the table: the `median` of the ratios of all rounds, and the `low`est and `high`est of them.

    `unit` says what the ratio counts: `times faster`, where more is better, or what a step costs in units of another, where less is.
    `limit` is what counted arithmetic allows (None: it is not arithmetic that limits), and `goal` what is aimed at.
    """

    case: str
    what: str
    beside: str
    median: float
    low: float
    high: float
    unit: str = "times faster"
    limit: float | None = None
    goal: float | None = None

    @classmethod
    def of(cls, case: str, what: str, beside: str, ratios: list[float], **more) -> Ratio:
        return cls(case, what, beside, *(round(f(ratios), 3) for f in (statistics.median, min, max)), **more)

    def as_dict(self) -> dict:
        return asdict(self)


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int = 5,
            clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    """Seconds of every side in every round, by default of CPU time; on a GPU the `clock` waits for the device first.

    The sides take turns, and a first round, which warms up, does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def quotients(above: list[float], below: list[float]) -> list[float]:
    "Round by round."
    return [a / b for a, b in zip(above, below, strict=True)]
