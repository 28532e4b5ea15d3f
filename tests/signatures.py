"""What is promised to stay as it is: the signatures of public names, and the options of the commands.

    python tests/signatures.py      # writes docs/signatures.txt, after a change that is meant

A test compares. What is written there may only change with a line in CHANGELOG.md.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import archrepair

FILE = Path(__file__).resolve().parent.parent / "docs" / "signatures.txt"
FOR_EXTENSIONS = {  # what a method, a strategy, a corruption or an entry of one's own is written with
    "core.settings": ("Count", "NotNegative", "OneOf", "Positive", "Seed", "Share", "WholeNumber", "Within", "checked"),
    "baselines.parts.common": ("Baseline", "Problem"),
    "nas.strategy": ("SearchStrategy",),
    "training.fit": ("Recipe", "fit"),
    "training.benchmark": ("METRICS", "RULES", "Benchmark", "Track", "read_benchmark", "score"),
    "experiments.leaderboard": ("enter", "leaderboard", "rescore"),
}


def shown(parameter: inspect.Parameter) -> str:
    "A parameter as it is written, with defaults that are functions or classes by their names."
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {plain(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {plain(parameter.default, quoted=True)}"
    return f"{stars}{parameter.name}{kind}{default}"


def plain(value: object, *, quoted: bool = False) -> str:
    "An annotation, or with `quoted` a default, without addresses in memory."
    text = value if isinstance(value, str) and not quoted else getattr(value, "__name__", None) or repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))


def signature(function: object) -> str:
    "The parameters of a function or class in parentheses; a bare star stands before those that are given by name alone."
    parts, parameters = [], list(inspect.signature(function).parameters.values())
    kinds = [parameter.kind for parameter in parameters]
    for i, parameter in enumerate(parameters):
        first_by_name = parameter.kind is parameter.KEYWORD_ONLY and parameter.KEYWORD_ONLY not in kinds[:i]
        if first_by_name and parameter.VAR_POSITIONAL not in kinds:
            parts.append("*")
        parts.append(shown(parameter))
    returned = inspect.signature(function).return_annotation
    return f"({', '.join(parts)})" + (f" -> {plain(returned)}" if returned not in (inspect.Signature.empty, None, "None") else "")


def lines_of(name: str, value: object) -> Iterator[str]:
    "A line for a function or value, and for a class one for each public method."
    if inspect.isclass(value):
        yield f"{name}{signature(value)}"
        for key, member in sorted(vars(value).items()):
            member = getattr(member, "__func__", member)
            if not key.startswith("_") and inspect.isfunction(member):
                yield f"{name}.{key}{signature(member)}"
            elif not key.startswith("_") and isinstance(member, property):
                yield f"{name}.{key}"
    elif inspect.isroutine(value):
        yield f"{name}{signature(value)}"
    else:
        yield name


def commands() -> Iterator[str]:
    "A line for each command, with its arguments and options."
    from typer.main import get_command

    from archrepair.cli.app import app

    for name, command in sorted(get_command(app).commands.items()):
        words = [min(p.opts, key=len) if p.param_type_name == "argument" else max(p.opts, key=len) for p in command.params]
        yield f"$ archrepair {name} {' '.join(sorted(words))}".rstrip()


def snapshot() -> list[str]:
    "Everything that is promised, a line each."
    lines = [line for name in archrepair.__all__ for line in lines_of(f"archrepair.{name}", getattr(archrepair, name))]
    for module, names in FOR_EXTENSIONS.items():
        content = import_module(f"archrepair.{module}")
        lines += [line for name in names for line in lines_of(f"archrepair.{module}.{name}", getattr(content, name))]
    return [*lines, *commands()]


if __name__ == "__main__":
    FILE.write_text("\n".join(snapshot()) + "\n", encoding="utf-8")
