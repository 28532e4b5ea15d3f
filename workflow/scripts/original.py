"Train one original, or read it if it is trained already."
# ruff: noqa: F821 - Snakemake puts the object `snakemake` into a script's globals
import sys
from pathlib import Path

import torch

sys.stdout = sys.stderr = Path(snakemake.log[0]).open("w", buffering=1)  # noqa: SIM115 - open for as long as the script runs
torch.set_num_threads(snakemake.threads)

from archrepair import original  # noqa: E402
from archrepair.cli.worker import preemptible  # noqa: E402
from archrepair.experiments.runs import device_alone  # noqa: E402

model, dataset, seed = snakemake.params.original
with preemptible(with_parent=True), device_alone(snakemake.config["device"]) as device:
    unrepaired = original(model, dataset, snakemake.config["tier"], seed, device=device, out=snakemake.output[0], own=False)
print(f"{unrepaired.path}: {model} on {unrepaired.dataset}, tier {unrepaired.tier.name}, seed {seed}")
