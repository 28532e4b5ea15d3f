"""One stage of `gpu.py`, in a process of its own: its jobs one after the other, each noted as it begins and as it ends."""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gpu import EPOCHS, RESTART, ROOT, Journal, epochs_share

import archrepair
from archrepair.core.errors import ArchrepairError, first_line, write_json
from archrepair.core.registry import CORRUPTIONS, METHODS, STRATEGIES
from archrepair.core.settings import settings_of
from archrepair.core.tiers import resolve_tier

ORDER = ("table9", "table5", "table7")
PLAN = "plan: "
LEAST = 5.0  # seconds in which nothing is worth beginning
DIGITS = "digits:fog:3"  # comes with scikit-learn
QUICK: dict[str, dict[str, object]] = {  # one epoch, and no more than it takes to go through every line
    "archrepair": {"blocks": ("layer2", "layer3"), "failure_views": 1, "control": False, "search_options": (("trial_images", 30),)},
    "mode": {"rounds": 1, "round_epochs": 1},
    "arachne": {"population": 6, "iterations": 2, "positives": 40}, "fewshot": {"candidates": 2},
    "apricot": {"reduced": 2, "subset": 0.2, "sweeps": 1, "retrain_epochs": 1},
}


class Impossible(Exception):
    "Something is missing on this machine; nothing is wrong."


@dataclass
class Stage:
    "What the jobs of a stage share: the device, the tier of cells, a folder for everything on the way, and the time until which to begin."

    name: str
    device: str
    tier: str
    work: Path
    journal: Journal
    until: float
    pace: list[tuple[float, float]] = field(default_factory=list)  # of each job that had an expectation: that, and what it took

    @property
    def results(self) -> Path:
        return self.work / "results"

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def expected(self, seconds: float) -> float:
        "A forecast, corrected by how far earlier ones were off."
        return seconds * sum(took for _, took in self.pace) / sum(before for before, _ in self.pace) if self.pace else seconds

    def do(self, name: str, job: Callable[[], object], seconds: float = 0.0) -> None:
        """Do a job that takes about so many `seconds`, unless it is done, or does not fit into the time left.

        What goes wrong is its line. After an error of the device itself nothing works in this process, which then ends to be begun anew.
        """
        if self.journal.outcome(self.name, name) == "done":
            return
        if self.expected(seconds) > self.left:
            self.journal.write(self.name, name, "left", 0.0, f"about {self.expected(seconds):.0f} s, and {max(0.0, self.left):.0f} s left")
            return
        self.journal.write(self.name, name, "begun")
        started, outcome, lost = time.monotonic(), "done", False
        try:
            line = str(job() or "")
        except (Impossible, ModuleNotFoundError) as reason:
            outcome, line = "impossible", first_line(reason)[:300]
        except Exception as error:
            outcome, line, lost = "failed", f"{type(error).__name__}: {first_line(error)[:300]}", is_lost(error)
        took = time.monotonic() - started
        if seconds and outcome == "done":
            self.pace.append((seconds, took))
        self.journal.write(self.name, name, outcome, took, line)
        if lost:
            sys.exit(RESTART)


def is_lost(error: Exception) -> bool:
    "Is it an error of the device after which every call fails?"
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


# --- what the machine is


def machine(stage: Stage) -> None:
    stage.do("device", partial(describe, stage))
    stage.do("arithmetic", partial(agree, stage))


def describe(stage: Stage) -> str:
    import torch

    content: dict[str, object] = {
        "archrepair": archrepair.__version__, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if stage.device == "cpu":
        content["device"] = platform.processor() or platform.machine()
    elif not torch.cuda.is_available():
        raise ArchrepairError("torch sees no GPU here")
    else:
        free, total = torch.cuda.mem_get_info()
        content |= {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability()), "bytes": total,
                    "free_bytes": free, "driver": driver()}
    write_json(stage.work / "machine.json", content)
    return str(content["device"])


def driver() -> str:
    "The driver's version, empty where nothing tells."
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = subprocess.run([program, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    return first_line(query.stdout) if query.returncode == 0 else ""


def agree(stage: Stage) -> str:
    "A step of a small network on the device and on the CPU: the same loss, in float32 to rounding, in bfloat16 roughly."
    import torch

    from archrepair.networks.models import create_model
    from archrepair.training.fit import autocast

    x, losses = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32), {}
    for device, precision in (("cpu", "fp32"), (torch_device(stage), "fp32"), (torch_device(stage), "bf16")):
        network = create_model("resnet18", 10, width=0.25).to(device).train()
        with autocast(device, precision):
            logits = network(x.to(device))
        loss = logits.float().square().mean()
        loss.backward()
        losses[device, precision] = float(loss)
    expected = losses["cpu", "fp32"]
    apart = {key: abs(loss - expected) / expected for key, loss in losses.items()}
    if apart[torch_device(stage), "fp32"] > 0.02 or apart[torch_device(stage), "bf16"] > 0.2:
        raise ArchrepairError(f"losses differ from the CPU's {expected:.4f}: {apart}")
    return f"fp32 {apart[torch_device(stage), 'fp32']:.1e} and bf16 {apart[torch_device(stage), 'bf16']:.1e} from the CPU's"


def torch_device(stage: Stage) -> str:
    return "cpu" if stage.device == "cpu" else "cuda"


# --- a smoke run of every path


def smoke(stage: Stage) -> None:
    stage.do("train an original", partial(train, stage))
    stage.do("repair, save, report", partial(repair, stage, "archrepair", {}))
    for name in METHODS:
        stage.do(f"method {name}", partial(repair, stage, name, QUICK.get(name, {})))
    for name in STRATEGIES:
        stage.do(f"strategy {name}", partial(repair, stage, "archrepair", {"strategy": name, "block": "layer4"}))
    for suffix in (".pt2", ".onnx"):
        stage.do(f"export {suffix}", partial(export, stage, suffix))
    stage.do("corruptions", partial(corruptions, stage))


def train(stage: Stage) -> str:
    from archrepair.experiments.originals import accuracy_of, original

    return f"{accuracy_of(original('resnet18', DIGITS, 'smoke', device=torch_device(stage), outputs=stage.results), 'digits').accuracy} %"


def repair(stage: Stage, method: str, settings: Mapping[str, object]) -> str:
    "A repair with one epoch of everything; with settings of its own the method is only run, without them all its files are written."
    from archrepair.experiments.cells import Cell, method_of, run_full, scenario_of
    from archrepair.experiments.methods import method_class
    from archrepair.experiments.originals import original

    known = settings_of(method_class(method))
    lengths = {name: 1 for name in ("epochs", "search_epochs", "finetune_epochs") if name in known}
    cell = Cell(method, "resnet18", DIGITS, tier="smoke", options=tuple({**lengths, **settings}.items()))
    unrepaired = original("resnet18", DIGITS, "smoke", device=torch_device(stage), outputs=stage.results)
    if settings or method != "archrepair":
        _, scenario = scenario_of(cell, unrepaired)
        result = method_of(cell.resolved(), resolve_tier("smoke")).repair(unrepaired.network, scenario.data)
        return f"{result.chosen}, {result.block}" if result.block else result.chosen
    folder = stage.work / "smoke"

    def keep(record, result, scenario) -> None:
        result.save(folder)
        result.report(stage.work / "report.html", scenario=scenario)

    record, *_ = run_full(cell, folder / "record.json", device=torch_device(stage), outputs=stage.results, unrepaired=unrepaired, keep=keep)
    return f"{record.accuracy(when='before')} % before, {record.accuracy()} % after"


def export(stage: Stage, suffix: str) -> str:
    from archrepair.data.datasets import load_dataset
    from archrepair.deploy.export import export_network
    from archrepair.experiments.originals import original

    needed = ("onnx", "onnxscript", "onnxruntime") if suffix == ".onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise Impossible(f"{', '.join(missing)}: not installed")
    unrepaired = original("resnet18", DIGITS, "smoke", device=torch_device(stage), outputs=stage.results)
    path = stage.work / f"network{suffix}"
    export_network(unrepaired.network, path, unrepaired.transform(load_dataset("digits", "test").images[:1]))
    return f"{path.stat().st_size:,} bytes"


def corruptions(stage: Stage) -> str:
    "Every kind gives on the device what it gives on the CPU, to a step in a few values."
    from archrepair.corruptions.catalogue import corrupt
    from archrepair.data.datasets import load_dataset

    images = load_dataset("digits", "test").images[:16]
    for name in CORRUPTIONS:
        there, here = corrupt(images.to(torch_device(stage)), name, 3).cpu(), corrupt(images, name, 3)
        difference = (there.int() - here.int()).abs()
        if difference.max() > 1 or (difference > 0).float().mean() > 1e-2:
            raise ArchrepairError(f"{name} differs from the CPU's by up to {int(difference.max())}")
    return f"{len(CORRUPTIONS)} kinds"


# --- tests and benchmarks


def tests(stage: Stage) -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "mark.gpu" in path.read_text(encoding="utf-8"):
            stage.do(path.relative_to(ROOT).as_posix(), partial(pytest, path))


def pytest(path: Path) -> str:
    "The tests of a file that need a GPU."
    if importlib.util.find_spec("pytest") is None:
        raise Impossible("pytest: not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout, run.stderr, flush=True)
    last = next((line for line in reversed(run.stdout.splitlines()) if line.strip()), "").strip("= ")
    if run.returncode:
        raise ArchrepairError(last or f"pytest ended with status {run.returncode}")
    if "passed" not in last:
        raise Impossible(f"{last}: torch sees no GPU in a process of its own")
    return last


def bench(stage: Stage) -> None:
    import torch
    from bench_device import CASES, Bench

    small = stage.tier == "smoke"
    made: list[Bench] = []

    def run(case: str) -> str:
        if not made:
            made.append(Bench(torch.device(torch_device(stage)), 0.125 if small else 1.0, 16 if small else 128, 1 if small else 5))
        ratios = [ratio.as_dict() for ratio in CASES[case](made[0])]
        path = stage.work / "bench.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        write_json(path, [*(ratio for ratio in earlier if ratio["case"] != case), *ratios])
        return "; ".join(f"{ratio['what']}: {ratio['median']:g} {ratio['unit']}" for ratio in ratios)

    for case in CASES:
        stage.do(case, partial(run, case))


# --- cells of the paper


def shortened(cell, share: float):
    "The same cell with that share of the tier's epochs, at least one of each kind; its record has a name of its own."
    from archrepair.experiments.methods import method_class

    if share == 1:
        return cell
    size, known = resolve_tier(cell.tier), settings_of(method_class(cell.method))
    lengths = {"search_epochs": size.search_epochs, "finetune_epochs": size.finetune_epochs,
               "epochs": size.search_epochs + size.finetune_epochs}
    options = {name: max(1, round(share * epochs)) for name, epochs in lengths.items() if name in known and epochs}
    return replace(cell, options=tuple(sorted({**options, **dict(cell.options)}.items())))


def cells_of(exhibit: str, dataset: str, tier: str, seed: int, share: float = 1.0) -> list:
    "What an exhibit requires for ResNet-18 and one seed."
    from archrepair.paper.exhibits import Settings, requirements

    settings = Settings.of(model="resnet18", dataset=dataset, tier=tier, seed=seed, seeds=1)
    return [replace(each, cell=shortened(each.cell, share)) for each in requirements((exhibit,), settings)]


def paper(stage: Stage) -> None:
    """The exhibits in their order for the first seed, then for the next; epochs are cut so that the first exhibit is whole.

    What an earlier call has planned is kept, and this one goes on with it. Where all is done at a share of the epochs, the next begins.
    """
    dataset = dataset_of(stage)
    rate = seconds_of_a_pass(stage, dataset)
    share = planned_share(stage) or share_in_time(stage, dataset, rate)
    plan = f"{PLAN}{share:g} of the epochs"
    stage.journal.write(stage.name, plan, "done", 0.0, f"{1e6 * rate:.1f} µs for a forward pass of an image in training")
    for each in sorted(larger for larger in EPOCHS if larger >= share):
        for seed in range(resolve_tier(stage.tier).seeds):
            for exhibit in ORDER:
                if stage.left < LEAST:
                    return
                run_exhibit(stage, exhibit, dataset, seed, each, rate)


def planned_share(stage: Stage) -> float | None:
    "The share of the epochs that an earlier call has begun with."
    names = [job.name for job in stage.journal.jobs() if job.stage == stage.name and job.name.startswith(PLAN)]
    return float(names[0].removeprefix(PLAN).split()[0]) if names else None


def share_in_time(stage: Stage, dataset: str, rate: float) -> float:
    "The share at which the first exhibit can be done with one seed."
    first = tasks_of(stage, cells_of(ORDER[0], dataset, stage.tier, 0))
    repairs = [expected(task, rate) for task in first if not task.trains_original]
    return epochs_share(repairs, sum(expected(task, rate) for task in first if task.trains_original), 0.9 * stage.left)


def run_exhibit(stage: Stage, exhibit: str, dataset: str, seed: int, share: float, rate: float) -> None:
    "What an exhibit lacks, as far as the time goes."
    from archrepair.paper.reproduce import run_task

    for task in tasks_of(stage, cells_of(exhibit, dataset, stage.tier, seed, share)):

        def job(task=task) -> str:
            run_task(task, stage.results, torch_device(stage))
            return outcome_of(stage, task)

        stage.do(f"{exhibit}, {task}", job, expected(task, rate, share))


def dataset_of(stage: Stage) -> str:
    "The tier's dataset where it lies here, else digits."
    from archrepair.data.datasets import load_dataset
    from archrepair.data.datasets import parse_version as parts

    dataset = DIGITS if stage.tier == "smoke" else resolve_tier(stage.tier).dataset
    try:
        load_dataset(parts(dataset)[0], "test", download=False)
    except ArchrepairError as error:
        stage.journal.write(stage.name, dataset, "impossible", 0.0, f"{first_line(error)}; {DIGITS} in its place")
        return DIGITS
    return dataset


def seconds_of_a_pass(stage: Stage, dataset: str) -> float:
    "Seconds of a forward pass of one image in training, measured."
    import torch

    from archrepair.experiments.forecast import time_training
    from archrepair.networks.models import create_model
    from archrepair.paper.plan import dataset_size

    size, pixels = resolve_tier(stage.tier), dataset_size(dataset).pixels
    network = create_model("resnet18", 10, image_size=pixels, width=size.width, stem_stride=size.stem_stride).to(torch_device(stage))
    return time_training(network, torch.zeros(size.batch_size, 3, pixels, pixels, device=torch_device(stage)))


def tasks_of(stage: Stage, requirements: list) -> list:
    "What is missing for some requirements, originals first."
    from archrepair.experiments.runs import Runs
    from archrepair.paper.exhibits import Settings
    from archrepair.paper.plan import Page, tasks

    page = Page("", (), Settings(), {}, tuple(requirements))
    return tasks([page], Runs(outputs=stage.results, device=torch_device(stage)))


def expected(task, rate: float, share: float = 1.0) -> float:
    "Seconds of a task from its counted passes, with a share of the epochs."
    from archrepair.paper.plan import dataset_size, estimate

    if task.trains_original:
        return 3 * dataset_size(task.cell.dataset).train * resolve_tier(task.cell.tier).train_epochs * rate
    evaluation = estimate(task.cell, len(task.versions), rate, repaired=True)
    if task.cell.method == "original":
        return evaluation
    return evaluation + share * (estimate(task.cell, len(task.versions), rate) - evaluation)


def outcome_of(stage: Stage, task) -> str:
    from archrepair.experiments.cells import Record

    path = task.cell.path(stage.results)
    if task.cell.method == "original" or not path.exists():
        return ""
    record = Record.read(path)
    return f"{record.accuracy(when='before'):.2f} % before, {record.accuracy():.2f} % after"


STAGES: dict[str, Callable[[Stage], None]] = {"machine": machine, "smoke": smoke, "tests": tests, "bench": bench, "paper": paper}


@contextlib.contextmanager
def device_of(name: str) -> Iterator[None]:
    "Where the device is only pretended, there is one inside."
    if name != "pretended":
        yield
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from support.pretended_gpu import PretendedGPU

    with PretendedGPU():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tier", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    stage = Stage(arguments.stage, arguments.device, arguments.tier, arguments.work,
                  Journal(arguments.journal, f"{arguments.device}, tier {arguments.tier}"), time.monotonic() + arguments.seconds)
    with device_of(arguments.device):
        STAGES[arguments.stage](stage)


if __name__ == "__main__":
    main()
