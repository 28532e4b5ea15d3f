"""What every input must keep to, whatever is in it: a result or one line, in ten seconds and 1 GiB, and nothing written elsewhere.

`make test` tries `SMOKE` inputs of each kind, always the same ones. `make fuzz` tries `FULL` in rounds, each a process with a seed of its
own (`tests/fuzz/run.py`): `ARCHREPAIR_FUZZ` tells it how many inputs to try, `ARCHREPAIR_FUZZ_COUNTS` where to add what came of them.
"""

import atexit
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import matplotlib.font_manager  # noqa: F401  # looks for fonts when it is imported
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image

from archrepair.cli.app import main
from archrepair.core.errors import ArchrepairError
from support.kinds import SMOKE, TESTS

try:
    import resource
except ImportError:  # Windows: no limit on memory there
    resource = None

Image.init()  # all formats, before imports are watched
SECONDS, BYTES = 10, 1 << 30
COUNTS: Counter[str] = Counter()  # "KIND result" and "KIND line"


def fuzz(kind: str) -> Callable:
    "Run a test on so many inputs of this kind: the same ones in `make test`, new ones in `make fuzz`."
    rounds = os.environ.get("ARCHREPAIR_FUZZ")
    phases = [Phase.explicit, Phase.generate, *([] if rounds else [Phase.shrink])]  # a round goes on; shrinking takes minutes
    return settings(
        max_examples=int(rounds or SMOKE[kind] // TESTS[kind]),
        deadline=None,
        derandomize=not rounds,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@atexit.register
def _add_counts() -> None:
    if COUNTS and (path := os.environ.get("ARCHREPAIR_FUZZ_COUNTS")):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(COUNTS) + "\n")


# --- what happens outside


class Trespass(BaseException):
    "An input had something done that none may: a file written elsewhere, a program started, another host asked."


class Overrun(BaseException):
    "An input took too long."


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"}  # their first argument is a path
_MOVES = {"os.rename", "os.link", "os.symlink"}  # the first two are
_STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.startfile",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "urllib.Request",
}
_inside: str | None = None  # the real path of the folder that may be written to, while an input is tried
_trespasses: list[str] = []


def _paths(event: str, arguments: tuple) -> tuple:
    "The paths that an event changes."
    if event == "open":
        return arguments[:1] if isinstance(arguments[2], int) and arguments[2] & _WRITES else ()
    return arguments[:1] if event in _CHANGES else arguments[:2] if event in _MOVES else ()


def _watch(event: str, arguments: tuple) -> None:
    "An audit hook: it stops what an input must not have done."
    if _inside is None or threading.current_thread() is not threading.main_thread():
        return
    for path in _paths(event, arguments):
        if isinstance(path, (str, bytes, os.PathLike)):
            real = os.path.realpath(os.fsdecode(path))
            if real != os.devnull and not f"{real}/".startswith((f"{_inside}/", f"{tempfile.gettempdir()}/")):
                _trespasses.append(f"{event} {real}")
                raise Trespass(_trespasses[-1])
    if event in _STARTS:
        _trespasses.append(f"{event} {arguments}")
        raise Trespass(_trespasses[-1])


sys.addaudithook(_watch)


@contextlib.contextmanager
def ground() -> Iterator[Path]:
    "A folder to write to, which is `HOME` too; the current folder, beside it, must stay as it is, and that of temporary files empty."
    root, here, temporary = Path(tempfile.mkdtemp(prefix="fuzz")).resolve(), os.getcwd(), tempfile.tempdir
    changed = {"ARCHREPAIR_HOME": str(root / "inside"), "HOME": str(root / "inside"), "COLUMNS": "120"}
    before = {name: os.environ.get(name) for name in changed}
    try:
        for name in ("inside", "elsewhere", "temporary"):
            (root / name).mkdir()
        tempfile.tempdir = str(root / "temporary")
        (root / "elsewhere" / "mine.txt").write_text("mine")
        os.chdir(root / "elsewhere")
        os.environ.update(changed)
        yield root / "inside"
        assert sorted(os.listdir(root)) == ["elsewhere", "inside", "temporary"] and not os.listdir(root / "temporary")
        assert os.listdir(root / "elsewhere") == ["mine.txt"] and (root / "elsewhere" / "mine.txt").read_text() == "mine"
    finally:
        tempfile.tempdir = temporary
        os.chdir(here)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(root, ignore_errors=True)


# --- time and memory


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    "Stop what computes for longer than `SECONDS`, or waits for six times as long; C code as soon as it returns."

    def stop(*_: object) -> None:
        raise Overrun(f"no end after {SECONDS} s")

    timers = {"SIGPROF": ("ITIMER_PROF", SECONDS), "SIGALRM": ("ITIMER_REAL", 6 * SECONDS)} if hasattr(signal, "setitimer") else {}
    before = {name: signal.signal(getattr(signal, name), stop) for name in timers}
    started = time.process_time()
    try:
        for timer, seconds in timers.values():
            signal.setitimer(getattr(signal, timer), seconds)
        yield
    finally:
        for name, (timer, _) in timers.items():
            signal.setitimer(getattr(signal, timer), 0)
            signal.signal(getattr(signal, name), before[name])
    assert time.process_time() - started < SECONDS, "too slow"


@contextlib.contextmanager
def _in_memory() -> Iterator[None]:
    "No more than `BYTES` beyond what the process has: whoever asks for more gets a `MemoryError`."
    if resource is None or not os.path.exists("/proc/self/statm"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _on_watch(inside: Path) -> Iterator[None]:
    "Nothing is written outside `inside`, and no program is started."
    global _inside
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _trespasses.clear()
    _inside = str(inside)
    try:
        yield
    finally:
        _inside = None
        sys.dont_write_bytecode = bytecode
    assert not _trespasses, _trespasses


# --- what comes of it


@dataclass(frozen=True)
class Outcome:
    "What an input came to: the `value` of a result, or the `line` that says why there is none."

    value: object = None
    line: str | None = None


def check_line(line: str) -> None:
    "One line, of a length that can be read, without what moves a cursor or colors a terminal."
    assert line and line.splitlines() == [line] and len(line) <= 700, line
    assert "Traceback" not in line and not [letter for letter in line if letter < " " or "\x7f" <= letter < "\xa0"], line


def attempt(kind: str, action: Callable[[], object], inside: Path, *, again: bool = False) -> Outcome:
    "Try one input: a result, or an `ArchrepairError` of one line; anything else fails. Looking at one `again` does not count."
    line = value = None
    with warnings.catch_warnings(), _in_time(), _in_memory(), _on_watch(inside):
        warnings.simplefilter("ignore")
        try:
            value = action()
        except ArchrepairError as error:
            line = str(error)
    COUNTS[f"{kind} {'result' if line is None else 'line'}"] += not again
    if line is not None:
        check_line(line)
    return Outcome(value, line)


def command(kind: str, arguments: list[str], inside: Path, *, again: bool = False) -> Outcome:
    "The same for a command line: status 0; 1 and one line on standard error; or 2 and a line on wrong usage. The value is what it printed."
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, newline="\n") for errors in ("strict", "backslashreplace"))
    status = 0

    def run() -> None:
        nonlocal status
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code or 0

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        outcome = attempt(kind, run, inside, again=True)
        out.flush()
        err.flush()
    COUNTS[f"{kind} {'line' if status else 'result'}"] += not again
    assert outcome.line is None
    said, complaint = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert status in (0, 1, 2), status
    if status == 1 and arguments[:1] == ["doctor"] and said:  # it says all that is wrong, and there is something
        assert "problem" in said, said
    elif status == 1:
        assert not said and complaint.startswith("archrepair: ") and complaint.endswith("\n"), (said, complaint)
        check_line(complaint[:-1])
    if status == 2:  # how the command is used, then the error, which repeats the words as they were typed
        assert not said and "Traceback" not in complaint and "Error: " in complaint, (said, complaint)
    return Outcome(said, complaint if status else None)


# --- what people and programs put where they should not

HOSTILE = [
    "",
    " ",
    "\0",
    "\n",
    "a\nb",
    "\x1b[31mred",
    "..",
    "../../up",
    "/",
    "~",
    "~no-such-user",
    "-",
    "--help",
    "%s%n",
    "{0}",
    "{x!r}",
    "nan",
    "NaN",
    "inf",
    "-1",
    "0",
    "1e999",
    "9" * 5000,
    "0x10",
    "1_000",
    "٣",
    "²",
    "None",
    "null",
    "true",
    "no",
    "a,b",
    "a=b",
    "a:b:3",
    "'",
    '"',
    "\\",
    "`",
    "|",
    "<xss-a>",
    '"><xss-b onclick=xss-c>',
    "</script><xss-d>",
    "<!--",
    "&lt;",
    "ünï",
    "e\u0301",
    "\u202e",
    "\u2028",
    "😀",
    "\udcff",
    "a" * 300,
    "x/" * 2500,
    "CON",
    "con.txt ",
    "*",
    "[",
    "$(touch xss)",
    "; touch xss",
]
text = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12))
filename = text.map(
    lambda name: (
        name.replace("/", "_")
        .replace("\0", "_")
        .encode("utf-8", "surrogateescape" if "\udcff" in name else "replace")[:120]
        .decode("utf-8", "surrogateescape")
    )
).filter(lambda name: name not in ("", ".", ".."))
number = st.one_of(
    st.integers(-3, 12), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**30, -1, 0, 0.5, float("nan"), float("inf")])
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)
broken = st.tuples(st.sampled_from(["whole"] * 6 + ["cut", "flipped", "zeroed", "longer", "empty"]), st.floats(0, 1), st.integers(1, 255))


def damage(content: bytes, how: tuple[str, float, int]) -> bytes:
    "A file cut off, with a bit flipped, a part zeroed or something behind it."
    kind, where, bits = how
    at = min(int(where * len(content)), max(len(content) - 1, 0))
    if kind == "flipped" and content:
        return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]
    return {
        "cut": content[:at],
        "zeroed": content[:at] + bytes(len(content) - at),
        "longer": content + bytes([bits]) * 300,
        "empty": b"",
    }.get(kind, content)


@st.composite
def mutations(draw: st.DrawFn, most: int = 3) -> list[tuple[int, str, object]]:
    "What to do to a few parts of a JSON value, for `mutate`."
    return draw(
        st.lists(
            st.tuples(st.integers(0, 10_000), st.sampled_from(["replace"] * 4 + ["remove", "rename", "repeat"]), junk),
            min_size=1,
            max_size=most,
        )
    )


def mutate(content: object, changes: list[tuple[int, str, object]]) -> object:
    "A JSON value with some of its parts, counted from the outside, replaced, removed, under another name or twice."
    root = {"": json.loads(json.dumps(content))}
    for where, how, value in changes:
        places: list[tuple[dict | list, object]] = []
        queue: list[object] = [root]
        while queue:
            parent = queue.pop(0)
            keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else []
            places += [(parent, key) for key in keys]
            queue += [parent[key] for key in keys]
        parent, key = places[where % len(places)]
        if how == "replace" or parent is root:
            parent[key] = value
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[str(value)] = parent.pop(key) if how == "rename" else parent[key]
    return root[""]
