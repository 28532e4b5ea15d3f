"""Is a record the same in another process and with another number of threads, and how far apart is it where it is not?

    python benchmarks/determinism.py [--tier smoke] [--model resnet18] [--dataset auto] [--method METHOD ...]
                                     [--threads 1 1 2] [--own-originals]

Each cell is run once for each number of threads, in a process and a folder of its own. The first trains the original, which the others take
over; with --own-originals each of them trains its own.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from archrepair.experiments.cells import Record  # noqa: E402

METHODS = ("archrepair", "archrepair:strategy=pc-darts", "retrain", "surgical")


def run(arguments: argparse.Namespace, method: str, threads: int, folder: Path) -> Record:
    "The record of a cell, from a process of its own."
    command = [sys.executable, "-m", "archrepair", "cell", "--method", method, "--model", arguments.model, "--dataset", arguments.dataset,
               "--tier", arguments.tier, "--device", "cpu", "--threads", str(threads), "--out", str(folder)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=ROOT,
                   env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "ARCHREPAIR_PROGRESS": "0"})
    record, = (path for path in folder.glob("*/records/*/*/*.json") if path.name.startswith(f"{method.partition(':')[0]}-"))
    return Record.read(record)


def distance(one: Record, other: Record) -> str:
    "How far two records are apart: in accuracies before and after (points), in validation losses, and in what was decided."
    largest = lambda when: max(abs(one.accuracy(name, when) - other.accuracy(name, when)) for name in one.metrics[when])
    losses = max(abs(loss - other.repair["validation"][name]) for name, loss in one.repair["validation"].items())
    choices = lambda record: (record.repair["genotype"] or {}).get("choices")
    decisions = [name for name in ("block", "chosen") if one.repair[name] != other.repair[name]]
    decisions += ["genotype"] * (choices(one) != choices(other))
    same = "the same" if one.digest == other.digest else "another"
    return f"{same} | {largest('before'):.2f} | {largest('after'):.2f} | {losses:.5f} | {', '.join(decisions) or 'none'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="smoke")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--method", action="append", help=f"may be repeated; default: {', '.join(METHODS)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 1, 2])
    parser.add_argument("--own-originals", action="store_true")
    arguments = parser.parse_args()
    columns = ("method", "threads", "beside", "digest", "before, points", "after, points", "losses", "other decisions")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for method in arguments.method or METHODS:
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name, str(number)) for number in range(len(arguments.threads))]
            first = run(arguments, method, arguments.threads[0], folders[0])
            for threads, folder in list(zip(arguments.threads, folders))[1:]:
                if not arguments.own_originals:
                    shutil.copytree(folders[0], folder, ignore=shutil.ignore_patterns("records"))
                apart = distance(first, run(arguments, method, threads, folder))
                print(f"| {method} | {threads} | {arguments.threads[0]} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
