"""One network repaired again and again, for one pattern after the other: what the last file answers, everywhere.

    python benchmarks/upon.py [--model cifar-resnet20:weights=published] [--dataset cifar10] [--severity 3] [--tier lite] [--seed 0]
                              [--patterns PATTERN ...] [--runs outputs/upon]

Each repair is `archrepair repair --repaired` of the one before, from failures of the network as it is by then; all gates share one limit of
answers that may change. What is complete in --runs is not run again. Writes `outputs/TIER/upon/MODEL.json`: a row for each repair, and the
accuracy of the first and of the last network on all test images of all versions. 07_beyond shows it.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from archrepair.core.errors import write_json  # noqa: E402
from archrepair.corruptions.catalogue import BENCHMARK_CORRUPTIONS, TUNING_CORRUPTIONS  # noqa: E402
from archrepair.experiments.cells import Cell, Record, repair_into  # noqa: E402
from archrepair.experiments.originals import Original, accuracy_of, original, outputs_of  # noqa: E402
from archrepair.repair.result import load  # noqa: E402

PATTERNS = ("gaussian_noise", "motion_blur", "contrast", "jpeg_compression", "pixelate")


def row(pattern: str, record: Record) -> dict:
    "What 07_beyond shows of a repair: accuracy on held-out images before and after, in per cent."
    gate = record.repair["conditional"]
    return {"pattern": pattern, "block": record.repair["block"], "chosen": record.repair["chosen"], "emulator": gate["emulator"],
            "failures": record.metrics["images"]["failures"],
            "before": record.accuracy("held_out", "before"), "after": record.accuracy("held_out", "after"),
            "clean before": record.accuracy("clean_held_out", "before"), "clean after": record.accuracy("clean_held_out", "after"),
            "commit": record.versions["commit"]}


def accuracies(first: Original, last: Original, versions: list[str]) -> dict:
    "Both networks on all test images of each version."
    scores = {}
    for version in versions:
        before, after = accuracy_of(first, version), accuracy_of(last, version)
        scores[version] = {"original": before.accuracy, "repaired": after.accuracy, "n": after.n}
        print(f"{version}: {before.accuracy:.2f} → {after.accuracy:.2f} %", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-resnet20:weights=published")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--tier", default="lite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "upon")
    arguments = parser.parse_args()
    version = lambda corruption: f"{arguments.dataset}:{corruption}:{arguments.severity}"
    steps: list[dict] = []
    folder: Path | None = None
    for number, pattern in enumerate(arguments.patterns, 1):
        cell = Cell("archrepair", arguments.model, version(pattern), arguments.seed, arguments.tier,
                    options=(("control", False), ("label", pattern)))
        before, folder = folder, arguments.runs / f"{number}-{pattern}"
        steps.append(row(pattern, repair_into(cell, folder, repaired=before)))
        print(steps[-1], flush=True)
    first = original(arguments.model, arguments.dataset, arguments.tier, arguments.seed)
    last = first.with_network(load(folder, first.network))
    versions = [arguments.dataset, *map(version, (*BENCHMARK_CORRUPTIONS, *TUNING_CORRUPTIONS))]
    out = outputs_of(arguments.tier) / "upon" / f"{arguments.model.partition(':')[0]}.json"
    write_json(out, {"steps": steps, "accuracy": accuracies(first, last, versions)})
    print(f"written: {out}")


if __name__ == "__main__":
    main()
