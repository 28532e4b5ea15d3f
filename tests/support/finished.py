"""A project folder with one finished repair, made once for all tests that look at one; and what is expected of a failing command."""
import atexit
import contextlib
import functools
import hashlib
import io
import shutil
import tempfile
from pathlib import Path

import pytest

from archrepair.cli.app import main

DATASET = "digits:brightness:5"
REPAIR = ("repair", "--tier", "smoke", "--dataset", DATASET, "--search-epochs", "2", "--finetune-epochs", "1")
ORIGINAL = Path("outputs", "smoke", "originals", "digits-resnet18-s0.safetensors")
FILES = {"record.json", "repair.json", "repaired.safetensors", "report.html", "MODEL_CARD.md"}


@functools.cache
def finished() -> Path:
    "A home in which an original was trained and `REPAIR` was run to its end, into `outputs/repair`; only to be read."
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        patch.setenv("ARCHREPAIR_HOME", str(folder))
        with pytest.raises(SystemExit) as ended:
            main([*REPAIR])
    assert not ended.value.code
    return folder


def furnish(folder: Path, *, repaired: bool = True) -> Path:
    "A home of one's own that begins as `finished`, or with its trained original alone."
    shutil.copytree(finished() / "outputs" / "smoke", folder / "outputs" / "smoke")
    if repaired:
        shutil.copytree(finished() / "outputs" / "repair", folder / "outputs" / "repair")
    return folder


def tree(folder: Path) -> dict[str, str]:
    "Every file and folder below one, with a digest of what is in it."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(folder.rglob("*"))}


def command(*arguments: object) -> int:
    "Run a command in this process; its exit status."
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return ended.value.code or 0


def fails(capsys, *arguments: object) -> str:
    "A command that must fail as a user's mistake: status 1, nothing on stdout, one line on stderr, which is returned."
    capsys.readouterr()
    status = command(*arguments)
    out, err = capsys.readouterr()
    check_failure(status, out, err)
    return err.removeprefix("archrepair: ").rstrip("\n")


def check_failure(status: int, out: str, err: str) -> None:
    assert status == 1 and out == ""
    assert err.startswith("archrepair: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) < 600 and "Traceback" not in err
