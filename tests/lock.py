"""Writes the two lock files from settings.ini: every run-time requirement at one release, with the SHA-256 of each of its files.

    python tests/lock.py            # needs uv: pip install uv

`requirements.lock` has everything but torch, `requirements-torch.lock` torch with what only it needs. They are apart because a machine
without a GPU wants torch's small builds for processors, which lie elsewhere: see Dockerfile. torch is the release that this environment
has, since that is the one the tests ran on; everything else is the newest that fits.
"""
import configparser
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.lock", "requirements-torch.lock")
OF_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEAD = """# {what}, with the SHA-256 of each file.
# Made from settings.ini by `python tests/lock.py`, and never edited; needs uv. Linux, macOS and Windows, Python {python} and newer.
# To install: pip install --require-hashes -r {name}
"""
WHAT = ("Everything that archrepair needs at run time but torch, at one release", "torch and torchvision, with what only they need")


def requirements() -> tuple[str, str]:
    "The run-time requirements, one a line, and the oldest Python."
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return "\n".join(config["DEFAULT"]["requirements"].split()), config["DEFAULT"]["min_python"]


def entries(text: str) -> list[str]:
    "The requirements of a compiled file, each with its hashes and without comments."
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    starts = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    return ["\n".join(lines[i:j]) for i, j in zip(starts, [*starts[1:], len(lines)])]


def locked(text: str) -> dict[str, str]:
    "Both lock files, by name, from what uv compiled."
    all_entries, python = entries(text), requirements()[1]
    parts = ([e for e in all_entries if not OF_TORCH.match(e)], [e for e in all_entries if OF_TORCH.match(e)])
    return {name: HEAD.format(what=what, name=name, python=python) + "\n".join(part) + "\n" for name, what, part in zip(FILES, WHAT, parts)}


def compile_all() -> str:
    "What uv makes of the requirements: releases and hashes, without a word on where they are from."
    wanted, python = requirements()
    pins = "\n".join(f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision"))
    command = ["uv", "pip", "compile", "-", "--universal", "--generate-hashes", "--python-version", python, "--no-header", "--no-annotate"]
    done = subprocess.run([*command], input=f"{wanted}\n{pins}\n", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"uv cannot resolve the requirements: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    for name, content in locked(compile_all()).items():
        (ROOT / name).write_text(content, encoding="utf-8")
        print(f"{name}: {len(entries(content))} packages")
