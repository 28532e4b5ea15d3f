"""Workers that die at a chosen place, and what a record says apart from when and how fast it was made.

Workers are forked from a server that has torch and the package imported, so that a hundred of them take minutes.
"""
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

METHOD = "archrepair:strategy=pc-darts;search_epochs=2;finetune_epochs=2;control=false"  # a search and a fine-tuning, in a second or two
CHANGING = {"seconds", "cpu_seconds", "milliseconds", "peak_bytes", "time", "commit", "machine"}  # of one run, whatever is run


def comparable(record: object) -> object:
    "A record, or a part of one, without what differs between two runs of the same."
    if isinstance(record, dict):
        return {name: comparable(value) for name, value in record.items() if name not in CHANGING}
    if isinstance(record, list):
        return [comparable(value) for value in record]
    return "NaN" if record != record else record  # which is not equal to itself


def records(home: Path) -> dict[str, object]:
    "What the records below a home say, by their paths."
    return {str(path.relative_to(home)): comparable(json.loads(path.read_text()))
            for path in sorted(home.glob("outputs/*/records/**/*.json")) if not path.name.startswith(".")}


def debris(home: Path) -> list[str]:
    "Files that no finished run leaves behind."
    return [str(path.relative_to(home)) for path in sorted((home / "outputs").rglob("*"))
            if path.name.endswith((".lock", ".checkpoints", ".failed", ".checkpoint.pt")) or ".part" in path.name]


def furnish(home: Path) -> list[str]:
    "Images for a home, a few of the digits. Returns the job that trains an original on them and repairs it, as the command line takes it."
    import numpy as np
    import torch

    from archrepair.data.datasets import load_dataset

    (home / "own").mkdir(parents=True)
    for split, n in (("train", 200), ("test", 160)):
        images = load_dataset("digits", split).select(torch.arange(n))
        np.savez(home / "own" / f"{split}.npz", images=images.batch(torch.arange(n)).numpy(), labels=images.labels.numpy())
    return ["cell", "--method", METHOD, "--dataset", f"npz:{home / 'own'}", "--tier", "smoke", "--device", "cpu", "--threads", "1"]


# --- a place to die

def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(module: str, name: str, number: int, act: Callable[[], object] = _die) -> None:
    "Call `act` at the call `number` (from 1) of a function."
    from importlib import import_module

    owner: object = import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, last), [0]

    @functools.wraps(function)
    def counted(*arguments, **more):
        calls[0] += 1
        if calls[0] == number:
            act()
        return function(*arguments, **more)

    setattr(owner, last, counted)


def _half(number: int, where: str, ending: str) -> None:
    "Die in the middle of writing a file with `where` in its path and that `ending`, when `number` per mille of it are on the disk."
    import archrepair.core.errors as errors

    replace = os.replace

    def die_instead(source, target):
        if where in str(target) and str(target).endswith(ending):
            size = os.path.getsize(source)
            with open(source, "r+b") as file:
                file.truncate(size * number // 1000)
            _die()
        replace(source, target)

    errors.os.replace = die_instead


def _in_finetuning(number: int) -> None:
    "Die in a step of fine-tuning, which begins when the search is over."
    _at_call("archrepair.repair.archrepair", "finetune", 1, lambda: _at_call("archrepair.training.fit", "_Run.step", number))


def _ask_and_slow_down() -> None:
    "Get SIGTERM in a step, whose successors would take an hour each."
    import archrepair.training.fit as fit

    fit._Run.step = lambda *arguments: time.sleep(3600)
    Path(os.environ["ARCHREPAIR_HOME"], "asked").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGTERM)


def stop_in(stage: str) -> None:
    "Be told to stop in the first step of the search or of fine-tuning."
    ask = lambda: _at_call("archrepair.training.fit", "_Run.step", 1, _ask_and_slow_down)
    ask() if stage == "search" else _at_call("archrepair.repair.archrepair", "finetune", 1, ask)


PLACES: dict[str, Callable[[int], None]] = {
    "training": lambda number: _at_call("archrepair.training.fit", "_Run.step", number),
    "search": lambda number: _at_call("archrepair.repair.search", "_Searcher._before_step", number),
    "fine-tuning": _in_finetuning,
    "record": lambda number: _half(number, "/resnet18/archrepair-localized-clean-s0-", ".json"),
    "checkpoint": lambda number: _half(number, ".checkpoints/", ".pt"),
    "original": lambda number: _half(number, "/originals/", ".safetensors")}


# --- workers

def _begin(home: str, arguments: tuple[str, ...], environment: dict[str, str], prepare: Callable[[], None] | None, log: str) -> None:
    "What a worker does, in its own process."
    from archrepair.cli.app import main

    os.environ |= {"ARCHREPAIR_HOME": home, **environment}
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - as long as the process lives
    os.dup2(sys.stderr.fileno(), 2)
    if prepare:
        prepare()
    main(list(arguments))


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["archrepair.cli.app", "archrepair.experiments.runs", "archrepair.repair.archrepair",
                                   "archrepair.baselines.retrain", "sklearn.datasets", "support.faults"])
    return server


def fork(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    "Call a function in a process that is forked from the server."
    process = _server().Process(target=function, args=arguments)
    process.start()
    return process


def start(home: Path, *arguments: object, prepare: Callable[[], None] | None = None, **environment: str) -> multiprocessing.Process:
    "Start a worker in a home; `prepare`, which can be pickled, is called first. What it says goes to `log.txt` beside the home."
    return fork(_begin, str(home), tuple(map(str, arguments)), environment, prepare, str(home.with_suffix(".log")))


def finish(process: multiprocessing.Process, seconds: float = 300) -> int:
    "The status that a worker ends with, negative for a signal."
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"a worker is still running after {seconds:g} s")
    return process.exitcode


def call(home: Path, *arguments: object, prepare: Callable[[], None] | None = None, **environment: str) -> int:
    "Run a worker to its end, whatever that is; its status."
    return finish(start(home, *arguments, prepare=prepare, **environment))


def die_at(place: str, number: int) -> Callable[[], None]:
    "What lets a worker die at a place."
    return functools.partial(_die_at, place, number)


def _die_at(place: str, number: int) -> None:
    PLACES[place](number)
