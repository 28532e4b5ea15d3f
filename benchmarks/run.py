"""All ratios in one table, beside their limits and goals: `archrepair bench`, `make bench`.

    python benchmarks/run.py [CASE ...] [--rounds 5] [--full] [--page] [--json]

Each case compares results before it times anything, and then takes turns between both sides in this process, on one thread, in CPU time.
Writes `outputs/bench/<processor>.json`, where lines of cases that were not run stay, and with `--page` the table in docs/benchmarks.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from archrepair.cli.bench import CASES  # noqa: E402

PAGE, BEGIN, END = ROOT / "docs" / "benchmarks.md", "<!-- measured: begin -->", "<!-- measured: end -->"


def processor() -> str:
    "The name of the processor, as it may stand in a file name."
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "unknown"


def lines_of(case: str, rounds: int, full: bool) -> Iterator:
    "The lines of a case, each as soon as it is measured."
    from importlib import import_module

    measure: Callable = import_module(f"bench_{case}").cases
    return measure(full=full, rounds=rounds) if case == "repair" else measure(rounds=rounds)


def reached(line: dict) -> str:
    "Is the goal reached? Empty where there is none."
    if line["goal"] is None:
        return ""
    more_is_better = line["unit"] == "times faster"
    return "yes" if (line["median"] >= line["goal"]) == more_is_better or line["median"] == line["goal"] else "not yet"


def row(line: dict) -> str:
    "A line as a row of the page's table."
    spread = f"{line['low']:.2f} – {line['high']:.2f}" if line["low"] != line["high"] else "counted" if line["case"] == "memory" else ""
    number = lambda key: "" if line[key] is None else f"{line[key]:g}"
    cells = (line["what"], line["beside"], f"{line['median']:.2f} {line['unit']}", spread, number("limit"), number("goal"), reached(line))
    return f"| {' | '.join(cells)} |"


def write_page(content: dict) -> None:
    "Put the table between the marks in the page."
    table = ["| what | beside | ratio | spread | limit by arithmetic | goal | reached |", "|---|---|---|---|---|---|---|",
             *(row(line) for line in content["lines"])]
    origin = f"{content['processor']}, one thread, CPU time, torch {content['torch']}, {content['date']}."
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{origin}\n\n" + "\n".join(table) + f"\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="every block of the six networks at full width; hours")
    parser.add_argument("--page", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON, alone, on standard output")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    if wrong := [case for case in arguments.cases if case not in CASES]:
        parser.error(f"unknown case {wrong[0]}; expected some of {', '.join(CASES)}")
    import torch

    from archrepair.core.errors import write_json

    torch.set_num_threads(1)
    path = arguments.out / f"{processor()}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"lines": []}
    for case in arguments.cases or CASES:
        measured = []
        for ratio in lines_of(case, arguments.rounds, arguments.full):
            measured.append({**ratio.as_dict(), "script": case})
            print(row(measured[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
        others = [line for line in content["lines"] if line["script"] != case]
        content = {"processor": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "threads": 1,
                   "lines": sorted([*others, *measured], key=lambda line: CASES.index(line["script"]))}
        write_json(path, content, ensure_ascii=False)
    print(path, file=sys.stderr)
    if arguments.json:
        measured = [line for line in content["lines"] if line["script"] in (arguments.cases or CASES)]
        print(json.dumps({**content, "lines": measured}, indent=1))
    if arguments.page:
        write_page(content)


if __name__ == "__main__":
    main()
