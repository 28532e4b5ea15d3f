"""What pages say: README is Markdown and short, its numbers are those of the records, and every count is that of a registry."""
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from archrepair.core.registry import CORRUPTIONS, DATASETS, METHODS, MODELS, STRATEGIES
from archrepair.corruptions.catalogue import BENCHMARK_CORRUPTIONS, PAPER_CORRUPTIONS
from archrepair.experiments.cells import Record
from archrepair.paper.sentences import search_sentence
from support import ROOT
from test_package import LAYERS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "REPRODUCING.md")),
         *sorted((ROOT / "docs").glob("*.md"))]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
         "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]


def prose(text: str) -> str:
    "A page without its code and without the rows of numbers."
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    ") and not re.search(r"\| [+-]?\d+\.\d\d \|", line))


def front_cells() -> dict[str, object]:
    "What the cells of nbs/index.ipynb define that make the table of results, run on the records of this checkout."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    first = next(i for i, source in enumerate(sources) if "import Record" in source)
    names: dict[str, object] = {}
    for source in sources[first:]:
        exec(source, names)  # noqa: S102
        if "numbers" in names:
            return names
    raise AssertionError("no cell makes the table")


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")]


# --- the front page


def test_readme_is_plain_markdown():
    text = re.sub(r"`[^`]*`", "", prose(README))
    assert not re.findall(r"</?[a-zA-Z!][^>]*>", text) and "\x1b" not in README


def test_readme_takes_no_more_than_600_words():
    text = re.sub(r"\]\([^)]*\)", "]", prose(README))
    assert len(re.findall(r"\w[\w'’.:/-]*", text)) <= 600


def test_the_numbers_of_the_front_page_are_those_of_the_records(monkeypatch):
    monkeypatch.setenv("ARCHREPAIR_HOME", str(ROOT))
    names = front_cells()
    assert names["numbers"] in README and names["answer"] in README, "records have changed; run `make readme` and commit"
    runs = Counter()
    for path in (ROOT / "outputs" / "lite" / "records").glob("cifar10*/*/archrepair-localized-clean-s*.json"):
        cell = Record.read(path).cell
        if (options := dict(cell["options"])) in ({}, {"strategy": "pc-darts"}):  # others change one thing, and are in the notebooks
            runs[options.get("strategy", "measured"), cell["dataset"], cell["model"]] += 1
    head, _, *shown = rows(names["numbers"])
    assert sorted(int(row[head.index("n")]) for row in shown) == sorted(runs.values())
    assert all((row[head.index("sd")] == "") == (row[head.index("n")] == "1") for row in shown)
    assert all(re.fullmatch(r"[+-]\d+\.\d\d", row[head.index("change")]) for row in shown)


def test_one_row_per_network_and_kind_of_failure(monkeypatch):
    "Two seeds are one row with their mean and deviation; a claim stands beside the kind of failure that the paper repaired."
    monkeypatch.setenv("ARCHREPAIR_HOME", str(ROOT))
    names = front_cells()
    scores = {"repair": "gate", "network": "A", "failures": "fog", "before %": 50.0, "after %": 60.0, "change": 10.0, "clean": None,
              "fine-tuning": 5.0, "fine-tuning, clean": None, "paper": 6.32}
    table = [scores, scores | {"after %": 64.0, "change": 14.0}, scores | {"network": "B"}]
    names["scores_of"] = lambda record: record
    exec("made = result_table(table)", names | {"table": table}, found := {})  # noqa: S102
    _, _, *shown = rows(found["made"])
    assert shown == [["gate", "A", "fog", "2", "50.00", "62.00", "+12.00", "2.83", "", "+5.00", "", "+6.32"],
                     ["gate", "B", "fog", "1", "50.00", "60.00", "+10.00", "", "", "+5.00", "", "+6.32"]]


def test_the_sentence_about_the_search_is_computed():
    records = [Record.read(path) for path in (ROOT / "outputs" / "lite" / "records").glob("cifar10*/*/archrepair-localized-clean-s*.json")]
    searched = [record for record in records if dict(record.cell["options"]) == {"strategy": "pc-darts"}]
    assert f"**The paper's search:** {search_sentence(searched)}" in README


def test_the_picture_of_the_four_steps_stands_alone():
    "In the light and in the dark, with words for who does not see it, and with nothing from elsewhere."
    source = (ROOT / "docs" / "workflow.svg").read_text(encoding="utf-8")
    picture = ElementTree.fromstring(source)
    assert "prefers-color-scheme: dark" in source and "](docs/workflow.svg)" in README
    assert not re.search(r"<script|href|url\(|@import", source)
    space = "{http://www.w3.org/2000/svg}"
    assert picture.find(f"{space}title").text and len(picture.findall(f"{space}g[@aria-label]")) == 4


# --- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages_lead_to_files(page):
    "From where the page lies, as GitHub follows them; a link without a text is one that the site fills in."
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not label or re.match(r"[a-z]+:|\.\./\.\./actions", target) or not path:
            continue
        file = page.parent / path
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)", file.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


# --- counts


CLAIMS = [  # a page, what it says, and how many there are
    ("README.md", r"\[(\w+) of them\]\(docs/methods\.md\)", len(METHODS)),
    ("CONTRIBUTING.md", r"(\w+) packages, from the ground up", len(LAYERS)),
    ("CHANGELOG.md", r"(\w+) packages in layers", len(LAYERS)),
    ("docs/api.md", r"(\w+) packages, from the ground up", len(LAYERS)),
    ("CHANGELOG.md", r"(\w+) tutorials", len(list((ROOT / "nbs" / "tutorials").glob("*.ipynb")))),
    ("CHANGELOG.md", r"the (\w+) baselines of the paper", sum(method.role == "paper" for method in METHODS.values())),
    ("CHANGELOG.md", r"and (\w+) controls behind one call", sum(method.role == "control" for method in METHODS.values())),
    ("CHANGELOG.md", r"the benchmark's (\w+) and", len(BENCHMARK_CORRUPTIONS)),
    ("CHANGELOG.md", r"the (\w+) it sets aside for tuning", sum(corruption.for_tuning for corruption in CORRUPTIONS.values())),
    ("docs/reliability.md", r"strange inputs of (\w+) kinds", len(set(p.stem for p in (ROOT / "tests" / "fuzz").glob("test_*.py"))
                                                                  - {"test_kinds"})),
]


@pytest.mark.parametrize(("page", "pattern", "count"), CLAIMS)
def test_a_count_is_that_of_the_registry(page, pattern, count):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    said = re.findall(pattern, text, re.I)
    assert said and {word.lower() for word in said} == {WORDS[count]}


COUNTED = {  # every count of these words that is right in some sense
    "methods": {len(METHODS), len(METHODS) - 1, sum(m.role in ("paper", "ours") for m in METHODS.values()),
                sum(m.role == "paper" for m in METHODS.values())},
    "packages": {len(LAYERS)},
    "corruptions": {len(CORRUPTIONS), len(PAPER_CORRUPTIONS), len(BENCHMARK_CORRUPTIONS)},
    "strategies": {len(STRATEGIES), len(STRATEGIES) - 1},
    "datasets": {len(DATASETS)},
    "networks": {len(MODELS), sum(not name.startswith("cifar-") for name in MODELS)},
    "tutorials": {len(list((ROOT / "nbs" / "tutorials").glob("*.ipynb")))},
}


def test_no_page_miscounts():
    "Five or more methods, packages, … are all of them, or all of one kind."
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pages[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    pattern = re.compile(rf"\b({'|'.join(WORDS[5:])}|\d+) ({'|'.join(COUNTED)})\b", re.I)
    claims = [(name, word, noun) for name, text in pages.items() for word, noun in pattern.findall(text)]
    wrong = [(name, word, noun) for name, word, noun in claims
             if (count := WORDS.index(word.lower()) if word.lower() in WORDS else int(word)) not in COUNTED[noun.lower()] and count > 4]
    assert claims and not wrong


def test_the_page_of_methods_lists_the_registry():
    lines = re.findall(r"^\| `(\w+)` \| (\w+) \| \[(.+?)\]\((.+?)\) \|$", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.M)
    assert [(name, role, text) for name, role, text, _ in lines] == [(name, m.role, m.description) for name, m in METHODS.items()]
    assert all(Path(target).stem.split("_")[-1] == METHODS[name].target.split(":")[0].rpartition(".")[2] for name, _, _, target in lines)
