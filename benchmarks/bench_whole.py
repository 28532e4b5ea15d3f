"""A whole repair by ArchRepair, from localization to verdict, beside fine-tuning the whole network for as many epochs.

    python benchmarks/bench_whole.py [--rounds 3]

Both repair the narrow ResNet-18 of the smoke tier on its failures in fog, from the same repair set, each as a user would call it. The
repair's control, which is a second training and only there to judge the first, is left out on both sides.
"""
from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch  # noqa: E402
from measure import Ratio, in_turn, quotients  # noqa: E402

from archrepair.baselines.retrain import Retrain  # noqa: E402
from archrepair.experiments.cells import Cell, scenario_of  # noqa: E402
from archrepair.repair.archrepair import ArchRepair  # noqa: E402

SEARCH, FINETUNE = 3, 6  # epochs, those of the tier lite
FORMS = {"behind a gate": {}, "the paper's search": {"strategy": "pc-darts"}}


def cases(rounds: int = 3):
    "A line of the table for each form of ArchRepair."
    unrepaired, scenario = scenario_of(Cell(model="resnet18", dataset="digits:fog:3", tier="smoke"))
    methods = {"network": Retrain(epochs=SEARCH + FINETUNE),
               **{name: ArchRepair(search_epochs=SEARCH, finetune_epochs=FINETUNE, control=False, **form) for name, form in FORMS.items()}}
    for method in methods.values():  # each of them must have learned something, or the seconds are worth nothing
        result = method.repair(unrepaired.network, scenario.data)
        assert result.validation["repaired"] < result.validation["original"], result.verdict
    seconds = in_turn({name: lambda method=method: method.repair(unrepaired.network, scenario.data) for name, method in methods.items()},
                      rounds)
    for name in FORMS:
        yield Ratio.of("whole", f"a whole repair, {name}, resnet18 ×0.25", "fine-tuning the whole network for as many epochs",
                       quotients(seconds[name], seconds["network"]), unit="of its time", goal=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for ratio in cases(arguments.rounds):
        print(json.dumps(ratio.as_dict()), flush=True)


if __name__ == "__main__":
    main()
