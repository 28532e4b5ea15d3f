"""Several processes train what one would have: the same numbers, after a stop as well, and only the first of them writes and prints."""
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from archrepair.core.errors import ArchrepairError
from archrepair.training.memory import Portions
from archrepair.training.ranks import Ranks, ranks_now, together
from support import ROOT


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "What two processes and one process ended with, the folder, and what was printed."
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-m", "support.processes", str(folder)], capture_output=True, text=True, timeout=240,
                         env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"{name}.pt") for name in ("0", "1", "alone")], folder, run


def test_two_processes_train_what_one_trains(ended):
    (first, second, alone), *_ = ended
    for key in ("val", "loss"):
        numbers = [[entry[key] for entry in each["epochs"] if key in entry] for each in (first, second, alone)]
        assert numbers[0] == numbers[1] and len(numbers[0]) >= 3
        assert numbers[0] == pytest.approx(numbers[2], abs=1e-4)
    assert alone["epochs"][0]["val"] - alone["epochs"][-1]["val"] > 0.01  # something was learned
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        assert torch.allclose(first["weights"][name].double(), value.double(), atol=1e-4), name


def test_the_network_is_given_back_without_what_divided_it(ended):
    assert not any(each["forward"] for each in ended[0][:2])


def test_the_first_process_alone_writes_and_prints(ended):
    _, folder, run = ended
    assert {path.name for path in (folder / "out").iterdir()} == {"checkpoint.pt", "written-by-0"}
    assert run.stdout.split("\n") == ["printed by 0 of 2"] * 2 + [""] and "noted by 1" not in run.stderr


def test_parts_are_the_batch():
    rows = torch.arange(11)
    parts = [Ranks(rank, 3).part(rows) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == rows.tolist() and {len(part) for part in parts} == {3, 4}
    assert Ranks().part(rows) is rows and Ranks().divide(net := nn.Linear(1, 1)) is net
    with pytest.raises(ArchrepairError, match="a batch of 2 images cannot be divided among 3 processes"):
        Ranks(0, 3).part(rows[:2])


def test_memory_that_runs_out_ends_one_process_in_one_line():
    "The others wait for its gradients of this batch, so it cannot do the batch in another number of steps."
    def lack(part: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ArchrepairError, match="does not hold this process's 8 images of a batch; expected more processes"):
        Portions(divisible=False).each(8, lack, torch.device("cpu"))


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "2", "RANK": "1"}], ids=["alone", "a cluster's own variables"])
def test_without_torchrun_nothing_is_different(variables, tmp_path, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with together(tmp_path / "out") as own:
        print("here")
        assert own == tmp_path / "out" and ranks_now() == Ranks() and ranks_now().alone
    assert capsys.readouterr().out == "here\n"


def test_more_processes_than_gpus_are_one_line(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ArchrepairError, match="there are 2 GPUs here, and process 4 would need one of its own"), together(tmp_path, "cuda"):
        pytest.fail("began")
