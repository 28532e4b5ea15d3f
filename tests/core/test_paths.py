"""Home is the environment's, else the checkout's, else the current folder; a file is made by one process at a time."""
import json
import multiprocessing
import os
import time
from dataclasses import asdict

import pytest

import archrepair.core.paths as paths
from archrepair.core.errors import ArchrepairError
from archrepair.core.paths import Held, Holder, Lock, find_root, home


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A folder that looks like a checkout of archrepair, with two folders in it."
    monkeypatch.delenv("ARCHREPAIR_HOME", raising=False)
    folder = tmp_path / "checkout"
    (folder / "nbs" / "tutorials").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = archrepair\n")
    return folder


def test_a_checkout_is_found_from_any_depth(checkout, monkeypatch):
    for folder in (checkout, checkout / "nbs", checkout / "nbs" / "tutorials"):
        assert find_root(folder / "any.ipynb") == checkout
        monkeypatch.chdir(folder)
        assert home() == checkout


def test_a_nearer_checkout_wins_and_another_projects_settings_do_not(checkout):
    (checkout / "nbs" / "settings.ini").write_text("[DEFAULT]\nlib_name = fastai\n")
    assert find_root(checkout / "nbs" / "any.ipynb") == checkout
    (checkout / "nbs" / "settings.ini").write_text("[DEFAULT]\nlib_name=archrepair\n")
    assert find_root(checkout / "nbs" / "any.ipynb") == checkout / "nbs"


def test_settings_that_cannot_be_read_are_passed_over(checkout):
    (checkout / "nbs" / "settings.ini").write_bytes(b"\xff\xfe\x00lib_name")
    (checkout / "nbs" / "tutorials" / "settings.ini").mkdir()
    assert find_root(checkout / "nbs" / "tutorials" / "any.ipynb") == checkout


def test_without_a_checkout_home_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ARCHREPAIR_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_root(tmp_path / "any.ipynb") is None and home() == tmp_path


def test_the_environment_comes_first_unless_it_is_empty(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("ARCHREPAIR_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("ARCHREPAIR_HOME", "")
    assert home() == checkout


# --- locks

def _count(folder: str, turns: int) -> None:
    "Add 1 to a number in a file, which needs a lock: reading and writing are two steps."
    for _ in range(turns):
        with Lock(os.path.join(folder, "number")) as lock:
            before = int(lock.path.read_text())
            time.sleep(0.002)
            lock.path.write_text(str(before + 1))


def test_one_process_at_a_time(tmp_path):
    (tmp_path / "number").write_text("0")
    processes = [multiprocessing.get_context("fork").Process(target=_count, args=(str(tmp_path), 10)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "number").read_text() == "30" and [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_process_holds_a_file_several_times_over_and_others_are_told_by_whom(tmp_path):
    with Lock(tmp_path / "new" / "file.json") as outer:
        with Lock(tmp_path / "new" / "file.json"):
            pass
        assert Holder.read(outer.file) == outer.holder and outer.holder.pid == os.getpid() and not outer.holder.ended
        outer._ours.clear()  # as another process sees it
        with pytest.raises(Held, match=f"is being made by process {os.getpid()} on "):
            Lock(tmp_path / "new" / "file.json").acquire(wait=False)
        outer._ours[outer._key] = 1
    assert not list(tmp_path.iterdir()), "the folder that was made for it is gone, too"


@pytest.mark.parametrize(("machine", "pid", "least"), [(None, 2**22 + 1, 0), (None, os.getpid(), 0), ("another boot", 1, 0.3)],
                         ids=["no such process", "a process that began later", "another machine"])
def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path, monkeypatch, machine, pid, least):
    "On this machine at once, also where its number belongs to another by now; of another machine when nobody has touched it for long."
    monkeypatch.setattr(paths, "SILENCE", 0.3)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # no clock but the one that counts seconds is looked at
    holder = Holder("there", machine or Holder.this().machine, pid, "1", "")
    if machine is None and not Holder.this().started:
        pytest.skip("the system does not say which processes there are")
    (tmp_path / "file.json.lock").write_text(json.dumps(asdict(holder)))
    (tmp_path / ".file.1.part.json").write_text("half")
    (tmp_path / ".file2.1.part.json").write_text("that of another file")
    began = time.monotonic()
    with Lock(tmp_path / "file.json"):
        assert time.monotonic() - began >= least
    assert [path.name for path in tmp_path.iterdir()] == [".file2.1.part.json"]


def test_a_lock_that_is_touched_is_never_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SILENCE", 0.4)
    monkeypatch.setattr(paths, "BEAT", 0.05)
    lock = Lock(tmp_path / "file.json").acquire()
    content = json.loads(lock.file.read_text())
    lock.holder = Holder(**content | {"machine": "another boot"})
    lock.file.write_text(json.dumps(asdict(lock.holder)))
    lock._ours.clear()
    other = multiprocessing.get_context("fork").Process(target=Lock(tmp_path / "file.json").acquire)
    other.start()
    other.join(1.5)
    assert other.is_alive(), "it waits"
    other.kill()
    other.join()
    assert Holder.read(lock.file) == lock.holder
    lock._released.set()


def test_a_lock_in_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchrepairError, match="cannot write .*x.json.lock.*choose a folder"):
        Lock(tmp_path / "file" / "x.json").acquire()
