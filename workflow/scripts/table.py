"Records into two tables: one row per run, and mean, standard deviation and n over the seeds."
# ruff: noqa: F821 - Snakemake puts the object `snakemake` into a script's globals
from pathlib import Path

import pandas as pd

from archrepair.core.errors import write_atomic
from archrepair.experiments.cells import Record
from archrepair.experiments.comparison import scores_of

KEYS = ["model", "dataset", "method", "options"]


def row(path: str) -> dict:
    "A record as one flat row."
    record = Record.read(Path(path))
    options = " ".join(f"{name}={value}" for name, value in record.cell["options"])
    return {**{key: record.cell[key] for key in KEYS[:3]}, "options": options, "seed": record.cell["seed"], "block": record.repair["block"],
            "before": record.accuracy("held_out", "before"), **scores_of(record), "chosen": record.repair["chosen"], "record": path}


runs = pd.DataFrame([row(path) for path in snakemake.input]).sort_values([*KEYS, "seed"])
scores = [name for name in runs.columns if name not in (*KEYS, "seed") and pd.api.types.is_numeric_dtype(runs[name])]
summary = runs.groupby(KEYS)[scores].agg(["mean", "std", "count"])
summary.columns = [f"{name} {what.replace('std', 'sd').replace('count', 'n')}" for name, what in summary.columns]
write_atomic(Path(snakemake.output.runs), lambda path: runs.to_csv(path, index=False))
write_atomic(Path(snakemake.output.summary), lambda path: summary.to_csv(path))
