"Run one cell, which writes its record."
# ruff: noqa: F821 - Snakemake puts the object `snakemake` into a script's globals
import sys
from pathlib import Path

import torch

sys.stdout = sys.stderr = Path(snakemake.log[0]).open("w", buffering=1)  # noqa: SIM115 - open for as long as the script runs
torch.set_num_threads(snakemake.threads)

from archrepair import Cell, original, run  # noqa: E402

fields = {**snakemake.params.cell, "options": tuple((name, value) for name, value in snakemake.params.cell["options"])}
cell, outputs, device = Cell(**fields), Path(snakemake.config["outputs"]), snakemake.config["device"]
unrepaired = original(cell.model, cell.dataset, cell.tier, cell.seed, weights=snakemake.input.weights, device=device)
record = run(cell, outputs=outputs, device=device, unrepaired=unrepaired)
assert Path(record.path) == Path(snakemake.output[0]), f"{record.path} was written where {snakemake.output[0]} was promised"
print(record.repair["verdict"])
