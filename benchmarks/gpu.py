"""Everything worth doing on a GPU that is lent for N minutes: `make gpu MINUTES=10`.

    python benchmarks/gpu.py [--minutes 10] [--device cuda] [--tier paper] [--out outputs/gpu]

Five stages, each with its share of the time, which no earlier one can use up: what the machine is, a smoke run of every path, the tests
that need a GPU, benchmarks, and cells of ResNet-18 on CIFAR-10 in the order of Tables 9, 5 and 7. A stage is a process of its own
(`gpu_stages.py`), so one that hangs or crashes costs no more than its share. A second call goes on with what is not done. All that is
worth keeping is in one folder of at most 8 files and 16 MB, also when the call is interrupted. No network is needed. The status is 0
where nothing failed that could have been done. `--device pretended --tier smoke` goes through all of it on a GPU that is not there.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from archrepair.core.errors import write_text  # noqa: E402

STAGES = Path(__file__).with_name("gpu_stages.py")
SHARES = {"machine": 0.06, "smoke": 0.22, "tests": 0.10, "bench": 0.14, "paper": 0.45}  # of the time; the rest is for packing
EPOCHS = (1.0, 0.5, 0.2, 0.1, 0.05)  # shares of a cell's epochs: of few minutes a small table is more use than a part of a large one
FILES, BYTES = 8, 16 << 20  # what may be kept
RESTART = 3  # the status of a stage whose process can go on no longer, though there is more to do
SHOWN = 20  # jobs of one outcome that the summary names
KEPT = ("records", "robust", "localizations")  # folders of small JSON files, of which one file is made


@dataclass(frozen=True)
class Job:
    """What became of one job of a stage, on a device and at a tier.

    `outcome`: `begun`, `done`, `failed`, `impossible` (something is missing here), or `left` (there was no time); `line` says more.
    """

    stage: str
    name: str
    outcome: str
    seconds: float = 0.0
    line: str = ""
    on: str = ""


class Journal:
    "A file with a line for each thing that happens to a job; the last one counts. `on` names device and tier: each has jobs of its own."

    def __init__(self, path: Path, on: str):
        self.path, self.on = path, on

    def write(self, stage: str, name: str, outcome: str, seconds: float = 0.0, line: str = "") -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Job(stage, name, outcome, round(seconds, 1), line, self.on))) + "\n")

    def jobs(self) -> list[Job]:
        "What became of every job so far, in the order in which they first came."
        latest: dict[tuple[str, str], Job] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for text in lines:
            try:
                job = Job(**json.loads(text))
            except (ValueError, TypeError):  # cut off by a full disk or a killed process
                continue
            if job.on == self.on:
                latest[job.stage, job.name] = job
        return list(latest.values())

    def outcome(self, stage: str, name: str) -> str:
        return next((job.outcome for job in self.jobs() if (job.stage, job.name) == (stage, name)), "")

    def compact(self) -> None:
        "Keep one line of each job of this device and tier, and all of the others."
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        others = [line for line in lines if f'"on": {json.dumps(self.on)}' not in line]
        write_text(self.path, "\n".join([*others, *(json.dumps(asdict(job)) for job in self.jobs())]) + "\n")


def ends(seconds: float, shares: Mapping[str, float] = SHARES) -> dict[str, float]:
    "When each stage must have ended, in seconds from the start: what one leaves over goes to the next, and none takes from a later one."
    total, result = 0.0, {}
    for stage, share in shares.items():
        total += share
        result[stage] = total * seconds
    return result


def epochs_share(whole: Sequence[float], fixed: float, seconds: float) -> float:
    """The largest share of their epochs at which repairs of `whole` seconds each end in time, with `fixed` seconds for all else.

    The least of `EPOCHS` where none is small enough.
    """
    return next((share for share in EPOCHS if share * sum(whole) + fixed <= seconds), EPOCHS[-1])


def fitting(files: Mapping[str, int], most_files: int = FILES, most_bytes: int = BYTES) -> list[str]:
    "Which of some files, from the most to the least important, with their sizes, fit into a folder."
    chosen, used = [], 0
    for name, size in files.items():
        if len(chosen) < most_files and used + size <= most_bytes:
            chosen.append(name)
            used += size
    return chosen


def run_stage(stage: str, arguments: argparse.Namespace, end: float) -> None:
    "Run a stage until it has ended, or until its time has: then its process group is killed, whatever it is doing."
    journal = journal_of(arguments)
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, str(STAGES), stage, "--seconds", f"{left:.1f}", "--device",
                   arguments.device, "--tier", arguments.tier, "--journal", str(journal.path), "--work", str(arguments.work)]
        environment = {**os.environ, "ARCHREPAIR_PROGRESS": "0", "MPLBACKEND": "agg"}
        with (arguments.work / f"{stage}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       start_new_session=True)
            try:
                status = process.wait(left)
            except subprocess.TimeoutExpired:
                return
            finally:  # what it has started ends with it, also on Ctrl-C
                kill_group(process)
        if status == RESTART:
            continue
        if status:
            journal.write(stage, "(the stage)", "failed", 0.0, last_line(arguments.work / f"{stage}.log") or f"ended with status {status}")
        return


def kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def journal_of(arguments: argparse.Namespace) -> Journal:
    return Journal(arguments.out / "jobs.jsonl", f"{arguments.device}, tier {arguments.tier}")


def records(work: Path) -> Iterator[tuple[str, str]]:
    "The small files of all cells: path below the folder of results, and content."
    for path in sorted(work.glob("results/*/*/**/*.json")):
        if path.relative_to(work).parts[2] in KEPT:
            yield path.relative_to(work).as_posix(), path.read_text(encoding="utf-8")


def unpack(out: Path, work: Path) -> None:
    "Put what an earlier call kept, perhaps on another machine, where the cells look for it."
    kept = out / "records.jsonl"
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else ():
        entry = json.loads(line)
        if not (work / entry["path"]).exists():
            write_text(work / entry["path"], entry["text"])


def pack(work: Path, out: Path, summary: str) -> None:
    "Keep what is worth it, the most important first; what the folder has no room for is named in the summary."
    contents = {"summary.md": summary.encode(),
                "records.jsonl": "".join(json.dumps({"path": path, "text": text}) + "\n" for path, text in records(work)).encode()}
    for name in ("machine.json", "bench.json", "report.html"):
        contents |= {name: (work / name).read_bytes()} if (work / name).exists() else {}
    logs = [f"== {path.stem}\n{path.read_text(encoding='utf-8', errors='replace')[-200_000:]}" for path in sorted(work.glob("*.log"))]
    contents["logs.txt"] = "\n".join(logs).encode()
    journal = out / "jobs.jsonl"
    room = BYTES - (journal.stat().st_size if journal.exists() else 0) - 4096  # for the line below
    chosen = fitting({name: len(content) for name, content in contents.items()}, FILES - 1, room)
    if dropped := [name for name in contents if name not in chosen]:
        contents["summary.md"] += f"\nNot kept, for want of room: {', '.join(dropped)}.\n".encode()
    for name, content in contents.items():
        if name in chosen:
            write_text(out / name, content.decode(errors="replace"))
        else:
            (out / name).unlink(missing_ok=True)


def summarize(jobs: Iterable[Job], seconds: float) -> str:
    "What was done, what failed, and what could not be done, as Markdown."
    jobs = list(jobs)
    lines = [f"{seconds:.0f} s.", "", "| stage | done | failed | could not be done | left for another call | seconds |",
             "|---|---|---|---|---|---|"]
    for stage in SHARES:
        of_stage = [job for job in jobs if job.stage == stage]
        count = Counter(job.outcome for job in of_stage)
        cells = (stage, count["done"], count["failed"], count["impossible"], count["left"] + count["begun"],
                 f"{sum(job.seconds for job in of_stage):.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for title, outcomes in (("Failed", {"failed"}), ("What could not be done", {"impossible"}),
                            ("Left for another call", {"begun", "left"}), ("Done", {"done"})):
        some = [job for job in jobs if job.outcome in outcomes]
        named = some if "left" not in outcomes else some[:SHOWN]
        lines += ["", f"{title}: {len(some)}", *(f"- {job.stage}: {job.name}{f': {job.line}' if job.line else ''}" for job in named)]
        lines += [f"- and {len(some) - len(named)} more"] * (len(some) > len(named))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "pretended"))
    parser.add_argument("--tier", default="paper", choices=("smoke", "lite", "paper"), help="of the cells; the smoke runs are small at any")
    parser.add_argument("--only", nargs="*", choices=tuple(SHARES), default=None, metavar="STAGE")
    parser.add_argument("--out", type=Path, default=None, help="folder of what is kept; default: outputs/gpu")
    arguments = parser.parse_args()
    started = time.monotonic()
    suffix = "" if arguments.device == "cuda" else f"-{arguments.device}"
    arguments.out = (arguments.out or ROOT / "outputs" / f"gpu{suffix}").absolute()
    arguments.work = arguments.out.with_name(f"{arguments.out.name}.part")  # checkpoints, weights and logs, which git ignores
    arguments.work.mkdir(parents=True, exist_ok=True)
    for log in arguments.work.glob("*.log"):
        log.unlink()
    unpack(arguments.out, arguments.work)
    journal = journal_of(arguments)
    try:
        for stage, end in ends(60 * arguments.minutes).items():
            if arguments.only is None or stage in arguments.only:
                print(f"{stage}: until {end:.0f} s", flush=True)
                run_stage(stage, arguments, started + end)
                outcomes = Counter(job.outcome for job in journal.jobs() if job.stage == stage)
                print("  " + ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()), flush=True)
            if stage == "machine" and any(job.stage == stage and job.outcome == "failed" for job in journal.jobs()):
                break  # nothing else could work
    finally:
        journal.compact()
        summary = summarize(journal.jobs(), time.monotonic() - started)
        pack(arguments.work, arguments.out, summary)
    print(f"\n{summary}\n{arguments.out}")
    sys.exit(any(job.outcome == "failed" for job in journal.jobs()))


if __name__ == "__main__":
    main()
