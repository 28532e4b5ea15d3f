"""Processes that train together, as `torchrun` starts them but by a fork, so that torch is imported once.

    python -m support.processes FOLDER

Two of them train a small network; they are stopped after an epoch and begun again. Then one process trains it alone. FOLDER receives what
each ended with.
"""
import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from archrepair.core.errors import note
from archrepair.training.fit import History, Recipe, fit
from archrepair.training.ranks import ranks_now, together
from archrepair.training.rows import Features, Rows

RECIPE = Recipe(epochs=3, lr=0.05, batch_size=15, failure_ratio=0.25, imitation=0.5)


def network() -> nn.Module:
    "A stem that stays as it is, a block with BatchNorm of both kinds and parameters that nothing uses, and a suffix."
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, momentum=None))
    block.unused = nn.Linear(2, 2)
    block.forward = lambda x: block[4](block[3](block[2](block[1](block[0](x)))))
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    whole.requires_grad_(False)
    block.requires_grad_(True)
    return whole.eval()


def rows() -> Rows:
    "61 images, the last 12 of them failures, whose batches do not divide evenly among two."
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(61, 3, 8, 8, generator=generator), torch.randint(0, 5, (61,), generator=generator)
    features, teacher = Features(labels, lambda positions, view: images[positions]), torch.randn(61, 5, generator=generator)
    return Rows([features], teacher, torch.arange(61) < 30, failures=12)


def train(folder: Path, stop: int | None = None) -> tuple[nn.Module, History]:
    "Train the block, or stop like a killed process after an epoch."
    model = network()
    data = rows()

    def validate() -> float:
        with torch.inference_mode():
            return float(nn.functional.cross_entropy(model(data.inputs(torch.arange(61))[0]), data.labels))

    def after(epoch: int) -> bool:
        if epoch - 1 == stop:  # the checkpoint of the epoch before is there
            raise KeyboardInterrupt
        return False

    history = fit(model, data, RECIPE, trainable=[model[2]], validate=validate, after_epoch=after, checkpoint=folder / "checkpoint.pt")
    return model, history


def one_of_two(rank: int, port: int, folder: Path, stop: int | None) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    with contextlib.suppress(KeyboardInterrupt), together(folder / "out", "cpu") as own:
        (own / f"written-by-{rank}").parent.mkdir(parents=True, exist_ok=True)
        (own / f"written-by-{rank}").touch()
        print(f"printed by {ranks_now().rank} of {ranks_now().size}", flush=True)
        note(f"noted by {rank}")
        model, history = train(own, stop)
        torch.save({"epochs": history.epochs, "weights": model.state_dict(), "forward": "forward" in vars(model[2][1])},
                   folder / f"{rank}.pt")


def start(work: Callable, folder: Path, stop: int | None = None) -> None:
    "Two processes, until both have ended."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank, port, folder, stop)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode:
            sys.exit(f"a process ended with {process.exitcode}")


def main(folder: Path) -> None:
    start(one_of_two, folder, stop=1)
    start(one_of_two, folder)
    model, history = train(folder / "alone")
    torch.save({"epochs": history.epochs, "weights": model.state_dict()}, folder / "alone.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
