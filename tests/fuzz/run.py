"""Try many inputs of every kind, in rounds: `make fuzz` runs this. What is done already is not done again.

A round is a process that tries a thousand inputs of one kind with a seed of its own, which is printed; `--seed` sets that of the first.
Finished rounds are kept in .fuzz/rounds.jsonl, so that an interrupted run goes on where it was. After the last one the counts are written
into docs/fuzz.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from support import ROOT
from support.kinds import FULL, TESTS

ROUNDS, PAGE = ROOT / ".fuzz" / "rounds.jsonl", ROOT / "docs" / "fuzz.md"
ROUND = 1000  # inputs of one process
MINUTES = 30  # that it may take


def plan(total: int, kinds: list[str]) -> list[tuple[str, int, int]]:
    "Kind, number and size of every round of `total` inputs, kinds in turn."
    share = total / sum(FULL.values())
    counts = {kind: round(FULL[kind] * share) for kind in kinds}
    rounds = [(kind, i, min(ROUND, count - i * ROUND)) for kind, count in counts.items() for i in range(-(-count // ROUND))]
    return sorted(rounds, key=lambda task: (task[1], kinds.index(task[0])))


def run_round(kind: str, inputs: int, seed: int) -> dict:
    "Try so many inputs of a kind; what came of them."
    counts, started = ROUNDS.parent / f"{kind}-{seed}.jsonl", time.time()
    counts.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "ARCHREPAIR_FUZZ": str(-(-inputs // TESTS[kind])),
        "ARCHREPAIR_FUZZ_COUNTS": str(counts),
        "OMP_NUM_THREADS": "1",
        "ARCHREPAIR_PROGRESS": "0",
        "MPLBACKEND": "agg",
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--timeout",
        str(MINUTES * 60),
        "--tb=short",
        f"--hypothesis-seed={seed}",
        f"tests/fuzz/test_{kind}.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
    tally = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    counts.unlink(missing_ok=True)
    if done.returncode:
        (ROUNDS.parent / f"{kind}-{seed}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return {
        "kind": kind,
        "seed": seed,
        "results": tally.get(f"{kind} result", 0),
        "lines": tally.get(f"{kind} line", 0),
        "seconds": round(time.time() - started),
        "failed": bool(done.returncode),
    }


def finished() -> list[dict]:
    "The rounds that are done."
    return [json.loads(line) for line in ROUNDS.read_text(encoding="utf-8").splitlines()] if ROUNDS.exists() else []


def table(rounds: list[dict]) -> str:
    "Inputs by kind, as Markdown."
    lines = ["| kind | inputs | results | one line | broke the rule | minutes |", "|---|---:|---:|---:|---:|---:|"]
    every = [(kind, [r for r in rounds if r["kind"] == kind]) for kind in FULL] + [("**all**", rounds)]
    for name, part in every:
        results, refused, failed, seconds = (sum(r[key] for r in part) for key in ("results", "lines", "failed", "seconds"))
        lines.append(f"| {name} | {results + refused:,} | {results:,} | {refused:,} | {failed} | {seconds / 60:.1f} |")
    return "\n".join(lines)


def write_page(rounds: list[dict], seed: int) -> None:
    "Put date, seed and counts into the page, between its marks."
    import torch

    day, python = time.strftime("%Y-%m-%d", time.gmtime()), sys.version.split()[0]
    said = f"On {day}, with seed {seed}, Python {python} and torch {torch.__version__}:\n\n{table(rounds)}"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"(?s)(<!-- counts -->\n).*(<!-- end -->)", lambda m: f"{m[1]}{said}\n{m[2]}", page), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=sum(FULL.values()), help="of all kinds together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL), metavar="KIND", help="these kinds alone")
    parser.add_argument("--seed", type=int, help="of the first round; default: that of the interrupted run, else a random one")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the counts into docs/fuzz.md, whatever was run")
    given = parser.parse_args()
    before = finished()
    seed = given.seed if given.seed is not None else before[0]["first"] if before else secrets.randbelow(2**31)
    ROUNDS.parent.mkdir(exist_ok=True)
    known = {(r["kind"], r["seed"]) for r in before}
    numbers = {kind: 100_000 * i for i, kind in enumerate(FULL)}
    tasks = [(kind, inputs, seed + numbers[kind] + i) for kind, i, inputs in plan(given.inputs, given.only)]
    todo = [task for task in tasks if (task[0], task[2]) not in known]
    print(f"seed {seed}: {len(tasks)} rounds, {len(tasks) - len(todo)} done before", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool, ROUNDS.open("a", encoding="utf-8") as file:
        for number, future in enumerate(as_completed([pool.submit(run_round, *task) for task in todo]), 1):
            done = future.result()
            file.write(json.dumps({"first": seed, **done}) + "\n")
            file.flush()
            state = f"FAILED, see .fuzz/{done['kind']}-{done['seed']}.log" if done["failed"] else "ok"
            print(
                f"{number}/{len(todo)} {done['kind']} seed {done['seed']}: {done['results']:,} results, {done['lines']:,} lines, "
                f"{done['seconds']} s, {state}",
                flush=True,
            )
    mine = {(task[0], task[2]) for task in tasks}
    rounds = [r for r in finished() if (r["kind"], r["seed"]) in mine]
    print(table(rounds))
    if given.page or given.inputs >= sum(FULL.values()) and given.only == list(FULL):
        write_page(rounds, seed)
        print(f"written into {PAGE.relative_to(ROOT)}")
    ROUNDS.rename(ROUNDS.with_name("last.jsonl"))
    sys.exit("some rounds failed" if any(r["failed"] for r in rounds) else 0)


if __name__ == "__main__":
    main()
