"""A worker through every fault: whatever happened, the same command ends with the records of an undisturbed run.

`make test` injects one or two faults of each kind. `make faults` injects them by the hundred (`FAULTS=20` for each place) and writes their
counts into docs/reliability.md.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from archrepair.core.paths import Holder, Lock
from archrepair.experiments.cells import Record
from support import ROOT
from support.faults import PLACES, call, debris, die_at, finish, fork, furnish, records, start, stop_in

TIMES = int(os.environ.get("FAULTS", "0"))  # for each place to die; 0: the short form
SURVIVED: Counter[str] = Counter()
PAGE, BEGIN, END = ROOT / "docs" / "reliability.md", "<!-- faults: begin -->", "<!-- faults: end -->"
pytestmark = [pytest.mark.timeout(1200), pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")]
long = pytest.mark.skipif(not TIMES, reason="a long one: make faults")


@pytest.fixture(scope="module", autouse=True)
def counts(request):
    "What was survived, for the table of the docs; it is written where everything was run, and nothing has failed."
    yield
    if TIMES:
        print("\n" + "\n".join(f"| {kind} | {number} |" for kind, number in SURVIVED.items()), file=sys.__stderr__)
        page = PAGE.read_text(encoding="utf-8")
        if not request.session.testsfailed and SURVIVED.keys() >= counts_of(page).keys():
            PAGE.write_text(with_counts(page, SURVIVED, f"`make faults FAULTS={TIMES}`, {time.strftime('%Y-%m-%d')}"), encoding="utf-8")


def counts_of(page: str) -> dict[str, int]:
    "The table of faults in a page, by kind."
    table = page.partition(BEGIN)[2].partition(END)[0]
    return {kind: int(number) for kind, number in re.findall(r"(?m)^\| (.+?) \| (\d+) \|$", table)}


def with_counts(page: str, counts: Mapping[str, int], what: str) -> str:
    "The page with another table of faults."
    before, _, rest = page.partition(BEGIN)
    rows = "\n".join(f"| {kind} | {number} |" for kind, number in counts.items())
    table = f"{what}: {sum(counts.values())} faults, all of them survived.\n\n| fault | survived |\n|---|---|\n{rows}\n"
    return f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}"


def test_the_page_of_faults_can_be_written_again():
    page = PAGE.read_text(encoding="utf-8")
    counts = counts_of(page)
    assert counts["kill -9, search"] > 0 and sum(counts.values()) > 40
    again = with_counts(page, dict.fromkeys(counts, 20), "`make faults`")
    assert set(counts_of(again).values()) == {20} and with_counts(again, counts, "") == with_counts(page, counts, "")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "A home in which nothing went wrong: its job, and what its record says."
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    job = furnish(home)
    assert call(home, *job) == 0, home.with_suffix(".log").read_text()
    record, = records(home)
    return SimpleNamespace(home=home, job=job, records=records(home), record=Path(record))


def of_others(home: Path) -> dict[str, str]:
    "Digests of what other runs have in the same folders."
    files = [path for path in sorted(home.rglob("*")) if "others" in str(path) and path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def place(undisturbed, tmp_path):
    "A home with the original and the files of other runs, and `again()`, which runs the job once more and looks at all that is there."
    home = tmp_path / "home"
    shutil.copytree(undisturbed.home / "outputs/smoke/originals", home / "outputs/smoke/originals")
    folder = "/".join(undisturbed.record.parts[-3:-1])
    for name in ("originals/others.safetensors", "originals/.others.1.part.safetensors", f"records/{folder}/.others.1.part.json",
                 f"records/{folder}/others.checkpoints/expert.pt"):
        path = home / "outputs/smoke" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    others = of_others(home)

    job = undisturbed.job

    def again(*arguments: object, expected: object = undisturbed.records, **environment: str) -> None:
        assert call(home, *job, *arguments, **environment) == 0, home.with_suffix(".log").read_text()
        assert records(home) == expected
        assert [name for name in debris(home) if "others" not in name] == [] and of_others(home) == others

    return SimpleNamespace(home=home, job=job, record=home / undisturbed.record, again=again, log=home.with_suffix(".log"))


def wait_for(what, seconds: float = 300) -> None:
    "Until `what()` is true; a failure if it is not after so many seconds."
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def kill_at(place, where: str, number: int) -> None:
    status = call(place.home, *place.job, prepare=die_at(where, number))
    assert status == -signal.SIGKILL, f"{where} {number}: {status}\n{place.log.read_text()}"


# --- killed

def test_a_worker_that_is_killed_again_and_again(place, undisturbed):
    "In training, in the search, in a checkpoint, in fine-tuning, in the record: each call goes on where the one before was killed."
    original, = place.home.glob("outputs/smoke/originals/*-s0.safetensors")
    original.unlink()
    for where, number in (("training", 4), ("search", 2), ("checkpoint", 500), ("fine-tuning", 2), ("record", 500)):
        kill_at(place, where, number)
    assert not place.record.exists()
    place.again()
    assert Record.read(place.record).digest == Record.read(undisturbed.home / undisturbed.record).digest


def test_another_number_of_threads_is_in_the_record_and_changes_little(place, undisturbed):
    "Sums of another order: no more than two images of a set are answered otherwise. Measured: none (docs/reliability.md)."
    assert call(place.home, *place.job, "--threads", 2) == 0, place.log.read_text()
    one, two = Record.read(undisturbed.home / undisturbed.record), Record.read(place.record)
    assert (one.versions["threads"], two.versions["threads"]) == ("1", "2")
    for when in ("before", "after"):
        for name, score in one.metrics[when].items():
            assert abs(score["accuracy"] - two.accuracy(name, when)) <= 100 * 2.5 / score["n"]


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["search", "fine-tuning", "record", "checkpoint"])
def test_kills(place, where):
    for number in range(TIMES):
        steps = {"search": 2, "fine-tuning": 4}.get(where)
        kill_at(place, where, 1 + number % steps if steps else 1000 * number // TIMES)
        place.again()
        place.record.unlink()
        SURVIVED[f"kill -9, {where}"] += 1


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["training", "original"])
def test_kills_of_a_training(tmp_path, where):
    "The original that comes out is the same, bit for bit."
    dataset = furnish(tmp_path)[4]
    train, trained = ("train", "--dataset", dataset, "--tier", "smoke", "--device", "cpu"), {}
    for number in range(-1, TIMES // (1 if where == "training" else 4)):
        home = tmp_path / str(number)
        if number >= 0:
            assert call(home, *train, prepare=die_at(where, 1 + number % 18 if where == "training" else 199 * number)) == -signal.SIGKILL
        assert call(home, *train) == 0 and debris(home) == []
        trained[number], = (path.read_bytes() for path in home.glob("outputs/smoke/originals/*"))
        assert trained[number] == trained[-1]
        SURVIVED[f"kill -9, {where}"] += number >= 0
        shutil.rmtree(home)


def test_a_worker_that_is_told_to_stop_does_so_in_five_seconds(place):
    "Status 75 says that the same command goes on; locks are given back and nothing half-written is left."
    worker = start(place.home, *place.job)
    wait_for(lambda: list(place.home.rglob("search.pt")))
    asked = time.monotonic()
    worker.terminate()
    assert finish(worker) == 75 and time.monotonic() - asked < 5
    assert "the same command goes on from there" in place.log.read_text()
    assert not [name for name in debris(place.home) if "others" not in name and not name.endswith(".checkpoints")]
    place.again()


@pytest.mark.parametrize("where", ["search", "fine-tuning"])
def test_an_epoch_that_takes_too_long_is_saved_as_far_as_it_has_come(place, where):
    "SIGTERM comes in a step whose successors would take an hour each; what goes on from there ends with the undisturbed record."
    assert call(place.home, *place.job, prepare=partial(stop_in, where)) == 75
    assert time.time() - float((place.home / "asked").read_text()) < 5
    checkpoint = place.record.with_suffix(".checkpoints") / {"search": "search.pt", "fine-tuning": "finetune.pt"}[where]
    assert torch.load(checkpoint, weights_only=True)["place"]["steps"] == 1
    place.again()
    SURVIVED["SIGTERM in an epoch"] += 1


def _parent(home: str, arguments: tuple, pids: str) -> None:
    "A process that starts a worker and waits for it."
    child = os.fork()
    if not child:
        import archrepair.cli.worker as worker
        from archrepair.cli.app import main

        def watch(parent: int, over) -> None:
            Path(f"{pids}-watches").touch()
            real(parent, over)

        real, worker._watch_parent = worker._watch_parent, watch
        os.environ["ARCHREPAIR_HOME"] = home
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        main([*arguments, "--with-parent"])
    Path(pids).write_text(str(child))
    os.waitpid(child, 0)


def test_children_end_with_their_parent(place):
    "Here the child waits for a lock, and would for ever."
    pids = place.home / "child"
    with Lock(place.record):
        parent = fork(_parent, str(place.home), tuple(place.job), str(pids))
        wait_for(lambda: pids.exists() and pids.read_text())
        child = int(pids.read_text())
        wait_for(lambda: (place.home / "child-watches").exists())
        assert is_alive(child)
        parent.kill()
        parent.join()
        wait_for(lambda: not is_alive(child), 60)
    SURVIVED["kill -9 of a parent"] += 1


# --- damaged files

def damage(path: Path, how: str) -> None:
    "Cut a file in its middle, empty it, or turn bits of it."
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "turned":
        content[middle:middle + 64] = bytes(255 - byte for byte in content[middle:middle + 64])
    path.write_bytes(content[:{"cut": middle, "empty": 0, "turned": len(content)}[how]])


def test_damaged_files_are_made_again(place):
    "A record that is cut, a checkpoint that is cut and another with wrong bits; the record is kept aside."
    kill_at(place, "fine-tuning", 3)  # in its second epoch
    search, finetune = (next(place.home.rglob(f"{name}.pt")) for name in ("search", "finetune"))
    damage(search, "turned")
    damage(finetune, "cut")
    record = search.parent.with_suffix(".json")
    record.write_text('{"cell": {"method": "arch')
    place.again()
    assert (record.with_name(f"{record.name}.damaged")).read_text() == '{"cell": {"method": "arch'
    assert place.log.read_text().count("is damaged") == 3


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["cut", "empty", "turned"])
@pytest.mark.parametrize("name", ["search.pt", "finetune.pt", "run.json", "record"])
def test_damages(place, name, how):
    kill_at(place, "fine-tuning", 3)  # in its second epoch
    if name == "record":
        place.again()
    damage(place.record if name == "record" else place.record.with_suffix(".checkpoints") / name, how)
    place.again()
    SURVIVED[f"damaged {name}"] += 1


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_damaged_original_is_trained_again(tmp_path, how):
    home = tmp_path / "home"
    job = furnish(home)
    assert call(home, *job) == 0
    expected = records(home)
    original, = home.glob("outputs/smoke/originals/*.safetensors")
    before = original.read_bytes()
    damage(original, how)
    shutil.rmtree(home / "outputs/smoke/records")
    assert call(home, *job) == 0 and records(home) == expected and original.read_bytes() == before
    SURVIVED["damaged original"] += 1


# --- others at the same time

def _no_locks() -> None:
    "A network file system without locks and hard links, and a clock that jumps back and forth by days."
    def refuse(*arguments, **more):
        raise OSError(37, "No locks available")

    fcntl.flock = fcntl.lockf = os.link = refuse
    now, turn = time.time, [0]

    def jumping() -> float:
        turn[0] += 1
        return now() + (turn[0] % 3 - 1) * 200_000

    time.time = jumping


def test_two_workers_on_one_cell(place):
    "One computes, the other waits and finds the record: with no locks but those that every file system has, and whatever the clock says."
    workers = [start(place.home, *place.job, prepare=_no_locks) for _ in range(2)]
    assert [finish(worker) for worker in workers] == [0, 0]
    said = place.log.read_text()
    assert said.count("1 recorded, 0 there before") == 1 and said.count("0 recorded, 1 there before") == 1
    place.again()
    SURVIVED.update({"two workers on one cell": 1, "no locks, a clock that jumps": 1})


# --- disks

@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    "A disk of that size; only root can make one."
    folder.mkdir(parents=True)
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_an_output_that_is_read_only(undisturbed, tmp_path):
    "What is recorded is found; what is not fails for good, in one line."
    home, job = tmp_path / "home", undisturbed.job
    with small_disk(home, "20m") as remount:
        shutil.copytree(undisturbed.home / "outputs", home / "outputs")
        remount("ro")
        assert call(home, *job) == 0
        assert call(home, *job, "--seeds", "1") == 1
        assert "Read-only file system" in home.with_suffix(".log").read_text()
    SURVIVED["read-only output"] += 1


@long
@pytest.mark.timeout(3600)
def test_a_disk_that_is_full_at_any_write(undisturbed, tmp_path):
    "Status 75: there may be room later. Then the same command ends the work."
    weights = sum(path.stat().st_size for path in undisturbed.home.rglob("*.safetensors")) // 1024
    home, job = tmp_path / "home", undisturbed.job
    with small_disk(home, "100m") as remount:
        statuses = Counter()
        for extra in range(0, 40 * TIMES, 40):  # in KiB; a page is 4
            shutil.copytree(undisturbed.home / "outputs/smoke/originals", home / "outputs/smoke/originals")
            remount(f"size={weights + 64 + extra}k")
            statuses[status := call(home, *job)] += 1
            assert status in (0, 75), home.with_suffix(".log").read_text()
            remount("size=100m")
            assert call(home, *job) == 0 and records(home) == undisturbed.records and debris(home) == []
            shutil.rmtree(home / "outputs")
            SURVIVED["disk full"] += status == 75
        assert statuses[75] >= TIMES // 2, statuses


# --- cells that fail

def _failing(reason: str) -> None:
    import archrepair.experiments.runs as runs
    from archrepair.core.errors import ArchrepairError

    kinds = {"for good": ArchrepairError("no failures to repair"), "for now": MemoryError("the machine is small"), "a fault": KeyError("x")}

    def run(cell, **more):
        if cell.seed == 1:
            raise kinds[reason]
        return real(cell, **more)

    real, runs.run = runs.run, run


@pytest.mark.parametrize(("reason", "status"), [("for good", 1), ("for now", 75), ("a fault", 1)])
def test_a_cell_that_always_fails_does_not_keep_the_others(undisturbed, tmp_path, reason, status):
    home, job = tmp_path / "home", undisturbed.job
    shutil.copytree(undisturbed.home, home)
    for attempt in (1, 2):
        assert call(home, *job, "--seeds", "1,0", "--attempt", attempt, prepare=partial(_failing, reason)) == status
    assert records(home) == undisturbed.records
    failure, = home.rglob("*.failed")
    assert json.loads(failure.read_text())["transient"] == (status == 75)
    assert home.with_suffix(".log").read_text().count("1 of 2 seeds failed; seed 1: ") == 2
    assert home.with_suffix(".log").read_text().count("Traceback") == {"for good": 0, "for now": 2, "a fault": 1}[reason]
    SURVIVED["cells that always fail"] += 1


# --- Snakemake

@long
@pytest.mark.timeout(3600)
def test_snakemake_is_killed_and_its_workers_end(tmp_path):
    home = tmp_path / "home"
    shutil.copytree(ROOT / "workflow", home / "workflow")
    command = [Path(sys.executable).with_name("snakemake"), "--profile", "workflow/profiles/local", "--cores", "1", "--configfile",
               "workflow/.test/config.yaml", "--config", "methods=['retrain:epochs=2']", "seeds=[0,1]"]
    environment = {**os.environ, "ARCHREPAIR_HOME": str(home), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home / "cache")}
    for sign in ("*.checkpoint.pt", "*.checkpoints", "*-s0-*.json"):
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda sign=sign, process=process: list(home.rglob(sign)) or process.poll() is not None, 900)
        holders = [Holder.read(path) for path in home.rglob("*.lock")]  # None: released since
        workers = {holder.pid for holder in holders if holder} - {process.pid}
        process.kill()
        process.wait()
        wait_for(lambda workers=workers: not any(map(is_alive, workers)), 30)
        SURVIVED["kill -9 of Snakemake"] += 1
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(records(home)) == 2 and debris(home) == []


def test_every_place_is_one_that_is_reached():
    assert set(PLACES) == {"training", "search", "fine-tuning", "record", "checkpoint", "original"}
