"""A worker through every fault: whatever happened, the same command ends with the records of an undisturbed run.

`make test` injects one or two faults of each kind. `make faults` injects them by the hundred (`FAULTS=20` for each place) and prints the
counts that stand in docs/reliability.md.
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from archrepair.core.paths import Holder, Lock
from archrepair.core.tiers import TIERS
from archrepair.data.datasets import load_dataset
from archrepair.experiments.originals import build_network, weights_of
from archrepair.networks.weights import save_weights
from support import ROOT
from support.faults import JOB, PLACES, call, debris, die_at, finish, records, start

TIMES = int(os.environ.get("FAULTS", "0"))  # for each place to die; 0: the short form
RECORD = Path("outputs/smoke/records/digits~fog~3/resnet18")
SURVIVED: Counter[str] = Counter()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")
long = pytest.mark.skipif(not TIMES, reason="a long one: make faults")


@pytest.fixture(scope="module", autouse=True)
def counts():
    "What was survived, for the table of the docs."
    yield
    if TIMES:
        print("\n" + "\n".join(f"| {kind} | {number} |" for kind, number in SURVIVED.items()), file=sys.__stderr__)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "A home in which nothing went wrong, and what its record says. Its original is untrained, so that it need not be waited for."
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    save_weights(build_network("resnet18", load_dataset("digits"), TIERS["smoke"]), str(weights_of("resnet18", "digits", "smoke", 0, home / "outputs")))
    assert call(home, *JOB) == 0, home.with_suffix(".log").read_text()
    return SimpleNamespace(home=home, records=records(home))


def of_others(home: Path) -> dict[str, str]:
    "Digests of what other runs have in the same folders."
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(home.rglob("*")) if "others" in str(path) and path.is_file()}


@pytest.fixture
def place(undisturbed, tmp_path):
    "A home with the original and the files of other runs, and `again()`, which runs the job once more and looks at all that is there."
    home = tmp_path / "home"
    shutil.copytree(undisturbed.home / "outputs/smoke/originals", home / "outputs/smoke/originals")
    for name in ("originals/others.safetensors", "originals/.others.1.part.safetensors", "records/digits~fog~3/resnet18/.others.1.part.json",
                 "records/digits~fog~3/resnet18/others.checkpoints/expert.pt"):
        path = home / "outputs/smoke" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    others = of_others(home)

    def again(*arguments: object, expected: object = undisturbed.records, **environment: str) -> None:
        assert call(home, *JOB, *arguments, **environment) == 0, home.with_suffix(".log").read_text()
        assert records(home) == expected
        assert [name for name in debris(home) if "others" not in name] == [] and of_others(home) == others

    return SimpleNamespace(home=home, again=again, log=home.with_suffix(".log"))


def kill_at(place, where: str, number: int) -> None:
    status = call(place.home, *JOB, prepare=die_at(where, number))
    assert status == -signal.SIGKILL, f"{where} {number}: {status}\n{place.log.read_text()}"


# --- killed

def test_a_worker_that_is_killed_again_and_again(place):
    "In the search, in a checkpoint, in fine-tuning, in the record: each call goes on where the one before was killed."
    for where, number in (("search", 3), ("checkpoint", 500), ("fine-tuning", 12), ("record", 500)):
        kill_at(place, where, number)
    assert not list((place.home / RECORD).glob("arch*.json"))
    place.again()


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["search", "fine-tuning", "record", "checkpoint"])
def test_kills(place, undisturbed, where):
    finished = place.home / RECORD
    for number in range(TIMES):
        kill_at(place, where, 1 + number if where in ("search", "fine-tuning") else 1000 * number // TIMES)
        place.again()
        for record in finished.glob("arch*.json"):
            record.unlink()
        SURVIVED[f"kill -9, {where}"] += 1


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["training", "original"])
def test_kills_of_a_training(tmp_path, where):
    "The original that comes out is the same, bit for bit."
    train, trained = ("train", "--tier", "smoke", "--device", "cpu"), {}
    for number in range(-1, TIMES // (1 if where == "training" else 4)):
        home = tmp_path / str(number)
        if number >= 0:
            assert call(home, *train, prepare=die_at(where, 1 + 7 * number if where == "training" else 199 * number)) == -signal.SIGKILL
        assert call(home, *train) == 0 and debris(home) == []
        trained[number], = (path.read_bytes() for path in home.glob("outputs/smoke/originals/*"))
        assert trained[number] == trained[-1]
        SURVIVED[f"kill -9, {where}"] += number >= 0
        shutil.rmtree(home)


def test_a_worker_that_is_told_to_stop_does_so_in_five_seconds(place):
    "Status 75 says that the same command goes on; locks are given back and nothing half-written is left."
    worker = start(place.home, *JOB)
    until = time.monotonic() + 60
    while not list(place.home.rglob("search.pt")) and time.monotonic() < until:
        time.sleep(0.02)
    asked = time.monotonic()
    worker.terminate()
    assert finish(worker) == 75 and time.monotonic() - asked < 5
    assert "the same command goes on from there" in place.log.read_text()
    assert not [name for name in debris(place.home) if "others" not in name and not name.endswith(".checkpoints")]
    place.again()


def _parent(home: str, arguments: tuple, pids: str) -> None:
    "A process that starts a worker and waits for it."
    child = os.fork()
    if not child:
        from archrepair.cli.app import main

        os.environ["ARCHREPAIR_HOME"] = home
        os.close(2)
        main([*arguments, "--with-parent"])
    Path(pids).write_text(str(child))
    os.waitpid(child, 0)


def test_children_end_with_their_parent(place):
    "Here the child waits for a lock, and would for ever."
    path = next(iter(records(place.home)), str(RECORD / "archrepair.json"))
    lock = Lock(place.home / RECORD / Path(path).name)
    from support.faults import _server

    pids = place.home / "child"
    job = [str(part) for part in JOB]
    from archrepair.cli.worker import seeds_of
    from archrepair.experiments.cells import Cell
    from archrepair.experiments.runs import method_cell

    assert seeds_of("0") == [0]
    cell = method_cell(job[job.index("--method") + 1], Cell(dataset="digits:fog:3", tier="smoke"))
    lock = Lock(cell.path(place.home / "outputs"))
    with lock:
        parent = _server().Process(target=_parent, args=(str(place.home), tuple(job), str(pids)))
        parent.start()
        until = time.monotonic() + 60
        while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        child = int(pids.read_text())
        time.sleep(1)
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        parent.join()
        until = time.monotonic() + 10
        while Path(f"/proc/{child}").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert not Path(f"/proc/{child}").exists()
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
    kill_at(place, "fine-tuning", 30)
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
    kill_at(place, "fine-tuning", 30)
    if name == "record":
        place.again()
    for path in place.home.glob(f"{RECORD}/archrepair*" + (".json" if name == "record" else f"/{name}")):
        damage(path, how)
    place.again()
    SURVIVED[f"damaged {name}"] += 1


@long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_damaged_original_is_trained_again(tmp_path, how):
    home, job = tmp_path / "home", [*JOB[:2], "retrain:epochs=1", *JOB[3:]]
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
    workers = [start(place.home, *JOB, prepare=_no_locks) for _ in range(2)]
    assert [finish(worker) for worker in workers] == [0, 0]
    said = place.log.read_text()
    assert said.count("1 recorded, 0 there before") == 1 and said.count("0 recorded, 1 there before") == 1
    place.again()
    SURVIVED.update({"two workers on one cell": 1, "no locks, a clock that jumps": 1})


def test_a_lock_of_a_killed_process_is_taken_over_and_one_of_another_host_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    killed = Holder("here", Holder.this().machine, 2**22 + 1, "1", "")
    elsewhere = Holder("there", "another boot", 1, "1", "")
    with monkeypatch.context() as patch:
        patch.setattr("archrepair.core.paths.SILENCE", 0.3)
        for holder, least in ((killed, 0), (elsewhere, 0.3)):
            (tmp_path / "file.json.lock").write_text(json.dumps(vars(holder)))
            began = time.monotonic()
            with Lock(path):
                assert time.monotonic() - began >= least
            assert not list(tmp_path.iterdir())


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
    home = tmp_path / "home"
    with small_disk(home, "20m") as remount:
        shutil.copytree(undisturbed.home / "outputs", home / "outputs")
        remount("ro")
        assert call(home, *JOB) == 0
        assert call(home, *JOB, "--seeds", "1") == 1
        assert "Read-only file system" in home.with_suffix(".log").read_text()
    SURVIVED["read-only output"] += 1


@long
@pytest.mark.timeout(3600)
def test_a_disk_that_is_full_at_any_write(undisturbed, tmp_path):
    "Status 75: there may be room later. Then the same command ends the work."
    weights = sum(path.stat().st_size for path in undisturbed.home.rglob("*.safetensors")) // 1024
    home = tmp_path / "home"
    with small_disk(home, "100m") as remount:
        statuses = Counter()
        for extra in range(0, 40 * TIMES, 40):  # in KiB; a page is 4
            shutil.copytree(undisturbed.home / "outputs/smoke/originals", home / "outputs/smoke/originals")
            remount(f"size={weights + 64 + extra}k")
            statuses[status := call(home, *JOB)] += 1
            assert status in (0, 75), home.with_suffix(".log").read_text()
            remount("size=100m")
            assert call(home, *JOB) == 0 and records(home) == undisturbed.records and debris(home) == []
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
    home = tmp_path / "home"
    shutil.copytree(undisturbed.home, home)
    for attempt in (1, 2):
        assert call(home, *JOB, "--seeds", "1,0", "--attempt", attempt, prepare=partial(_failing, reason)) == status
    assert records(home) == undisturbed.records
    failure, = home.rglob("*.failed")
    assert json.loads(failure.read_text())["transient"] == (status == 75)
    assert home.with_suffix(".log").read_text().count("0 recorded, 1 there before, 1 failed") == 2
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
        until = time.monotonic() + 300
        while not list(home.rglob(sign)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        workers = {Holder.read(path).pid for path in home.rglob("*.lock")} - {process.pid}
        process.kill()
        process.wait()
        until = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        SURVIVED["kill -9 of Snakemake"] += 1
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(records(home)) == 2 and debris(home) == []
    assert len(re.findall(r"\d", str(len(list(home.glob("outputs/smoke/originals/*.safetensors")))))) == 1


def test_every_place_is_one_that_is_reached():
    assert set(PLACES) == {"training", "search", "fine-tuning", "record", "checkpoint", "original"}
