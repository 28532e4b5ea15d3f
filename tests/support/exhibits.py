"""Settings of the smoke tier, and a folder with the runs that Figure 4 needs under them."""
import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pandas as pd

from archrepair.experiments.runs import Runs
from archrepair.paper.exhibits import Settings, requirements
from archrepair.paper.tables import collect_rows

SMOKE = Settings.of(tier="smoke", methods="retrain,surgical")


@functools.cache
def recorded() -> tuple[Path, Runs, pd.DataFrame]:
    "A folder of results in which the cells of Figure 4 were run, their networks kept; the runs; their rows. Only to be read: `a_copy`."
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    runs = Runs(outputs=folder)
    return folder, runs, collect_rows(requirements(["fig4"], SMOKE), runs)


def a_copy(folder: Path) -> Runs:
    "The runs of `recorded`, without an evaluation, in a new folder: for tests that evaluate networks, whatever ran before them."
    shutil.copytree(recorded()[0], folder)
    shutil.rmtree(folder / "smoke" / "robust", ignore_errors=True)
    return Runs(outputs=folder)
