"""Lay out the source of the site in docs/_nbs: pages, notebooks as myst-nb reads them, a page a module, every stored result.

    python docs/prep.py [FOLDER] && sphinx-build -W --keep-going -j 2 -c docs docs/_nbs _docs

In pages, `{{notebooks: PATTERN ...}}` lists notebooks, `{{modules: PATTERN}}` lists modules, `{{result}}` is the table of the front notebook.
"""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

import pandas as pd

DOCS = Path(__file__).resolve().parent
ROOT, SITE = DOCS.parent, Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "_nbs")
NBS, OUTPUTS = ROOT / "nbs", ROOT / "outputs"
MATHJAX = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"  # es5/tex-svg.js of MathJax 3.2.2, as its authors publish it
PLACES = {"nbs/baselines": "methods.md", "nbs/lib": "library.md", "nbs/tutorials": "tutorials.md", "outputs": "results.md", "CONTRIBUTING.md": "CONTRIBUTING.md",
          "CHANGELOG.md": "CHANGELOG.md", "benchmarks": "benchmarks.md", "tests": "reliability.md", "README.md": "start.ipynb", "nbs/index.ipynb": "start.ipynb"}
NOTEBOOKS = {p.relative_to(NBS).as_posix(): p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and p.stem != "index"}


def relink(text: str, base: str, page: str) -> str:
    "Point links of a text in folder `base` of the repository at pages of the site; what the site does not hold becomes plain text."
    def replace(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = os.path.normpath(f"{base}/{target}").partition("#")
        inside = PurePosixPath(path).relative_to("nbs").as_posix() if path.startswith("nbs/") else ""
        found = inside if inside in NOTEBOOKS else next((v for k, v in PLACES.items() if path == k or path.startswith(k + "/")), "")
        return f"[{label}]({os.path.relpath(found, os.path.dirname(page) or '.')}{'#' + anchor if anchor else ''})" if found else label
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", replace, text)


def notebook(source: Path, page: str, title: str = "") -> None:
    "One notebook: directives become tags, pictures get a text that says what they show, links lead to pages."
    book, said, kept = json.loads(source.read_text(encoding="utf-8")), "", []
    module = next((m.group(1) for c in book["cells"] if (m := re.match(r"#\|\s*default_exp (\S+)", "".join(c["source"])))), "")
    base = "." if source.stem == "index" else source.parent.relative_to(ROOT).as_posix()
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            said = text
            if not kept:
                text = re.sub(r"^# .*", f"# {title}", text) if title else text
                text += f"\n\nExported as {{doc}}`archrepair.{module} </api/archrepair.{module}>`.\n" if module else ""
            cell["source"] = relink(text, base, page)
        elif re.match(r"#\|\s*(default_exp|hide)\b", text) or "remove-cell" in cell["metadata"].get("tags", []):
            continue
        else:
            tags = cell["metadata"].setdefault("tags", [])
            words = re.sub(r"^#+ .*\n+|[`*_$#>\\]|\((?=\S+\.ipynb)[^)]*\)", "", said).strip().split("\n\n")[-1]
            described = re.search(r"^#\|\s*fig-(?:alt|cap): *(.+)", text, re.M)
            alt = described.group(1) if described else " ".join(words.split())[:300].rstrip(":") or "Figure"
            text = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip("\n")
            cell["source"] = text
            lines = [x for x in text.splitlines() if x and not x.startswith((" ", ")", "#"))]
            if lines and all(re.match(r"(import|from) |if TYPE_CHECKING:", x) for x in lines) and not cell["outputs"]:
                if kept and kept[-1].get("metadata", {}).get("mystnb", {}).get("code_prompt_show") == "Imports":
                    kept[-1]["source"] += "\n" + text
                    continue
                tags.append("hide-input")
                cell["metadata"]["mystnb"] = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}
            cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": alt}
            for data in (o["data"] for o in cell["outputs"] if "text/html" in o.get("data", {})):
                found = "".join(data["text/html"])
                found = re.sub(r"(background-color: *[^;}]+;)(?![^}]*[{;\s]color:)", r"\1 color: #111;", found)  # readable in the dark too
                found = re.sub(r"<img(?![^>]*\balt=)", f'<img alt="{html.escape(alt)}"', found)
                data["text/html"] = re.sub(r"<svg(?![^>]*\b(?:role|aria-\w+)=)", f'<svg role="img" aria-label="{html.escape(alt)}"', found)
        kept.append(cell)
    target = SITE / page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**book, "cells": kept}), encoding="utf-8")


def listing(patterns: str) -> str:
    "Notebooks with their summaries, in the order of the patterns, and the hidden tree that the navigation is made of."
    found = dict.fromkeys(p for pattern in patterns.split() for p in NOTEBOOKS if PurePosixPath(p).match(pattern) and p.count("/") == pattern.count("/"))
    rows = []
    for page in found:
        first = "".join(json.loads(NOTEBOOKS[page].read_text(encoding="utf-8"))["cells"][0]["source"])
        summary = re.search(r"^> *(.+)", first, re.M)
        rows.append(f"[{re.search('# *(.+)', first).group(1)}]({page})\n: {summary.group(1) if summary else ''}\n")
    return "\n".join([*rows, tree([p.removesuffix(".ipynb") for p in found])])


def tree(pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"]) if pages else "*None yet.*"


def modules(pattern: str) -> str:
    "Modules with their summaries; writes a page for each."
    rows, pages = [], []
    for path in sorted((ROOT / "archrepair").glob(pattern)):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if path.stem.startswith("_") or not summary:
            continue
        lesson = re.search(r"File to edit: (?:\.\./)*nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8")[:600])
        (SITE / "api").mkdir(parents=True, exist_ok=True)
        source = f"*Taught in* :doc:`/{lesson.group(1)}`\n\n" if lesson else ""
        (SITE / "api" / f"{name}.rst").write_text(f"{name}\n{'=' * len(name)}\n\n{source}.. automodule:: {name}\n", encoding="utf-8")
        rows.append(f"{{doc}}`{name} </api/{name}>`\n: {summary.splitlines()[0]}\n")
        pages.append(f"{name.removeprefix('archrepair.')} <api/{name}>")
    return "\n".join([*rows, tree(pages)])


def results() -> str:
    "Every stored table and figure, with the tier and the commit that made it."
    parts = []
    for tier in (t for t in ("paper", "lite") if any((OUTPUTS / t / k).is_dir() for k in ("tables", "figures"))):
        parts.append(f"## Tier `{tier}`\n")
        made = {p.stem: p for p in sorted((OUTPUTS / tier / "tables").glob("*.csv"))}
        drawn = {p.stem: p for p in sorted((OUTPUTS / tier / "figures").glob("*.*g")) if p.suffix == ".svg" or not p.with_suffix(".svg").exists()}
        order = lambda stem: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", stem)]
        for stem in sorted({*made, *drawn}, key=order):
            name = stem.replace("~", " ").replace("-", " · ")
            name = re.sub(r"^(table|fig(?:ure)?)(\d+)", lambda m: f"{'Table' if m[1] == 'table' else 'Figure'} {m[2]}", name)
            frame = pd.read_csv(made[stem], dtype=str, keep_default_na=False) if stem in made else pd.DataFrame()
            commits = sorted({c for c in frame.get("commit", []) if c}) or ["that of the records it was drawn from"]
            parts.append(f"### {name}\n\nTier `{tier}` · commit {', '.join(f'`{c}`' if len(c) < 41 and ' ' not in c else c for c in commits)}\n")
            if stem in drawn:
                shutil.copy(drawn[stem], SITE / "_figures" / f"{tier}-{drawn[stem].name}")
                parts.append(f"```{{figure}} /_figures/{tier}-{drawn[stem].name}\n:alt: {name}, drawn from records of tier {tier}\n```\n")
            if len(frame):
                shown = frame.drop(columns=[c for c in ("tier", "commit") if c in frame])
                table = shown.to_html(index=False, border=0, classes="dataframe")
                parts.append(f'```{{raw}} html\n<div class="table-box" role="region" aria-label="{html.escape(name)}" tabindex="0">{table}</div>\n```\n')
    return "\n".join(parts)


def mathjax() -> None:
    "MathJax from the Python package that carries it, if it is the very file its authors published."
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if not found:
        raise SystemExit("docs: MathJax is not installed; expected the docs extra: pip install -e '.[docs]'")
    content = (Path(found.origin).parent / "static" / "mathjax" / "tex-svg.js").read_bytes()
    if hashlib.sha256(content).hexdigest() != MATHJAX:
        raise SystemExit("docs: this MathJax is not release 3.2.2; expected sphinx-mathjax-offline 0.0.2: pip install -e '.[docs]'")
    (DOCS / "_static" / "tex-svg.js").write_bytes(content)


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "_figures").mkdir(parents=True)
    shutil.copy(DOCS / "workflow.html", SITE)
    mathjax()
    for page, path in NOTEBOOKS.items():
        notebook(path, page)
    notebook(NBS / "index.ipynb", "start.ipynb", "Getting started")
    front = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))
    result = next("".join(o["data"]["text/html"]) for c in front["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {}))
    fill = {"notebooks": listing, "modules": modules, "results": lambda _: results(), "result": lambda _: result}
    for page in (*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        text = relink(page.read_text(encoding="utf-8"), ".", page.name)
        text = re.sub(r"\{\{(\w+)(?:: ([^}]*))?\}\}", lambda m: fill[m[1]](m[2] or ""), text)
        (SITE / page.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
