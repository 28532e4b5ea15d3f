"""The main job as on other processors, each time in a process of its own: an abort is a failure and not the end of the run."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.finished import FILES, ORIGINAL, check_failure

REPAIR = ("repair", "--tier", "smoke", "--dataset", "digits:fog:3", "--search-epochs", "1", "--finetune-epochs", "1",
          "--out", "outputs/repair")
ORIGINALS: dict[tuple[str, int], bytes] = {}  # one training for each instruction set and number of threads


def run(home: Path, *arguments: str, isa: str, threads: int, precision: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "ARCHREPAIR_HOME": str(home), "ARCHREPAIR_PRECISION": precision, "ONEDNN_MAX_CPU_ISA": isa,
           "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}  # threads that wait do not take the time of other tests
    return subprocess.run([sys.executable, "-m", "archrepair", *arguments], cwd=home, env=env, capture_output=True, text=True, timeout=580)


OFTEN = {("AVX2", 1, "fp32"), ("AVX2", 2, "bf16"), ("DEFAULT", 1, "bf16"), ("DEFAULT", 2, "fp32")}  # every pair of two settings, once
CASES = [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow)
         for case in itertools.product(("AVX2", "DEFAULT"), (1, 2), ("fp32", "bf16"))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("isa", "threads", "precision"), CASES)
def test_the_main_job(tmp_path, isa, threads, precision):
    if (isa, threads) in ORIGINALS:
        (tmp_path / ORIGINAL).parent.mkdir(parents=True)
        (tmp_path / ORIGINAL).write_bytes(ORIGINALS[isa, threads])
    block = ("--block", "layer1") if precision == "bf16" else ()  # where bf16 is emulated, trials of every block take a minute
    done = run(tmp_path, *REPAIR, *block, isa=isa, threads=threads, precision=precision)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    ORIGINALS[isa, threads] = (tmp_path / ORIGINAL).read_bytes()
    folder = tmp_path / "outputs" / "repair"
    assert {p.name for p in folder.iterdir()} >= FILES
    assert json.loads((folder / "record.json").read_text())["repair"]["config"]["precision"] == precision


def test_an_unknown_precision_is_one_line(tmp_path):
    done = run(tmp_path, *REPAIR, isa="DEFAULT", threads=1, precision="fp16")
    check_failure(done.returncode, done.stdout, done.stderr)
    assert "ARCHREPAIR_PRECISION is 'fp16'; expected fp32 or bf16" in done.stderr
