"""Pages that are made, not written: one a module, every stored result; and MathJax, checked."""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.util
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd

METRICS = ("change", "clean change", "elsewhere change", "accuracy", "clean accuracy", "failures fixed", "negative flips",
           "processor seconds")  # columns of the leaderboard
ROOT = Path(__file__).resolve().parent.parent
MATHJAX = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"  # es5/tex-svg.js of MathJax 3.2.2, as its authors publish it


def tree(pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"]) if pages else "*None yet.*"


def packages() -> dict[str, str]:
    "Packages with what they say of themselves, from the ground up: the order of the contract in pyproject.toml."
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {name: summary(ROOT / "archrepair" / name / "__init__.py") for name in reversed(layers)}


def summary(path: Path) -> str:
    "The first line of a module's docstring."
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def lesson_of(path: Path) -> str:
    "The notebook that a module is exported from, below nbs/ and without its suffix."
    lesson = re.search(r"File to edit: (?:\.\./)*nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8")[:600])
    return lesson.group(1) if lesson else ""


def modules_of(package: str) -> list[Path]:
    "Modules of a package in the order in which one should read them: that of their notebooks; `parts` come last."
    paths = [p for p in (ROOT / "archrepair" / package).rglob("*.py") if not p.stem.startswith("_")]
    return sorted(paths, key=lambda p: (len(p.parts), not re.match(r"\d\d_", lesson_of(p)), lesson_of(p), p.stem))


def api(site: Path) -> str:
    "A section for every package with its modules; writes a page for each module."
    return "\n".join(f"### {package}\n\n{sentence}\n\n{_modules(package, site)}" for package, sentence in packages().items())


def _modules(package: str, site: Path) -> str:
    rows, pages = [], []
    (site / "api").mkdir(parents=True, exist_ok=True)
    for path in modules_of(package):
        name, lesson = ".".join(path.relative_to(ROOT).with_suffix("").parts), lesson_of(path)
        source = f"*Taught in* :doc:`/{lesson}`\n\n" if lesson else ""
        (site / "api" / f"{name}.rst").write_text(f"{name}\n{'=' * len(name)}\n\n{source}.. automodule:: {name}\n", encoding="utf-8")
        rows.append(f"{{doc}}`{name} </api/{name}>`\n: {summary(path)}\n")
        pages.append(f"{name.removeprefix('archrepair.')} <api/{name}>")
    return "\n".join([*rows, tree(pages)]) + "\n"


def names() -> str:
    "The names of the package itself, each with a link to where it is described."
    sys.path.insert(0, str(ROOT))
    import archrepair

    return " · ".join(f"{{py:obj}}`{n} <archrepair.{archrepair._WHERE[n]}.{n}>`" for n in archrepair.__all__)


def results(site: Path) -> str:
    "Every stored table and figure, with the tier and the commit that made it: from its card, or where it has none from its own columns."
    natural = lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.stem)]
    parts = []
    for tier in ("paper", "lite"):
        folder = ROOT / "outputs" / tier
        found = sorted([*folder.glob("tables/*.csv"), *folder.glob("figures/*.png")], key=lambda path: (natural(path), path.suffix))
        parts += [f"## Tier `{tier}`\n"] if found else []
        for path in found:
            card, frame = {}, pd.DataFrame()
            if path.with_suffix(".json").exists():
                card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            source = path if path.suffix == ".csv" else folder / "tables" / f"{path.stem}.csv"
            if source.exists():
                frame = pd.read_csv(source, dtype=str, keep_default_na=False)
            commits = ", ".join(sorted({*frame.get("commit", [])} - {""})) or "unknown"
            numbered = lambda m: f"{'Table' if m[1] == 'table' else 'Figure'} {m[2]}"
            name = re.sub(r"^(table|fig(?:ure)?)(\d+)", numbered, path.stem.replace("-", " · "))
            name += " (figure)" if path.suffix == ".png" and not card else ""
            caption = html.escape(card.get("caption") or f"{name.replace('~', ' ')}. Tier {tier}; commit {commits}")
            heading = f"{caption.split(' · ')[0]} · {html.escape(card['title'])}" if card else name.replace("~", " ")
            if path.suffix == ".png":
                shown = path.with_suffix(".svg") if path.with_suffix(".svg").exists() else path
                shutil.copy(shown, site / "_figures" / f"{tier}-{shown.name}")
                alt = " ".join((card.get("alt") or f"{heading}, drawn from records of tier {tier}").split())
                body = f"```{{image}} /_figures/{tier}-{shown.name}\n:alt: {alt}\n```"
            else:
                shown = frame.drop(columns=["tier", "commit"], errors="ignore")
                table = card.get("html") or shown.to_html(index=False, border=0, classes="dataframe")
                box = f'<div class="table-box" role="region" aria-label="{html.escape(heading)}" tabindex="0">{table}</div>'
                body = f"```{{raw}} html\n{box}\n```"
            parts.append(f"### {heading}\n\n{body}\n\n{{.of}}\n{caption}\n")
    return "\n".join(parts)


def version() -> str:
    "The version of the package, as its settings have it."
    return re.search(r"(?m)^version = (.+)$", (ROOT / "settings.ini").read_text(encoding="utf-8")).group(1)


def rules() -> str:
    "The rules by which networks are selected, as a list."
    from archrepair.training.benchmark import RULES

    return "\n".join(f"- **{rule}**: {text}" for rule, text in RULES.items())


def leaderboard(part: str) -> str:
    "The stored table, entries of a `track` or other `records`: a row for each method, network, version and rule, means over the seeds."
    frame = pd.read_csv(ROOT / "outputs" / "leaderboard.csv", keep_default_na=False)
    frame = frame[(frame.track != "") == (part == "track")]
    frame["network"] = frame.network.str.replace(":weights=published", " (published)")
    frame["repaired on"] = frame.dataset + ":" + frame.version + frame.severity.map(lambda s: f":{s}" if s else "")
    frame["method"] = frame.method + frame.options.map(lambda text: f" {text}" if text else "")
    keys = ["method", "network", "repaired on", "rule", "tier"]
    table = frame.pivot_table("value", keys, "metric")
    table = table[[metric for metric in METRICS if metric in table]]
    table.insert(0, "n", frame[frame.metric == "change"].groupby(keys).seed.nunique())
    shown = table.reset_index().rename_axis(columns=None).sort_values(["network", "repaired on", "change"], ascending=[True, True, False])
    signed = {name: "{:+.2f}".format if name.endswith("change") else "{:.2f}".format for name in table if name != "n"}
    made = shown.to_html(index=False, border=0, classes="dataframe sortable", na_rep="–", formatters=signed)
    return f'```{{raw}} html\n<div class="table-box" role="region" aria-label="Leaderboard, {part}" tabindex="0">{made}</div>\n```'


def bring() -> str:
    "A section for every kind of thing that people bring, from the tables of the tests that show what happens."
    sys.path.insert(0, str(ROOT / "tests"))
    from support.bring import kinds

    tables = kinds()
    works = [row.works for kind in tables for row in kind.rows]
    counts = f"Of the {len(works)} rows below {sum(works)} work, and {len(works) - sum(works)} are answered in one line.\n"
    return "\n".join([counts, *map(_table, tables)])


def _table(kind: Any) -> str:
    "The rows of a kind as a table."
    rows = [f"| {_cell(row.brings)} | {'works' if row.works else 'one&nbsp;line'} | {_cell(row.happens)} |" for row in kind.rows]
    return "\n".join([f"## {kind.title}\n\n{kind.door}\n", "| you bring | | what happens |", "|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return (text[:1].upper() + text[1:]).replace("|", "\\|")


def mathjax(folder: Path) -> None:
    "MathJax from the Python package that carries it, if it is the very file its authors published."
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if not found:
        raise SystemExit("docs: MathJax is not installed; expected the docs extra: pip install -e '.[docs]'")
    content = (Path(found.origin).parent / "static" / "mathjax" / "tex-svg.js").read_bytes()
    if hashlib.sha256(content).hexdigest() != MATHJAX:
        raise SystemExit("docs: this MathJax is not release 3.2.2; expected sphinx-mathjax-offline 0.0.2: pip install -e '.[docs]'")
    (folder / "tex-svg.js").write_bytes(content)
