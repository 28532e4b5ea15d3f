"""Lay out the source of the site in docs/_nbs: pages, notebooks as myst-nb reads them, a page a module, every stored result.

    python docs/prep.py [FOLDER] && sphinx-build -W --keep-going -j 2 -c docs docs/_nbs _docs

In pages, `{{notebooks: PATTERN ...}}` lists notebooks, `{{modules: PATTERN}}` modules, `{{names}}` the package's own names; `{{results}}` is
every stored table and figure, and `{{result}}` the table of the front notebook.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

from pages import ROOT, mathjax, modules, names, results, tree

DOCS = ROOT / "docs"
SITE = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "_nbs")
NBS = ROOT / "nbs"
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


def description(code: str, said: str, heading: str) -> str:
    "Words for the picture that a cell draws: its own `#| fig-alt:`, else the section, what its titles and axes are called, and what was said before it."
    if found := re.search(r"^#\|\s*fig-(?:alt|cap): *(.+)", code, re.M):
        return found.group(1)
    labels = dict.fromkeys(re.findall(r"(?:title|label)\w*[=(]\s*\"([^\"{}]{3,60})\"", code))
    words = re.sub(r"^#+ .*\n+|[`*_$#>\\]|\]\([^)]*\)|\[", "", said, flags=re.M).strip().split("\n\n")[-1].split()
    shown = " ".join(words[:45]).rstrip(":.") + ("…" if len(words) > 45 else "")
    return f"Figure: {heading.strip('`')}. " + (f"Labels: {', '.join(labels)}. " if labels else "") + shown


def notebook(source: Path, page: str, title: str = "") -> None:
    "One notebook: directives become tags, pictures get a text that says what they show, links lead to pages."
    book, said, heading, kept = json.loads(source.read_text(encoding="utf-8")), "", "", []
    module = next((m.group(1) for c in book["cells"] if (m := re.match(r"#\|\s*default_exp (\S+)", "".join(c["source"])))), "")
    base = "." if source.stem == "index" else source.parent.relative_to(ROOT).as_posix()
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            said = text
            heading = ([heading] + re.findall(r"^#+ +(.+)", text, re.M))[-1]
            if not kept:
                text = re.sub(r"^# .*", f"# {title}", text) if title else text
                text += f"\n\nExported as {{doc}}`archrepair.{module} </api/archrepair.{module}>`.\n" if module else ""
            cell["source"] = relink(text, base, page)
        elif re.match(r"#\|\s*(default_exp|hide)\b", text) or "remove-cell" in cell["metadata"].get("tags", []):
            continue
        else:
            tags = cell["metadata"].setdefault("tags", [])
            alt = description(text, said, heading)
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


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "_figures").mkdir(parents=True)
    shutil.copy(DOCS / "workflow.html", SITE)
    mathjax(DOCS / "_static")
    for page, path in NOTEBOOKS.items():
        notebook(path, page)
    notebook(NBS / "index.ipynb", "start.ipynb", "Getting started")
    front = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))
    result = next("".join(o["data"]["text/html"]) for c in front["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {}))
    fill = {"notebooks": listing, "modules": lambda pattern: modules(pattern, SITE), "results": lambda _: results(SITE), "names": lambda _: names(), "result": lambda _: result}
    for page in (*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        text = relink(page.read_text(encoding="utf-8"), ".", page.name)
        text = re.sub(r"\{\{(\w+)(?:: ([^}]*))?\}\}", lambda m: fill[m[1]](m[2] or ""), text)
        (SITE / page.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
