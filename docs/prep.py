"""Lay out the source of the site in docs/_nbs: pages, notebooks as myst-nb reads them, one page per module, every stored result.

    python docs/prep.py [FOLDER] && sphinx-build -W --keep-going -j 2 -c docs docs/_nbs _docs

In pages, `{{notebooks: PATTERN ...}}` lists notebooks, and `{{tree: PATTERN ...}}` only puts them into the navigation. `{{library}}` lists
those of every package, `{{api}}` the modules of every package, `{{names}}` the package's own names, and `{{results}}` every stored table
and figure. `{{workflow}}` is the four steps of docs/workflow.svg, `{{readers}}` the front notebook's table of where to go, and `{{bring}}`
what people bring with what happens, from the tables of tests/journeys/test_bring_*.py. `{{leaderboard: track}}` and
`{{leaderboard: records}}` are the two parts of outputs/leaderboard.csv, `{{rules}}` the rules by which its networks are
selected, and `{{version}}` is that of the package.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

from pages import ROOT, api, bring, leaderboard, lesson_of, mathjax, modules_of, names, packages, results, rules, tree, version

DOCS = ROOT / "docs"
SITE = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "_nbs")
NBS = ROOT / "nbs"
PLACES = {  # what lies here is described on this page
    **{f"nbs/{package}": f"library.md#{package}" for package in packages()},
    **dict.fromkeys(["nbs/baselines", "nbs/baselines/parts"], "methods.md"), "nbs/tutorials": "tutorials.md", "outputs": "results.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md", "REPRODUCING.md": "REPRODUCING.md",
    "benchmarks": "benchmarks.md", "tests": "reliability.md",
    "README.md": "start.ipynb", "nbs/index.ipynb": "start.ipynb",
    **{f"docs/{page.name}": page.name for page in DOCS.glob("*.md")},
}
NOTEBOOKS = {p.relative_to(NBS).as_posix(): p for p in sorted(NBS.rglob("*.ipynb"))
             if ".ipynb_checkpoints" not in p.parts and p.stem != "index"}


def relink(text: str, base: str, page: str) -> str:
    "Point links of a text in folder `base` of the repository at pages of the site; what the site does not hold becomes plain text."
    def replace(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = os.path.normpath(f"{base}/{target}").partition("#")
        inside = PurePosixPath(path).relative_to("nbs").as_posix() if path.startswith("nbs/") else ""
        place = inside if inside in NOTEBOOKS else next((v for k, v in PLACES.items() if path == k or path.startswith(k + "/")), "")
        if not place:
            return label
        place, _, section = place.partition("#")
        anchor = anchor or section
        return f"[{label}]({os.path.relpath(place, os.path.dirname(page) or '.')}{'#' + anchor if anchor else ''})"
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", replace, text)


def description(code: str, said: str, heading: str) -> str:
    """Words for the picture that a cell draws: its own `#| fig-alt:`, else the section, the labels of its titles and axes, and the text
    before it."""
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
        if "readme-only" in cell["metadata"].get("tags", []):
            continue
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
                unnamed = r"<svg(?![^>]*\b(?:role|aria-\w+)=)"
                data["text/html"] = re.sub(unnamed, f'<svg role="img" aria-label="{html.escape(alt)}"', found)
        kept.append(cell)
    target = SITE / page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**book, "cells": kept}), encoding="utf-8")


def workflow() -> str:
    "The four steps of docs/workflow.svg as four images, each of which shows a quarter of it, so that on a phone they wrap."
    labels = re.findall(r'<g [^>]*aria-label="([^"]+)"', (DOCS / "workflow.svg").read_text(encoding="utf-8"))
    steps = [f'<img src="_static/workflow.svg" alt="{label}" width="288" height="316">' for label in labels]
    return "\n".join(["```{raw} html", '<div class="workflow">', *steps, "</div>", "```"])


def readers() -> str:
    "Where to go, by what a reader wants: the table of the front notebook."
    cells = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return relink(next(text for cell in cells if (text := "".join(cell["source"])).startswith("## Where to go")), ".", "index.md")


def entry(page: str) -> str:
    "A notebook's title as a link, and its summary."
    first = "".join(json.loads(NOTEBOOKS[page].read_text(encoding="utf-8"))["cells"][0]["source"])
    summary = re.search(r"^> *(.+)", first, re.M)
    return f"[{re.search('# *(.+)', first).group(1)}]({page})\n: {summary.group(1) if summary else ''}\n"


def matching(patterns: str) -> list[str]:
    "The notebooks of these patterns, in their order."
    return list(dict.fromkeys(page for pattern in patterns.split() for page in NOTEBOOKS
                              if PurePosixPath(page).match(pattern) and page.count("/") == pattern.count("/")))


def listing(patterns: str) -> str:
    "Notebooks with their summaries, and the hidden tree that the navigation is made of."
    return "\n".join([*map(entry, matching(patterns)), hidden_tree(patterns)])


def hidden_tree(patterns: str) -> str:
    "What puts notebooks into the navigation."
    return tree([page.removesuffix(".ipynb") for page in matching(patterns)])


def library() -> str:
    "A section for every package, from the ground up: what it is for, and its notebooks in the order in which one should read them."
    return "\n".join(f"## {package}\n\n{sentence}\n\n{_lessons(package)}\n" for package, sentence in packages().items())


def _lessons(package: str) -> str:
    "The notebooks of a package, first those of the paper that export into it; the tree holds each notebook once in the whole site."
    if package == "baselines":
        return "One notebook per method and one per part that several of them share: [](methods.md)."
    lessons = [f"{lesson_of(path)}.ipynb" for path in modules_of(package)]
    own = [page for page in lessons if page.startswith(f"{package}/")]
    return "\n".join([*map(entry, sorted(set(lessons) - set(own)) + own), tree([page.removesuffix(".ipynb") for page in own])])


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    (SITE / "_figures").mkdir(parents=True)
    mathjax(DOCS / "_static")
    for page, path in NOTEBOOKS.items():
        notebook(path, page)
    notebook(NBS / "index.ipynb", "start.ipynb", "Getting started")
    fill = {"notebooks": listing, "tree": hidden_tree, "library": lambda _: library(), "names": lambda _: names(),
            "api": lambda _: api(SITE), "results": lambda _: results(SITE), "workflow": lambda _: workflow(), "bring": lambda _: bring(),
            "readers": lambda _: readers(), "rules": lambda _: rules(), "version": lambda _: version(), "leaderboard": leaderboard}
    for page in (*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "REPRODUCING.md"))):
        text = relink(page.read_text(encoding="utf-8"), page.parent.relative_to(ROOT).as_posix(), page.name)
        text = re.sub(r"\{\{(\w+)(?:: ([^}]*))?\}\}", lambda m: fill[m[1]](m[2] or ""), text)
        (SITE / page.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
